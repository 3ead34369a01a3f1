"""Rotary positions in one pass: each pair of a head is read once, turned in float32 and written once.

Built in chapter 10.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 32  # positions of a head that one program turns


# Lengths are not specialised on: another one compiles nothing anew. Strides are: where they are known to be multiples
# of 16 numbers, 16 bytes are loaded at once.
LENGTHS = ["first", "n_steps", "n_positions", "pos_b"]


@triton.jit(do_not_specialize=LENGTHS)
def _rope(
    x, out, cos, sin, positions, first, n_heads, n_steps, n_positions,
    x_b, x_h, x_t, x_k, out_b, out_h, out_t, out_k, pos_b, pos_t,
    half: tl.constexpr, GIVEN: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x (B, H, T, K) by strides; cos and sin (S, K/2) contiguous; one program: BLOCK_T positions of one head."""
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, head = (tl.program_id(0) // n_heads).to(tl.int64), (tl.program_id(0) % n_heads).to(tl.int64)
    pair = tl.arange(0, BLOCK_K)
    here = t < n_steps
    if GIVEN:
        where = tl.load(positions + row * pos_b + t * pos_t, mask=here, other=0)
    else:
        where = first + t
    inside = (where >= 0) & (where < n_positions)
    kept = here[:, None] & (pair < half)[None, :]
    place = where.to(tl.int64)[:, None] * half + pair[None, :]
    # Outside the table there is no angle: not a number, never another position's.
    c = tl.load(cos + place, mask=kept & inside[:, None], other=float("nan"))
    s = tl.load(sin + place, mask=kept & inside[:, None], other=float("nan"))
    if INVERSE:
        s = -s
    low = tl.where(INTERLEAVED, 2 * pair, pair).to(tl.int64)[None, :]
    high = tl.where(INTERLEAVED, 2 * pair + 1, pair + half).to(tl.int64)[None, :]
    x += row * x_b + head * x_h + t.to(tl.int64)[:, None] * x_t
    out += row * out_b + head * out_h + t.to(tl.int64)[:, None] * out_t
    a = tl.load(x + low * x_k, mask=kept).to(tl.float32)
    b = tl.load(x + high * x_k, mask=kept).to(tl.float32)
    tl.store(out + low * out_k, a * c - b * s, mask=kept)
    tl.store(out + high * out_k, b * c + a * s, mask=kept)


@torch.library.custom_op("moemla::rope", mutates_args=())
def rope(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, first: int, interleaved: bool, inverse: bool
) -> Tensor:
    """Turns x (B, H, T, K) by its positions (B or 1, T), or first .. first + T - 1; the result lies as x does.

    cos and sin (S, K/2) float32. `inverse` turns back, which is the gradient. ValueError for widths that do not fit.
    """
    batch, heads, steps, width = x.shape
    if cos.shape != sin.shape or cos.dim() != 2 or 2 * cos.shape[1] != width:
        right = f"must be (S, {width}/2) for heads of {width}"
        raise ValueError(f"cos.shape={tuple(cos.shape)}, sin.shape={tuple(sin.shape)}: {right}")
    if positions is not None and positions.shape not in ((batch, steps), (1, steps)):
        raise ValueError(f"positions.shape={tuple(positions.shape)}: must be ({batch} or 1, {steps})")
    if positions is not None and positions.is_floating_point():
        raise ValueError(f"positions.dtype={positions.dtype}: must be whole numbers")
    out = torch.empty_like(x)
    table = x if positions is None else positions
    strides = (0, 0) if positions is None else (positions.stride(0) * (len(positions) > 1), positions.stride(1))
    if x.numel():
        half = width // 2
        grid = (batch * heads, triton.cdiv(steps, BLOCK_T))  # only the first may be larger than 65,535
        with torch.cuda.device_of(x):
            _rope[grid](
                x, out, cos.contiguous(), sin.contiguous(), table, first, heads, steps, len(cos),
                *x.stride(), *out.stride(), *strides,
                half=half, GIVEN=positions is not None, INTERLEAVED=interleaved, INVERSE=inverse,
                BLOCK_T=BLOCK_T, BLOCK_K=triton.next_power_of_2(half),
            )  # fmt: skip
    return out


@rope.register_fake
def _(x, cos, sin, positions, first, interleaved, inverse):
    return torch.empty_like(x)


def _keep(ctx, inputs, output):
    _, cos, sin, positions, *ctx.turn = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, grad):
    first, interleaved, inverse = ctx.turn
    return rope(grad, *ctx.saved_tensors, first, interleaved, not inverse), *[None] * 6


rope.register_autograd(_backward, setup_context=_keep)
