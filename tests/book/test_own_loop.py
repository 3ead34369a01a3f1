"""The page *Use it in your own loop*: its blocks run in their order, in a process of their own."""

import re
import subprocess
import sys

from tools.book import ROOT

PAGE = (ROOT / "book" / "own-loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)


def test_every_block_runs(tmp_path):
    assert len(BLOCKS) >= 10 and PAGE.count("```") == 2 * len(BLOCKS)  # no block of another kind stands there untried
    script = tmp_path / "page.py"
    script.write_text("import torch\n\ntorch.set_num_threads(1)\n" + "\n".join(BLOCKS), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "record_routing(model) as routings" in done.stdout  # what was refused says what to do
    assert "router.weight comes as" not in done.stderr
