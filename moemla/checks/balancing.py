"""Chapter 8: the rules that move a bias, what they do to a skewed router, and the loss that they replace.

`rule(bias (E,), counts (E,), top_k, rate)` gives the next bias; the quantile rule takes `routing.margin_histogram` in
place of counts.
"""

from collections.abc import Callable

import torch

from moemla.balancing import RULES, coefficient_of_variation, noise_floor, switch_loss
from moemla.checks.compare import check, normal, require, same, same_with_gradients
from moemla.routing import Router, Routing, margin_histogram, route

LOADS = (([2, 0], 1), ([4, 4, 4], 2), ([8, 0, 0, 8], 2), ([10, 0, 2, 4], 2), ([0, 0, 21, 0, 3, 1, 5], 3))  # counts, k


def _loads(name: str = ""):
    """(what a rule is told, k, bias, the counts in words) of each case."""
    for counts, top_k in LOADS:
        bias = normal(len(counts))
        if name == "quantile":
            scores = torch.rand(40, len(counts), dtype=torch.float64)
            seen, said = margin_histogram(scores, bias, top_k, bins=50), f"40 tokens, top {top_k} of {len(counts)}"
        else:
            seen, said = torch.tensor(counts), f"counts {counts}, top {top_k}"
        yield seen, top_k, bias, said


@check
def equals_rule(rule: Callable, name: str, rate: float = 0.1) -> None:
    """The next bias is the library's rule of that name."""
    for seen, top_k, bias, said in _loads(name):
        same(rule(bias, seen, top_k, rate), RULES[name](bias, seen, top_k, rate), f"{said}: next bias")


@check
def lifts_the_less_loaded(rule: Callable, rate: float = 0.1) -> None:
    """From equal biases the expert with fewer tokens never ends below one with more, and the least above the most."""
    for counts, top_k, bias, said in _loads():
        moved = rule(torch.zeros_like(bias), counts, top_k, rate)
        for i in range(len(counts)):
            for j in range(len(counts)):
                wrong = f"{said}: expert {i} of {counts[i]} tokens gets bias {moved[i]:.3g}, expert {j} {moved[j]:.3g}"
                require(counts[i] >= counts[j] or moved[i] >= moved[j] - 1e-15, wrong)
        least, most = moved[counts.argmin()], moved[counts.argmax()]
        require(least > most or counts.min() == counts.max(), f"{said}: the least loaded gets no more than the most")


@check
def shift_stays_a_shift(rule: Callable, rate: float = 0.1, name: str = "") -> None:
    """A constant on all biases, which changes no choice, changes no difference between the next ones."""
    for seen, top_k, bias, said in _loads(name):
        apart = rule(bias + 0.75, seen, top_k, rate) - rule(bias, seen, top_k, rate)
        same(apart, apart.mean().expand_as(apart), f"{said}: what 0.75 on every bias adds to the next", 1e-9)


@check
def permuting_experts_permutes_the_bias(rule: Callable, rate: float = 0.1, name: str = "") -> None:
    """Experts in another order get the same biases, in that order."""
    for seen, top_k, bias, said in _loads(name):
        order = torch.arange(len(bias)).roll(1)
        moved = rule(bias[order], seen[order], top_k, rate)
        wanted = rule(bias, seen, top_k, rate)[order]
        same(moved, wanted, f"{said}: next bias with experts in order {order.tolist()}")


@check
def parts_count_as_one(step: Callable, name: str = "sign", rate: float = 0.1) -> None:
    """step(bias, [counts, ...], top_k, rate): micro-batches or ranks are summed up, and the bias moves once."""
    for counts, top_k, bias, said in _loads():
        parts = [counts, counts.roll(1), 3 * counts.flip(0)]
        wanted = RULES[name](bias, sum(parts), top_k, rate)
        same(step(bias, parts, top_k, rate), wanted, f"{said}, and two more parts of a step: next bias")


@check
def moves_in_place(balancer_of: Callable) -> None:
    """balancer_of(router).step() writes into the bias that is there: a checkpoint, or another rank, holds on to it."""
    for router, balancer, counts, said in _counted(balancer_of):
        held, before = router.state_dict()["bias"], router.bias.clone()  # the numbers themselves, not the name
        balancer.step()
        same_memory = held.data_ptr() == router.bias.data_ptr()
        require(same_memory, f"{said}: router.bias is another tensor after the step")
        even = counts.min() == counts.max()
        require(even or not torch.equal(held, before), f"{said}: the bias has not moved")


@check
def forgets_the_counts(balancer_of: Callable) -> None:
    """After a step the router's counts are zero, and a step without tokens moves nothing."""
    for router, balancer, _, said in _counted(balancer_of):
        balancer.step()
        left = int(router.load.sum())
        require(not left, f"{said}: {left} of the slots are still counted after the step")
        before = router.bias.clone()
        balancer.step()
        same(router.bias, before, f"{said}, then a step without tokens: bias")


def _counted(balancer_of: Callable):
    """(a router that has counted, its balancer, the counts, the same in words) of each case."""
    for counts, top_k, bias, said in _loads():
        router = Router(d_model=2, n_experts=len(bias), top_k=top_k, dtype=torch.float64)
        balancer = balancer_of(router)
        router.bias.copy_(bias)
        router.load += counts
        yield router, balancer, counts, said


@check
def balances(
    rule: Callable, rate: float, name: str = "", steps: int = 200, window: int = 20, at_most: float = 2.0
) -> dict[str, float]:
    """A router that is skewed and does not learn is balanced: the CV of its last steps is near chance.

    `at_most` is how often the floor of a whole window of steps. Returns {"before": CV, "after": CV, "floor": CV}.
    """
    n_experts, top_k, tokens = 8, 2, 256
    skew, bias = normal(n_experts), torch.zeros(n_experts, dtype=torch.float64)
    loads = []
    for _ in range(steps):
        routing = route(normal(tokens, n_experts) + skew, bias, top_k)
        loads.append(routing.counts)
        seen = margin_histogram(routing.probabilities, bias, top_k) if name == "quantile" else routing.counts
        bias = rule(bias, seen, top_k, rate)
    before, after = coefficient_of_variation(loads[0]), coefficient_of_variation(torch.stack(loads[-window:]).sum(0))
    floor = noise_floor(n_experts, top_k, tokens * window)
    require(
        after <= at_most * floor,
        f"{n_experts} experts, top {top_k}, rate {rate}: CV {after:.3f} after {steps} steps, {before:.3f} before them, "
        f"{floor:.3f} is chance",
    )
    return {"before": before, "after": after, "floor": floor}


@check
def equals_switch_loss(loss: Callable) -> None:
    """loss(probabilities (N, E), index (N, k)) is E sum_e f_e P_e with f_e over k, and its gradient flows to logits."""
    for tokens, n_experts, top_k in ((1, 2, 1), (1, 3, 2), (9, 7, 3)):
        logits = normal(tokens, n_experts).requires_grad_()
        probabilities = logits.softmax(-1)
        index = probabilities.detach().topk(top_k).indices
        wanted = switch_loss(Routing(index, probabilities.gather(1, index), probabilities, logits))
        what = f"loss of probabilities {(tokens, n_experts)}, top {top_k}"
        same_with_gradients(loss(probabilities, index), wanted, {"the logits": logits}, what)
