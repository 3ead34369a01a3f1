"""Chapter 4: a rotation turns the right pairs, and attention then sees order and distance alone.

`rope(x, positions)` turns x (B, H, T, K) by positions (1, T).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla.checks.compare import check, normal, require, same, same_with_gradients


def turned_by_hand(
    x: Float[Tensor, "b h t k"], positions: Int[Tensor, "c t"], layout: str = "halves", theta: float = 10000.0
) -> Float[Tensor, "b h t k"]:
    """Eq. 9 as complex numbers: each pair times e^(i m theta_p); "halves" pairs i with i + K/2."""
    width = x.shape[-1]
    order = torch.arange(width).view(2, -1) if layout == "halves" else torch.arange(width).view(-1, 2).T
    angles = positions[..., None] * theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    turned = torch.complex(x[..., order[0]], x[..., order[1]]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), -1)[..., order.flatten().argsort()]


@check
def turns_the_pairs(rope: Callable, width: int = 8, layout: str = "halves") -> None:
    """Outputs and gradients are those of eq. 9, pair by pair."""
    for heads, positions in ((1, [0]), (1, [1]), (2, [3, 0, 411])):
        x = normal(1, heads, len(positions), width).requires_grad_()
        here = torch.tensor([positions])
        what = f"x {tuple(x.shape)} at positions {positions} in layout {layout!r}"
        same_with_gradients(rope(x, here), turned_by_hand(x, here, layout), {"x": x}, what)


@check
def scores_by_distance(rope: Callable, width: int = 8) -> None:
    """Lengths stay, position 0 turns nothing, and a score depends on the distance alone, on each one differently."""
    q, k = normal(2, 1, 1, 1, width)

    def turn(x, m):
        return rope(x, torch.tensor([[m]]))

    def score(m, n):
        return (turn(q, m) * turn(k, n)).sum()

    require(torch.equal(turn(q, 0), q), f"position 0 turns x {tuple(q.shape)}")
    same(turn(q, 5).norm(), q.norm(), "length of a vector turned by position 5")
    require((turn(q, 5) - q).abs().max() > 0.01, f"position 5 turns x {tuple(q.shape)} by nothing")
    for m, n, by in ((0, 0, 1), (2, 7, 1), (7, 2, 90), (0, 0, 400), (300, 11, 200)):
        same(score(m + by, n + by), score(m, n), f"score of positions {m + by} and {n + by}, as of {m} and {n}")
    different = len({round(score(0, n).item(), 9) for n in range(64)})
    require(different == 64, f"64 distances have {different} scores")


@check
def layouts_differ_by_a_permutation(halves: Callable, interleaved: Callable, width: int = 8) -> None:
    """Interleaved is halves with the dimensions in another order, and not the same."""
    x, here = normal(1, 2, 9, width), torch.arange(9)[None]
    order = torch.arange(width).view(2, -1).T.flatten()  # interleaved place -> halves place
    same(interleaved(x[..., order], here), halves(x, here)[..., order], f"interleaved x {tuple(x.shape)}")
    require((interleaved(x, here) - halves(x, here)).abs().max() > 0.1, "both layouts turn the same pairs")


class Moved(nn.Module):
    """A rotation that believes every token to be `by` positions further on."""

    def __init__(self, rope: nn.Module, by: int):
        super().__init__()
        self.rope, self.by = rope, by

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        positions = torch.arange(x.shape[2])[None] if positions is None else positions
        return self.rope(x, positions + self.by)


@check
@torch.no_grad()
def order_and_distance(layer: nn.Module, width: int, rows: int = 2, tokens: int = 9, by: int = 100) -> None:
    """The past is no set, and moving all tokens by as many positions changes nothing. The layer's `rope` turns."""
    rope = layer.rope
    for steps in (3, tokens):
        x = normal(rows, steps, width)
        out, swapped = layer(x), layer(x[:, [1, 0, *range(2, steps)]])
        unseen = f"the order of the first two tokens of x {tuple(x.shape)} is invisible to the last"
        require((swapped[:, -1] - out[:, -1]).abs().max() > 1e-4, unseen)
        try:
            layer.rope = Moved(rope, by)
            moved = layer(x)
        finally:
            layer.rope = rope
        same(moved, out, f"x {tuple(x.shape)} with all positions moved by {by}")
