"""The README's Python runs as it stands, without a warning, and computes what its comments say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
CHECKED = """
import torch.nn.functional as F
logits = model(text)
assert torch.allclose(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()), rtol=1e-4)
assert story.shape == (2, 8 + 64) and bool((story[:, :8] == text[:, :8]).all())
assert y.shape == (2, 8, 512) and cache.length == 8 and y.isfinite().all()
assert not torch.allclose(loss, F.cross_entropy(logits.flatten(0, 1), text.flatten()), rtol=1e-4)
"""
SMALL = {'preset("M"': 'preset("tiny"', "vocab_size=50257": "vocab_size=97"}


def run(changes):
    code = "\n".join(BLOCKS)
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    code = f"import torch\ntorch.set_num_threads(1)\ntorch.manual_seed(0)\n{code}{CHECKED}"
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_example_at_another_size():
    run(SMALL)


@pytest.mark.slow
def test_the_example_as_it_stands():
    run({})
