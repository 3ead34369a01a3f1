"""The whole layer: router, routed and shared experts, padding."""

import gc
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moemla.feedforward import activate
from moemla.moe import MixtureOfExperts
from tests.helpers import close, model_of, shake, tokens_of


def layer_of(dtype=torch.float64, **changes):
    settings = dict(d_model=6, n_experts=7, top_k=3, d_expert=5, n_shared=2) | changes
    layer = shake(MixtureOfExperts(dtype=dtype, **settings))
    layer.router.bias.normal_(std=0.1)
    return layer


HOWS = {
    "working": {},
    "literal": dict(scores="softmax", bias_in_gate=True),
    "raw gates": dict(renormalise=False, routed_scale=2.5),
    "no shared": dict(n_shared=0),
    "swiglu": dict(activation="swiglu"),
    "loop": dict(backend="loop"),
    "one of one": dict(n_experts=1, top_k=1),
}


def by_loops(layer, x, how):
    """Eqs. 1-2 for one token vector at a time: each shared expert on its own, each chosen expert by its gate."""
    activation = how.get("activation", "gelu")
    width = layer.experts.w_out.shape[1]
    n_shared = how.get("n_shared", 2)
    out = torch.zeros_like(x)
    for b, t in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        token = x[b, t]
        logits = layer.router.weight @ token
        score = torch.sigmoid if how.get("scores", "sigmoid") == "sigmoid" else lambda z: z.softmax(-1)
        biased = score(logits + layer.router.bias)
        plain = biased if how.get("bias_in_gate") else score(logits)
        picked_by = biased if how.get("bias_in_gate") else plain + layer.router.bias
        chosen = picked_by.argsort(descending=True)[: layer.router.top_k].tolist()
        gates = plain[chosen] / (plain[chosen].sum() if how.get("renormalise", True) else 1)
        for e, gate in zip(chosen, gates * how.get("routed_scale", 1.0), strict=True):
            hidden = activate(token @ layer.experts.w_in[e], activation)
            out[b, t] += gate * (hidden @ layer.experts.w_out[e])
        for s in range(n_shared):
            mine = slice(s * width, (s + 1) * width)
            up = layer.shared.up.weight
            if activation == "swiglu":  # all gates stand first, then all values
                value = up[n_shared * width :][mine]
                hidden = activate(torch.cat((up[: n_shared * width][mine] @ token, value @ token)), activation)
            else:
                hidden = activate(up[mine] @ token, activation)
            out[b, t] += layer.shared.down.weight[:, mine] @ hidden
    return out


@pytest.mark.parametrize("how", HOWS)
@torch.no_grad()
def test_against_loops(how):
    layer, x = layer_of(**HOWS[how]), torch.randn(2, 5, 6, dtype=torch.float64)
    close(layer(x), by_loops(layer, x, HOWS[how]), 1e-13)


def test_no_bias_terms():
    assert {name for name, _ in layer_of().named_parameters()} == {
        "router.weight", "experts.w_in", "experts.w_out", "shared.up.weight", "shared.down.weight"
    }  # fmt: skip
    assert layer_of(n_shared=0).shared is None


@pytest.mark.parametrize("n_shared", [0, 2])
@pytest.mark.parametrize("backend", ["masked", "loop"])
def test_padding_changes_nothing(backend, n_shared):
    layer = layer_of(backend=backend, n_shared=n_shared)
    x, valid = torch.randn(2, 5, 6, dtype=torch.float64), torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    noisy = torch.where(valid[..., None], x, 1e6 * torch.randn_like(x))
    out = layer(x, valid)
    first = layer.router.load.clone()
    assert first.sum() == 3 * 7
    again = layer(noisy, valid)
    assert torch.equal(layer.router.load, 2 * first)
    close(again[valid], out[valid], 1e-12)
    close(out[1:, :2], layer(x[1:, :2]), 1e-12)
    if not n_shared:
        assert out[~valid].abs().max() == 0
    grads = torch.autograd.grad(layer(noisy, valid)[valid].sum(), list(layer.parameters()))
    wanted = torch.autograd.grad(layer(x[:1])[0].sum() + layer(x[1:, :2]).sum(), list(layer.parameters()))
    for ours, theirs in zip(grads, wanted, strict=True):
        close(ours, theirs, 1e-10)


@torch.no_grad()
def test_permuting_experts_changes_nothing():
    layer, twin = layer_of(), layer_of()
    order, x = torch.randperm(7), torch.randn(2, 5, 6, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    for tensor in (twin.router.weight, twin.router.bias, twin.experts.w_in, twin.experts.w_out):
        tensor.copy_(tensor[order].clone())
    close(twin(x), layer(x), 1e-13)
    assert torch.equal(twin.router.last.counts, layer.router.last.counts[order])


def test_the_router_learns_from_the_output():
    layer, x = layer_of(), torch.randn(2, 5, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in layer.parameters())


def test_gradcheck_through_the_layer():
    layer = layer_of(d_model=3, n_experts=4, top_k=2, d_expert=2, n_shared=1)
    x = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,), rtol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_once_and_changes_no_gradient(reentrant):
    plain, saving = layer_of(), layer_of()
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        plain(x).square().sum().backward()
        checkpoint(saving, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(plain.router.load, saving.router.load)
    assert saving.router.load.sum() == 2 * 3 * 10
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-12)


def test_bfloat16_keeps_the_router_in_float32():
    layer = layer_of(dtype=torch.float32)
    narrow = layer_of(dtype=torch.bfloat16)
    assert narrow.router.weight.dtype == torch.float32
    x = torch.randn(4, 25, 6)
    out = layer.bfloat16()(x.bfloat16())
    assert out.dtype == torch.bfloat16
    assert layer.router.weight.dtype == layer.router.bias.dtype == torch.float32
    assert layer.router.last.gate.dtype == torch.float32


def test_one_token_and_none():
    layer = layer_of()
    assert layer(torch.randn(1, 1, 6, dtype=torch.float64)).shape == (1, 1, 6)
    assert layer(torch.randn(0, 4, 6, dtype=torch.float64)).shape == (0, 4, 6)


def test_a_pass_without_backward_leaves_nothing_behind():
    """Whatever autograd saved on the way is gone with the loss, though the routing can still be looked at."""

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # else an output that its own node saves would hold itself
            saved.append(weakref.ref(self))

    saved, model = [], model_of(n_layers=3).train()
    text = tokens_of(2, 9)
    with saved_tensors_hooks(Saved, lambda held: held.tensor):
        loss = model(text[:, :-1], text[:, 1:])
    assert len(model.routing()) == 3 and sum(ref() is not None for ref in saved) > 30
    del loss
    gc.collect()
    assert not any(ref() for ref in saved)
    assert [routing.counts.sum() for routing in model.routing()] == [2 * 8 * 3] * 3
