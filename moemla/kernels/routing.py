"""The router in one pass over its logits: scores, biased top-k, gates and counts, without a matrix of anything else.

A program holds a few tokens by all experts, padded to a power of two: 62 experts are 64 lanes, two of them masked.
Built in chapter 10.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moemla.kernels import tiling

TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _score(logits, lane_is_real, SOFTMAX: tl.constexpr):
    """Sigmoid or softmax of (BLOCK_N, BLOCK_E) logits; 0 in lanes that are no expert."""
    if SOFTMAX:
        shifted = tl.where(lane_is_real, logits, -float("inf"))
        shifted = tl.exp(shifted - tl.max(shifted, axis=1)[:, None])
        score = shifted / tl.sum(shifted, axis=1)[:, None]
    else:
        score = 1 / (1 + tl.exp(-logits))
    return tl.where(lane_is_real, score, 0.0)


@triton.jit(do_not_specialize=["n_tokens"])
def _route(
    logits, bias, valid, index, gate, plain, counts, n_tokens, n_experts, scale,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, BIAS_IN_GATE: tl.constexpr, RENORMALISE: tl.constexpr,
    HAS_VALID: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    lane, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_A)
    token, expert = (row < n_tokens)[:, None], (lane < n_experts)[None, :]
    z = tl.load(logits + row[:, None] * n_experts + lane[None, :], mask=token & expert, other=0.0)
    b = tl.load(bias + lane, mask=lane < n_experts, other=0.0)[None, :]
    if BIAS_IN_GATE:
        score = _score(z + b, expert, SOFTMAX)
        biased = score
    else:
        score = _score(z, expert, SOFTMAX)
        biased = (z if SOFTMAX else score) + b
    # Not-a-number counts as largest, as in torch.topk. No expert is as low as a lane that is none, or is taken.
    biased = tl.where(biased == biased, tl.maximum(biased, LOWEST), float("inf"))
    left = tl.where(expert, biased, -float("inf"))
    taken = tl.zeros((BLOCK_N, BLOCK_E), tl.int32)
    weights = tl.zeros((BLOCK_N, BLOCK_A), tl.float32)
    for j in range(0, TOP_K):
        best = tl.argmax(left, axis=1, tie_break_left=True)
        hit = lane[None, :] == best[:, None]
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1)
        weights = tl.where((slot == j)[None, :], weight[:, None], weights)
        tl.store(index + row * TOP_K + j, best.to(tl.int64), mask=row < n_tokens)
        left = tl.where(hit, -float("inf"), left)
        taken += hit.to(tl.int32)
    if RENORMALISE:
        total = tl.sum(weights, axis=1)
        weights = weights / tl.where(total < TINY, TINY, total)[:, None]  # and not maximum, which drops a NaN
    weights *= scale
    counted = token
    if HAS_VALID:
        real = tl.load(valid + row, mask=row < n_tokens, other=0) != 0
        weights = tl.where(real[:, None], weights, 0.0)
        counted = counted & real[:, None]
    inside = token & (slot < TOP_K)[None, :]
    tl.store(gate + row[:, None] * TOP_K + slot[None, :], weights, mask=inside)
    tl.store(plain + row[:, None] * n_experts + lane[None, :], score, mask=token & expert)
    tl.atomic_add(
        counts + lane, tl.sum(tl.where(counted, taken, 0), axis=0).to(tl.int64), mask=lane < n_experts, sem="relaxed"
    )


@triton.jit(do_not_specialize=["n_tokens"])
def _route_backward(
    grad_gate, grad_plain, plain, index, valid, grad_logits, n_tokens, n_experts, scale,
    TOP_K: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALISE: tl.constexpr, HAS_VALID: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    lane, slot = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_A)
    inside = (row < n_tokens)[:, None] & (slot < TOP_K)[None, :]
    mask = (row < n_tokens)[:, None] & (lane < n_experts)[None, :]
    place = row[:, None] * TOP_K + slot[None, :]
    upstream = tl.load(grad_gate + place, mask=inside, other=0.0) * scale
    if HAS_VALID:
        real = tl.load(valid + row, mask=row < n_tokens, other=0) != 0
        upstream = tl.where(real[:, None], upstream, 0.0)
    if RENORMALISE:  # gate = w / sum w
        chosen = tl.load(index + place, mask=inside, other=0)
        w = tl.load(plain + row[:, None] * n_experts + chosen, mask=inside, other=0.0)
        total = tl.sum(w, axis=1)
        safe = tl.where(total < TINY, TINY, total)
        shared = tl.where(total >= TINY, tl.sum(upstream * w, axis=1) / safe, 0.0)
        upstream = (upstream - shared[:, None]) / safe[:, None]
    grad = tl.load(grad_plain + row[:, None] * n_experts + lane[None, :], mask=mask, other=0.0)
    for j in range(0, TOP_K):
        best = tl.load(index + row * TOP_K + j, mask=row < n_tokens, other=-1)
        part = tl.sum(tl.where((slot == j)[None, :], upstream, 0.0), axis=1)
        grad += tl.where(lane[None, :] == best[:, None], part[:, None], 0.0)
    score = tl.load(plain + row[:, None] * n_experts + lane[None, :], mask=mask, other=0.0)
    if SOFTMAX:
        grad = score * (grad - tl.sum(grad * score, axis=1)[:, None])
    else:
        grad = grad * score * (1 - score)
    tl.store(grad_logits + row[:, None] * n_experts + lane[None, :], grad, mask=mask)


def _blocks(n_experts: int, top_k: int) -> dict[str, int]:
    lanes, slots = triton.next_power_of_2(n_experts), triton.next_power_of_2(top_k)
    return dict(BLOCK_E=max(16, lanes), BLOCK_A=max(2, slots), TOP_K=top_k, **tiling.route())


@torch.library.custom_op("moemla::route", mutates_args=())
def route(
    logits: Tensor,
    bias: Tensor,
    valid: Tensor | None,
    top_k: int,
    softmax: bool,
    bias_in_gate: bool,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, E), bias (E,) float32 -> gate (N, A), index (N, A) int64, plain scores (N, E), counts (E,) int64.

    Of equal scores the first expert wins. ValueError for shapes and types that do not fit.
    """
    n_tokens, n_experts = logits.shape
    if logits.dtype != torch.float32 or bias.dtype != torch.float32 or bias.shape != (n_experts,):
        shapes = f"logits.shape={tuple(logits.shape)}, bias.shape={tuple(bias.shape)}"
        raise ValueError(f"{shapes}: must be float32, (N, E) and (E,)")
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k={top_k}: must be between 1 and the number of experts, {n_experts}")
    if valid is not None and (valid.shape != (n_tokens,) or valid.dtype != torch.bool):
        raise ValueError(f"valid.shape={tuple(valid.shape)}, {valid.dtype}: must be ({n_tokens},), True or False")
    logits, bias = logits.contiguous(), bias.contiguous()
    mask = logits if valid is None else valid.contiguous().view(torch.uint8)
    index = logits.new_empty((n_tokens, top_k), dtype=torch.int64)
    gate, plain = logits.new_empty(n_tokens, top_k), torch.empty_like(logits)
    counts = logits.new_zeros(n_experts, dtype=torch.int64)
    if n_tokens:
        with torch.cuda.device_of(logits):
            _route[lambda meta: (triton.cdiv(n_tokens, meta["BLOCK_N"]),)](
                logits, bias, mask, index, gate, plain, counts, n_tokens, n_experts, scale,
                SOFTMAX=softmax, BIAS_IN_GATE=bias_in_gate, RENORMALISE=renormalise, HAS_VALID=valid is not None,
                **_blocks(n_experts, top_k),
            )  # fmt: skip
    return gate, index, plain, counts


