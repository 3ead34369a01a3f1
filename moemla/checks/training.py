"""Chapter 5: the loss in pieces, AdamW, the learning rate, and what a token is drawn from."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moemla.checks.compare import check, normal, require, same


@check
def adamw_steps(optimizer_of: Callable, model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
    """The first step is `lr` long whatever the gradient, and pulls matrices alone towards zero.

    optimizer_of(model) decays by weight_decay.
    """
    optimizer = optimizer_of(model)
    before = [p.detach().clone() for p in model.parameters()]
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 10.0**-number) if number % 2 else torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for number, (name, p) in enumerate(model.named_parameters()):
        slope = 10.0**-number if number % 2 else 0.0
        wanted = before[number] * (1 - lr * weight_decay) if p.dim() > 1 else before[number]
        same(p, wanted - lr * slope / (slope + 1e-8), f"{name} after a step with gradient {slope:g}")


@check
def loss_in_pieces(loss: Callable) -> None:
    """loss(x (N, D), weight (V, D), targets (N,), chunk) -> (mean nats, dx, dweight), whatever the chunk."""
    for n, v, d, chunk in ((1, 2, 1, 1), (3, 4, 2, 2), *((40, 30, 6, chunk) for chunk in (1, 7, 40, 1000))):
        x, weight = normal(n, d).requires_grad_(), normal(v, d).requires_grad_()
        targets = torch.randint(v, (n,))
        wanted = F.cross_entropy(x @ weight.T, targets)
        right = (wanted, *torch.autograd.grad(wanted, (x, weight)))
        actual, names = loss(x, weight, targets, chunk), ("loss", "gradient of x", "gradient of weight")
        for what, ours, theirs in zip(names, actual, right, strict=True):
            same(ours, theirs, f"{what} of x {(n, d)} in pieces of {chunk}")


@check
def draws_from_the_likeliest(
    probabilities: Callable, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> None:
    """probabilities(logits (B, V)) is a distribution over the fewest likeliest tokens that top_k and top_p ask for."""
    logits = 2 * normal(6, 40)
    tempered = logits / temperature
    if top_k:
        tempered = tempered.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    for row, (p, plain) in enumerate(zip(probabilities(logits), tempered.softmax(-1), strict=True)):
        where = f"row {row} of logits {tuple(logits.shape)}"
        allowed = p > 0
        kept, least = plain[allowed].sum(), plain[allowed].min()
        same(p, plain.where(allowed, 0.0) / kept, f"probabilities in {where}", 1e-6)
        more = plain.masked_fill(allowed, -1).max()
        require(least > more, f"{where}: a token of probability {more:.3g} is ruled out, one of {least:.3g} is not")
        if top_p:
            require(kept >= top_p > kept - least, f"{where}: {kept:.3g} kept for top_p={top_p}, the last {least:.3g}")
        else:
            wanted = top_k or logits.shape[1]
            require(allowed.sum() == wanted, f"{where}: {allowed.sum()} tokens are left, not {wanted}")


@check
def rate_climbs_and_falls(rate_at: Callable[..., float]) -> None:
    """rate_at(step, lr=, min_lr=, warmup=, steps=) climbs in a line to lr and falls by half a cosine to min_lr."""
    lr, least, warmup, steps = 2.0, 0.5, 10, 60

    def wanted(step: int) -> float:
        if step < warmup:
            return lr * (step + 1) / warmup
        return least + (lr - least) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

    rates: Sequence[float] = [rate_at(n, lr=lr, min_lr=least, warmup=warmup, steps=steps) for n in range(steps + 1)]
    for step, rate in enumerate(rates):
        right = wanted(step)
        require(abs(rate - right) < 1e-6 * lr, f"step {step} of {steps}: rate {rate:.6g}, wanted {right:.6g}")
