"""The router: choice, gates and counts against loops; padding; precision; what is counted, and when."""

import copy
import gc
import math
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moemla.balancing import Balancer, switch_loss, z_loss
from moemla.routing import Router, record_routing, route
from tests.helpers import close

SCORES = ("sigmoid", "softmax")


def scores_by_hand(row, scores):
    if scores == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in row]
    top = max(row)
    total = sum(math.exp(z - top) for z in row)
    return [math.exp(z - top) / total for z in row]


def route_by_hand(logits, bias, top_k, scores, bias_in_gate, renormalise, scale, valid):
    """One token at a time, as the formulas read. Returns a dictionary expert -> gate for each token, and counts."""
    gates, counts = [], [0] * len(bias)
    for n, row in enumerate(logits.tolist()):
        shifted = [z + b for z, b in zip(row, bias.tolist(), strict=True)]
        if bias_in_gate:
            picked_by = plain = scores_by_hand(shifted, scores)
        else:
            plain = scores_by_hand(row, scores)
            # softmax keeps order, so selection by logit + bias is selection by the softmax of it
            picked_by = [p + b for p, b in zip(plain, bias.tolist(), strict=True)] if scores == "sigmoid" else shifted
        chosen = sorted(range(len(row)), key=lambda e: -picked_by[e])[:top_k]
        total = sum(plain[e] for e in chosen) if renormalise else 1.0
        padding = valid is not None and not valid[n]
        gates.append({e: 0.0 if padding else scale * plain[e] / total for e in chosen})
        for e in chosen:
            counts[e] += 0 if padding else 1
    return gates, counts


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("bias_in_gate", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_against_loops(scores, bias_in_gate, renormalise, padded):
    logits, bias = torch.randn(20, 7, dtype=torch.float64) * 2, torch.randn(7, dtype=torch.float64)
    valid = torch.rand(20) > 0.4 if padded else None
    how = dict(scores=scores, bias_in_gate=bias_in_gate, renormalise=renormalise)
    out = route(logits, bias, 3, routed_scale=1.7, valid=valid, **how)
    gates, counts = route_by_hand(logits, bias, 3, scale=1.7, valid=valid, **how)
    for n, wanted in enumerate(gates):
        assert set(out.index[n].tolist()) == set(wanted)
        for e, gate in zip(out.index[n].tolist(), out.gate[n].tolist(), strict=True):
            assert gate == pytest.approx(wanted[e], abs=1e-13)
    assert out.counts.tolist() == counts
    assert out.counts.dtype == torch.int64
    assert out.counts.sum() == 3 * (20 if valid is None else valid.sum())
    plain = [scores_by_hand(row, scores) for row in (logits + bias if bias_in_gate else logits).tolist()]
    close(out.probabilities, torch.tensor(plain, dtype=torch.float64), 1e-13)


def test_algorithm_1_as_printed():
    """Lines 3-4 by hand: l = W_g x + b, TopK(softmax(l)), gates of eq. 2 from the same probabilities."""
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]], dtype=torch.float64)
    bias = torch.tensor([2.5, 0.0, -2.0, 0.0], dtype=torch.float64)
    out = route(logits, bias, 2, scores="softmax", bias_in_gate=True)
    assert out.index.tolist() == [[0, 1]]  # l = 3.5, 2, 1, 0
    first = math.exp(3.5) / (math.exp(3.5) + math.exp(2.0))
    close(out.gate, torch.tensor([[first, 1 - first]], dtype=torch.float64), 1e-14)
    working = route(logits, bias, 2, scores="softmax")
    assert working.index.tolist() == [[0, 1]]  # the bias chooses...
    close(working.gate, torch.tensor([[math.exp(1), math.exp(2)]], dtype=torch.float64) / (math.e + math.e**2), 1e-14)


@pytest.mark.parametrize("scores", SCORES)
def test_a_selection_bias_changes_the_choice_and_never_a_gate(scores):
    logits = torch.randn(50, 6, dtype=torch.float64)
    bias = torch.tensor([0.3, -0.3, 0.0, 0.1, 0.0, -0.1], dtype=torch.float64)
    without = route(logits, torch.zeros_like(bias), 2, scores=scores, renormalise=False)
    biased = route(logits, bias, 2, scores=scores, renormalise=False)
    assert not torch.equal(without.index, biased.index)
    assert torch.equal(biased.gate, without.probabilities.gather(1, biased.index))


