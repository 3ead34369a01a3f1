"""The rules by hand, what they do to a skewed router, and the measures against simulation."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from moemla import balancing
from moemla.balancing import (
    RATES,
    RULES,
    Balancer,
    algorithm_1,
    coefficient_of_variation,
    dead_experts,
    equation_4,
    load_entropy,
    max_violation,
    noise_floor,
    proportional_rule,
    quantile_rule,
    sign_rule,
    switch_loss,
    z_loss,
)
from moemla.routing import Router, margin_histogram, route
from tests.helpers import close, model_of, tokens_of

COUNTS = torch.tensor([10, 0, 2, 4])  # 8 tokens, 2 experts each; mean 4
BIAS = torch.tensor([0.5, -0.5, 0.0, 0.25], dtype=torch.float64)


def check(got, wanted):
    close(got, torch.tensor(wanted, dtype=torch.float64), 1e-15)


def test_sign_rule_by_hand():
    check(sign_rule(BIAS, COUNTS, 2, 0.01), [0.49, -0.49, 0.01, 0.25])


def test_proportional_rule_by_hand():
    check(proportional_rule(BIAS, COUNTS, 2, 0.1), [0.35, -0.4, 0.05, 0.25])


def test_algorithm_1_by_hand():
    # f = 10/8, 0, 2/8, 4/8 against 1/N_r = 1/4
    check(algorithm_1(BIAS, COUNTS, 2, 0.1), [0.5 - 0.1, -0.5 + 0.025, 0.0, 0.25 - 0.025])


def test_equation_4_by_hand_forgets_the_old_bias():
    check(equation_4(BIAS, COUNTS, 2, 0.1), [-0.15, 0.1, 0.05, 0.0])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 64), st.integers(1, 400), st.floats(1e-4, 1.0), st.data(), st.integers(0, 10**6))
def test_algorithm_1_lets_the_mean_fall_by_gamma_k_minus_1_over_n(n_experts, tokens, gamma, data, seed):
    top_k = data.draw(st.integers(1, n_experts))
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, n_experts, generator=generator).topk(top_k).indices
    counts = torch.bincount(chosen.flatten(), minlength=n_experts)
    bias = torch.randn(n_experts, generator=generator, dtype=torch.float64)
    fall = (bias - algorithm_1(bias, counts, top_k, gamma)).mean()
    assert fall.item() == pytest.approx(gamma * (top_k - 1) / n_experts, rel=1e-9, abs=1e-14)


def test_algorithm_1_falls_on_every_step_of_a_run():
    router = Router(d_model=8, n_experts=62, top_k=6, scores="softmax", bias_in_gate=True, dtype=torch.float64)
    balancer = Balancer(router, rule="algorithm-1", rate=0.1)
    for step in range(20):
        router(torch.randn(64, 8, dtype=torch.float64))
        balancer.step()
        assert router.bias.mean().item() == pytest.approx(-(step + 1) * 0.1 * 5 / 62, rel=1e-12)


def evidence_of(router):
    """What the router's rule is given: histograms where it asked for them."""
    return router.load if router.margins is None else router.margins


