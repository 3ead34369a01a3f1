"""Rotary positions: kernel and plain function against eq. 9 in float64, forward and backward."""

import pytest
import torch

from moemla import kernels
from moemla.rope import RotaryEmbedding
from tests.kernels.ways import each_way, exact, gradients, near

SHAPES = {
    "two tiles and a rest": (2, 3, 70, 20),
    "one token": (3, 1, 1, 8),
    "two dimensions": (1, 2, 33, 2),
    "wide": (1, 1, 5, 130),
}
PLACES = ("from the start", "from 5", "of each row", "shared")


def places(kind: str, batch: int, steps: int, device: str):
    if kind in ("from the start", "from 5"):
        return None if kind == "from the start" else (5, 5 + steps)
    rows = 1 if kind == "shared" else batch
    return torch.randint(0, 90, (rows, steps), generator=torch.Generator().manual_seed(1)).to(device)


@each_way
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_oracle(way, shape, kind, layout, monkeypatch):
    batch, heads, steps, width = shape
    x = way.normal(batch, steps, heads, width, seed=0).transpose(1, 2)  # heads as attention makes them: not contiguous
    where = places(kind, batch, steps, way.device)
    table = RotaryEmbedding(width, 90, layout=layout, device=way.device)
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    turned = table(x, where)
    assert turned.dtype == way.dtype
    monkeypatch.setattr(kernels, "_enabled", False)
    theirs = exact(x)
    wanted = RotaryEmbedding(width, 90, layout=layout, dtype=torch.float64)(
        theirs, where.cpu() if isinstance(where, torch.Tensor) else where
    )
    near(turned, wanted, way.tolerance)
    near(*gradients([turned], [x]), *gradients([wanted], [theirs]), way.tolerance)


@each_way
def test_a_step_of_the_gradient_and_strides_of_any_kind(way, monkeypatch):
    """Rows with gaps, reversed axes, an expanded upstream gradient."""
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    base = way.normal(2, 8, 40, 6, seed=0)
    table = RotaryEmbedding(8, 64, device=way.device)
    x = base.permute(0, 3, 2, 1)[:, ::2]  # (2, 3, 40, 8), last dimension far apart
    near(table(x), table(x.detach().contiguous()).double().cpu(), way.tolerance)
    (ours,) = torch.autograd.grad(table(x).sum(), base)
    (wanted,) = torch.autograd.grad(table(x).double().sum(), base)
    near(ours, wanted.double().cpu(), way.tolerance)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled here")
def test_outside_the_table_there_is_no_number(monkeypatch):
    from moemla.kernels.rope import rope

    monkeypatch.setattr(kernels, "_enabled", True)
    table, x = RotaryEmbedding(8, 10), torch.ones(1, 1, 3, 8)
    turned = rope(x, table.cos, table.sin, torch.tensor([[9, 10, -1]]), 0, False, False)
    assert torch.isfinite(turned[0, 0, 0]).all() and turned[0, 0, 1:].isnan().all()
    with pytest.raises(ValueError, match="at most max_seq_len"):
        table(x, (8, 11))


@pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled here")
def test_wrong_widths_are_said():
    from moemla.kernels.rope import rope

    x, cos = torch.ones(1, 2, 3, 8), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"cos\.shape=\(5, 3\)"):
        rope(x, cos[:, :3], cos[:, :3], None, 0, False, False)
    with pytest.raises(ValueError, match="whole numbers"):
        rope(x, cos, cos, torch.zeros(1, 3), 0, False, False)
    with pytest.raises(ValueError, match=r"positions\.shape=\(2, 3\): must be \(1 or 1, 3\)"):
        rope(x, cos, cos, torch.zeros(2, 3, dtype=torch.long), 0, False, False)
