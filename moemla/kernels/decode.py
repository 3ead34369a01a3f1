"""One new token against a cache of latents: a tile of them is read once if it fits, and no key or value is written.

`latent_decode` is for the paper's cache: a tile of K latents is multiplied up to the keys of one head after another,
turned to its positions and scored; the V latents are summed as they are (V absorbed). `joint_decode` is for the joint
latent, where the query has been brought to the latent's space and nothing is rebuilt. Both cut the sequence into
pieces that are worked on side by side, each with a softmax of its own; `_merge` joins them by their log-sum-exp.
Built in chapter 12.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moemla.kernels import tiling


@triton.jit
def _attend_tile(scores, values, highest, total, context):
    """Online softmax: takes scores (H, S), -inf where nothing may be seen, and values (S, W) into the running sums."""
    new = tl.maximum(highest, tl.max(scores, axis=1))
    safe = tl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing yet
    shrink = tl.exp(highest - safe)
    weights = tl.exp(scores - safe[:, None])
    context = context * shrink[:, None]
    context = tl.dot(weights.to(values.dtype), values, context, input_precision="ieee")
    return new, total * shrink + tl.sum(weights, axis=1), context


@triton.jit
def _store_piece(pieces, sums, highest, total, context, at, head, n_heads, width, lane):
    """The piece's weighted mean (H, W) and the log of its sum of exponentials, -inf for one that has no slot."""
    seen = total > 0
    mean = context / tl.where(seen, total, 1.0)[:, None]
    mask = (head < n_heads)[:, None] & (lane < width)[None, :]
    tl.store(pieces + (at * n_heads + head.to(tl.int64))[:, None] * width + lane[None, :], mean, mask=mask)
    log = tl.where(seen, highest + tl.log(tl.where(seen, total, 1.0)), -float("inf"))
    tl.store(sums + at * n_heads + head, log, mask=head < n_heads)


