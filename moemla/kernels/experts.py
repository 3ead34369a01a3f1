"""Routed experts as grouped products over sorted slots, forward and backward, without copies of the tokens.

A program takes BLOCK_M rows of one expert and gathers their tokens while it multiplies. Kept for the backward pass is
the hidden layer before its activation, (M, F): neither the gathered tokens, nor the activated layer, nor the experts'
outputs. Where experts are narrow (F up to `tiling.ON_CHIP`), the forward pass is one kernel and the activated layer
never leaves the chip. Each token's A rows are then summed in their order: no atomics, the same sum each time.
M = N A slots; products are summed in float32. Built in chapter 11.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moemla.kernels import tiling
from moemla.kernels.dispatch import Dispatch, dispatch

GELU, SWIGLU = tl.constexpr(0), tl.constexpr(1)
_KINDS = {"gelu": GELU.value, "swiglu": SWIGLU.value}


# --- the activation, in float32


@triton.jit
def _silu(z):
    return z / (1 + tl.exp(-z))


@triton.jit
def _gelu(z):
    return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_slope(z):
    bell = tl.exp(-0.5 * z * z) * 0.3989422804014327
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * bell


@triton.jit
def _hidden(z, row, col, mask, width, KIND: tl.constexpr):
    """Activated columns `col` of the hidden layer from z (M, F; 2F for SwiGLU), float32; 0 outside the mask."""
    if KIND == SWIGLU:
        at = z + row * (2 * width) + col
        return _silu(tl.load(at, mask=mask, other=0.0).to(tl.float32)) * tl.load(at + width, mask=mask, other=0.0).to(
            tl.float32
        )
    value = tl.load(z + row * width + col, mask=mask, other=0.0).to(tl.float32)
    return _gelu(value)


# --- rows of an expert times its matrix


@triton.jit
def _product(
    a, w, c, order, offsets, tile_expert, tile_row, n_in, n_out, n_experts, a_row, w_e, w_i, w_o,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """c (M, O) = rows of a times w[e] (I, O): of a (M, I), or of tokens gathered from a (N, I)."""
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= n_experts:
        return
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    real = row < tl.load(offsets + expert + 1)
    slot = tl.load(order + row, mask=real, other=0)
    source = (slot // TOP_K if GATHER else row).to(tl.int64)
    col = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    w += expert.to(tl.int64) * w_e
    total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for start in range(0, n_in, BLOCK_I):
        i = start + tl.arange(0, BLOCK_I)
        left = tl.load(a + source[:, None] * a_row + i[None, :], mask=real[:, None] & (i < n_in)[None, :], other=0.0)
        right = tl.load(
            w + i[:, None] * w_i + col[None, :] * w_o, mask=(i < n_in)[:, None] & (col < n_out)[None, :], other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    place = row.to(tl.int64)[:, None] * n_out + col[None, :]
    tl.store(c + place, total, mask=real[:, None] & (col < n_out)[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def _activate(
    z, h, gate, order, n_rows, width, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """h (M, F) = gate act(z): once for each number, where a product would do it again for each of its tiles."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    weight = tl.load(gate + tl.load(order + row, mask=row < n_rows, other=0), mask=row < n_rows, other=0.0)
    mask = (row < n_rows)[:, None] & (f < width)[None, :]
    hidden = _hidden(z, row[:, None], f[None, :], mask, width, KIND) * weight.to(tl.float32)[:, None]
    tl.store(h + row[:, None] * width + f[None, :], hidden, mask=mask)


