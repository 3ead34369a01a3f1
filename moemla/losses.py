"""Cross-entropy of a vocabulary head without the (N, V) logits: a block of rows at a time, gradients made on the way
forward.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK = 1024  # rows of logits alive at once


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        valid = targets >= 0
        count = valid.sum().clamp(min=1)
        precise = torch.float64 if x.dtype == torch.float64 else torch.float32
        total = torch.zeros((), dtype=precise, device=x.device)
        needs = ctx.needs_input_grad
        dx = torch.empty_like(x) if needs[0] else None
        dweight = torch.zeros_like(weight, dtype=precise) if needs[1] else None
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            logits = (x[rows] @ weight.T).to(precise)
            kept, target = valid[rows, None], targets[rows, None].clamp(min=0)
            slope = logits.softmax(-1)
            largest, place = logits.max(-1, keepdim=True)
            logsumexp = (
                largest - slope.gather(1, place).log()
            )  # the largest probability is at least 1/V: safe to take the log of
            total += ((logsumexp - logits.gather(1, target)) * kept).sum()
            if dx is None and dweight is None:
                continue
            slope.scatter_add_(1, target, slope.new_full((1, 1), -1.0).expand_as(target))  # softmax - one-hot
            slope = slope.mul_(kept.to(precise) / count).to(x.dtype)
            if dx is not None:
                torch.mm(slope, weight, out=dx[rows])
            if dweight is not None:
                dweight += slope.T @ x[rows]
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():  # create_graph=True: the saved gradients are constants, theirs would be zero
            raise RuntimeError("linear_cross_entropy has no second derivatives; use F.cross_entropy for them")
        dx, dweight = ctx.saved_tensors
        dx = None if dx is None else dx * upstream.to(dx.dtype)
        dweight = None if dweight is None else (dweight * upstream.to(dweight.dtype)).to(ctx.weight_dtype)
        return dx, dweight, None, None


def linear_cross_entropy(
    x: Float[Tensor, "n d"], weight: Float[Tensor, "v d"], targets: Int[Tensor, "n"], chunk: int = CHUNK
) -> Float[Tensor, ""]:
    """Mean nats of `targets` under softmax(x weight^T), over the rows whose target is not negative; 0 if there are
    none.

    x (N, D), weight (V, D), targets (N,) int64. At most `chunk` x V logits exist at once. Gradients are exact; asking
    for second derivatives raises. Built in chapter 5.
    """
    if not torch.is_grad_enabled():  # else the gradient of a weight that wants one is made, and thrown away
        x, weight = x.detach(), weight.detach()
    return _LinearCrossEntropy.apply(x, weight, targets, chunk)