@route.register_fake
def _(logits, bias, valid, top_k, softmax, bias_in_gate, renormalise, scale):
    n_tokens, n_experts = logits.shape
    index = logits.new_empty((n_tokens, top_k), dtype=torch.int64)
    counts = logits.new_empty(n_experts, dtype=torch.int64)
    return logits.new_empty(n_tokens, top_k), index, logits.new_empty(n_tokens, n_experts), counts


@torch.library.custom_op("moemla::route_backward", mutates_args=())
def _route_grad(
    grad_gate: Tensor,
    grad_plain: Tensor,
    plain: Tensor,
    index: Tensor,
    valid: Tensor | None,
    softmax: bool,
    renormalise: bool,
    scale: float,
) -> Tensor:
    (n_tokens, n_experts), top_k = plain.shape, index.shape[1]
    grad = torch.empty_like(plain)
    mask = plain if valid is None else valid.contiguous().view(torch.uint8)
    if n_tokens:
        with torch.cuda.device_of(plain):
            _route_backward[lambda meta: (triton.cdiv(n_tokens, meta["BLOCK_N"]),)](
                grad_gate.contiguous(), grad_plain.contiguous(), plain, index, mask, grad, n_tokens, n_experts, scale,
                SOFTMAX=softmax, RENORMALISE=renormalise, HAS_VALID=valid is not None, **_blocks(n_experts, top_k),
            )  # fmt: skip
    return grad


@_route_grad.register_fake
def _(grad_gate, grad_plain, plain, index, valid, softmax, renormalise, scale):
    return torch.empty_like(plain)


def _keep(ctx, inputs, output):
    _, _, valid, _, ctx.softmax, _, ctx.renormalise, ctx.scale = inputs
    _, index, plain, counts = output
    ctx.mark_non_differentiable(index, counts)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(plain, index, valid)


def _backward(ctx, grad_gate, _index, grad_plain, _counts):
    plain, index, valid = ctx.saved_tensors
    if grad_gate is None and grad_plain is None:
        return (None,) * 8
    grad_gate = plain.new_zeros(index.shape) if grad_gate is None else grad_gate
    grad_plain = torch.zeros_like(plain) if grad_plain is None else grad_plain
    gating = ctx.softmax, ctx.renormalise, ctx.scale
    return _route_grad(grad_gate, grad_plain, plain, index, valid, *gating), *[None] * 7


route.register_autograd(_backward, setup_context=_keep)