@pytest.mark.parametrize("scores", SCORES)
def test_a_constant_added_to_all_biases_changes_nothing(scores):
    logits, bias = torch.randn(200, 9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    one, two = route(logits, bias, 3, scores=scores), route(logits, bias - 5.25, 3, scores=scores)
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.gate, two.gate)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.data(),
    st.sampled_from(SCORES),
    st.booleans(),
    st.floats(0.1, 3.0),
    st.integers(0, 10**6),
)
def test_gates_sum_to_the_scale_and_experts_are_distinct(n_experts, data, scores, bias_in_gate, scale, seed):
    top_k = data.draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, n_experts, generator=generator) * 4
    bias = torch.randn(n_experts, generator=generator)
    out = route(logits, bias, top_k, scores=scores, bias_in_gate=bias_in_gate, routed_scale=scale)
    close(out.gate.sum(-1), torch.full((8,), scale), 1e-5)
    assert all(len(set(row)) == top_k for row in out.index.tolist())
    assert (out.gate >= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SCORES), st.booleans(), st.integers(0, 10**6))
def test_permuting_experts_permutes_the_routing(scores, bias_in_gate, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    bias, order = torch.randn(6, generator=generator, dtype=torch.float64), torch.randperm(6, generator=generator)
    one = route(logits, bias, 2, scores=scores, bias_in_gate=bias_in_gate)
    two = route(logits[:, order], bias[order], 2, scores=scores, bias_in_gate=bias_in_gate)
    assert torch.equal(order[two.index], one.index)
    close(two.gate, one.gate, 1e-14)
    assert torch.equal(two.counts, one.counts[order])


def test_extreme_logits_stay_finite():
    for scores in SCORES:
        out = route(torch.tensor([[-200.0, -300.0, -400.0], [200.0, 300.0, 400.0]]), torch.zeros(3), 2, scores=scores)
        assert torch.isfinite(out.gate).all()


def test_wrong_arguments():
    logits, bias = torch.randn(2, 4), torch.zeros(4)
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"top_k={top_k}: must be between 1 and the number of experts, 4"):
            route(logits, bias, top_k)
    with pytest.raises(ValueError, match="scores='tanh'"):
        route(logits, bias, 2, scores="tanh")


def test_the_choice_has_no_gradient_and_the_gates_have():
    router = Router(d_model=5, n_experts=4, top_k=2, dtype=torch.float64)
    x = torch.randn(3, 5, dtype=torch.float64)
    assert not router.bias.requires_grad
    assert [name for name, _ in router.named_parameters()] == ["weight"]

    def gates(weight):
        logits = x @ weight.T
        return route(logits, router.bias, 2).gate

    assert torch.autograd.gradcheck(gates, router.weight)


MOVES = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to": lambda m: m.to(dtype=torch.bfloat16),
    "inside": lambda m: nn.Sequential(m).half()[0],
}


@pytest.mark.parametrize("move", MOVES)
def test_float32_through_narrow_types(move):
    router = Router(d_model=8, n_experts=5, top_k=2)
    router.bias += 4
    weight, x = router.weight.detach().clone(), torch.randn(6, 8)
    router = MOVES[move](router)
    assert router.weight.dtype == router.bias.dtype == torch.float32
    assert torch.equal(router.weight, weight)
    router.bias += 1e-3  # in bfloat16 the step at 4 is 0.03
    assert (router.bias > 4.0009).all()
    narrow = router(x.bfloat16())
    assert narrow.gate.dtype == narrow.logits.dtype == torch.float32
    close(narrow.logits, x.bfloat16().float() @ weight.T, 1e-6)


