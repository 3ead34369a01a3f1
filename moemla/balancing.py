"""Balancing without gradients: a bias for each expert, moved after every step by how many tokens it got.

The rules take a bias (E,), the step's counts (E,) and a rate, and return the next bias. `counts` sums to T k for T
tokens: each token is counted at each of its k experts, so a balanced expert holds the share k / E of the tokens.
Algorithm 1 prints the target 1 / N_r. The quantile rule takes a histogram of scores in place of counts.

Measures of balance and the losses that such rules replace are here too, to compare with. Built in chapter 8.
"""

import math

import torch
import torch.distributed as dist
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla.distributed import World
from moemla.routing import Router, Routing


def sign_rule(bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float) -> Float[Tensor, "e"]:
    """b + rate sign(mean - counts), arXiv 2408.15664: a fixed step, up for the under-loaded, down for the others."""
    load = counts.to(bias.dtype)
    return bias + rate * (load.mean() - load).sign()


def proportional_rule(
    bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float
) -> Float[Tensor, "e"]:
    """b - rate (counts / mean - 1): eq. 4's relative error, accumulated."""
    load = counts.to(bias.dtype)
    return bias - rate * (load / load.mean().clamp(min=1e-9) - 1)


def algorithm_1(bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float) -> Float[Tensor, "e"]:
    """b - gamma (f - 1/N_r) with f = counts / tokens, as Algorithm 1 line 6 prints it.

    Since f sums to k and the targets to 1, the mean bias falls by gamma (k - 1) / N_r at each step.
    """
    load = counts.to(bias.dtype)
    tokens = load.sum() / top_k
    return bias - rate * (load / tokens.clamp(min=1) - 1 / len(bias))


def equation_4(bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float) -> Float[Tensor, "e"]:
    """-gamma (f / mean f - 1), eq. 4 read literally: an offset for one step to a b that it does not say how to move."""
    return proportional_rule(torch.zeros_like(bias), counts, top_k, rate)


def quantile_rule(
    bias: Float[Tensor, "e"], margins: Int[Tensor, "e bins"], top_k: int, rate: float
) -> Float[Tensor, "e"]:
    """Goes the share `rate` of the way to the bias with which each expert would pass k / E of the step's cutoffs.

    The cutoffs stand still, and the mean is 0. margins: `routing.margin_histogram` under this bias. Quantile
    balancing (J. Su, kexue.fm/archives/11619; Kimi K3's report, section 2.3.3): no step to choose.
    """
    bins, spread = margins.shape[1], bias.max() - bias.min() + 2
    below = margins.cumsum(1).to(bias.dtype)
    wanted = below[:, -1:] * (top_k / len(bias))
    place = torch.searchsorted(below, wanted).clamp(max=bins - 1)  # the bin in which the quantile lies
    inside = margins.gather(1, place)
    part = (wanted - below.gather(1, place) + inside) / inside.clamp(min=1)
    target = bias.min() - 1 + (place + part).squeeze(1) * spread / bins
    moved = bias + rate * (target - bias)
    return moved - moved.mean()


def no_rule(bias: Float[Tensor, "e"], counts: Int[Tensor, "e"], top_k: int, rate: float) -> Float[Tensor, "e"]:
    """The bias as it is: for a run balanced by a loss, or not at all."""
    return bias


RULES = {
    "sign": sign_rule,
    "proportional": proportional_rule,
    "algorithm-1": algorithm_1,
    "equation-4": equation_4,
    "quantile": quantile_rule,
    "none": no_rule,
}
# Where none is given: 2408.15664's; ten times that for Algorithm 1 (audit A27: it does not balance below 0.01).
RATES = {"sign": 1e-3, "proportional": 1e-3, "algorithm-1": 1e-2, "equation-4": 1e-2, "quantile": 1.0, "none": 1.0}


