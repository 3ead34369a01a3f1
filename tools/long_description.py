"""The README as a package index shows it: without pictures and links into the repository, which lead nowhere there."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class LongDescription(MetadataHookInterface):
    """Called when the wheel is built."""

    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        text = re.sub(r"<img\b[^>]*\bsrc=\"(?!https?://)[^>]*>\n*", "", text)
        text = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n*", "", text)
        text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?://|#|mailto:)[^)]*\)", r"\1", text)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
