"""`moemla.statistics` against scipy's own tests, textbook numbers, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from moemla import statistics

RANDOM = np.random.default_rng(3)
A, B = RANDOM.normal(1.0, 0.1, 8), RANDOM.normal(1.05, 0.3, 8)


def test_an_interval_is_student_t_s():
    found = statistics.estimate(A, level=0.9)
    low, high = stats.t.interval(0.9, len(A) - 1, loc=A.mean(), scale=stats.sem(A))
    assert (found.value, found.low, found.high) == pytest.approx((A.mean(), low, high), rel=1e-12)
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.p == pytest.approx(stats.ttest_1samp(A, 0).pvalue, rel=1e-9)


def test_superiority_is_mann_and_whitney_s_u():
    """With ties: the values are whole numbers."""
    random = np.random.default_rng(4)
    a, b = random.integers(0, 5, 40).tolist(), random.integers(1, 6, 30).tolist()
    u = stats.mannwhitneyu(a, b).statistic
    assert statistics.superiority(a, b) == pytest.approx(u / (40 * 30)) != 0.5
    assert statistics.superiority(a, b) + statistics.superiority(b, a) == pytest.approx(1)
    assert statistics.superiority([1], [1]) == statistics.superiority(a, a) == 0.5
    assert statistics.superiority([2, 3], [1]) == 1 and statistics.superiority([3, 1], iter([2, 2])) == 0.5
    for wrong in ([], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="one or more finite"):
            statistics.superiority(wrong, [1])
        with pytest.raises(ValueError, match="one or more finite"):
            statistics.superiority([1], wrong)


def test_by_hand_for_three_seeds():
    # mean 2, variance 1, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    found = statistics.estimate([1, 2, 3])
    assert (found.low, found.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6)


def test_a_difference_is_scipy_s_paired_and_welch_test():
    found = statistics.difference(A, B)
    paired, welch = stats.ttest_rel(A, B), stats.ttest_ind(A, B, equal_var=False)
    for ours, theirs in ((found.paired, paired), (found.welch, welch)):
        interval = theirs.confidence_interval(0.95)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert ours.df == pytest.approx(theirs.df)
        assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.correlation == pytest.approx(np.corrcoef(A, B)[0, 1])


@pytest.mark.parametrize(("sign", "narrower"), [(1, "paired"), (-1, "welch")])
def test_pairing_helps_where_seeds_agree_and_harms_where_they_oppose(sign, narrower):
    found = statistics.difference(A, 2 + sign * A + 0.01 * B)
    widths = {"paired": found.paired.half_width, "welch": found.welch.half_width}
    assert min(widths, key=widths.__getitem__) == narrower
    assert math.copysign(1, found.correlation) == sign


def test_an_interaction_is_the_difference_of_two_differences():
    neither, first, second, both = RANDOM.normal(size=(4, 6))
    found = statistics.interaction(neither, first, second, both)
    each = (both - second) - (first - neither)
    assert found.paired == statistics.estimate(each)
    assert found.welch.value == pytest.approx(each.mean())
    spread = sum(stats.sem(group) ** 2 for group in (neither, first, second, both))
    assert found.welch.standard_error == pytest.approx(math.sqrt(spread))
    # what adds up exactly has none
    assert statistics.interaction([1, 2], [2, 3.5], [3, 4], [4, 5.5]).paired.value == 0


def test_a_contrast_of_four_groups_of_any_length_by_hand():
    """Welch and Satterthwaite: V = sum of c^2 s^2 / n, degrees of freedom V^2 / sum of its parts squared over n - 1."""
    weights, groups = (0.5, 0.5, -0.25, -0.75), [RANDOM.normal(size=n) * n for n in (3, 5, 10, 4)]
    shared = [group[:3] for group in groups]
    found = statistics.contrast(groups, weights, shared=shared).welch
    parts = [w**2 * group.var(ddof=1) / len(group) for w, group in zip(weights, groups, strict=True)]
    df = sum(parts) ** 2 / sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=True))
    value, error = sum(w * group.mean() for w, group in zip(weights, groups, strict=True)), math.sqrt(sum(parts))
    assert (found.value, found.standard_error, found.df) == pytest.approx((value, error, df))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(value) / error, df))
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, df) * error)


def test_holm_by_hand():
    # ordered 0.01 x 3, 0.02 x 2, 0.5 x 1; the second of two near ones never falls below the first
    assert statistics.holm({"b": 0.02, "a": 0.01, "c": 0.5}) == pytest.approx({"b": 0.04, "a": 0.03, "c": 0.5})
    assert statistics.holm({"a": 0.02, "b": 0.021}) == pytest.approx({"a": 0.04, "b": 0.04})
    assert statistics.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert statistics.holm({"a": 0.01, "lost": 1.0}) == pytest.approx({"a": 0.02, "lost": 1.0})  # counts, if not judged


def test_holm_keeps_the_rate_of_false_alarms():
    alarms = [
        min(statistics.holm(dict(zip("abcde", row, strict=True))).values()) < 0.05
        for row in RANDOM.uniform(size=(4000, 5))
    ]
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.015)


def test_sameness_is_the_larger_of_two_one_sided_tests():
    found, margin = statistics.estimate(A - 1), 0.2
    above = stats.ttest_1samp(A - 1, margin, alternative="less").pvalue
    below = stats.ttest_1samp(A - 1, -margin, alternative="greater").pvalue
    assert found.p_within(margin) == pytest.approx(max(above, below), rel=1e-9)
    assert found.p_within(1e-6) > 0.3  # hardly within nothing
    assert statistics.estimate([5, 6, 7]).p_within(1) > 0.99
    assert statistics.estimate([0.5, 0.5]).p_within(1) == 0 and statistics.estimate([2, 2]).p_within(1) == 1


def test_power_is_the_share_of_experiments_that_see_it():
    seeds, sd, size = 5, 0.02, 0.045
    groups = RANDOM.normal(0, sd, (4000, 2, seeds)) + np.array([0, size])[None, :, None]
    seen = stats.ttest_ind(groups[:, 0], groups[:, 1], axis=1).pvalue < 0.05
    expected = statistics.power(size, sd * math.sqrt(2 / seeds), 2 * (seeds - 1))
    assert np.mean(seen) == pytest.approx(expected, abs=0.025)
    wanted = statistics.detectable(sd, seeds)
    assert statistics.power(wanted, sd * math.sqrt(2 / seeds), 2 * (seeds - 1)) == pytest.approx(0.9)
    assert statistics.detectable(sd, 20) < wanted / 2


def test_no_spread_is_no_error():
    found = statistics.difference([1, 1, 1], [2, 2, 2])
    assert (found.paired.value, found.paired.half_width, found.welch.p) == (-1, 0, 0)
    assert found.correlation is None and statistics.difference([1, 2], [3, 5]).correlation is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: statistics.estimate([1.0]), "two or more"),
        (lambda: statistics.estimate([1.0, math.nan]), "finite"),
        (lambda: statistics.difference([1, 2], [1, 2, 3]), "as many seeds"),
        (lambda: statistics.contrast(([1, 2], [2, 3]), (1, 1)), "sum to zero"),
        (lambda: statistics.estimate([1, 2]).p_within(0), "above 0"),
    ],
)
def test_what_cannot_be_said_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_groups_of_other_sizes_all_count():
    a, b = [1.0, 1.4, 0.9, 1.2, 1.3, 1.1], [0.8, 1.0, 0.9]
    found = statistics.contrast((a, b), (1, -1), shared=(a[:3], b))
    theirs = stats.ttest_ind(a, b, equal_var=False)
    assert found.welch.p == pytest.approx(theirs.pvalue) and found.welch.df == pytest.approx(theirs.df)
    assert found.paired.p == pytest.approx(stats.ttest_rel(a[:3], b).pvalue)
