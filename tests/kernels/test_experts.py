"""Expert kernels against the `loop` in float64: output and every gradient; and the dispatch against a stable sort."""

import pytest
import torch

from moemla import experts as module, kernels
from moemla.experts import choose, experts
from tests.kernels.ways import GPU, Way, each_way, exact, gradients, near

# N, E, A, D, F: two tiles and a rest in each dimension, somewhere
SIZES = {
    "narrow": (70, 7, 3, 72, 24),
    "62 experts": (90, 62, 6, 40, 8),
    "as wide as one kernel takes": (50, 7, 2, 40, 64),
    "wide": (70, 7, 3, 40, 72),
    "wide, two tiles of hidden": (40, 3, 2, 136, 150),
    "one token": (1, 62, 6, 33, 8),
    "one token, wide": (1, 7, 2, 33, 80),
    "one expert": (20, 1, 1, 24, 8),
}


def example(way, n, e, k, d, f, activation, index=None):
    width = 2 * f if activation == "swiglu" else f
    if index is None:
        index = torch.rand(n, e, generator=torch.Generator().manual_seed(9)).topk(k).indices
    x, w_in, w_out = (
        way.normal(n, d, seed=1),
        way.normal(e, d, width, seed=2, scale=d**-0.5),
        way.normal(e, f, d, seed=3),
    )
    return x, w_in, w_out, index.to(way.device), way.normal(n, k, seed=4)


def compare(way, x, w_in, w_out, index, gate, activation):
    leaves = (x, w_in, w_out, gate)
    out = experts(x, w_in, w_out, index, gate, "triton" if way.kernel else "grouped", activation)
    theirs = [exact(leaf) for leaf in leaves]
    wanted = experts(*theirs[:3], index.cpu(), theirs[3], "loop", activation)
    assert out.dtype == way.dtype
    near(out, wanted, way.tolerance)
    for ours, oracle, leaf in zip(gradients([out], leaves), gradients([wanted], theirs), leaves, strict=True):
        assert ours.dtype == leaf.dtype
        near(ours, oracle, way.tolerance)


@each_way
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_equals_the_oracle(way, size, activation):
    compare(way, *example(way, *size, activation), activation)


@each_way
@pytest.mark.parametrize("width", [8, 80], ids=["narrow", "wide"])
@pytest.mark.parametrize("expert", [0, 4, 6])
def test_all_to_one_and_none_to_the_others(way, width, expert):
    index = torch.full((150, 1), expert)
    x, w_in, w_out, index, gate = example(way, 150, 7, 1, 24, width, "gelu", index)
    compare(way, x, w_in, w_out, index, gate, "gelu")
    out = experts(x, w_in, w_out, index, gate, "triton" if way.kernel else "grouped")
    for grad in gradients([out], [w_in, w_out]):
        assert [bool(g.abs().max() > 0) for g in grad] == [e == expert for e in range(7)]


@each_way
def test_layouts_of_any_kind(way):
    """Transposed weights, tokens with gaps, expanded gates."""
    x, w_in, w_out, index, _ = example(way, 30, 5, 2, 24, 8, "gelu")
    odd = x.repeat(1, 2)[:, ::2].detach().requires_grad_()
    turned = w_in.detach().mT.contiguous().mT.requires_grad_()
    gate = torch.ones(30, 1, dtype=way.dtype, device=way.device).expand(30, 2)
    compare(way, odd, turned, w_out, index, gate.detach().requires_grad_(), "gelu")


@each_way
def test_no_token(way):
    x, w_in, w_out, index, gate = example(way, 0, 7, 3, 24, 8, "gelu")
    out = experts(x, w_in, w_out, index, gate, "triton" if way.kernel else "grouped")
    assert out.shape == (0, 24)
    assert all(grad.abs().max() == 0 for grad in gradients([out], [w_in, w_out]))


