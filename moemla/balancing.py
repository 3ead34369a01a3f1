"""Balancing without gradients: a bias for each expert, moved after every step by how many tokens it got; and measures
of balance.

The rules take a bias (E,), the step's counts (E,) and a rate, and return the next bias. `counts` sums to T k for T
tokens: each token is counted at each of its k experts, so a balanced expert holds the share k / E of the tokens.
Algorithm 1 prints the target 1 / N_r.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla.routing import Router


def sign_rule(bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float) -> Float[Tensor, "e"]:
    """b + rate sign(mean - counts), arXiv 2408.15664: a fixed step for the under-loaded up, for the over-loaded down.

    Built in chapter 8.
    """
    load = counts.to(bias.dtype)
    return bias + rate * (load.mean() - load).sign()


def proportional_rule(
    bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float
) -> Float[Tensor, "e"]:
    """b - rate (counts / mean - 1): eq. 4's relative error, accumulated. Built in chapter 8."""
    load = counts.to(bias.dtype)
    return bias - rate * (load / load.mean().clamp(min=1e-9) - 1)


def algorithm_1(bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float) -> Float[Tensor, "e"]:
    """b - gamma (f - 1/N_r) with f = counts / tokens, as Algorithm 1 line 6 prints it. Built in chapter 8.

    Since f sums to k and the targets to 1, the mean bias falls by gamma (k - 1) / N_r at each step.
    """
    load = counts.to(bias.dtype)
    tokens = load.sum() / top_k
    return bias - rate * (load / tokens.clamp(min=1) - 1 / len(bias))


def equation_4(bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float) -> Float[Tensor, "e"]:
    """-gamma (f / mean f - 1) as eq. 4 prints it: an offset for one step, never summed up. Built in chapter 8."""
    return proportional_rule(torch.zeros_like(bias), counts, top_k, rate)


RULES = {"sign": sign_rule, "proportional": proportional_rule, "algorithm-1": algorithm_1, "equation-4": equation_4}


class Balancer:
    """Moves the bias of every router of a model; for anyone's training loop. Built in chapter 8.

    Call `step()` once after each optimizer step: it takes the counts of all training passes since the last call
    (micro-batches included), sums them over the ranks with one all-reduce where torch.distributed runs, and applies the
    rule. ValueError for an unknown rule or a rate that is not positive; a model without routers is balanced by doing
    nothing.
    """

    def __init__(self, model: nn.Module, rule: str = "sign", rate: float = 1e-3):
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
        if not rate > 0:
            raise ValueError(f"rate={rate!r}: must be above 0")
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.rule, self.rate = rule, rate
        self.counts: Int[Tensor, "l e"] | None = None  # of the last step, for the log

    @torch.no_grad()
    def step(self) -> None:
        """Applies the rule to every router and forgets the counts. Routers that saw no token keep their bias."""
        if not self.routers:
            return
        counts = torch.stack([router.load for router in self.routers])  # (L, E)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        for router, load in zip(self.routers, counts, strict=True):
            updated = RULES[self.rule](router.bias, load, router.top_k, self.rate)
            router.bias.copy_(torch.where(load.sum() > 0, updated, router.bias))
            router.load.zero_()
        self.counts = counts


def coefficient_of_variation(counts: Tensor) -> float:
    """Standard deviation of the experts' loads over their mean, 0 when equal.

    Depends on the window: see `noise_floor`. Built in chapter 8.
    """
    load = counts.double()
    return (load.std(correction=0) / load.mean().clamp(min=1e-12)).item()


def noise_floor(n_experts: int, top_k: int, tokens: int) -> float:
    """The CV that perfectly uniform random routing shows in a window of T tokens: sqrt((1 - k/E) E / (T k)).

    Built in chapter 8.
    """
    return ((1 - top_k / n_experts) * n_experts / (tokens * top_k)) ** 0.5


def max_violation(counts: Tensor) -> float:
    """MaxVio of arXiv 2408.15664: the largest load over the mean, minus one. Built in chapter 8."""
    load = counts.double()
    return (load.max() / load.mean().clamp(min=1e-12) - 1).item()


def load_entropy(counts: Tensor) -> float:
    """Entropy of the load in nats over its largest value ln E: 1 when uniform, 0 when one expert takes all.

    Built in chapter 8.
    """
    share = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return (entropy / torch.tensor(float(max(2, len(counts)))).log()).item()


def dead_experts(counts: Tensor) -> int:
    """Experts that got no token in the window. Built in chapter 8."""
    return int((counts == 0).sum())
