"""Chapter 11: slots sorted by expert, and experts in tiles of them, at counts around a tile's rows.

`dispatch(index (N, A), n_experts, block)` gives (order, place, offsets) first. `experts(x, w_in, w_out, index, gate)`
is chapter 6's. Kernels sum in float32: so all is given in it, and held against the loop in float64.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from moemla.checks.compare import check, gradients, in_float32, normal, require, same
from moemla.experts import loop

BLOCK = 16  # rows of a tile, where a function asks
CLOSE = 1e-4  # of float32 sums over a few dozen numbers
COUNTS = (15, 16, 17, 0, 1, 33)  # tokens of each expert: just under, at and just over a tile; none, one, two tiles
RANDOM = {  # tokens, experts, chosen: the smallest first; the last expert but one is never taken
    "one token": (1, 3, 2),
    "a few tokens": (7, 5, 3),
    "62 experts": (21, 62, 6),
}


def _routings() -> Iterator[tuple[str, Tensor, int]]:
    """Name, index (N, A) and the number of experts of each case."""
    for name, (tokens, n_experts, top_k) in RANDOM.items():
        score = torch.rand(tokens, n_experts)
        score[:, -2] = -1
        yield name, score.topk(top_k).indices, n_experts
    counts = torch.tensor(COUNTS)
    experts = torch.arange(len(COUNTS)).repeat_interleave(counts)
    yield (
        f"experts with {', '.join(map(str, COUNTS))} tokens",
        experts[torch.randperm(len(experts))][:, None],
        len(COUNTS),
    )
    yield "all to the last expert", torch.full((18, 1), 4), 5


def _case(index: Tensor, n_experts: int, d: int = 9, f: int = 5) -> dict[str, Tensor]:
    """x, w_in, w_out, index and gate in float32, with odd widths."""
    drawn = dict(x=normal(len(index), d), w_in=normal(n_experts, d, f), w_out=normal(n_experts, f, d))
    leaves = {name: tensor.float().requires_grad_() for name, tensor in drawn.items()}
    return leaves | dict(index=index, gate=torch.rand(index.shape, dtype=torch.float32).requires_grad_())


def _leaves(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in case.items() if name != "index"}


def _ends_with(case: dict[str, Tensor], experts: Callable, upstream: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients."""
    with in_float32():
        out = experts(*case.values())
        require(out.shape == upstream.shape, f"output {tuple(out.shape)}, wanted {tuple(upstream.shape)}")
        return out, gradients(out, _leaves(case).values(), upstream.to(out.dtype))


@check
def sorts_by_expert(dispatch: Callable) -> None:
    """order is the stable sort of the chosen experts: an expert's slots stay in their order."""
    for name, index, n_experts in _routings():
        with in_float32():
            order = dispatch(index.clone(), n_experts, BLOCK)[0].tolist()
        right = index.flatten().argsort(stable=True).tolist()
        said = f"{name}: index {tuple(index.shape)}, {n_experts} experts"
        require(len(order) == len(right), f"{said}: order has {len(order)} rows, not {len(right)}")
        wrong = [row for row in range(len(right)) if order[row] != right[row]]
        said += f": row {wrong[0]} has slot {order[wrong[0]]}, wanted {right[wrong[0]]}" if wrong else ""
        require(not wrong, said)


@check
def says_where(dispatch: Callable) -> None:
    """place is the row of each slot, offsets the first row of each expert, and the end."""
    for name, index, n_experts in _routings():
        with in_float32():
            _, place, offsets = (part.tolist() for part in dispatch(index.clone(), n_experts, BLOCK)[:3])
        chosen = index.flatten()
        counts = chosen.bincount(minlength=n_experts)
        said = f"{name}: index {tuple(index.shape)}, {n_experts} experts"
        right = [0, *counts.cumsum(0).tolist()]
        require(offsets == right, f"{said}: offsets {offsets[:8]}, wanted {right[:8]}" + " ..." * (len(right) > 8))
        right = chosen.argsort(stable=True).argsort().tolist()
        require(len(place) == len(right), f"{said}: place has {len(place)} slots, not {len(right)}")
        wrong = [slot for slot in range(len(right)) if place[slot] != right[slot]]
        said += f": slot {wrong[0]} is in row {place[wrong[0]]}, wanted {right[wrong[0]]}" if wrong else ""
        require(not wrong, said)