class Balancer:
    """Moves the bias of every router of a model; for anyone's training loop.

    Call `step()` once after each optimizer step: it takes the counts of all training passes since the last call
    (micro-batches included), sums them over the ranks that share the routers with one all-reduce, and applies the rule.
    These are torch.distributed's default group, where there is one; `world` or `group` (a process group) name others.
    Every rank of them calls `step()` as often, so that all have the same bias.

    rule is "sign", "proportional" or "quantile", or "algorithm-1" or "equation-4", as they are printed; "none" moves
    nothing. rate None is the rule's own: 0.001 for the first two, 1 for "quantile", 0.01 for the printed ones. After a
    step `counts` holds the tokens of each expert, (E,) for each router. The model may be wrapped (DDP, FSDP2,
    torch.compile). ValueError for an unknown rule, a rate that is not finite and positive, or `world` and `group` both;
    a model without routers is balanced by doing nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: str = "sign",
        rate: float | None = None,
        *,
        world: World | None = None,
        group=None,
    ):
        if rule not in RULES:
            raise ValueError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
        rate = RATES[rule] if rate is None else rate
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate={rate!r}: must be a finite number above 0")
        if rule == "quantile" and rate > 1:
            raise ValueError(f"rate={rate!r}: the quantile rule goes a share of the way, at most 1")
        if world is not None and group is not None:
            raise ValueError(f"group={group}: world={world} names the ranks already; give one of them")
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.rule, self.rate, self.world, self.group = rule, rate, world, group
        self.counts: list[Tensor] | None = None  # (E,) of each router in the last step, for the log
        for router in self.routers:
            router.watch_margins(rule == "quantile")
            router.forget()  # what was counted before is not this balancer's

    def sum_over_ranks(self, counts: Tensor) -> Tensor:
        """`counts` summed over the ranks that share the routers, in place; as it is where there is one process."""
        if self.world is not None:
            return self.world.sum(counts)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts, group=self.group)
        return counts

    @torch.no_grad()
    def step(self) -> None:
        """Applies the rule to every router and forgets the counts. Routers that saw no token keep their bias."""
        if not self.routers:
            return
        seen = [router.margins if self.rule == "quantile" else router.load for router in self.routers]
        if any(tensor is None for tensor in seen):
            raise RuntimeError("another Balancer has taken these routers over: a model has one")
        for router in self.routers:
            if router.bias.element_size() < 4:
                raise RuntimeError(f"router.bias is {router.bias.dtype}: steps vanish in it; keep it in float32")
        seen += [router.load for router in self.routers]
        flat = self.sum_over_ranks(torch.cat([tensor.flatten() for tensor in seen]))  # at once, for all layers
        parts = [part.view_as(sums) for part, sums in zip(flat.split([t.numel() for t in seen]), seen, strict=True)]
        self.counts = parts[len(self.routers) :]
        for router, evidence, load in zip(self.routers, parts, self.counts):  # noqa: B905  (evidence comes first)
            updated = RULES[self.rule](router.bias, evidence, router.top_k, self.rate)
            seen_any = (load.sum() > 0) & (evidence.sum() > 0)
            router.bias.copy_(torch.where(seen_any, updated, router.bias))
            router.forget()


def switch_loss(routing: Routing, sequences: int = 1, counts: Int[Tensor, "e"] | None = None) -> Float[Tensor, ""]:
    """The auxiliary loss of arXiv 2101.03961, eq. 4: E sum_e f_e P_e, 1 when the load is uniform.

    f_e is the share of the T k slots that expert e got (divided by k: else uniform routing gives k), P_e its mean
    probability; sigmoid scores are first divided by their sum. sequences: into how many equal rows the N tokens fall;
    the loss is then taken for each and averaged (DeepSeek-V3's sequence-wise loss). Padding counts for nothing.

    counts (E,): what f is taken from where the routing is a part of a step (a micro-batch, a rank): the counts of the
    whole step. The losses of the parts, weighed by their tokens, then add up to that of the whole, gradients too; with
    f of its own each part would be balanced alone, which is another loss. Sequences are whole in every part, and need
    none.
    """
    _require_gradients(routing)
    if counts is not None and sequences != 1:
        raise ValueError(f"sequences={sequences}: each row has counts of its own; leave counts= out")
    n_experts, top_k = routing.probabilities.shape[1], routing.index.shape[1]
    tokens = len(routing.index)
    if not tokens:
        return routing.probabilities.sum()
    if sequences < 1 or tokens % sequences:
        raise ValueError(f"sequences={sequences}: must divide the {tokens} tokens")
    valid = torch.ones(tokens, 1, device=routing.index.device) if routing.valid is None else routing.valid[:, None]
    valid = valid.to(routing.probabilities.dtype)
    taken = torch.zeros_like(routing.probabilities).scatter(1, routing.index, 1.0) * valid
    whole = routing.probabilities.sum(-1, keepdim=True).clamp(min=torch.finfo(valid.dtype).tiny)
    chance = routing.probabilities / whole * valid
    taken, chance, count = (rearrange(part, "(s t) e -> s t e", s=sequences).sum(1) for part in (taken, chance, valid))
    count = count.clamp(min=1)
    share = taken / (count * top_k) if counts is None else counts.to(chance.dtype) / counts.sum().clamp(min=1)
    each = n_experts * (share * (chance / count)).sum(-1)
    seen = valid.view(sequences, -1).amax(1)  # a row of nothing but padding has no loss
    return (each * seen).sum() / seen.sum().clamp(min=1)


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Mean squared log-sum-exp of the router's logits (arXiv 2202.08906, eq. 5), without padding.

    Keeps logits small, so that 16-bit neighbours do not round them apart. A mean over tokens: parts of a step add up to
    the whole when they are weighed by their tokens.
    """
    _require_gradients(routing)
    each = routing.logits.logsumexp(-1).square()
    kept = torch.ones_like(each) if routing.valid is None else routing.valid
    return (each * kept).sum() / kept.sum().clamp(min=1)


def _require_gradients(routing: Routing) -> None:
    """A loss that looks right and trains nothing is refused; under no_grad it is only looked at."""
    if routing.detached and torch.is_grad_enabled():
        raise ValueError(
            "routing: kept for looking at, without its gradient; make the pass inside "
            "`with record_routing(model) as routings:` and take the loss of those"
        )


def coefficient_of_variation(counts: Tensor) -> float:
    """Standard deviation of the experts' loads over their mean, 0 when equal.

    Depends on the window: see `noise_floor`.
    """
    load = counts.cpu().double()
    return (load.std(correction=0) / load.mean().clamp(min=1e-12)).item()


def noise_floor(n_experts: int, top_k: int, tokens: int) -> float:
    """The CV that perfectly uniform random routing shows in a window of T tokens: sqrt((1 - k/E) E / (T k))."""
    return ((1 - top_k / n_experts) * n_experts / (tokens * top_k)) ** 0.5


def max_violation(counts: Tensor) -> float:
    """MaxVio of arXiv 2408.15664: the largest load over the mean, minus one."""
    load = counts.cpu().double()
    return (load.max() / load.mean().clamp(min=1e-12) - 1).item()


def load_entropy(counts: Tensor) -> float:
    """Entropy of the load in nats over its largest value ln E: 1 when uniform, 0 when one expert takes all."""
    share = counts.cpu().double() / counts.sum().cpu().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return (entropy / math.log(max(2, len(counts)))).item()


def dead_experts(counts: Tensor) -> int:
    """Experts that got no token in the window."""
    return int((counts == 0).sum())
