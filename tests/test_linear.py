"""`Linear` is `nn.Linear`; under a compiler a single row is the same numbers by another way."""

import subprocess
import sys

import torch
from torch import nn

from moemla.linear import Linear


def test_the_same_as_torch():
    ours, theirs = Linear(6, 4, dtype=torch.float64), nn.Linear(6, 4, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(ours(x), theirs(x))
    assert isinstance(ours, nn.Linear)


COMPILED = """
import torch, moemla.linear
from moemla.linear import Linear
torch.manual_seed(0)
for bias in (True, False):
    layer = Linear(256, 300, bias=bias)
    assert layer.weight.numel() >= moemla.linear.LARGE
    quick = torch.compile(layer, backend="aot_eager")
    for shape in ((1, 1, 256), (1, 256), (256,), (3, 256)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert quick(x).shape == layer(x).shape
            assert (quick(x) - layer(x)).abs().max() < 1e-5
    x = torch.randn(1, 256, requires_grad=True)
    quick(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0), atol=1e-5)
"""


def test_compiled_rows():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
