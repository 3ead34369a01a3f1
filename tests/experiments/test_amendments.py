"""The numbers that an amendment rests on, by simulation: what intervals cover, what the choice of a rate takes away."""

import numpy as np
import pytest
from scipy import stats

from moemla import statistics

WEIGHTS = np.array([1.0, -1.0, -1.0, 1.0])
SD, SEEDS, MARGIN, RUNS = 0.0105, 10, 0.02, 20_000
RANDOM = np.random.default_rng(7)


def squares(sd=SD, correlation=0.0):
    """Losses of four arms over ten seeds, without an interaction: (RUNS, 4, SEEDS)."""
    common, own = RANDOM.normal(size=(RUNS, 1, SEEDS)), RANDOM.normal(size=(RUNS, 4, SEEDS))
    return sd * (np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)


def welch(losses):
    """Interaction, standard error and degrees of freedom of each."""
    parts = losses.var(2, ddof=1) / SEEDS
    return losses.mean(2) @ WEIGHTS, np.sqrt(parts.sum(1)), parts.sum(1) ** 2 / (parts**2 / (SEEDS - 1)).sum(1)


def p_of(value, error, df):
    return 2 * stats.t.sf(abs(value) / error, df)


def test_the_many_are_the_one():
    losses = squares()[:20]
    for group, *mine in zip(losses, *welch(losses), strict=True):
        one = statistics.contrast(group, WEIGHTS).welch
        assert mine == pytest.approx([one.value, one.standard_error, one.df]) and p_of(*mine) == pytest.approx(one.p)


def test_what_welch_covers():
    assert np.mean(p_of(*welch(squares())) >= 0.05) == pytest.approx(0.95, abs=0.006)
    assert np.mean(p_of(*welch(squares(correlation=0.3))) >= 0.05) > 0.975
    assert np.mean(p_of(*welch(squares(correlation=0.7))) >= 0.05) > 0.995
    twice = 2 * stats.norm.sf(stats.t.ppf(0.975, 36) / np.sqrt(2))  # seeds that oppose: twice Welch's variance
    assert 1 - twice == pytest.approx(0.84, abs=0.01)


def test_two_error_rates():
    p = RANDOM.uniform(size=(RUNS, 12))
    by_holm = p.min(1) < 0.05 / 12
    assert by_holm.mean() == pytest.approx(0.049, abs=0.005)
    others = p[:, 1:].min(1) < 0.05 / 12  # the smallest of all is asked first
    assert ((p[:, 0] < 0.05) | others).mean() == pytest.approx(0.092, abs=0.007)


def test_one_run_chooses_a_rate():
    """Four rates, truly 0, g, g and 2 g above the best: seed 0 chooses, ten seeds measure what was chosen."""
    covered = {}
    for g in (0.01, 0.015):
        excess = np.array([0, g, g, 2 * g])
        chosen = (excess + RANDOM.normal(0, SD, (RUNS, 4, 4))).argmin(2)
        losses = squares() + excess[chosen][:, :, None]
        covered[g] = np.mean(p_of(*welch(losses)) >= 0.05)
        value, error, df = welch(losses)
        assert np.mean(p_of(value - excess[chosen] @ WEIGHTS, error, df) >= 0.05) == pytest.approx(0.95, abs=0.006)
    assert covered == pytest.approx({0.01: 0.69, 0.015: 0.62}, abs=0.015)


@pytest.mark.parametrize(("sd", "same", "open_"), [(0.0105, 0.81, 0.15), (0.0121, 0.64, 0.31), (0.014, 0.43, 0.52)])
def test_what_can_be_said_of_sameness(sd, same, open_):
    value, error, df = welch(squares(sd))
    within = stats.t.sf((MARGIN - abs(value)) / error, df) < 0.05
    differs = p_of(value, error, df) < 0.05
    assert within.mean() == pytest.approx(same, abs=0.015)
    assert np.mean(~within & ~differs) == pytest.approx(open_, abs=0.015)
    assert abs(value[within]).max() < MARGIN and np.median(abs(value[within])) < 0.009
