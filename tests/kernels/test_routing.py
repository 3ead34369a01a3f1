"""The router in one pass: the plain `route` in float64 is the oracle."""

import pytest
import torch

from moemla import kernels
from moemla.routing import Router, route
from tests.kernels.ways import each_way, exact, gradients, near

SIZES = {
    "62 experts": (70, 62, 6),
    "7 experts": (70, 7, 3),
    "all chosen": (33, 7, 7),
    "one": (5, 1, 1),
    "one token": (1, 62, 6),
}
HOWS = {
    "sigmoid": dict(scores="sigmoid"),
    "sigmoid scaled": dict(scores="sigmoid", routed_scale=2.5, renormalise=False),
    "softmax": dict(scores="softmax"),
    "literal": dict(scores="softmax", bias_in_gate=True),
    "sigmoid in the gate": dict(scores="sigmoid", bias_in_gate=True, renormalise=False),
}


def both(way, n, e, k, how, padded, monkeypatch):
    """(ours, its leaf), (the oracle, its leaf); logits are float32 whatever the model is."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, e, generator=generator).to(way.device).requires_grad_()
    bias = 0.3 * torch.randn(e, generator=generator).to(way.device)
    valid = (torch.rand(n, generator=generator) > 0.3).to(way.device) if padded else None
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    ours = route(logits, bias, k, valid=valid, **how)
    monkeypatch.setattr(kernels, "_enabled", False)
    theirs = exact(logits)
    return (
        ours,
        logits,
        route(theirs, bias.double().cpu(), k, valid=None if valid is None else valid.cpu(), **how),
        theirs,
    )


@each_way
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_equals_the_oracle(way, size, how, padded, monkeypatch):
    ours, leaf, wanted, theirs = both(way, *size, how, padded, monkeypatch)
    assert (ours.counted is not None) == way.kernel
    assert torch.equal(ours.index.cpu(), wanted.index)
    assert torch.equal(ours.counts.cpu(), wanted.counts) and ours.counts.dtype == torch.int64
    near(ours.gate, wanted.gate, 1e-5)
    near(ours.probabilities, wanted.probabilities, 1e-5)
    mine = gradients([ours.gate, ours.probabilities], [leaf])
    near(*mine, *gradients([wanted.gate, wanted.probabilities], [theirs]), 2e-5)


@each_way
def test_only_the_gate_has_a_gradient(way, monkeypatch):
    """Nobody used the plain scores: their gradient is missing, not zero."""
    ours, leaf, wanted, theirs = both(way, 40, 7, 3, {}, False, monkeypatch)
    near(*gradients([ours.gate], [leaf]), *gradients([wanted.gate], [theirs]), 2e-5)


@each_way
def test_ties_choose_k_different_experts(way, monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    logits = torch.zeros(40, 62, device=way.device)
    logits[:20, 7] = 1.0
    found = route(logits, torch.zeros(62, device=way.device), 6)
    assert all(len(set(row)) == 6 and 0 <= min(row) <= max(row) < 62 for row in found.index.tolist())
    assert all(7 in row for row in found.index[:20].tolist())
    near(found.gate[20:], torch.full((20, 6), 1 / 6, dtype=torch.float64), 1e-6)


@each_way
@pytest.mark.parametrize("how", HOWS.values(), ids=HOWS)
def test_lanes_of_padding_are_never_chosen(way, how, monkeypatch):
    """62 experts are 64 lanes: however low all scores are, the two lanes more are no choice."""
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    logits = torch.randn(40, 62, device=way.device) - 30
    index = route(logits, torch.full((62,), -3.0, device=way.device), 62, **how).index
    assert index.sort(-1).values.tolist() == [list(range(62))] * 40


@each_way
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_choose_k_different_experts(way, bad, monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    logits = torch.full((3, 7), bad, device=way.device)
    logits[1, 2] = 0.5
    index = route(logits, torch.zeros(7, device=way.device), 3).index
    assert all(len(set(row)) == 3 and 0 <= min(row) <= max(row) < 7 for row in index.tolist())


@each_way
def test_one_logit_that_is_no_number_spoils_all_gates_of_its_token(way, monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    logits = torch.zeros(3, 7, device=way.device)
    logits[1, 4] = float("nan")
    gate = route(logits, torch.zeros(7, device=way.device), 3).gate
    assert gate[1].isnan().all() and gate[[0, 2]].isfinite().all()


@each_way
def test_a_bias_that_learns_and_16_bit_logits_go_the_plain_way(way, monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    logits, bias = torch.randn(5, 7, device=way.device), torch.zeros(7, device=way.device)
    learns = bias.clone().requires_grad_()
    gate = route(logits, learns, 2, bias_in_gate=True, renormalise=False).gate
    assert torch.autograd.grad(gate.sum(), learns)[0].any()
    assert route(logits.bfloat16(), bias.bfloat16(), 2).gate.dtype == torch.bfloat16


@each_way
def test_no_token(way, monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    found = route(torch.zeros(0, 7, device=way.device), torch.zeros(7, device=way.device), 3)
    assert found.index.shape == found.gate.shape == (0, 3) and found.counts.tolist() == [0] * 7


@each_way
def test_a_router_counts_each_pass_once(way, monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    router = Router(d_model=16, n_experts=7, top_k=3, device=way.device)
    x = way.normal(2, 20, 16, seed=0)
    valid = torch.ones(2, 20, dtype=torch.bool, device=way.device)
    valid[1, 15:] = False
    for _ in range(2):
        router(x, valid)
    assert router.load.sum().item() == 2 * 35 * 3
    router.eval()(x, valid)
    assert router.load.sum().item() == 2 * 35 * 3


@pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled here")
def test_float64_takes_the_plain_path(monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", True)
    assert route(torch.zeros(2, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), 2).counted is None


@pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled here")
def test_a_mask_of_numbers_is_refused():
    """Its bytes would be read, and most of them are zero."""
    from moemla.kernels.routing import route as in_one_pass

    with pytest.raises(ValueError, match="True or False"):
        in_one_pass(torch.zeros(5, 7), torch.zeros(7), torch.ones(5).long(), 2, False, False, True, 1.0)
