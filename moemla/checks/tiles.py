"""Chapter 10: what chapters 4 and 6 ask, at sizes where tiles have ragged edges, and on tensors that are views."""

from collections.abc import Callable

import torch

from moemla.checks.compare import check, normal, require, same, same_with_gradients
from moemla.checks.rope import turned_by_hand

TURNS = ((1, 1), (2, 3), (1, 37), (3, 70))  # heads and tokens, the smallest first
VIEWS = {  # of rows three times as wide, (1, T, H, 3 K); the simplest first
    "": lambda wide, width: wide[..., :width].transpose(1, 2).contiguous(),
    ", a transposed view": lambda wide, width: wide[..., :width].contiguous().transpose(1, 2),
    ", cut from wider rows": lambda wide, width: wide[..., width : 2 * width].transpose(1, 2),
    ", every second column of wider rows": lambda wide, width: wide[..., : 2 * width : 2].transpose(1, 2),
}
ROUTINGS = ((1, 5, 2), (33, 62, 6), (70, 62, 6), (70, 64, 1))  # tokens, experts, chosen


@check
def turns_every_tile(rope: Callable, width: int = 10) -> None:
    """Outputs and gradients of eq. 9 for many tokens, of heads without gaps and of views into other tensors."""
    for lies, view in VIEWS.items():
        for heads, steps in TURNS:
            here = torch.arange(steps)[None]
            wide = normal(1, steps, heads, 3 * width).requires_grad_()
            x = view(wide, width)
            what = f"x {tuple(x.shape)}{lies}"
            same_with_gradients(rope(x, here), turned_by_hand(x, here), {"x": wide}, what)


@check
def routes_every_tile(route: Callable) -> None:
    """Choices, gates and gradients for many tokens with low scores: no lane of padding is an expert."""
    for tokens, n_experts, top_k in ROUTINGS:
        for low in (0, 30):
            logits = (normal(tokens, n_experts) - low).requires_grad_()
            bias = normal(n_experts) / 10 - 3
            said = f"top {top_k} of logits {tuple(logits.shape)}" + ", all low" * (low > 0)
            index, gate = route(logits, bias, top_k)
            right = (logits.sigmoid() + bias).topk(top_k).indices
            unlike = (index.sort().values != right.sort().values).any(-1).nonzero().flatten().tolist()
            require(not unlike, f"{said}: token {unlike[:1]} does not get the largest")
            chosen = logits.sigmoid().gather(1, index)
            same_with_gradients(gate, chosen / chosen.sum(-1, keepdim=True), {"the logits": logits}, f"{said}: gates")


@check
def equals_are_all_different(route: Callable) -> None:
    """Of equal scores k different experts are chosen, with equal gates."""
    for n_experts, top_k in ((5, 3), (62, 6)):
        index, gate = route(torch.zeros(3, n_experts, dtype=torch.float64), torch.zeros(n_experts).double(), top_k)
        said = f"top {top_k} of {n_experts} equal scores"
        require(all(len({*row}) == top_k for row in index.tolist()), f"{said}: {index[0].tolist()}")
        same(gate, torch.full_like(gate, 1 / top_k), f"{said}: gates")
