"""Slots sorted by expert without waiting for the counts: what the expert kernels walk along. M = N A slots.

A counting sort in two passes over the chosen experts. It is stable, uses no atomics, and nothing comes back to the
host: the number of row tiles is bounded instead (M / BLOCK_M full ones, and one ragged tile for each expert).
Built in chapter 11.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # slots of a program


class Dispatch(NamedTuple):
    """Where each slot went.

    order (M,): the slot in each row; place (M,): the row of each slot, -1 for an expert that does not exist;
    offsets (E + 1,): the first row of each expert, and the number of rows; tile_expert and tile_row (tiles,): expert
    and first row of each tile of `block_m` rows, expert E for a tile that is not needed. All int32.
    """

    order: Tensor
    place: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor


@triton.jit(do_not_specialize=["n_slots"])
def _count(index, counts, n_slots, n_experts, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    slot, lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    expert = tl.load(index + slot, mask=slot < n_slots, other=-1)
    expert = tl.where((expert >= 0) & (expert < n_experts), expert, -1).to(tl.int32)  # judged before it is narrowed
    chosen = (expert[:, None] == lane[None, :]).to(tl.int32)
    tl.store(counts + lane * tl.num_programs(0) + tl.program_id(0), tl.sum(chosen, axis=0), mask=lane < n_experts)


@triton.jit(do_not_specialize=["n_slots"])
def _place(index, first, order, place, n_slots, n_experts, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr):
    slot, lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    expert = tl.load(index + slot, mask=slot < n_slots, other=-1)
    expert = tl.where((expert >= 0) & (expert < n_experts), expert, -1).to(tl.int32)  # judged before it is narrowed
    chosen = (expert[:, None] == lane[None, :]).to(tl.int32)
    before = tl.cumsum(chosen, axis=0) - chosen  # slots of the same expert in this block, above
    start = tl.load(first + lane * tl.num_programs(0) + tl.program_id(0), mask=lane < n_experts, other=0)
    row = tl.sum(chosen * (before + start[None, :]), axis=1)
    real = (slot < n_slots) & (expert >= 0)
    tl.store(place + slot, tl.where(real, row, -1), mask=slot < n_slots)
    tl.store(order + row, slot, mask=real)


def dispatch(index: Tensor, n_experts: int, block_m: int) -> Dispatch:
    """index (N, A), the chosen experts -> `Dispatch` for tiles of `block_m` rows."""
    chosen = index.reshape(-1).contiguous()
    n_slots, int32 = chosen.numel(), dict(dtype=torch.int32, device=index.device)
    blocks = max(1, triton.cdiv(n_slots, BLOCK))
    counts = torch.empty(n_experts * blocks, **int32)  # an expert's blocks side by side: one sum says where each begins
    order, place = torch.zeros(n_slots, **int32), torch.empty(n_slots, **int32)
    tile = dict(BLOCK=BLOCK, BLOCK_E=max(16, triton.next_power_of_2(n_experts)))
    with torch.cuda.device_of(index):
        _count[(blocks,)](chosen, counts, n_slots, n_experts, **tile)
        ends = counts.cumsum(0, dtype=torch.int32)
        first = ends - counts
        _place[(blocks,)](chosen, first, order, place, n_slots, n_experts, **tile)
    offsets = torch.cat((first[::blocks], ends[-1:]))
    each = offsets.diff()
    tiles = (each + block_m - 1) // block_m
    ends = tiles.cumsum(0, dtype=torch.int32)
    number = torch.arange(triton.cdiv(n_slots, block_m) + min(n_experts, n_slots), **int32)
    expert = torch.searchsorted(ends, number, right=True, out_int32=True)
    known = expert.clamp(max=n_experts - 1)
    row = offsets[known] + (number - (ends - tiles)[known]) * block_m
    return Dispatch(order, place, offsets, expert, row)
