"""Chapter 12: one new token against a cache of latents, tile by tile and piece by piece.

`call(cut=None, **tensors)` gives (B, H, R). Kernels sum in float32: all is given in it, and held against one softmax
over whole rows in float64. `kind` is "joint" or "latent", which says what the tensors are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moemla.attention import attend_shared, split_heads
from moemla.checks.compare import check, in_float32, normal, require, same
from moemla.rope import RotaryEmbedding

CLOSE = 1e-4  # of float32 sums over a few hundred numbers
SCALE = 0.3  # no power of any width
SIZES = ((1, 1, 1, 2, 1), (1, 3, 2, 4, 3), (2, 20, 3, 6, 5), (3, 70, 3, 10, 24), (1, 150, 17, 8, 40))
CUTS = ((16, 16), (17, 16), (40, 32), (256, 64))  # slots of a piece and of a tile, where a function asks
ROOM = 5  # slots of a storage beyond those that are held


@dataclass
class Case:
    """What a function is called with, by name, which of it are caches, and the slots that each row holds."""

    tensors: dict[str, Tensor]
    caches: tuple[str, ...]
    ends: list[int]
    rank: int

    @property
    def said(self) -> str:
        """The sizes, for a line."""
        shapes = (f"{name} {tuple(self.tensors[name].shape)}" for name in ("q", *self.caches))
        return f"{', '.join(shapes)}, lengths {self.ends}"

    def wanted(self) -> Tensor:
        """One softmax over each row, in float64; what a row does not hold is not looked at."""
        wide = {name: tensor.double() for name, tensor in self.tensors.items()}
        q, keys = wide["q"], wide[self.caches[0]].nan_to_num()
        values, heads = wide[self.caches[-1]].nan_to_num(), q.shape[1]
        if "weight" in wide:
            turn = RotaryEmbedding(q.shape[2], keys.shape[1], dtype=torch.float64)
            keys = turn(split_heads(keys @ wide["weight"].mT, heads))
        else:
            keys = keys[:, None]
        seen = torch.arange(keys.shape[2]) < torch.tensor(self.ends)[:, None]
        return attend_shared(q[:, :, None], keys, values, seen[:, None, None], SCALE)[:, :, 0, : self.rank]


def _case(kind: str, rows: int, slots: int, heads: int, width: int, rank: int, ragged: bool = False) -> Case:
    if kind == "joint":
        drawn = dict(q=normal(rows, heads, rank + width), joint=normal(rows, slots, rank + width))
    else:
        drawn = dict(
            q=normal(rows, heads, width), k_latent=normal(rows, slots, rank), v_latent=normal(rows, slots, rank)
        )
        drawn["weight"] = normal(heads * width, rank) / rank**0.5
        table = RotaryEmbedding(width, slots + ROOM, dtype=torch.float64)
        drawn |= dict(cos=table.cos, sin=table.sin)
    caches = ("joint",) if kind == "joint" else ("k_latent", "v_latent")
    ends = [slots, 1, (slots + 1) // 2][:rows] if ragged else [slots] * rows
    return Case({name: tensor.float() for name, tensor in drawn.items()}, caches, ends, rank)


def _compare(call: Callable, case: Case, what: str = "", cut: tuple[int, int] | None = None) -> None:
    lengths = torch.tensor(case.ends, dtype=torch.int32)
    given_rank = {} if "weight" in case.tensors else dict(rank=case.rank)
    with in_float32(), torch.no_grad():
        out = call(cut=cut, **case.tensors, **given_rank, lengths=lengths, scale=SCALE)
    same(out, case.wanted(), f"{case.said}{what}", CLOSE)


@check
def equals_one_softmax(call: Callable, kind: str) -> None:
    """The mean of all slots that attention in one piece gives."""
    for sizes in SIZES:
        _compare(call, _case(kind, *sizes))


@check
def rows_end_where_they_end(call: Callable, kind: str) -> None:
    """Each row sees its own slots: behind them is not-a-number, which no share of zero hides."""
    for rows, slots, heads, width, rank in ((2, 3, 1, 2, 2), (3, 20, 2, 6, 5), (3, 150, 3, 10, 24)):
        case = _case(kind, rows, slots, heads, width, rank, ragged=True)
        for cache in case.caches:
            for row, end in enumerate(case.ends):
                case.tensors[cache][row, end:] = torch.nan
        _compare(call, case, ", NaN behind them")


@check
def takes_views(call: Callable, kind: str) -> None:
    """Caches are views of longer storages, which lie differently."""
    for sizes in ((2, 3, 1, 2, 2), (3, 70, 3, 10, 24)):
        case = _case(kind, *sizes)
        for number, cache in enumerate(case.caches):
            held = case.tensors[cache]
            rows, slots, width = held.shape
            storage = held.new_full((rows, slots + ROOM, width + 3 * number), torch.nan)
            storage[:, :slots, :width] = held
            case.tensors[cache] = storage[:, :slots, :width]
        _compare(call, case, ", views of longer storages")


@check
def large_scores(call: Callable, kind: str) -> None:
    """Scores in the hundreds, whose exponentials are no float32, in rows where they rise towards the end."""
    for sizes in ((1, 3, 1, 2, 1), (2, 70, 2, 6, 5)):
        case = _case(kind, *sizes)
        rising = torch.linspace(0, 40, sizes[1], dtype=torch.float32)[:, None]
        case.tensors[case.caches[0]] *= rising
        _compare(call, case, ", large scores")


@check
def any_cut(call: Callable, kind: str) -> None:
    """Pieces and tiles of any size give the same."""
    for cut in CUTS:
        for sizes in ((1, 3, 2, 4, 3), (3, 70, 3, 10, 24)):
            _compare(call, _case(kind, *sizes, ragged=True), f", piece {cut[0]}, block {cut[1]}", cut)


@check
def online_softmax(call: Callable) -> None:
    """call(scores (H, S), values (S, W), block) is softmax(scores) @ values, whatever the order of the scores."""
    for heads, slots, block in ((1, 1, 1), (1, 2, 1), (2, 7, 3), (3, 40, 16)):
        values = normal(slots, 5).float().double()
        risen = 200 / slots * torch.arange(1, heads * slots + 1, dtype=torch.float64).view(heads, slots)
        for name, scores in (("random", normal(heads, slots)), ("rising", risen), ("falling", -risen)):
            for hidden in (0, slots // 2):
                scores = scores.float().double()
                scores[-1, :hidden] = -torch.inf
                with in_float32():
                    out = call(scores.float(), values.float(), block)
                what = f"scores ({heads}, {slots}), {name}, the first {hidden} of the last head hidden, block {block}"
                same(out, scores.softmax(1) @ values, what, CLOSE)


@check
def merges_pieces(call: Callable) -> None:
    """call(means (B, P, H, W), logs (B, P, H)): shares are those of the exponentials; one of -inf takes no part."""
    for rows, parts, heads, width in ((1, 1, 1, 1), (1, 2, 1, 1), (2, 5, 3, 4)):
        means, logs = normal(rows, parts, heads, width), 100 * normal(rows, parts, heads)
        logs[0, : parts - 1] = -torch.inf
        means[0, : parts - 1] = 0
        with in_float32():
            out = call(means.float(), logs.float())
        shape = f"means {tuple(means.shape)}, all but the last of row 0 empty"
        require(isinstance(out, Tensor), f"{shape}: gives {type(out).__name__}, not a tensor")
        same(out, (logs.float().double().softmax(1)[..., None] * means).sum(1), shape, CLOSE)