def test_built_in_narrow_and_wide_types():
    assert Router(d_model=4, n_experts=3, top_k=1, dtype=torch.bfloat16).weight.dtype == torch.float32
    assert Router(d_model=4, n_experts=3, top_k=1, dtype=torch.float64).bias.dtype == torch.float64
    assert Router(d_model=4, n_experts=3, top_k=1).double().weight.dtype == torch.float64
    assert Router(d_model=4, n_experts=3, top_k=1, dtype=torch.float64).half().weight.dtype == torch.float64
    assert Router(d_model=4, n_experts=3, top_k=1, device="meta").bias.device.type == "meta"


def test_logits_stay_float32_under_autocast():
    router, x = Router(d_model=16, n_experts=5, top_k=2), torch.randn(6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = router(x)
    assert out.logits.dtype == torch.float32
    close(out.logits, x @ router.weight.T, 1e-6)


def test_bias_is_saved_and_load_is_not():
    router = Router(d_model=4, n_experts=3, top_k=1)
    router(torch.randn(5, 4))
    assert set(router.state_dict()) == {"weight", "bias"}
    assert router.state_dict()["bias"].dtype == torch.float32


def test_counting_in_training_only():
    router, x = Router(d_model=4, n_experts=5, top_k=2), torch.randn(2, 6, 4)
    router(x)
    once = router.load.clone()
    assert torch.equal(once, router.last.counts)
    assert once.sum() == 2 * 12
    router(x)
    assert torch.equal(router.load, 2 * once)  # micro-batches add up
    router.eval()
    router(x)
    assert torch.equal(router.load, 2 * once)


def test_padding_is_not_counted_and_has_no_gate():
    router, x = Router(d_model=4, n_experts=5, top_k=2), torch.randn(2, 6, 4)
    valid = torch.arange(6) < torch.tensor([4, 0])[:, None]
    out = router(x, valid)
    assert (out.gate[~valid.flatten()] == 0).all()
    close(out.gate[:4].sum(-1), torch.ones(4), 1e-6)
    assert router.load.sum() == 2 * 4
    alone = Router(d_model=4, n_experts=5, top_k=2)
    alone.load_state_dict(router.state_dict())
    alone(x[:1, :4])
    assert torch.equal(alone.load, router.load)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once(reentrant):
    router, x = Router(d_model=4, n_experts=5, top_k=2), torch.randn(6, 4, requires_grad=True)

    def layer(x):
        return router(x).gate.sum(-1) * x.sum(-1)

    seen = [checkpoint(layer, x, use_reentrant=reentrant).sum() for _ in range(3)]
    assert router.load.sum() == 3 * 2 * 6
    sum(seen).backward()
    assert router.load.sum() == 3 * 2 * 6
    layer(x)
    assert router.load.sum() == 4 * 2 * 6  # and counting goes on afterwards


def test_empty_batch():
    out = Router(d_model=4, n_experts=5, top_k=2)(torch.randn(0, 4))
    assert out.index.shape == out.gate.shape == (0, 2)
    assert out.counts.tolist() == [0] * 5


def test_copy_and_pickle_after_a_training_pass():
    router, x = Router(d_model=4, n_experts=5, top_k=2), torch.randn(6, 4, requires_grad=True)
    router(x)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        assert twin.last is None
        assert torch.equal(twin.weight, router.weight)
        assert torch.equal(twin.load, router.load)
    assert router.last is not None


# --- float32 whatever the rest is -----------------------------------------------------------------


def assert_wide(router, x, dtype=torch.float32):
    """Every number that the router makes is of `dtype`, and is what the exact product of its inputs gives."""
    out = router(x)
    assert out.logits.dtype == out.gate.dtype == out.probabilities.dtype == router.bias.dtype == dtype
    close(out.logits.double(), x.detach().double() @ router.weight.detach().double().T, 1e-6)


def test_a_default_dtype_of_float64_makes_a_router_of_float64():
    torch.set_default_dtype(torch.float64)
    try:
        assert Router(d_model=4, n_experts=3, top_k=1).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Router(d_model=4, n_experts=3, top_k=1).bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("assign", [False, True])
def test_a_narrow_checkpoint_does_not_narrow_the_router(assign):
    router, saved = Router(d_model=8, n_experts=5, top_k=2), Router(d_model=8, n_experts=5, top_k=2).state_dict()
    router.load_state_dict({name: tensor.bfloat16() for name, tensor in saved.items()}, assign=assign)
    assert torch.equal(router.weight, saved["weight"].bfloat16().float())
    assert_wide(router, torch.randn(6, 8).bfloat16())


def test_a_weight_narrowed_from_outside_is_multiplied_in_float32_with_a_warning():
    """As FSDP2 hands it over with a narrow param_dtype: rounded already, but the product and all behind it are wide."""
    router, x = Router(d_model=64, n_experts=5, top_k=2), torch.randn(6, 64).bfloat16()
    router.weight.data = router.weight.data.bfloat16()
    with pytest.warns(UserWarning, match=r"router.weight comes as torch.bfloat16.*fully_shard on each Router first"):
        assert_wide(router, x)
    with pytest.warns(UserWarning), torch.autocast("cpu", dtype=torch.bfloat16):
        assert_wide(router, x)
    with pytest.warns(UserWarning):
        router(x).gate.sum().backward()
    assert router.weight.grad.dtype == torch.bfloat16
    router.bias.data = router.bias.data.bfloat16()
    with pytest.raises(RuntimeError, match=r"router.bias is torch.bfloat16: steps vanish in it"):
        Balancer(router).step()


COMPILED = """
import torch
from moemla.routing import Router, record_routing
torch.set_num_threads(1)
router = Router(d_model=64, n_experts=5, top_k=2).half()
two = torch.nn.ModuleList([router, Router(d_model=64, n_experts=5, top_k=2)])
router(torch.randn(6, 64).bfloat16())  # einops has seen a tensor, so that no guard on its caches fails later
router.forget()
compiled = torch.compile(router, backend="aot_eager", fullgraph=True)

def check(x, step):
    out = compiled(x)
    assert out.logits.dtype == out.gate.dtype == out.probabilities.dtype == torch.float32
    assert (out.logits.double() - x.double() @ router.weight.double().T).abs().max() < 1e-6
    assert router.load.sum() == step * 12 and torch.equal(router.last.index, out.index)
    assert not router.last.gate.requires_grad

x = torch.randn(6, 64).bfloat16()
check(x, 1)
with torch._dynamo.config.patch(error_on_recompile=True):
    check(x + 1, 2)
with torch.autocast("cpu", dtype=torch.bfloat16):
    check(x, 3)
with record_routing(two) as first:
    check(x, 4)
with torch._dynamo.config.patch(error_on_recompile=True), record_routing(two) as routings:
    check(x, 5)
assert len(first) == len(routings) == 1
routings[0].logits.square().sum().backward()
assert router.weight.grad.abs().max() > 0
"""


def test_float32_under_compile_with_one_compilation():
    """In a process of its own: torch cannot look through the run-time checks of shapes that the tests install."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


# --- what a pass leaves behind --------------------------------------------------------------------


def test_the_sums_are_no_buffers():
    router = Router(d_model=4, n_experts=5, top_k=2)
    router.watch_margins()
    assert [name for name, _ in router.named_buffers()] == ["bias"]
    router(torch.randn(6, 4))
    moved = router.double()
    assert moved.load.dtype == moved.margins.dtype == torch.int64
    assert moved.load.sum() == 12 and moved.margins.sum() == 5 * 6


def test_the_sums_follow_a_router_wherever_it_goes():
    real = Router(d_model=4, n_experts=5, top_k=2)
    real(torch.randn(6, 4))
    born = Router(d_model=4, n_experts=5, top_k=2, device="meta")
    born.load_state_dict(real.state_dict(), assign=True)  # moves weights past `_apply`
    born(torch.randn(6, 4))
    assert born.load.device.type == "cpu" and born.load.sum() == 12
    assert real.to("meta").load.is_meta
    assert real.to_empty(device="cpu").load.tolist() == [0] * 5


def test_a_pass_without_backward_keeps_no_graph():
    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.seen = torch.ones(1)
            graphs.append(weakref.ref(ctx.seen))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    graphs, router = [], Router(d_model=4, n_experts=5, top_k=2)
    out = router(Watched.apply(torch.randn(6, 4, requires_grad=True)))
    assert torch.equal(router.last.gate, out.gate) and torch.equal(router.last.logits, out.logits)
    assert not any(t.requires_grad for t in (router.last.gate, router.last.probabilities, router.last.logits))
    assert graphs[0]() is not None
    del out
    gc.collect()
    assert graphs[0]() is None


def test_a_loss_on_what_is_for_looking_is_refused():
    router = Router(d_model=4, n_experts=5, top_k=2)
    router(torch.randn(6, 4))
    for loss in (switch_loss, z_loss):
        with pytest.raises(ValueError, match=r"with record_routing\(model\) as routings"):
            loss(router.last)
        with torch.no_grad():
            assert loss(router.last) > 0


def test_every_pass_is_recorded_in_its_order():
    one, two = (Router(d_model=4, n_experts=e, top_k=2, dtype=torch.float64) for e in (3, 5))
    layers = nn.ModuleList([one, two])
    x = torch.randn(6, 4, dtype=torch.float64)
    with record_routing(layers) as routings:
        given = [two(x), one(x), two(2 * x), one(-x)]
        with pytest.raises(RuntimeError, match="records these routers already"), record_routing(one):
            pass
        given.append(one(x))
    one(x)
    assert all(a is b for a, b in zip(routings, given, strict=True))
    sum(z_loss(routing) for routing in routings[:4]).backward()
    by_hand = sum((f(x) @ w.T).logsumexp(-1).square().mean() for w, f in (
        (one.weight, lambda x: x), (one.weight, lambda x: -x), (two.weight, lambda x: x), (two.weight, lambda x: 2 * x)
    ))  # fmt: skip
    for router, wanted in zip((one, two), torch.autograd.grad(by_hand, [one.weight, two.weight]), strict=True):
        close(router.weight.grad, wanted, 1e-12)


def test_nothing_is_recorded_for_copies_or_after_an_error():
    router = Router(d_model=4, n_experts=5, top_k=2)
    with pytest.raises(KeyError), record_routing(router) as routings:
        twin = copy.deepcopy(router)
        twin(torch.randn(3, 4))
        raise KeyError
    router(torch.randn(3, 4))
    assert routings == [] and router.recorded is None


def auxiliary(router, layer, x):
    with record_routing(router) as routings:
        out = layer(x)
    return out.sum() + sum(switch_loss(routing) + z_loss(routing) for routing in routings)


def test_auxiliary_losses_flow_through_checkpointing_or_are_refused():
    router = Router(d_model=4, n_experts=5, top_k=2, dtype=torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def layer(x):
        return router(x.tanh()).gate.square()

    wanted = torch.autograd.grad(auxiliary(router, layer, x), [x, router.weight])
    plain = torch.autograd.grad(layer(x).sum(), router.weight)[0]
    assert (wanted[1] - plain).abs().max() > 1e-3
    found = torch.autograd.grad(
        auxiliary(router, lambda x: checkpoint(layer, x, use_reentrant=False), x), [x, router.weight]
    )
    for a, b in zip(found, wanted, strict=True):
        close(a, b, 1e-12)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        auxiliary(router, lambda x: checkpoint(layer, x, use_reentrant=True), x)
    with torch.no_grad():  # to look at the loss of a model that is not trained now
        assert auxiliary(router, layer, x) > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_repeated_pass_is_not_the_last(reentrant):
    router = Router(d_model=4, n_experts=5, top_k=2)
    first = torch.randn(6, 4, requires_grad=True)
    loss = checkpoint(lambda x: router(x).gate.square(), first, use_reentrant=reentrant).sum()
    shown = router(torch.randn(3, 4))
    loss.backward()
    assert torch.equal(router.last.index, shown.index)


def test_a_replica_of_data_parallel_does_not_count_in_vain():
    router = Router(d_model=4, n_experts=5, top_k=2)
    replica = router._replicate_for_data_parallel()
    replica.weight, replica.bias = router.weight, router.bias
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        replica(torch.randn(6, 4))
    assert replica.eval()(torch.randn(6, 4)).counts.sum() == 12