@each_way
def test_the_same_sum_each_time(way):
    x, w_in, w_out, index, gate = example(way, 90, 7, 3, 40, 24, "gelu")
    runs = []
    for _ in range(2):
        out = experts(x, w_in, w_out, index, gate, "triton" if way.kernel else "grouped")
        runs.append((out, *gradients([out], (x, w_in, w_out, gate))))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("width", [24, 72], ids=["narrow", "wide"])
def test_programs_may_run_in_any_order(width, monkeypatch):
    """No program relies on another one to overwrite what it wrote too much."""
    from triton.runtime.interpreter import interpreter_builder as builder

    way = Way("interpreted", torch.float32)
    leaves = example(way, 70, 7, 3, 40, width, "gelu")

    def run():
        out = experts(*leaves, "triton")
        return out, *gradients([out], [leaf for leaf in leaves if leaf.requires_grad])

    forwards, place = run(), builder.set_grid_idx
    last_first = lambda *at: place(*(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))  # noqa: E731
    monkeypatch.setattr(builder, "set_grid_idx", last_first)
    for one, two in zip(forwards, run(), strict=True):
        assert torch.equal(one, two)


@each_way
def test_what_is_kept_for_the_gradient(way):
    """The hidden layer before its activation and the order of the slots: no gathered token, no output of an expert."""
    if not way.kernel:
        pytest.skip("about the kernels")
    n, e, k, d, f = 60, 7, 3, 200, 16
    x, w_in, w_out, index, gate = example(way, n, e, k, d, f, "gelu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(x, w_in, w_out, index, gate, "triton")
    leaves = {leaf.data_ptr() for leaf in (x, w_in, w_out, gate)}
    others = sum(t.nbytes for t in kept if t.data_ptr() not in leaves)
    assert others < n * k * f * x.element_size() + 16 * n * k + 1000
    assert others < n * k * d * x.element_size() / 2


@each_way
@pytest.mark.parametrize("e, n, k", [(62, 50, 6), (7, 300, 3), (1, 10, 1), (5, 1, 5), (130, 40, 2)])
def test_dispatch_is_a_stable_sort(way, e, n, k):
    if not way.kernel:
        pytest.skip("about the kernels")
    from moemla.kernels.dispatch import dispatch

    index = torch.rand(n, e, generator=torch.Generator().manual_seed(2)).topk(k).indices.to(way.device)
    where = dispatch(index, e, 16)
    chosen = index.flatten()
    order = chosen.argsort(stable=True)
    assert torch.equal(where.order.long(), order)
    assert torch.equal(where.place.long(), order.argsort())
    counts = torch.bincount(chosen, minlength=e)
    assert where.offsets.tolist() == [0, *counts.cumsum(0).tolist()]
    tiles = [(x, r) for x, r in zip(where.tile_expert.tolist(), where.tile_row.tolist(), strict=True) if x < e]
    starts = where.offsets.tolist()
    assert tiles == [(x, r) for x in range(e) for r in range(starts[x], starts[x + 1], 16)]


@each_way
def test_an_expert_that_does_not_exist_gives_no_number(way):
    if not way.kernel:
        pytest.skip("about the kernels")
    x, w_in, w_out, index, gate = example(way, 20, 7, 2, 24, 8, "gelu")
    good = experts(x, w_in, w_out, index, gate, "triton")
    index[3, 1] = 7
    index[5, 0] = -1
    index[7, 0] = 2**32 + 1  # expert 1 in 32 bits
    out = experts(x, w_in, w_out, index, gate, "triton")
    rows = out.isnan().all(1).nonzero().flatten().tolist()
    assert rows == [3, 5, 7]
    near(out[[0, 1, 2, 4]], good[[0, 1, 2, 4]].detach().double().cpu(), 1e-6)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("width", [32, 256], ids=["narrow", "wide"])
def test_nothing_waits_for_the_gpu(width):
    """Forward and backward are started without a number coming back to the host."""
    leaves = example(Way("compiled", torch.bfloat16), 300, 62, 6, 512, width, "gelu")
    for mode in ("default", "error"):  # once to compile
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out = experts(*leaves, "triton")
            out.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_more_numbers_than_32_bits_count():
    """2.2e9 of them in the experts' outputs: the last tokens are right."""
    way, n = Way("compiled", torch.bfloat16), 360_000
    x, w_in, w_out, index, gate = example(way, n, 7, 6, 1024, 8, "gelu")
    with torch.no_grad():
        out = experts(x, w_in, w_out, index, gate, "triton")
        last = slice(n - 50, n)
        few = [exact(t) for t in (x[last], w_in, w_out)]
        near(out[last], experts(*few, index[last].cpu(), exact(gate[last]), "loop"), way.tolerance)


@pytest.mark.parametrize("trained", ["x", "w_in", "w_out", "gate"])
@pytest.mark.parametrize("width", [5, 80], ids=["narrow", "wide"])
def test_what_is_frozen_gets_no_gradient(trained, width):
    if not kernels.INTERPRETED:
        pytest.skip("kernels are compiled here")
    torch.manual_seed(0)
    tensors = dict(x=torch.randn(9, 8), w_in=torch.randn(4, 8, width), w_out=torch.randn(4, width, 8))
    index = torch.rand(9, 4).topk(2).indices
    tensors["gate"] = torch.rand(9, 2)
    tensors[trained].requires_grad_()
    found = []
    for backend in ("triton", "loop"):
        out = experts(tensors["x"], tensors["w_in"], tensors["w_out"], index, tensors["gate"], backend, "gelu")
        found.append(torch.autograd.grad(out.square().sum(), tensors[trained])[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_said():
    if not kernels.INTERPRETED:
        pytest.skip("kernels are compiled here")
    from moemla.kernels.experts import routed_experts

    x, w_in, w_out = torch.ones(3, 8), torch.ones(4, 8, 5), torch.ones(4, 5, 8)
    index, gate = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"w_in\.shape=\(4, 8, 5\): must be \(4, 8, 10\)"):
        routed_experts(x, w_in, w_out, index, gate, "swiglu")
    with pytest.raises(ValueError, match=r"x\.shape=\(3, 7\)"):
        routed_experts(x[:, :7], w_in, w_out, index, gate, "gelu")
    with pytest.raises(ValueError, match="a row for each of the 3 tokens"):
        routed_experts(x, w_in, w_out, index[:2], gate[:2], "gelu")
    with pytest.raises(ValueError, match="one type for all three"):
        routed_experts(x.half(), w_in, w_out, index, gate, "gelu")
    with pytest.raises(ValueError, match="whole numbers"):
        routed_experts(x, w_in, w_out, index.float(), gate, "gelu")
    with pytest.raises(ValueError, match=r"index\.dtype=torch\.uint8"):
        routed_experts(x, w_in, w_out, index.to(torch.uint8), gate, "gelu")
    with pytest.raises(ValueError, match="'relu'"):
        routed_experts(x, w_in, w_out, index, gate, "relu")


def test_the_rule_is_seen(monkeypatch):
    """`auto` takes the kernels on a GPU where they are enabled and experts have a tile's worth of rows."""
    monkeypatch.setattr(module.kernels, "enabled", lambda *tensors: True)
    w_out = torch.empty(62, 32, 512, device="meta")
    assert choose(torch.empty(8192, 512, device="meta"), w_out, 6) == "triton"
    assert choose(torch.empty(16, 512, device="meta"), w_out, 6) == "masked"
    assert choose(torch.empty(8192, 512), w_out, 6) != "triton"  # interpreted kernels are for tests
    monkeypatch.setattr(module.kernels, "enabled", lambda *tensors: False)
    assert choose(torch.empty(8192, 512, device="meta"), w_out, 6) == "masked"