def test_margin_histogram_by_hand():
    """Two experts of three: the bias at which expert e would just have been chosen is the third score less its own."""
    scores, bias = torch.tensor([[0.9, 0.5, 0.2], [0.1, 0.3, 0.6]]), torch.tensor([0.0, 0.0, 0.5])
    # biased: 0.9, 0.5, 0.7 and 0.1, 0.3, 1.1; the third are 0.5 and 0.1
    asked = torch.tensor([[0.5 - 0.9, 0.1 - 0.1], [0.5 - 0.5, 0.1 - 0.3], [0.5 - 0.2, 0.1 - 0.6]])
    bins = 25  # of 0.1, from -1 to 1.5
    wanted = torch.zeros(3, bins, dtype=torch.int64)
    for e in range(3):
        for value in asked[e].tolist():
            wanted[e, math.floor((value + 1) * 10 + 1e-4)] += 1
    found = margin_histogram(scores, bias, 2, bins)
    assert (found - wanted).abs().sum() <= 2 * 2  # a value on the edge of a bin may fall to either side
    assert torch.equal(found.sum(1), torch.tensor([2, 2, 2]))
    padded = margin_histogram(scores, bias, 2, bins, valid=torch.tensor([True, False]))
    assert torch.equal(padded, margin_histogram(scores[:1], bias, 2, bins))
    assert margin_histogram(scores, bias, 3, bins).sum() == 0  # all are chosen: nothing to ask


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.data(), st.floats(0.05, 1.0), st.integers(0, 10**6))
def test_quantile_rule_against_sorted_margins(n_experts, data, rate, seed):
    top_k = data.draw(st.integers(1, n_experts - 1))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(500, n_experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(n_experts, generator=generator, dtype=torch.float64)
    cutoff = (scores + bias).sort(dim=1, descending=True).values[:, top_k]
    asked = (cutoff[:, None] - scores).sort(dim=0).values
    exact = asked[round(500 * top_k / n_experts) - 1]
    exact = bias + rate * (exact - bias)
    moved = quantile_rule(bias, margin_histogram(scores, bias, top_k, bins=20000), top_k, rate)
    assert moved.mean().abs() < 1e-12
    gap = (asked[1:] - asked[:-1]).max().item()  # a quantile lies between two tokens
    close(moved, exact - exact.mean(), 2 * rate * gap + 1e-3)


def test_algorithm_rules_have_a_rate_of_their_own():
    for rule, rate in RATES.items():
        assert Balancer(nn.Linear(2, 2), rule).rate == rate
        assert Balancer(nn.Linear(2, 2), rule, 0.25).rate == 0.25
    for rate in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"rate=.*: must be a finite number above 0"):
            Balancer(nn.Linear(2, 2), rate=rate)
    with pytest.raises(ValueError, match=r"rate=1\.5: the quantile rule"):
        Balancer(nn.Linear(2, 2), "quantile", 1.5)


@pytest.mark.parametrize("how", [dict(scores="softmax"), dict(bias_in_gate=True)])
def test_quantile_needs_scores_of_known_range(how):
    with pytest.raises(ValueError, match="the quantile rule needs sigmoid scores"):
        Balancer(Router(d_model=4, n_experts=3, top_k=1, **how), "quantile")


def test_another_balancer_stops_the_histograms():
    router = Router(d_model=4, n_experts=3, top_k=1)
    Balancer(router, "quantile")
    router(torch.randn(5, 4))
    assert router.margins.sum() == 15
    assert set(router.state_dict()) == {"weight", "bias"}
    Balancer(router, "sign")
    assert router.margins is None


def test_balanced_counts_move_nothing():
    even = torch.full((62,), 97)
    for rule in (sign_rule, proportional_rule):
        assert torch.equal(rule(torch.ones(62), even, 6, 0.1), torch.ones(62))
    assert torch.equal(equation_4(torch.ones(62), even, 6, 0.1), torch.zeros(62))


@pytest.mark.parametrize("rule", RULES)
def test_balancer_applies_its_rule_to_every_router_once(rule):
    model = model_of(n_experts=7, top_k=3).train()
    balancer = Balancer(model, rule=rule, rate=0.01)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    assert len(routers) == 2
    wanted, total = [router.bias.clone() for router in routers], [0, 0]
    for step in range(2):
        total = [torch.zeros(7, dtype=torch.int64) for _ in routers]
        for micro in range(3):
            model(tokens_of(2, 9, seed=10 * step + micro))
            total = [t + router.last.counts for t, router in zip(total, routers, strict=True)]
        evidence = [evidence_of(router).clone() for router in routers]
        balancer.step()
        wanted = [RULES[rule](bias, seen, 3, 0.01) for bias, seen in zip(wanted, evidence, strict=True)]
        for router, bias, counts, kept in zip(routers, wanted, total, balancer.counts, strict=True):
            close(router.bias, bias, 1e-14)
            assert router.load.sum() == evidence_of(router).sum() == 0
            assert torch.equal(kept, counts)
            assert counts.sum() == 3 * 3 * 18


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_one_step_of_micro_batches_is_one_step_of_the_whole_batch(rule):
    text = tokens_of(6, 9)
    biases = []
    for micro in (1, 2, 6):
        model = model_of().train()
        balancer = Balancer(model, rule, rate=0.01)
        for part in text.chunk(micro):
            model(part)
        balancer.step()
        biases.append(torch.stack([router.bias for router in balancer.routers]))
    assert torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], biases[2])
    assert biases[0].abs().max() > 0


