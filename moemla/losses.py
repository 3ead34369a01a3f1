"""Cross-entropy of a vocabulary head without the (N, V) logits.

A block of rows at a time, with the gradients made on the way forward. Built in chapter 5.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK, CPU_CHUNK = 512, 128  # rows of logits alive at once; on a CPU those of 4,096 tokens then stay in its cache
LINE = 64  # bytes: products into rows that begin on a cache line are up to a third faster (V = 50,257 is odd)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, chunk, compute):
        rows, vocab = min(chunk, len(x)), len(weight)
        valid = targets >= 0
        count = valid.sum().clamp(min=1)
        precise = torch.float64 if compute == torch.float64 else torch.float32
        total = torch.zeros((), dtype=precise, device=x.device)
        wants_dx, wants_dweight = ctx.needs_input_grad[:2]
        wide = precise if x.dtype == torch.float16 else x.dtype  # a loss scale comes in backward only
        dx = torch.empty_like(x, dtype=wide) if wants_dx else None
        dweight = torch.zeros_like(weight, dtype=precise) if wants_dweight else None
        inputs, matrix = x.to(compute), weight.to(compute)
        line = LINE // compute.itemsize
        padded = inputs.new_full((rows, (vocab + line - 1) // line * line), -torch.inf)  # softmax gives these 0
        for start in range(0, len(x), chunk):
            part = inputs[start : start + chunk]
            here = slice(start, start + len(part))
            if torch.compiler.is_compiling():  # lays out its own memory
                logits = part @ matrix.T
            else:
                logits = padded[: len(part)]
                torch.mm(part, matrix.T, out=logits[:, :vocab])
            scores = logits.log_softmax(-1, dtype=precise)
            kept, target = valid[here, None], targets[here, None].clamp(min=0)
            total -= scores[:, :vocab].gather(1, target).masked_fill(~kept, 0.0).sum()
            if not (wants_dx or wants_dweight):
                continue
            slope = scores.exp_().scatter_add_(1, target, scores.new_full((1, 1), -1.0).expand_as(target))
            slope = slope[:, :vocab].to(compute)  # softmax - one-hot
            if wants_dx:
                dx[here] = (slope @ matrix).to(precise) * (kept.to(precise) / count)
            if wants_dweight and compute == precise:
                dweight.addmm_(slope.T, part * kept)
            elif wants_dweight:
                dweight += slope.T @ (part * kept)
        if wants_dweight:
            dweight /= count
        ctx.save_for_backward(dx, dweight)
        ctx.x_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True: the saved gradients are constants, theirs would be zero
            raise RuntimeError("linear_cross_entropy has no second derivatives; use F.cross_entropy for them")
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else (dx * upstream.to(dx.dtype)).to(ctx.x_dtype)
        dweight = None if dweight is None else (dweight * upstream.to(dweight.dtype)).to(ctx.weight_dtype)
        return dx, dweight, None, None, None


def linear_cross_entropy(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], targets: Int[Tensor, "n"], chunk: int | None = None
) -> Float[Tensor, ""]:
    """Mean nats of `targets` under softmax(x weight^T), over rows whose target is not negative; 0 if there are none.

    x (N, D), weight (V, D), targets (N,) int64. At most `chunk` x V logits exist at once; by default 512 rows, 128 on a
    CPU. Gradients are exact; asking for second derivatives raises. ValueError for a target outside the vocabulary (on a
    CPU).
    """
    if not torch.is_grad_enabled():  # else the gradient of a weight that wants one is made, and thrown away
        x, weight = x.detach(), weight.detach()
    if len(targets) != len(x):
        raise ValueError(f"targets.shape={tuple(targets.shape)}: must have one for each of {len(x)} rows")
    kind = x.device.type
    if chunk is None:
        chunk = CPU_CHUNK if kind == "cpu" else CHUNK
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: must be at least 1")
    if kind == "cpu" and not torch.compiler.is_compiling() and len(x) and int(targets.max()) >= len(weight):
        raise ValueError(f"targets={int(targets.max())}: must be below the vocabulary's size, {len(weight)}")
    narrow = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # as torch's own
    return _LinearCrossEntropy.apply(x, weight, targets, chunk, torch.get_autocast_dtype(kind) if narrow else x.dtype)
