"""Chapters 6 and 7: who is chosen and with what weight, routed experts against the loop, shared ones against one layer.

`route(logits (N, E), bias (E,), top_k)` gives `(index, gate)`, (N, k) each. `experts(x, w_in, w_out, index, gate)` is
(N, D), (E, D, F), (E, F, D), (N, k), (N, k) -> (N, D).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moemla.checks.compare import check, normal, require, same, same_with_gradients
from moemla.experts import loop
from moemla.feedforward import activate, width_in

ROUTINGS = ((1, 1, 1), (1, 2, 1), (1, 3, 2), (2, 4, 4), (9, 7, 3))  # tokens, experts, chosen: the smallest first
CASES = {  # tokens, experts, chosen (or the expert that all take), model width, expert width
    "one token": (1, 1, 1, 1, 1),
    "one token, odd widths": (1, 3, 2, 3, 1),
    "all experts chosen": (3, 4, 4, 2, 3),
    "all to one": (6, 7, [4], 5, 3),
    "all to the last": (6, 7, [6], 5, 3),
    "no token for some": (2, 7, 2, 5, 6),
    "many": (9, 7, 3, 5, 6),
    "62 experts": (7, 62, 6, 5, 6),
    "no token": (0, 7, 3, 5, 6),
}


def plain_scores(logits: Float[Tensor, "n e"], scores: str) -> Float[Tensor, "n e"]:
    """What weighs: the sigmoid of each logit, or the softmax of all."""
    return logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)


def spread(index: Int[Tensor, "n a"], gate: Float[Tensor, "n a"], n_experts: int) -> Float[Tensor, "n e"]:
    """The gates at their experts' places, (N, k) -> (N, E): the same for chosen experts in any order."""
    return gate.new_zeros(len(index), n_experts).scatter_add(1, index, gate)


def _drawn(tokens: int, n_experts: int, with_bias: bool = True) -> tuple[Tensor, list[Tensor]]:
    """Logits, and two biases: none, and one that moves the choice; only the first unless `with_bias`."""
    drawn, biases = 2 * normal(tokens, n_experts), [torch.zeros(n_experts, dtype=torch.float64), normal(n_experts)]
    return drawn, biases if with_bias else biases[:1]


def _said(logits: Tensor, bias: Tensor, top_k: int) -> str:
    said = f"top {top_k} of logits {tuple(logits.shape)}"
    if len(logits) > 1:
        return said
    numbers = (" ".join(f"{z:.3g}" for z in row) for row in (logits[0].tolist(), bias.tolist()))
    return f"{said} (logits; bias: {'; '.join(numbers)})"


@check
def chooses_the_largest(route: Callable, scores: str = "sigmoid", with_bias: bool = True) -> None:
    """The chosen are the k largest of score + bias (of logit + bias with softmax), each once."""
    for tokens, n_experts, top_k in ROUTINGS:
        logits, biases = _drawn(tokens, n_experts, with_bias)
        for bias in biases:
            index, _ = route(logits, bias, top_k)
            said = _said(logits, bias, top_k)
            require(index.shape == (tokens, top_k), f"{said}: index {tuple(index.shape)}")
            biased = (plain_scores(logits, scores) if scores == "sigmoid" else logits) + bias
            pairs = zip(index.sort().values.tolist(), biased.topk(top_k).indices.sort().values.tolist(), strict=True)
            for n, (ours, right) in enumerate(pairs):
                require(ours == right, f"{said}: token {n} gets experts {ours}, the largest with bias are {right}")


@check
def gates_are_shares(route: Callable, scores: str = "sigmoid", with_bias: bool = True) -> None:
    """Gates are the chosen plain scores over their sum, and so is their gradient: the bias does not weigh."""
    for tokens, n_experts, top_k in ROUTINGS:
        logits, biases = _drawn(tokens, n_experts, with_bias)
        logits.requires_grad_()
        for bias in biases:
            index, gate = route(logits, bias, top_k)
            said = _said(logits, bias, top_k)
            same(gate.sum(-1), torch.ones(tokens, dtype=gate.dtype), f"{said}: sum of a token's gates")
            chosen = plain_scores(logits, scores).gather(1, index)
            wanted = spread(index, chosen / chosen.sum(-1, keepdim=True), n_experts)
            leaves = {"the logits": logits}
            same_with_gradients(spread(index, gate, n_experts), wanted, leaves, f"{said}: gates by token and expert")


@check
def bias_only_chooses(route: Callable) -> None:
    """A bias high enough makes all tokens choose an expert; the same for all experts changes nothing."""
    for tokens, n_experts, top_k in ROUTINGS:
        logits, (_, bias) = _drawn(tokens, n_experts)
        said = _said(logits, bias, top_k)
        before = spread(*route(logits, bias, top_k), n_experts)
        after = spread(*route(logits, bias - 5.25, top_k), n_experts)
        same(after, before, f"{said}: gates with 5.25 taken off every bias")
        lifted = bias.clone()
        lifted[-1] += 100
        chosen = (route(logits, lifted, top_k)[0] == n_experts - 1).any(-1)
        missed = int(chosen.int().argmin())
        require(chosen.all(), f"{said}: bias 100 higher, and token {missed} does not choose the last expert")