def test_nothing_counted_nothing_moved():
    model = model_of()
    balancer = Balancer(model, rule="equation-4", rate=0.5)
    for router in balancer.routers:
        router.bias += 1
    model(tokens_of(2, 5))  # eval
    balancer.step()
    assert all((router.bias == 1).all() for router in balancer.routers)


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_what_was_counted_before_is_not_this_balancers(rule):
    model = model_of().train()
    model(tokens_of(2, 9))
    balancer = Balancer(model, rule)
    for router in balancer.routers:
        router.bias.normal_()
    before = [router.bias.clone() for router in balancer.routers]
    balancer.step()
    assert all(torch.equal(router.bias, bias) for router, bias in zip(balancer.routers, before, strict=True))


def test_memory_that_was_never_written_is_no_count():
    router = Router(d_model=4, n_experts=300, top_k=2, device="meta").to_empty(device="cpu")
    assert router.load.sum() == 0
    Balancer(router, "quantile")
    assert router.to(torch.float64).margins.sum() == 0


def test_a_model_has_one_balancer():
    router = Router(d_model=4, n_experts=3, top_k=1)
    old = Balancer(router, "quantile")
    Balancer(router, "sign")
    router(torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="another Balancer"):
        old.step()


def test_switch_loss_of_scores_that_underflow_and_of_nothing():
    assert torch.isfinite(switch_loss(route(torch.full((4, 3), -200.0), torch.zeros(3), 1)))
    assert switch_loss(route(torch.zeros(0, 3), torch.zeros(3), 1)) == 0


def test_routers_of_different_sizes():
    layers = nn.ModuleList(Router(d_model=4, n_experts=e, top_k=2) for e in (3, 5, 8))
    balancer = Balancer(layers, rate=0.5)
    for router in layers:
        router(torch.randn(9, 4))
    wanted = [sign_rule(router.bias, router.load, 2, 0.5) for router in layers]
    balancer.step()
    assert [len(counts) for counts in balancer.counts] == [3, 5, 8]
    assert all(torch.equal(router.bias, bias) for router, bias in zip(layers, wanted, strict=True))


@pytest.mark.parametrize("rule", ["proportional", "quantile"])
def test_padding_does_not_move_the_bias(rule):
    text, lengths = tokens_of(2, 8), torch.tensor([8, 3])
    biases = []
    for padded in (True, False):
        model = model_of().train()
        balancer = Balancer(model, rule, rate=0.01)
        if padded:
            model(text, lengths=lengths)
        else:
            for row, length in enumerate(lengths):
                model(text[row : row + 1, :length])
        balancer.step()
        biases.append(torch.stack([router.bias for router in balancer.routers]))
    assert torch.equal(*biases)
    assert biases[0].abs().max() > 0


def test_a_model_without_routers():
    Balancer(nn.Linear(2, 2)).step()


@pytest.mark.parametrize("rate", [0, -1e-3, float("nan")])
def test_wrong_rate(rate):
    with pytest.raises(ValueError, match="rate="):
        Balancer(nn.Linear(2, 2), rate=float(rate))


def test_wrong_rule():
    with pytest.raises(ValueError, match="rule='signs': choose one of sign"):
        Balancer(nn.Linear(2, 2), rule="signs")


def skewed_router(**how):
    """62 experts of which some have a head start for every token: a constant feature that the router weighs."""
    router = Router(d_model=17, n_experts=62, top_k=6, **how)
    with torch.no_grad():
        router.weight.normal_(std=0.25)
        router.weight[:, -1] = torch.linspace(-0.5, 0.5, 62)[torch.randperm(62)]
    return router


def stories(tokens=1024):
    return torch.cat((torch.randn(tokens, 16), torch.ones(tokens, 1)), dim=1)


@torch.no_grad()
def test_the_sign_rule_balances_a_skewed_router():
    router = skewed_router()
    assert max_violation(router(stories()).counts) > 1
    router.load.zero_()
    balancer = Balancer(router, rule="sign", rate=1e-3)
    window, single = torch.zeros(62, dtype=torch.int64), []
    for step in range(600):
        router(stories())
        balancer.step()
        if step >= 600 - 64:
            window += balancer.counts[0]
            single.append(coefficient_of_variation(balancer.counts[0]))
    assert window.sum() == 64 * 1024 * 6
    assert max_violation(window) < 0.05
    assert dead_experts(window) == 0
    assert load_entropy(window) > 0.999
    assert sum(single) / 64 < 1.2 * noise_floor(62, 6, 1024)


