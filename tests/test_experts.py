"""Routed experts: every back end against three nested loops, in output and in every gradient."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moemla import experts as module
from moemla.experts import BACKENDS, Experts, choose, experts
from tests.helpers import close


def example(n=9, e=7, k=3, d=5, f=6, activation="gelu", dtype=torch.float64, index=None, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    width = 2 * f if activation == "swiglu" else f
    if index is None:
        index = torch.rand(n, e, generator=generator).topk(k).indices
    gate = torch.rand(index.shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return normal(n, d), normal(e, d, width), normal(e, f, d), index, gate


def by_loops(x, w_in, w_out, index, gate, activation):
    """y_n = sum_j gate[n, j] W_out[e]^T act(W_in[e]^T x_n), one token, one slot, one hidden unit at a time."""
    width = w_out.shape[1]
    rows = []
    for n in range(len(x)):
        y = torch.zeros_like(x[n])
        for j in range(index.shape[1]):
            e = int(index[n, j])
            for f in range(width):
                z = (x[n] * w_in[e][:, f]).sum()
                if activation == "gelu":
                    hidden = z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))
                else:
                    hidden = z * torch.sigmoid(z) * (x[n] * w_in[e][:, width + f]).sum()
                y = y + gate[n, j] * hidden * w_out[e][f]
        rows.append(y)
    return torch.stack(rows) if rows else torch.zeros_like(x)


def gradients(out, leaves, seed=5):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((out * upstream.to(out.dtype)).sum(), leaves, allow_unused=True)


CASES = {
    "plain": {},
    "62 experts": dict(e=62, k=6, n=7),
    "one expert": dict(e=1, k=1),
    "all chosen": dict(e=4, k=4),
    "one token": dict(n=1),
    "odd widths": dict(d=3, f=1),
    "no token for some": dict(n=2, e=7, k=2),
    "all to one": dict(index=torch.full((6, 1), 4), n=6),
    "all to the last": dict(index=torch.full((6, 1), 6), n=6),
}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_loops_with_gradients(backend, case, activation):
    x, w_in, w_out, index, gate = example(activation=activation, **CASES[case])
    leaves = (x, w_in, w_out, gate)
    out = experts(x, w_in, w_out, index, gate, backend=backend, activation=activation)
    wanted = by_loops(x, w_in, w_out, index, gate, activation)
    close(out, wanted, 1e-12)
    for ours, oracle, leaf in zip(gradients(out, leaves), gradients(wanted, leaves), leaves, strict=True):
        oracle = torch.zeros_like(leaf) if oracle is None else oracle
        close(ours, oracle, 1e-12)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, activation):
    x, w_in, w_out, index, gate = example(n=4, e=3, k=2, d=3, f=2, activation=activation)
    assert torch.autograd.gradcheck(
        lambda x, a, b, g: experts(x, a, b, index, g, backend, activation), (x, w_in, w_out, gate), rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_narrow_types(backend, dtype):
    exact = example(n=64, e=7, k=3, d=16, f=8, dtype=torch.float64)
    index = exact[3]
    narrow = [t.detach().to(dtype).requires_grad_() for t in exact if t is not index]
    exact = [t.detach().double().requires_grad_() for t in narrow]  # the oracle starts from the rounded numbers
    out = experts(*narrow[:3], index, narrow[3], backend)
    wanted = experts(*exact[:3], index, exact[3], "loop")
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    close(out.double(), wanted, tolerance, scale=0)
    for ours, oracle in zip(gradients(out, narrow), gradients(wanted, exact), strict=True):
        assert ours.dtype == dtype
        close(ours.double(), oracle, tolerance, scale=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, w_in, w_out, index, gate = example(n=0)
    out = experts(x, w_in, w_out, index, gate, backend)
    assert out.shape == (0, 5)
    for grad in gradients(out, (w_in, w_out)):
        assert grad is None or grad.abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_gate_serves_a_bfloat16_token(backend):
    x, w_in, w_out, index, gate = example(dtype=torch.bfloat16)
    assert experts(x, w_in, w_out, index, gate.float(), backend).dtype == torch.bfloat16


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.data(), st.sampled_from(list(BACKENDS)), st.integers(0, 10**6))
def test_permuting_experts_changes_nothing(n, e, data, backend, seed):
    k = data.draw(st.integers(1, e))
    x, w_in, w_out, index, gate = example(n=n, e=e, k=k, seed=seed)
    order = torch.randperm(e, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()  # expert e stands at place[e] now
    out = experts(x, w_in[order], w_out[order], place[index], gate, backend)
    close(out, experts(x, w_in, w_out, index, gate, backend), 1e-12)
    slots = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    close(experts(x, w_in, w_out, index[:, slots], gate[:, slots], backend), out, 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_does_not_depend_on_the_others(backend):
    x, w_in, w_out, index, gate = example()
    out = experts(x, w_in, w_out, index, gate, backend)
    for n in range(len(x)):
        alone = experts(x[n : n + 1], w_in, w_out, index[n : n + 1], gate[n : n + 1], backend)
        close(alone[0], out[n], 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchosen_experts_get_no_gradient(backend):
    x, w_in, w_out, index, gate = example(index=torch.tensor([[0, 2], [2, 5]]), n=2)
    for grad in gradients(experts(x, w_in, w_out, index, gate, backend), (w_in, w_out)):
        assert [bool(g.abs().max() > 0) for g in grad] == [True, False, True, False, False, True, False]


def test_loop_does_not_make_a_gradient_of_all_experts_for_each():
    """`w_in[e]` in a loop would: its backward fills a tensor of all experts once for every expert."""
    x, w_in, w_out, index, gate = example(n=20, e=16, k=2, d=8, f=8)
    out = experts(x, w_in, w_out, index, gate, "loop")
    with torch.profiler.profile(profile_memory=True) as profile:
        out.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::select_backward" not in names
    assert w_in.grad is not None


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "62 experts", "no token for some", "all to one", "one token"])
def test_grouped_on_the_fused_product(case, dtype, activation, monkeypatch):
    """torch's own grouped product, used on new GPUs only, runs on a CPU too: the same numbers."""
    monkeypatch.setattr(module, "_fused", lambda x, w_in, w_out: True)
    sizes = CASES[case] | dict(d=16, f=8)
    exact = example(activation=activation, **sizes)
    index = exact[3]
    narrow = [t.detach().to(dtype).requires_grad_() for t in exact if t is not index]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    out = experts(*narrow[:3], index, narrow[3], "grouped", activation)
    wanted = experts(*exact[:3], index, exact[3], "loop", activation)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    close(out.double(), wanted, tolerance, scale=0)
    for ours, oracle in zip(gradients(out, narrow), gradients(wanted, exact), strict=True):
        close(ours.double(), oracle, tolerance, scale=0)