@check
def permuting_experts_permutes_the_routing(route: Callable, with_bias: bool = True) -> None:
    """Experts in another order are chosen and weighed as before."""
    for tokens, n_experts, top_k in ROUTINGS:
        logits, (*_, bias) = _drawn(tokens, n_experts, with_bias)
        order = torch.arange(n_experts).roll(1)
        actual = spread(*route(logits[:, order], bias[order], top_k), n_experts)
        wanted = spread(*route(logits, bias, top_k), n_experts)[:, order]
        same(actual, wanted, f"{_said(logits, bias, top_k)}: gates with experts in order {order.tolist()}")


def _case(tokens: int, n_experts: int, top_k: int | list[int], d: int, f: int, activation: str) -> dict[str, Tensor]:
    if isinstance(top_k, list):
        index = torch.tensor(top_k).expand(tokens, -1)
    else:
        index = torch.rand(tokens, n_experts).topk(top_k).indices
    gate = torch.rand(index.shape, dtype=torch.float64).requires_grad_()
    x, w_in = normal(tokens, d).requires_grad_(), normal(n_experts, d, width_in(f, activation)).requires_grad_()
    return dict(x=x, w_in=w_in, w_out=normal(n_experts, f, d).requires_grad_(), index=index, gate=gate)


@check
def equals_loop(experts: Callable, activation: str = "gelu") -> None:
    """Outputs and every gradient are those of `moemla.experts.loop`, from one token to none."""
    for name, sizes in CASES.items():
        case = _case(*sizes, activation)
        leaves = {key: value for key, value in case.items() if key != "index"}
        what = f"{name}: x {tuple(case['x'].shape)}, w_in {tuple(case['w_in'].shape)}"
        same_with_gradients(experts(*case.values()), loop(*case.values(), activation), leaves, what)


@check
def permuting_experts_changes_nothing(experts: Callable, activation: str = "gelu") -> None:
    """Experts in another order, and a token's choices in another order, give the same output."""
    for name, sizes in CASES.items():
        x, w_in, w_out, index, gate = (t.detach() for t in _case(*sizes, activation).values())
        out, order = experts(x, w_in, w_out, index, gate), torch.arange(len(w_in)).roll(1)
        moved = experts(x, w_in[order], w_out[order], order.argsort()[index], gate)
        same(moved, out, f"{name}: output with experts in order {order.tolist()}")
        turned = experts(x, w_in, w_out, index.flip(1), gate.flip(1))
        same(turned, out, f"{name}: output with each token's choices the other way round")


@check
def padding_changes_nothing(
    layer: Callable, width: int, counts: Callable | None = None, top_k: int = 1, shared: bool = False
) -> None:
    """layer(x, valid), (B, T, D) and (B, T): what stands at padding changes no real token and takes no expert.

    counts() is the last pass's (E,). Without `shared` experts the output at padding is zero.
    """
    for rows, tokens in ((1, 2), (2, 5)):
        x, valid = normal(rows, tokens, width), torch.ones(rows, tokens, dtype=torch.bool)
        valid[-1, tokens // 2 :] = False
        said = f"x {tuple(x.shape)}, the last row padded from {tokens // 2} on"
        out, alone = layer(x, valid), layer(x[-1:, : tokens // 2], valid[-1:, : tokens // 2])
        same(out[-1:, : tokens // 2], alone, f"{said}: the last row's tokens against them alone")
        noisy = layer(torch.where(valid[..., None], x, 1e6 * normal(rows, tokens, width)), valid)
        same(noisy[valid], out[valid], f"{said}: real tokens with other padding")
        if not shared:
            same(out[~valid], torch.zeros_like(out[~valid]), f"{said}: output at padding")
        if counts is not None:
            counted, real = int(counts().sum()), top_k * int(valid.sum())
            require(counted == real, f"{said}: {counted} slots counted, {real} are real tokens'")


@check
def shared_equal_one_layer(shared: Callable, activation: str = "gelu") -> None:
    """shared(x, w_in (S, D, F), w_out (S, F, D)) is one dense layer of width S F, in outputs and gradients."""
    for tokens, n_shared, d, f in ((1, 1, 1, 1), (1, 2, 2, 1), (6, 3, 5, 4)):
        x, w_in = normal(tokens, d).requires_grad_(), normal(n_shared, d, width_in(f, activation)).requires_grad_()
        w_out = normal(n_shared, f, d).requires_grad_()
        parts = w_in.unflatten(2, (-1, f)).permute(1, 2, 0, 3).flatten(1)  # swiglu: all gates first, then all values
        wanted = activate(x @ parts, activation) @ w_out.flatten(0, 1)
        leaves = dict(x=x, w_in=w_in, w_out=w_out)
        what = f"x {(tokens, d)} through shared w_in {tuple(w_in.shape)}"
        same_with_gradients(shared(x, w_in, w_out), wanted, leaves, what)