@torch.no_grad()
def test_the_quantile_rule_balances_in_a_few_steps():
    """No step to choose: at the floor within ten batches, where the sign rule takes a hundred."""
    router = skewed_router()
    balancer, single = Balancer(router, rule="quantile", rate=0.5), []
    for _ in range(74):
        router(stories())
        balancer.step()
        single.append(coefficient_of_variation(balancer.counts[0]))
    assert single[0] > 4 * noise_floor(62, 6, 1024)
    assert sum(single[10:]) / 64 < 1.2 * noise_floor(62, 6, 1024)


@torch.no_grad()
def test_without_a_rule_the_skew_stays():
    router = skewed_router()
    balancer = Balancer(router, rule="none")
    for _ in range(5):
        router(stories())
        balancer.step()
    assert router.bias.abs().max() == 0
    assert max_violation(balancer.counts[0]) > 1


@torch.no_grad()
def test_equation_4_as_printed_does_not_balance():
    """Never summed up, the offset of one step is gone in the next (audit A27)."""
    router = skewed_router(scores="softmax")
    start = coefficient_of_variation(router(stories()).counts)
    router.load.zero_()
    balancer, seen = Balancer(router, rule="equation-4", rate=0.1), []
    for _ in range(60):
        router(stories())
        balancer.step()
        seen.append(coefficient_of_variation(balancer.counts[0]))
    assert sum(seen[-20:]) / 20 > 0.5 * start


def switch_by_hand(routing, rows):
    """E sum_e (slots of e / T k) (mean probability of e), for each of `rows` sequences, padding left out."""
    n_experts, top_k = routing.probabilities.shape[1], routing.index.shape[1]
    per_row, losses = len(routing.index) // rows, []
    for r in range(rows):
        tokens = [t for t in range(r * per_row, (r + 1) * per_row) if routing.valid is None or routing.valid[t]]
        if not tokens:
            continue
        loss = 0.0
        for e in range(n_experts):
            slots = sum(e in routing.index[t].tolist() for t in tokens)
            chance = sum(routing.probabilities[t, e] / routing.probabilities[t].sum() for t in tokens) / len(tokens)
            loss = loss + n_experts * slots / (len(tokens) * top_k) * chance
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_switch_loss_and_z_loss_by_hand(scores, sequences, padded):
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    valid = torch.tensor([True] * 3 + [False] + [True] * 4 + [False] * 4) if padded else None
    routing = route(logits, torch.zeros(5, dtype=torch.float64), 2, scores=scores, valid=valid)
    ours, wanted = switch_loss(routing, sequences), switch_by_hand(routing, sequences)
    close(ours, wanted, 1e-13)
    (a,), (b,) = (torch.autograd.grad(loss, logits, retain_graph=True) for loss in (ours, wanted))
    close(a, b, 1e-13)
    assert a.abs().max() > 0
    kept = range(12) if valid is None else valid.nonzero().flatten().tolist()
    z = sum(math.log(sum(math.exp(v) for v in logits[t].tolist())) ** 2 for t in kept) / len(kept)
    assert z_loss(routing).item() == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_switch_loss_is_one_where_the_load_is_uniform(top_k):
    """Whatever k: not divided by k it would be k, and its weight would mean something else for each model."""
    assert switch_loss(route(torch.zeros(6, 6), torch.zeros(6), top_k)).item() == pytest.approx(1)
    crowded = route(torch.tensor([[9.0, 8, 7, 6, 5, 4]]).expand(6, 6), torch.zeros(6), top_k, scores="softmax")
    assert switch_loss(crowded).item() > 1 or top_k == 6


def test_the_switch_loss_balances_by_its_gradient():
    router = skewed_router(scores="softmax")
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    x, before = stories(), None
    for _ in range(60):
        routing = router(x)
        before = before or coefficient_of_variation(routing.counts)
        optimizer.zero_grad()
        switch_loss(routing).backward()
        optimizer.step()
    assert coefficient_of_variation(router(x).counts) < before / 2


def test_switch_loss_of_rows_that_do_not_divide():
    with pytest.raises(ValueError, match="sequences=5: must divide the 12 tokens"):
        switch_loss(route(torch.zeros(12, 4), torch.zeros(4), 2), sequences=5)