@triton.jit
def _narrow(
    x, w_in, w_out, z, y, gate, order, offsets, tile_expert, tile_row, n_in, width, n_experts, x_row,
    TOP_K: tl.constexpr, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y (M, D) = gate act(x w_in[e]) w_out[e] with the whole hidden layer of BLOCK_M rows on the chip; z is kept."""
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= n_experts:
        return
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    real = row < tl.load(offsets + expert + 1)
    slot = tl.load(order + row, mask=real, other=0)
    token = (slot // TOP_K).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    columns = width * 2 if KIND == SWIGLU else width
    w_in += expert.to(tl.int64) * n_in * columns
    w_out += expert.to(tl.int64) * width * n_in
    first = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in range(0, n_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left = tl.load(x + token[:, None] * x_row + d[None, :], mask=real[:, None] & (d < n_in)[None, :], other=0.0)
        at = w_in + d[:, None] * columns + f[None, :]
        mask = (d < n_in)[:, None] & (f < width)[None, :]
        first = tl.dot(left, tl.load(at, mask=mask, other=0.0), first, input_precision="ieee")
        if KIND == SWIGLU:
            second = tl.dot(left, tl.load(at + width, mask=mask, other=0.0), second, input_precision="ieee")
    kept = real[:, None] & (f < width)[None, :]
    at = z + row.to(tl.int64)[:, None] * columns + f[None, :]
    tl.store(at, first, mask=kept)
    if KIND == SWIGLU:
        tl.store(at + width, second, mask=kept)
        hidden = _silu(first) * second
    else:
        hidden = _gelu(first)
    hidden = (hidden * tl.load(gate + slot, mask=real, other=0.0).to(tl.float32)[:, None]).to(y.dtype.element_ty)
    for start in range(0, n_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        right = tl.load(
            w_out + f[:, None] * n_in + d[None, :], mask=(f < width)[:, None] & (d < n_in)[None, :], other=0.0
        )
        out = tl.dot(hidden, right, input_precision="ieee")
        tl.store(y + row.to(tl.int64)[:, None] * n_in + d[None, :], out, mask=real[:, None] & (d < n_in)[None, :])


@triton.jit(do_not_specialize=["n_tokens"])
def _sum_slots(
    y, place, out, n_tokens, width, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out (N, D): for each token the sum of its A rows of y (M, D), in the order of its slots."""
    token = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    real = token < n_tokens
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + j, mask=real, other=0).to(tl.int64)
        mask = (real & (row >= 0))[:, None] & (d < width)[None, :]
        part = tl.load(y + row[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.where((row >= 0)[:, None], part, float("nan"))  # an expert that does not exist has no output
    tl.store(out + token[:, None] * width + d[None, :], total, mask=real[:, None] & (d < width)[None, :])


# --- backward


@triton.jit(do_not_specialize=["n_slots"])
def _hidden_backward(
    grad, w_out, z, h, grad_z, grad_gate, gate, order, offsets, tile_expert, tile_row, n_slots, n_out, width,
    n_experts, grad_row, TOP_K: tl.constexpr, KIND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_F columns: grad_z = gate act'(z) u, h = gate act(z), a part of grad_gate = act(z) . u; u = grad w_out^T."""
    expert = tl.load(tile_expert + tl.program_id(0))
    if expert >= n_experts:
        return
    row = tl.load(tile_row + tl.program_id(0)) + tl.arange(0, BLOCK_M)
    real = row < tl.load(offsets + expert + 1)
    slot = tl.load(order + row, mask=real, other=0)
    token = (slot // TOP_K).to(tl.int64)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    w_out += expert.to(tl.int64) * width * n_out
    u = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    for start in range(0, n_out, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        left = tl.load(
            grad + token[:, None] * grad_row + d[None, :], mask=real[:, None] & (d < n_out)[None, :], other=0.0
        )
        right = tl.load(
            w_out + f[None, :] * n_out + d[:, None], mask=(f < width)[None, :] & (d < n_out)[:, None], other=0.0
        )
        u = tl.dot(left, right, u, input_precision="ieee")
    weight = tl.load(gate + slot, mask=real, other=0.0).to(tl.float32)[:, None]
    mask = real[:, None] & (f < width)[None, :]
    hidden = _hidden(z, row.to(tl.int64)[:, None], f[None, :], mask, width, KIND)
    tl.store(grad_gate + tl.program_id(1).to(tl.int64) * n_slots + slot, tl.sum(hidden * u, axis=1), mask=real)
    tl.store(h + row.to(tl.int64)[:, None] * width + f[None, :], hidden * weight, mask=mask)
    u *= weight
    if KIND == SWIGLU:
        at = row.to(tl.int64)[:, None] * (2 * width) + f[None, :]
        first = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(z + at + width, mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1 / (1 + tl.exp(-first))
        tl.store(grad_z + at, u * second * sigmoid * (1 + first * (1 - sigmoid)), mask=mask)
        tl.store(grad_z + at + width, u * first * sigmoid, mask=mask)
    else:
        at = row.to(tl.int64)[:, None] * width + f[None, :]
        value = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_z + at, u * _gelu_slope(value), mask=mask)


@triton.jit
def _weight_gradient(
    a, b, c, order, offsets, n_a, n_b, a_row, b_row,
    TOP_K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """c[e] (A, B) = sum over the rows of e of a^T b, one of them gathered. Zero for an expert without rows."""
    expert = tl.program_id(0)
    i, o = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A), tl.program_id(2) * BLOCK_B + tl.arange(0, BLOCK_B)
    first, last = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(first, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        real = row < last
        token = tl.load(order + row, mask=real, other=0) // TOP_K
        source = (token if GATHER_A else row).to(tl.int64)
        left = tl.load(a + source[:, None] * a_row + i[None, :], mask=real[:, None] & (i < n_a)[None, :], other=0.0)
        source = (token if GATHER_B else row).to(tl.int64)
        right = tl.load(b + source[:, None] * b_row + o[None, :], mask=real[:, None] & (o < n_b)[None, :], other=0.0)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    at = c + expert.to(tl.int64) * n_a * n_b + i.to(tl.int64)[:, None] * n_b + o[None, :]
    tl.store(at, total, mask=(i < n_a)[:, None] & (o < n_b)[None, :])


# --- the two operators


def _rows_of(a, w, c, where: Dispatch, top_k: int, block_m: int, transposed=False, gather=False) -> None:
    n_in, n_out = (w.shape[2], w.shape[1]) if transposed else (w.shape[1], w.shape[2])
    w_i, w_o = (w.stride(2), w.stride(1)) if transposed else (w.stride(1), w.stride(2))
    tile = tiling.product(a, block_m, n_in, n_out)
    _product[(len(where.tile_expert), triton.cdiv(n_out, tile["BLOCK_O"]))](
        a, w, c, where.order, where.offsets, where.tile_expert, where.tile_row,
        n_in, n_out, len(w), a.stride(0), w.stride(0), w_i, w_o,
        TOP_K=top_k, GATHER=gather, BLOCK_M=block_m, **tile,
    )  # fmt: skip


def _activated(z, gate, where: Dispatch, width: int, kind: int) -> Tensor:
    h, tile = z.new_empty(len(z), width), tiling.activate(z, width)
    grid = triton.cdiv(len(z), tile["BLOCK_M"]), triton.cdiv(width, tile["BLOCK_F"])
    _activate[grid](z, h, gate, where.order, len(z), width, KIND=kind, **tile)
    return h


def _summed(y, where: Dispatch, n_tokens: int, top_k: int) -> Tensor:
    width = y.shape[1]
    out, tile = y.new_empty(n_tokens, width), tiling.sum_slots(y, width)
    grid = triton.cdiv(n_tokens, tile["BLOCK_N"]), triton.cdiv(width, tile["BLOCK_D"])
    _sum_slots[grid](y, where.place, out, n_tokens, width, TOP_K=top_k, **tile)
    return out


def _gradient_of(a, b, w, where: Dispatch, top_k: int, gather_a=False, gather_b=False) -> Tensor:
    c = torch.empty_like(w, memory_format=torch.contiguous_format)
    tile = tiling.weight_gradient(a, w.shape[1], w.shape[2])
    _weight_gradient[(len(w), triton.cdiv(w.shape[1], tile["BLOCK_A"]), triton.cdiv(w.shape[2], tile["BLOCK_B"]))](
        a, b, c, where.order, where.offsets, w.shape[1], w.shape[2], a.stride(0), b.stride(0),
        TOP_K=top_k, GATHER_A=gather_a, GATHER_B=gather_b, **tile,
    )  # fmt: skip
    return c


def _check(x, w_in, w_out, index, gate, activation) -> None:
    """ValueError, naming what does not fit."""
    if activation not in _KINDS:
        raise ValueError(f"activation={activation!r}: choose 'gelu' or 'swiglu'")
    (n_experts, width, d_model), factor = w_out.shape, 2 if activation == "swiglu" else 1
    wanted = {"x": (len(x), d_model), "w_in": (n_experts, d_model, factor * width), "gate": tuple(index.shape)}
    for name, tensor in (("x", x), ("w_in", w_in), ("gate", gate)):
        if tuple(tensor.shape) != wanted[name]:
            right = f"must be {wanted[name]} beside w_out {tuple(w_out.shape)}"
            raise ValueError(f"{name}.shape={tuple(tensor.shape)}: {right}")
    if len(index) != len(x):
        raise ValueError(f"index.shape={tuple(index.shape)}: must have a row for each of the {len(x)} tokens")
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(f"x.dtype={x.dtype}, w_in {w_in.dtype}, w_out {w_out.dtype}: one type for all three")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index.dtype={index.dtype}: must be whole numbers, int32 or int64")
    if index.numel() >= 2**31:
        raise ValueError(f"index.shape={tuple(index.shape)}: rows are counted in 32 bits; split the batch")


@torch.library.custom_op("moemla::routed_experts", mutates_args=())
def routed_experts(
    x: Tensor, w_in: Tensor, w_out: Tensor, index: Tensor, gate: Tensor, activation: str
) -> list[Tensor]:
    """Eq. 2 as `moemla.experts.experts` has it: (N, D); behind it z (M, F or 2F) and the `Dispatch`, for the gradient.

    ValueError for widths or types that do not fit.
    """
    _check(x, w_in, w_out, index, gate, activation)
    (n_tokens, top_k), n_experts, width = index.shape, len(w_in), w_out.shape[1]
    x, w_in, w_out, gate = x.contiguous(), w_in.contiguous(), w_out.contiguous(), gate.contiguous()
    n_slots, kind = n_tokens * top_k, _KINDS[activation]
    z, y = x.new_empty(n_slots, w_in.shape[2]), x.new_empty(n_slots, x.shape[1])
    block_m = tiling.rows(n_slots, n_experts, width)
    where = dispatch(index, n_experts, block_m)
    with torch.cuda.device_of(x):
        if width <= tiling.ON_CHIP:
            _narrow[(len(where.tile_expert),)](
                x, w_in, w_out, z, y, gate, where.order, where.offsets, where.tile_expert, where.tile_row,
                x.shape[1], width, n_experts, x.stride(0), TOP_K=top_k, KIND=kind,
                BLOCK_M=block_m, **tiling.narrow(x, block_m, width, x.shape[1]),
            )  # fmt: skip
        else:
            _rows_of(x, w_in, z, where, top_k, block_m, gather=True)
            _rows_of(_activated(z, gate, where, width, kind), w_out, y, where, top_k, block_m)
        out = _summed(y, where, n_tokens, top_k)
    return [out, z, *where]


@routed_experts.register_fake
def _(x, w_in, w_out, index, gate, activation):
    n_slots, n_experts = index.numel(), len(w_in)
    rows = [index.new_empty(n_slots, dtype=torch.int32) for _ in range(2)]
    tiles = triton.cdiv(n_slots, tiling.rows(n_slots, n_experts, w_out.shape[1])) + min(n_experts, n_slots)
    offsets = index.new_empty(n_experts + 1, dtype=torch.int32)
    tiled = [index.new_empty(tiles, dtype=torch.int32) for _ in range(2)]
    return [x.new_empty(x.shape), x.new_empty(n_slots, w_in.shape[2]), *rows, offsets, *tiled]


@torch.library.custom_op("moemla::routed_experts_backward", mutates_args=())
def _grad(
    grad: Tensor,
    x: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    gate: Tensor,
    z: Tensor,
    where: list[Tensor],
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in and w_out, each empty where `needs` says so, and of gate."""
    (n_tokens, top_k), width, kind = gate.shape, w_out.shape[1], _KINDS[activation]
    grad, x, w_in, w_out, gate = (t.contiguous() for t in (grad, x, w_in, w_out, gate))
    where, n_slots = Dispatch(*where), n_tokens * top_k
    block_m = tiling.rows(n_slots, len(w_in), width)
    tile = tiling.hidden_backward(x, block_m, width, x.shape[1])
    parts = triton.cdiv(width, tile["BLOCK_F"])
    grad_z, h = torch.empty_like(z), z.new_empty(n_slots, width)
    grad_gate = gate.new_zeros(parts, n_slots, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _hidden_backward[(len(where.tile_expert), parts)](
            grad, w_out, z, h, grad_z, grad_gate, gate, where.order, where.offsets, where.tile_expert, where.tile_row,
            n_slots, grad.shape[1], width, len(w_out), grad.stride(0), TOP_K=top_k, KIND=kind,
            BLOCK_M=block_m, **tile,
        )  # fmt: skip
        grad_x, grad_in, grad_out = (x.new_empty(0) for _ in range(3))
        if needs[0]:
            rows = x.new_empty(n_slots, x.shape[1])
            _rows_of(grad_z, w_in, rows, where, top_k, block_m, transposed=True)
            grad_x = _summed(rows, where, n_tokens, top_k)
        if needs[1]:
            grad_in = _gradient_of(x, grad_z, w_in, where, top_k, gather_a=True)
        if needs[2]:
            grad_out = _gradient_of(h, grad, w_out, where, top_k, gather_b=True)
    return grad_x, grad_in, grad_out, grad_gate.sum(0).view_as(gate).to(gate.dtype)


@_grad.register_fake
def _(grad, x, w_in, w_out, gate, z, where, activation, needs):
    made = zip((x, w_in, w_out, gate), (*needs, True), strict=True)
    return tuple(t.new_empty(t.shape if need else 0) for t, need in made)


def _keep(ctx, inputs, output):
    x, w_in, w_out, _, gate, ctx.activation = inputs
    ctx.set_materialize_grads(False)  # nobody asks for gradients of z and of the dispatch
    ctx.save_for_backward(x, w_in, w_out, gate, *output[1:])


def _backward(ctx, grads):
    if grads[0] is None:
        return (None,) * 6
    x, w_in, w_out, gate, z, *where = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    *made, grad_gate = _grad(grads[0], x, w_in, w_out, gate, z, where, ctx.activation, needs)
    return *(grad if need else None for grad, need in zip(made, needs, strict=True)), None, grad_gate, None


routed_experts.register_autograd(_backward, setup_context=_keep)
