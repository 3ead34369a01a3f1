"""Where things stand: the project, the package, the book; the plan of the chapters, the contents, the notebooks."""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
BOOK, PACKAGE, RESULTS = ROOT / "book", ROOT / "moemla", ROOT / "results"


@dataclass(frozen=True)
class Chapter:
    """A line of book/chapters.yml, and the notebook that is or will be there."""

    number: int
    slug: str
    title: str
    part: str = ""
    book: Path = BOOK

    @property
    def page(self) -> str:
        return f"{self.number:02d}-{self.slug}"

    @property
    def notebook(self) -> Path:
        return self.book / f"{self.page}.ipynb"

    @property
    def written(self) -> bool:
        return self.notebook.exists()


def plan(book: Path = BOOK) -> list[Chapter]:
    """The chapters in their order, written or not."""
    lines = yaml.safe_load((book / "chapters.yml").read_text(encoding="utf-8"))
    return [Chapter(**line, book=book) for line in lines]


def contents() -> list[str]:
    """The pages that _toc.yml names, in order, without suffix: "book/preface" first."""

    def files(entry: dict) -> list[str]:
        parts = [part for key in ("parts", "chapters", "sections") for part in entry.get(key, [])]
        own = [entry[key] for key in ("root", "file") if key in entry]
        return own + [name for part in parts for name in files(part)]

    return files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))


def notebooks(book: Path = BOOK) -> list[Path]:
    """Every notebook of the book: the chapters, and the pages that run."""
    return sorted(book.glob("*.ipynb"))


def is_chapter(path: Path) -> bool:
    return re.fullmatch(r"\d\d-[a-z0-9-]+\.ipynb", path.name) is not None