def test_measures_by_hand():
    assert coefficient_of_variation(COUNTS) == pytest.approx(math.sqrt((36 + 16 + 4 + 0) / 4) / 4)
    assert max_violation(COUNTS) == pytest.approx(10 / 4 - 1)
    shares = [10 / 16, 2 / 16, 4 / 16]
    assert load_entropy(COUNTS) == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4))
    assert dead_experts(COUNTS) == 1
    even, one = torch.full((5,), 3), torch.tensor([0, 7, 0])
    assert coefficient_of_variation(even) == max_violation(even) == dead_experts(even) == 0
    assert load_entropy(even) == pytest.approx(1)
    assert load_entropy(one) == pytest.approx(0)
    assert max_violation(one) == pytest.approx(2)
    nothing = torch.zeros(4, dtype=torch.int64)
    assert coefficient_of_variation(nothing) == load_entropy(nothing) == 0
    assert dead_experts(nothing) == 4


@pytest.mark.parametrize(("n_experts", "top_k", "tokens"), [(62, 6, 512), (7, 3, 100), (16, 1, 200)])
def test_noise_floor_against_uniform_routing(n_experts, top_k, tokens):
    squares = []
    for _ in range(400):
        chosen = torch.rand(tokens, n_experts).topk(top_k).indices
        squares.append(coefficient_of_variation(torch.bincount(chosen.flatten(), minlength=n_experts)) ** 2)
    simulated = (sum(squares) / len(squares)) ** 0.5
    # the variance around the batch's own mean: E counts with a fixed sum lose nothing on average but rounding
    assert noise_floor(n_experts, top_k, tokens) == pytest.approx(simulated, rel=0.05)


def test_noise_floor_of_the_papers_windows():
    """0.135, 0.034 and 0.012 for 512, 8,192 and 65,536 tokens: "CV < 0.1" says nothing without the window."""
    floors = [round(noise_floor(62, 6, tokens), 3) for tokens in (512, 8192, 65536)]
    assert floors == [0.135, 0.034, 0.012]
    assert noise_floor(8, 8, 100) == 0


def test_every_rule_is_listed():
    assert set(RULES) == set(RATES) == {"sign", "proportional", "algorithm-1", "equation-4", "quantile", "none"}
    assert all(rule in vars(balancing).values() for rule in RULES.values())


def test_parts_weighed_by_their_tokens_add_up_to_the_whole():
    """The Switch loss with the counts of the whole, the z-loss, and sequences, which are whole in every part."""
    logits = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        logits[:3, 0] += 4  # each part prefers another expert
        logits[3:9, 1] += 4
    bias = torch.zeros(5, dtype=torch.float64)
    valid = torch.tensor([True] * 7 + [False] * 4 + [True])
    for padding in (None, valid):

        def parts(padding=padding):
            for rows in (slice(0, 3), slice(3, 9), slice(9, 12)):
                mask = None if padding is None else padding[rows]
                yield route(logits[rows], bias, 2, valid=mask), rows.stop - rows.start if mask is None else mask.sum()

        whole = route(logits, bias, 2, valid=padding)
        tokens = 12 if padding is None else valid.sum()
        for loss, of_part in (
            (switch_loss(whole), lambda part, counts=whole.counts: switch_loss(part, counts=counts)),
            (z_loss(whole), z_loss),
        ):
            summed = sum(of_part(part) * n / tokens for part, n in parts())
            close(summed, loss, 1e-12)
            (a,), (b,) = (torch.autograd.grad(value, logits, retain_graph=True) for value in (summed, loss))
            close(a, b, 1e-12)
        alone = sum(switch_loss(part) * n / tokens for part, n in parts())
        assert (alone - switch_loss(whole)).abs() > 0.05
    rows = [switch_loss(route(logits[r : r + 6], bias, 2), sequences=2) for r in (0, 6)]
    close(sum(rows) / 2, switch_loss(route(logits, bias, 2), sequences=4), 1e-12)
    with pytest.raises(ValueError, match="sequences=2: each row has counts of its own"):
        switch_loss(route(logits, bias, 2), sequences=2, counts=torch.ones(5).long())


def test_a_pass_without_tokens_has_no_loss():
    routing = route(torch.zeros(0, 4, requires_grad=True), torch.zeros(4), 2)
    assert z_loss(routing).item() == switch_loss(routing).item() == 0