def test_gather_of_one_token_needs_no_copy_and_is_the_same():
    x, w_in, w_out, index, gate = example(n=1, activation="swiglu")
    with torch.no_grad():
        alone = experts(x, w_in, w_out, index, gate, "gather", "swiglu")
    close(alone, experts(x, w_in, w_out, index, gate, "gather", "swiglu"), 1e-13)
    close(alone, by_loops(x, w_in, w_out, index, gate, "swiglu"), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_computes_in_the_autocast_type(backend):
    x, w_in, w_out, index, gate = example(d=16, f=8, dtype=torch.float32)
    exact = experts(x, w_in, w_out, index, gate, "loop")
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, w_in, w_out, index, gate, backend)
    assert out.dtype == torch.bfloat16
    close(out.float(), exact, 0.03, scale=0)
    assert all(grad.dtype == torch.float32 for grad in gradients(out, (x, w_in, w_out, gate)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_alone(backend):
    x, w_in, w_out, index, gate = example()
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(x, w_in, w_out, index, gate, backend)
    close(out, experts(x, w_in, w_out, index, gate, "loop"), 1e-12)


@torch.no_grad()
def test_one_token_under_autocast():
    x, w_in, w_out, index, gate = example(n=1, d=16, f=8, dtype=torch.float32)
    exact = experts(x, w_in, w_out, index, gate, "loop")
    with torch.autocast("cpu", torch.bfloat16):
        close(experts(x, w_in, w_out, index, gate, "gather").float(), exact, 0.03, scale=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_narrow_indices(backend):
    x, w_in, w_out, index, gate = example(n=6)
    wanted = experts(x, w_in, w_out, index, gate, "loop")
    turned = [tensor.detach().mT.contiguous().mT for tensor in (x, w_in, w_out, gate)]
    close(experts(*turned[:3], index, turned[3], backend), wanted, 1e-12)
    if backend != "masked":  # torch's scatter takes int64 only
        close(experts(x, w_in, w_out, index.int(), gate, backend), wanted, 1e-12)


def test_grouped_keeps_neither_gathered_tokens_nor_outputs():
    """What waits for the backward: x, the weights, the gates and two hidden arrays; nothing of N A rows of D."""
    n, k, d, f = 32, 4, 64, 8
    x, w_in, w_out, index, gate = example(n=n, e=6, k=k, d=d, f=f)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(x, w_in, w_out, index, gate, "grouped")
    numbers = sum(t.numel() for t in kept) - w_in.numel() - w_out.numel()
    assert numbers == n * d + n * k + 2 * n * k * f
    assert numbers < n * k * d


def test_grouped_has_no_second_derivatives():
    x, w_in, w_out, index, gate = example()
    with pytest.raises(RuntimeError, match="no second derivatives; use 'masked' or 'loop'"):
        torch.autograd.grad(experts(x, w_in, w_out, index, gate, "grouped").sum(), x, create_graph=True)


def on_cpu(n, d, f, e=62):
    return torch.zeros(1).expand(n, d), torch.zeros(1).expand(e, f, d)


def elsewhere(n, d, f, e=62):
    return torch.empty(n, d, device="meta"), torch.empty(e, f, d, device="meta")


def test_auto_takes_what_was_measured_to_be_fastest():
    """Narrow experts and few tokens: `masked`; more of either: `grouped`; a few tokens in decode: `gather`."""
    assert choose(*on_cpu(256, 128, 8), 6) == "masked"
    assert choose(*on_cpu(4096, 128, 64), 6) == "grouped"
    assert choose(*on_cpu(1024, 512, 32), 6) == "grouped"
    assert choose(*on_cpu(1, 128, 64), 6) == "masked"  # a gradient may be asked for
    assert choose(*on_cpu(1, 512, 32), 6) == "grouped"
    with torch.no_grad():
        assert choose(*on_cpu(1, 128, 64), 6) == choose(*on_cpu(4, 512, 32), 6) == "gather"
        assert choose(*on_cpu(1, 128, 64, e=6), 6) == "masked"  # nothing is left out
        assert choose(*on_cpu(64, 512, 512), 6) == "grouped"
    assert choose(*elsewhere(4096, 512, 32), 6) == "masked"  # not a CPU: by arithmetic
    assert choose(*elsewhere(4096, 512, 512), 6) == "grouped"


@pytest.mark.parametrize("n", [0, 1, 5, 300])
def test_auto_is_equal_whatever_it_takes(n):
    x, w_in, w_out, index, gate = example(n=n, e=62, k=6, d=16, f=24)
    close(experts(x, w_in, w_out, index, gate), experts(x, w_in, w_out, index, gate, "loop"), 1e-12)
    with torch.no_grad():
        close(experts(x, w_in, w_out, index, gate), experts(x, w_in, w_out, index, gate, "loop"), 1e-12)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["plain", "62 experts", "no token for some", "all to one", "one token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_gpu(backend, case, dtype, activation):
    exact = example(activation=activation, **CASES[case] | dict(d=64, f=24))
    index = exact[3].cuda()
    narrow = [t.detach().cuda().to(dtype).requires_grad_() for t in exact if t is not exact[3]]
    exact = [t.detach().double().cpu().requires_grad_() for t in narrow]
    out = experts(*narrow[:3], index, narrow[3], backend, activation)
    wanted = experts(*exact[:3], index.cpu(), exact[3], "loop", activation)
    tolerance = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 0.03}[dtype]  # TF32 may be on
    close(out.double().cpu(), wanted, tolerance, scale=0)
    pairs = zip(
        torch.autograd.grad(out.float().square().sum(), narrow), gradients_of_square(wanted, exact), strict=True
    )
    for ours, oracle in pairs:
        close(ours.double().cpu(), oracle, 3 * tolerance, scale=0)


def gradients_of_square(out, leaves):
    return torch.autograd.grad(out.square().sum(), leaves)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='fast': choose one of auto, masked, loop"):
        experts(*example(), backend="fast")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_module(activation):
    layer = Experts(d_model=5, n_experts=7, d_expert=6, activation=activation, backend="loop", dtype=torch.float64)
    assert layer.w_in.shape == (7, 5, 12 if activation == "swiglu" else 6)
    assert layer.w_out.shape == (7, 6, 5)
    x, _, _, index, gate = example()
    close(layer(x, index, gate), by_loops(x, layer.w_in, layer.w_out, index, gate, activation), 1e-13)
    assert Experts(d_model=5, n_experts=7, d_expert=6, device="meta", dtype=torch.bfloat16).w_in.dtype == torch.bfloat16


# --- dispatch, compute, combine -------------------------------------------------------------------


class Part:
    """Of all experts only those from `first` to before `last` are here; the rows of the others come back as zeros."""

    share = 1.0

    def __init__(self, expert, first, last):
        self.here = (expert >= first) & (expert < last)
        self.counts = torch.bincount(expert[self.here] - first, minlength=last - first)

    def dispatch(self, rows):
        return rows[self.here]

    def combine(self, rows):
        return rows.new_zeros(len(self.here), rows.shape[1]).index_put((self.here,), rows)


class Reordered:
    """The experts stand in another order here: `order` (E,) says which stands where."""

    share = 1.0

    def __init__(self, expert, order):
        place = order.argsort()[expert]
        self.order = place.argsort(stable=True)
        self.counts = torch.bincount(place, minlength=len(order))

    def dispatch(self, rows):
        return rows[self.order]

    def combine(self, rows):
        return torch.empty_like(rows).index_put((self.order,), rows)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("case", ["plain", "62 experts", "one token", "no token for some", "all to one"])
@pytest.mark.parametrize("dispatcher", ["halves", "reordered"])
def test_a_dispatcher_from_outside_changes_nothing(dispatcher, case, activation):
    """Two halves of the experts, each with its own weights, add up to the whole; and the order of experts is free."""
    x, w_in, w_out, index, gate = example(activation=activation, **CASES[case])
    leaves, n_experts = (x, w_in, w_out, gate), len(w_in)
    if dispatcher == "halves":
        out, edges = 0.0, (0, n_experts // 2, n_experts)
        for first, last in pairwise(edges):
            some = partial(Part, first=first, last=last)
            out = out + experts(x, w_in[first:last], w_out[first:last], index, gate, "auto", activation, some)
    else:
        order = torch.randperm(n_experts)
        out = experts(x, w_in[order], w_out[order], index, gate, "grouped", activation, partial(Reordered, order=order))
    wanted = experts(x, w_in, w_out, index, gate, "loop", activation)
    close(out, wanted, 1e-12)
    for ours, oracle in zip(gradients(out, leaves), gradients(wanted, leaves), strict=True):
        close(ours, oracle, 1e-12)


def test_a_dispatcher_needs_rows():
    x, w_in, w_out, index, gate = example()
    with pytest.raises(ValueError, match=r"backend='masked': a dispatcher needs 'grouped' \(or 'auto'\)"):
        experts(x, w_in, w_out, index, gate, "masked", dispatcher=partial(Part, first=0, last=7))
