"""Tile sizes of the kernels with their warps and stages: what was fastest on a GPU (an H200), in one place.

A tile is as large as the widths it covers, up to what is named here, and what its stages hold must fit into the shared
memory of a program. `python -m tools.tune` tries others. Built in chapter 11.
"""

import torch
import triton
from torch import Tensor

ROOM = 101_376  # bytes of shared memory that a program can have on every GPU from compute capability 8.0 on
LARGE = 163_840  # and on an A100, about; an H100 has 232,448
ON_CHIP = 64  # hidden width up to which one kernel does the experts' forward pass
PROGRAMS = 132  # multiprocessors of an H100: as many programs of a decode, or twice as many where tiles are small

Meta = dict[str, int]


def room(tensor: Tensor) -> int:
    """Bytes of shared memory that one program may have where a tensor lies."""
    if not tensor.is_cuda:
        return ROOM
    return torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin


def block(width: int, most: int) -> int:
    """The power of two that covers a width, between 16 and `most`."""
    size = 16
    while size < min(width, most):  # comparisons alone: a width may be a symbol of the compiler
        size *= 2
    return size


# ---- experts


def rows(n_slots: int, n_experts: int, width: int) -> int:
    """Rows of a tile: about what an expert has, between 16 and 128, where experts are narrow 64."""
    return block(triton.cdiv(n_slots, n_experts), 64 if width <= ON_CHIP else 128)


def product(tensor: Tensor, block_m: int, n_in: int, n_out: int) -> Meta:
    """Rows of an expert times its matrix (I, O)."""
    if tensor.element_size() == 2 and n_out > 128 and block_m == 128:
        if room(tensor) >= LARGE:
            return dict(BLOCK_I=block(n_in, 64), BLOCK_O=256, num_warps=8, num_stages=3)
        return dict(BLOCK_I=block(n_in, 32), BLOCK_O=256, num_warps=8, num_stages=4)
    return dict(BLOCK_I=block(n_in, 32), BLOCK_O=block(n_out, 128), num_warps=4, num_stages=3)


def activate(tensor: Tensor, width: int) -> Meta:
    """The hidden layer of M rows, activated."""
    return dict(BLOCK_M=16, BLOCK_F=block(width, 256), num_warps=4)


def narrow(tensor: Tensor, block_m: int, width: int, d_model: int) -> Meta:
    """The whole expert with its hidden layer of `width` on the chip."""
    return dict(BLOCK_F=block(width, ON_CHIP), BLOCK_D=block(d_model, 64), num_warps=4, num_stages=3)


def hidden_backward(tensor: Tensor, block_m: int, width: int, d_model: int) -> Meta:
    """Gradients of the hidden layer and of the gates; BLOCK_F also says in how many parts a gate's gradient comes."""
    if tensor.element_size() == 2 and width > ON_CHIP and block_m == 128:
        return dict(BLOCK_F=64, BLOCK_D=block(d_model, 64), num_warps=8, num_stages=4)
    deep = 64 if tensor.element_size() == 2 else 32
    return dict(BLOCK_F=block(width, 64), BLOCK_D=block(d_model, deep), num_warps=4, num_stages=3)


def weight_gradient(tensor: Tensor, n_a: int, n_b: int) -> Meta:
    """The gradient of an expert's matrix (A, B), a sum over its rows."""
    if tensor.element_size() == 4:
        return dict(BLOCK_M=32, BLOCK_A=block(n_a, 64), BLOCK_B=block(n_b, 128), num_warps=4, num_stages=3)
    if min(n_a, n_b) <= ON_CHIP:
        return dict(BLOCK_M=128, BLOCK_A=block(n_a, 128), BLOCK_B=block(n_b, 128), num_warps=4, num_stages=3)
    return dict(BLOCK_M=64, BLOCK_A=block(n_a, 128), BLOCK_B=block(n_b, 128), num_warps=8, num_stages=3)


def sum_slots(tensor: Tensor, width: int) -> Meta:
    """A token's A rows, summed."""
    return dict(BLOCK_N=8, BLOCK_D=block(width, 512), num_warps=4)


def route() -> Meta:
    """Tokens of the router's tile: few, since each thread waits for itself in every round."""
    return dict(BLOCK_N=8, num_warps=4)


# ---- decode


def heads_of(heads: int, rank: int) -> int:
    """Heads of one program, whose sums (H, R) are held in registers."""
    return block(heads, min(64, max(16, 16_384 // block(rank, 1 << 20))))


def latent_decode(tensor: Tensor, heads: int, half: int, rank: int) -> Meta | None:
    """Slots of a tile, and what of the latents (S, R) is multiplied at once: all, where a tile of them can be held.

    None where not even the values of a small tile can be.
    """
    all_r, large = block(rank, 1 << 20), room(tensor) >= LARGE
    block_h, row = heads_of(heads, rank), all_r * tensor.element_size()
    head = 2 * block(half, 1 << 20) * row  # of W^Kr
    fits = lambda slots, stages: slots * row + stages * head <= room(tensor)  # noqa: E731
    if row > (1024 if large and tensor.element_size() == 2 else 512) or not fits(64, 2 if row <= 512 else 1):
        if 32 * row + head * min(64, all_r) // all_r > room(tensor):
            return None
        return dict(BLOCK_S=32, BLOCK_H=block_h, BLOCK_R=min(64, all_r), HELD=False, num_warps=4, num_stages=1)
    slots, stages = (128, 3) if large and row <= 512 and fits(128, 3) else (64, 2 if row <= 512 else 1)
    return dict(BLOCK_S=slots, BLOCK_H=block_h, BLOCK_R=all_r, HELD=True, num_warps=8, num_stages=stages)


def joint_decode(tensor: Tensor, heads: int, rank: int, rope: int) -> Meta | None:
    """Slots of a tile of joint rows (S, R + rope), and how many tiles are on their way; None where none fits."""
    size, most = tensor.element_size(), heads_of(heads, rank)
    row = (block(rank, 1 << 20) + block(rope, 1 << 20)) * size
    wide = ((32, 1), (16, 1)) if size == 4 else ((64 if rank + rope <= 352 else 32, 3), (32, 2), (16, 2))
    for (slots, stages), block_h in [*((tile, most) for tile in wide), (wide[-1], 16)]:
        held = (block_h + max(1, stages - 1) * slots) * row + block_h * slots * size  # queries, tiles, weights
        if held <= room(tensor):
            return dict(BLOCK_S=slots, BLOCK_H=block_h, num_warps=4, num_stages=stages)
    return None


def pieces(rows: int, n_slots: int, block_s: int) -> tuple[int, int]:
    """(slots of a piece, number of pieces): as many programs as a large GPU runs at once, and not one more.

    `rows`: of the batch, times the blocks of heads. One program more than there is room for waits until another has
    ended, and all take twice as long. A piece has at least 128 slots and is a multiple of a tile.
    """
    programs = PROGRAMS if block_s >= 128 else 2 * PROGRAMS
    wanted = max(1, min(programs // rows, triton.cdiv(n_slots, 128)))
    piece = triton.cdiv(triton.cdiv(n_slots, wanted), block_s) * block_s
    return piece, triton.cdiv(n_slots, piece)