@triton.jit(do_not_specialize=["n_slots", "piece"])
def _latent_decode(
    q, k_latent, v_latent, weight, bias, cos, sin, lengths, pieces, sums, n_heads, rank, n_slots, piece, scale,
    k_b, k_s, v_b, v_s, half: tl.constexpr, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, BIASED: tl.constexpr,
    RAGGED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ALL_R: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.minimum(n_slots, (part + 1) * piece)
    if RAGGED:
        last = tl.minimum(last, tl.load(lengths + row).to(tl.int32))
    first_head = tl.program_id(2) * BLOCK_H
    head, lane, pair = first_head + tl.arange(0, BLOCK_H), tl.arange(0, ALL_R), tl.arange(0, BLOCK_K)
    low = tl.where(INTERLEAVED, 2 * pair, pair)
    high = tl.where(INTERLEAVED, 2 * pair + 1, pair + half)
    real = pair < half
    both = tl.arange(0, 2 * BLOCK_K)
    column = tl.where(INTERLEAVED, both, both // 2 + both % 2 * half)
    exists = both // 2 < half
    highest = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    context = tl.zeros((BLOCK_H, ALL_R), tl.float32)
    for start in range(part * piece, last, BLOCK_S):
        slot = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        held = slot < last
        if TURNED:
            angle = slot[:, None] * half + pair[None, :]
            c = tl.load(cos + angle, mask=held[:, None] & real[None, :], other=0.0)
            s = tl.load(sin + angle, mask=held[:, None] & real[None, :], other=0.0)
        scores = tl.full((BLOCK_H, BLOCK_S), -float("inf"), tl.float32)
        kept = k_latent + row * k_b + slot[:, None] * k_s
        if HELD:
            latent = tl.load(kept + lane[None, :], mask=held[:, None] & (lane < rank)[None, :], other=0.0)
        for h in range(first_head, tl.minimum(first_head + BLOCK_H, n_heads)):
            keys = tl.zeros((BLOCK_S, 2 * BLOCK_K), tl.float32)  # of this head, the two dimensions of a pair together
            for r0 in tl.static_range(0, ALL_R, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                if not HELD:
                    latent = tl.load(kept + r[None, :], mask=held[:, None] & (r < rank)[None, :], other=0.0)
                at = weight + (h * 2 * half + column[None, :]) * rank + r[:, None]
                w = tl.load(at, mask=(r < rank)[:, None] & exists[None, :], other=0.0)
                keys = tl.dot(latent, w, keys, input_precision="ieee")
            if BIASED:
                keys += tl.load(bias + h * 2 * half + column, mask=exists, other=0.0).to(tl.float32)[None, :]
            first, second = tl.split(tl.reshape(keys, (BLOCK_S, BLOCK_K, 2)))
            at = q + (row * n_heads + h) * (2 * half)
            a = tl.load(at + low, mask=real, other=0.0).to(tl.float32)[None, :]
            b = tl.load(at + high, mask=real, other=0.0).to(tl.float32)[None, :]
            if TURNED:
                product = a * (first * c - second * s) + b * (second * c + first * s)
            else:
                product = a * first + b * second
            score = tl.where(held, tl.sum(product, axis=1) * scale, -float("inf"))
            scores = tl.where((head == h)[:, None], score[None, :], scores)
        values = tl.load(
            v_latent + row * v_b + slot[:, None] * v_s + lane[None, :],
            mask=held[:, None] & (lane < rank)[None, :], other=0.0,
        )  # fmt: skip
        highest, total, context = _attend_tile(scores, values, highest, total, context)
    at = row * tl.num_programs(1) + part
    _store_piece(pieces, sums, highest, total, context, at, head, n_heads, rank, lane)


@triton.jit(do_not_specialize=["n_slots", "piece"])
def _joint_decode(
    q, joint, lengths, pieces, sums, n_heads, rank, rope, n_slots, piece, scale, c_b, c_s,
    RAGGED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, ALL_R: tl.constexpr, ALL_ROPE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    last = tl.minimum(n_slots, (part + 1) * piece)
    if RAGGED:
        last = tl.minimum(last, tl.load(lengths + row).to(tl.int32))
    head = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    lane, tail = tl.arange(0, ALL_R), tl.arange(0, ALL_ROPE)
    some = (head < n_heads)[:, None]
    asked = q + (row * n_heads + head[:, None]) * (rank + rope)
    query = tl.load(asked + lane[None, :], mask=some & (lane < rank)[None, :], other=0.0)
    turned = tl.load(asked + rank + tail[None, :], mask=some & (tail < rope)[None, :], other=0.0)
    highest = tl.full((BLOCK_H,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    context = tl.zeros((BLOCK_H, ALL_R), tl.float32)
    for start in range(part * piece, last, BLOCK_S):
        slot = (start + tl.arange(0, BLOCK_S)).to(tl.int64)
        held = slot < last
        kept = joint + row * c_b + slot[:, None] * c_s
        latent = tl.load(kept + lane[None, :], mask=held[:, None] & (lane < rank)[None, :], other=0.0)
        key = tl.load(kept + rank + tail[None, :], mask=held[:, None] & (tail < rope)[None, :], other=0.0)
        scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(turned, tl.trans(key), scores, input_precision="ieee") * scale
        scores = tl.where(held[None, :], scores, -float("inf"))
        highest, total, context = _attend_tile(scores, latent, highest, total, context)
    at = row * tl.num_programs(1) + part
    _store_piece(pieces, sums, highest, total, context, at, head, n_heads, rank, lane)


@triton.jit(do_not_specialize=["n_pieces"])
def _merge(pieces, sums, out, n_heads, n_pieces, width, ALL_W: tl.constexpr):
    """Joins the pieces of one head: each counts by its share of all exponentials."""
    row, head, lane = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, ALL_W)
    highest, total = -float("inf"), 0.0
    context = tl.zeros((ALL_W,), tl.float32)
    for part in range(0, n_pieces):
        at = (row * n_pieces + part) * n_heads + head
        log = tl.load(sums + at)
        new = tl.maximum(highest, log)
        safe = tl.where(new == -float("inf"), 0.0, new)
        shrink, share = tl.exp(highest - safe), tl.exp(log - safe)
        context = context * shrink + share * tl.load(pieces + at * width + lane, mask=lane < width, other=0.0)
        total = total * shrink + share
        highest = new
    tl.store(out + (row * n_heads + head) * width + lane, context / total, mask=lane < width)


def _scratch(q: Tensor, parts: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads = q.shape[:2]
    pieces = q.new_empty(batch, parts, heads, width, dtype=torch.float32)
    return pieces, q.new_empty(batch, parts, heads, dtype=torch.float32), q.new_empty(batch, heads, width)


def _join(pieces: Tensor, sums: Tensor, out: Tensor) -> Tensor:
    batch, heads, width = out.shape
    all_w = triton.next_power_of_2(width)
    _merge[(batch, heads)](pieces, sums, out, heads, pieces.shape[1], width, ALL_W=all_w)
    return out


def _check(name: str, tensor: Tensor, shape: tuple, q: Tensor) -> None:
    """ValueError where a tensor has another shape than it must, or another type than the query."""
    if tuple(tensor.shape) != shape or tensor.dtype != q.dtype:
        right = f"must be {shape} and {q.dtype}"
        raise ValueError(f"{name}.shape={tuple(tensor.shape)}, {tensor.dtype}: {right}")


def _check_rows(n_slots: int, lengths: Tensor | None, batch: int) -> Tensor | None:
    """The lengths without gaps. ValueError for an empty cache, and for lengths that are no (B,) whole numbers."""
    if n_slots == 0:
        raise ValueError("cache: is empty, and a token needs a slot to look at")
    if lengths is None:
        return None
    if lengths.shape != (batch,) or lengths.is_floating_point():
        raise ValueError(f"lengths.shape={tuple(lengths.shape)}, {lengths.dtype}: must be ({batch},), whole numbers")
    return lengths.contiguous()


def _there_is(tile: tiling.Meta | None, rank: int) -> tiling.Meta:
    if tile is None:
        raise ValueError(f"rank={rank}: no tile of latents this wide fits into the shared memory; see kernels.decodes")
    return tile


def _dense_rows(tensor: Tensor) -> Tensor:
    """Itself where each row (last dimension) lies without gaps, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("moemla::latent_decode", mutates_args=())
def latent_decode(
    q: Tensor,
    k_latent: Tensor,
    v_latent: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    lengths: Tensor | None,
    interleaved: bool,
    scale: float,
) -> Tensor:
    """Attention-weighted V latents (B, H, R) of one turned query a row, q (B, H, K), over K latents (B, S, R).

    weight (H K, R) and bias (H K,) make keys of the latents (W^Kr), cos and sin (at least S, K/2) turn them: slot s
    holds position s. lengths (B,): row b sees lengths[b] slots; without it all S. No gradient: for decode. ValueError
    for shapes and types that do not fit.
    """
    batch, heads, width = q.shape
    n_slots, rank = k_latent.shape[1:]
    _check("k_latent", k_latent, (batch, n_slots, rank), q)
    _check("v_latent", v_latent, (batch, n_slots, rank), q)
    _check("weight", weight, (heads * width, rank), q)
    if bias is not None:
        _check("bias", bias, (heads * width,), q)
    if width % 2:
        raise ValueError(f"q.shape={tuple(q.shape)}: heads must have an even width")
    turned = cos is not None
    if turned and (len(cos) < n_slots or cos.shape[1] != width // 2 or cos.shape != sin.shape):
        right = f"must be (at least {n_slots}, {width // 2})"
        raise ValueError(f"cos.shape={tuple(cos.shape)}, sin.shape={tuple(sin.shape)}: {right}")
    lengths = _check_rows(n_slots, lengths, batch)
    q, weight, k_latent, v_latent = q.contiguous(), weight.contiguous(), _dense_rows(k_latent), _dense_rows(v_latent)
    if batch == 0:
        return q.new_empty(0, heads, rank)
    half = width // 2
    tile = _there_is(tiling.latent_decode(q, heads, half, rank), rank)
    blocks = triton.cdiv(heads, tile["BLOCK_H"])
    piece, parts = tiling.pieces(batch * blocks, n_slots, tile["BLOCK_S"])
    pieces, sums, out = _scratch(q, parts, rank)
    with torch.cuda.device_of(q):
        _latent_decode[(batch, parts, blocks)](
            q, k_latent, v_latent, weight, q if bias is None else bias.contiguous(), cos.contiguous() if turned else q,
            sin.contiguous() if turned else q, q if lengths is None else lengths, pieces, sums,
            heads, rank, n_slots, piece, scale, *k_latent.stride()[:2], *v_latent.stride()[:2],
            half=half, TURNED=turned, INTERLEAVED=interleaved, BIASED=bias is not None, RAGGED=lengths is not None,
            BLOCK_K=max(16, triton.next_power_of_2(half)), ALL_R=max(16, triton.next_power_of_2(rank)), **tile,
        )  # fmt: skip
        return _join(pieces, sums, out)


@latent_decode.register_fake
def _(q, k_latent, v_latent, weight, bias, cos, sin, lengths, interleaved, scale):
    return q.new_empty(*q.shape[:2], k_latent.shape[2])


@torch.library.custom_op("moemla::joint_decode", mutates_args=())
def joint_decode(q: Tensor, joint: Tensor, lengths: Tensor | None, rank: int, scale: float) -> Tensor:
    """Attention-weighted latents (B, H, R) of one query a row, over a joint cache.

    q (B, H, R + d_rope), joint (B, S, R + d_rope): its rows are the keys, their first R numbers the values.
    lengths (B,): row b sees lengths[b] slots; without it all S. No gradient: for decode. ValueError for shapes and
    types that do not fit.
    """
    batch, heads, width = q.shape
    n_slots = joint.shape[1]
    _check("joint", joint, (batch, n_slots, width), q)
    if not 1 <= rank < width:
        raise ValueError(f"rank={rank}: must be at least 1 and less than the width {width}")
    lengths = _check_rows(n_slots, lengths, batch)
    q, joint = q.contiguous(), _dense_rows(joint)
    if batch == 0:
        return q.new_empty(0, heads, rank)
    tile = _there_is(tiling.joint_decode(q, heads, rank, width - rank), rank)
    blocks = triton.cdiv(heads, tile["BLOCK_H"])
    piece, parts = tiling.pieces(batch * blocks, n_slots, tile["BLOCK_S"])
    pieces, sums, out = _scratch(q, parts, rank)
    with torch.cuda.device_of(q):
        _joint_decode[(batch, parts, blocks)](
            q, joint, q if lengths is None else lengths, pieces, sums, heads, rank, width - rank, n_slots, piece,
            scale, *joint.stride()[:2], RAGGED=lengths is not None,
            ALL_R=max(16, triton.next_power_of_2(rank)), ALL_ROPE=max(16, triton.next_power_of_2(width - rank)), **tile,
        )  # fmt: skip
        return _join(pieces, sums, out)


@joint_decode.register_fake
def _(q, joint, lengths, rank, scale):
    return q.new_empty(*q.shape[:2], rank)