@check
def equals_loop_in_tiles(experts: Callable) -> None:
    """Outputs and every gradient are those of `moemla.experts.loop`, at counts around a tile."""
    for name, index, n_experts in _routings():
        case = _case(index, n_experts)
        wide = {key: t if key == "index" else t.detach().double().requires_grad_() for key, t in case.items()}
        wanted = loop(*wide.values(), "gelu")
        upstream = normal(*wanted.shape)
        said = f"{name}: x {tuple(case['x'].shape)}, w_in {tuple(case['w_in'].shape)}"
        out, slopes = _ends_with(case, experts, upstream)
        same(out, wanted, said, CLOSE)
        right = gradients(wanted, _leaves(wide).values(), upstream)
        for leaf, mine, other in zip(_leaves(case), slopes, right, strict=True):
            same(mine, other, f"{said}, gradient of {leaf}", CLOSE)


@check
def takes_views(experts: Callable) -> None:
    """Tokens cut from a larger tensor give what their copy gives; so do the gradients of a sum, one number for all."""
    case = _case(torch.tensor([[0, 2], [2, 1], [0, 1]]), 3)
    x = case["x"].detach()
    with in_float32():
        out = experts(*case.values())
        right = gradients(out, _leaves(case).values(), torch.ones_like(out))
        views = {
            "rows 4 to 6 of 7": torch.cat((torch.ones(4, x.shape[1]), x))[4:],
            "every second column": x.repeat_interleave(2, dim=1)[:, ::2],
        }
        for lies, view in views.items():
            same(experts(*(case | dict(x=view)).values()), out.detach(), f"x {tuple(x.shape)}, {lies}", CLOSE)
        slopes = torch.autograd.grad(experts(*case.values()).sum(), list(_leaves(case).values()))
        for leaf, mine, other in zip(_leaves(case), slopes, right, strict=True):
            same(mine, other, f"gradient of {leaf} by output.sum()", CLOSE)


@check
def nobodys_expert_gets_zeros(experts: Callable) -> None:
    """An expert without a row has gradients of zero, written by somebody, and not what memory held before."""
    for name, index, n_experts in _routings():
        case = _case(index, n_experts)
        rubbish = [torch.full_like(tensor, torch.nan) for tensor in case.values() if tensor.is_floating_point()]
        del rubbish  # what is made next may lie where these lay
        _, slopes = _ends_with(case, experts, normal(*case["x"].shape))
        idle = (index.flatten().bincount(minlength=n_experts) == 0).nonzero().flatten().tolist()
        for leaf, slope in zip(_leaves(case), slopes, strict=True):
            for e in idle if leaf.startswith("w_") else []:
                what = f"{name}: expert {e} has no token, and its gradient of {leaf}"
                same(slope[e], torch.zeros_like(slope[e]), what, 0.0)


@check
def experts_in_another_order(experts: Callable) -> None:
    """Experts in another order, and a token's choices in another order, change nothing."""
    for name, index, n_experts in _routings():
        x, w_in, w_out, index, gate = (tensor.detach() for tensor in _case(index, n_experts).values())
        order = torch.arange(n_experts).roll(1)
        with in_float32():
            out = experts(x, w_in, w_out, index, gate)
            moved = experts(x, w_in[order], w_out[order], order.argsort()[index], gate)
            turned = experts(x, w_in, w_out, index.flip(1), gate.flip(1))
        same(moved, out, f"{name}: output with experts in order {order.tolist()[:8]}", CLOSE)
        same(turned, out, f"{name}: output with each token's choices the other way round", CLOSE)


@check
def same_bits_again(experts: Callable) -> None:
    """The same call gives the same numbers to the last bit, gradients too."""
    for name, index, n_experts in _routings():
        case = _case(index, n_experts)
        upstream = normal(*case["x"].shape)
        (one, first), (two, second) = (_ends_with(case, experts, upstream) for _ in range(2))
        for what, a, b in zip(("output", *_leaves(case)), (one, *first), (two, *second), strict=True):
            gradient = "" if what == "output" else "gradient of "
            same(b, a.detach(), f"{name}: {gradient}{what}, the second time", 0.0)
