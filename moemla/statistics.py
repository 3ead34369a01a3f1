"""What losses over seeds allow one to say: intervals, contrasts, tests of sameness, and how many seeds it takes.

A contrast is a weighted sum of group means with weights that sum to zero: a difference has (1, -1), the interaction of
two changes (1, -1, -1, 1). Seed s gives every group the same batches, so a contrast can be taken within each seed
(paired) or between the groups as if their seeds had nothing in common (Welch). Both are returned, with the correlation
over seeds: of two groups it decides which interval is narrower. Built in chapter 15.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from types import ModuleType

from moemla.errors import optional

LEVEL = 0.95
POWER = 0.9


@dataclass(frozen=True)
class Estimate:
    """A value with its interval by Student's t, and the two-sided p against zero."""

    value: float
    low: float
    high: float
    p: float
    standard_error: float
    df: float
    level: float = LEVEL

    @property
    def half_width(self) -> float:
        """What stands behind the ± sign."""
        return (self.high - self.low) / 2

    def p_within(self, margin: float) -> float:
        """p of two one-sided tests: small where the value lies between -margin and margin (Schuirmann 1987).

        "No difference" may be said where it is below 1 - `level`. ValueError unless the margin is positive.
        """
        if not margin > 0:
            raise ValueError(f"margin={margin}: must be above 0")
        if self.standard_error == 0:
            return float(abs(self.value) >= margin)
        above, below = ((margin + sign * self.value) / self.standard_error for sign in (1, -1))
        return float(max(_scipy().stats.t.sf([above, below], self.df)))


@dataclass(frozen=True)
class Contrast:
    """One weighted sum of means, taken within seeds and between groups.

    `correlation` is the mean of the groups' pairwise correlations over seeds; None where a group does not vary.
    """

    paired: Estimate
    welch: Estimate
    correlation: float | None


def estimate(values: Iterable[float], level: float = LEVEL) -> Estimate:
    """The mean of independent values, (n,) with n >= 2, in the unit of the values.

    ValueError for fewer than two, or one that is not finite.
    """
    values = _checked(values)
    n = len(values)
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return _estimate(mean, math.sqrt(variance / n), n - 1, level)


def contrast(
    groups: Iterable[Iterable[float]],
    weights: Iterable[float],
    level: float = LEVEL,
    shared: Iterable[Iterable[float]] | None = None,
) -> Contrast:
    """sum_g w_g mean_g over groups of losses.

    Welch: the groups' variances apart, degrees of freedom by Welch and Satterthwaite, groups of any length. Paired: the
    sum within each seed, then `estimate`, over `shared`, what the groups hold of seeds that all have, entry s of each
    being one seed (default: all). ValueError unless these have one length and the weights sum to zero.
    """
    groups, weights = [_checked(group) for group in groups], list(weights)
    shared = groups if shared is None else [_checked(group) for group in shared]
    lengths = [len(group) for group in shared]
    if len(set(lengths)) != 1 or len(groups) != len(weights):
        raise ValueError(f"weights={weights}: one a group, and as many seeds in each, of which there are {lengths}")
    if abs(math.fsum(weights)) > 1e-12:
        raise ValueError(f"weights={weights}: must sum to zero")
    seeds = zip(*shared, strict=True)
    paired = estimate([math.fsum(w * v for w, v in zip(weights, seed, strict=True)) for seed in seeds], level)
    means = [estimate(group, level) for group in groups]
    value = math.fsum(w * mean.value for w, mean in zip(weights, means, strict=True))
    parts = [(w * mean.standard_error) ** 2 for w, mean in zip(weights, means, strict=True)]
    variance, dfs = math.fsum(parts), [len(group) - 1 for group in groups]
    df = variance**2 / math.fsum(part**2 / n for part, n in zip(parts, dfs, strict=True)) if variance else sum(dfs)
    return Contrast(paired, _estimate(value, math.sqrt(variance), df, level), _correlation(shared))


def difference(a: Iterable[float], b: Iterable[float], level: float = LEVEL) -> Contrast:
    """mean a - mean b over the same seeds."""
    return contrast((a, b), (1, -1), level)


def interaction(
    neither: Iterable[float],
    first: Iterable[float],
    second: Iterable[float],
    both: Iterable[float],
    level: float = LEVEL,
) -> Contrast:
    """(both - second) - (first - neither): by how much one change does more in the presence of the other.

    In losses a synergy is negative.
    """
    return contrast((both, first, second, neither), (1, -1, -1, 1), level)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values of several registered comparisons, corrected so that one false alarm in the family has 5 % at p < 0.05.

    Holm 1979: the smallest times m, the next times m - 1 and so on, never falling.
    """
    corrected, largest, m = {}, 0.0, len(p_values)
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (m - place) * p_values[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p_values}


def superiority(a: Iterable[float], b: Iterable[float]) -> float:
    """The share of pairs, one value of a and one of b, in which a's is the larger; a tie counts half.

    0.5 where the two are alike. It is Mann and Whitney's U over the number of pairs. ValueError where one is empty, or
    a value is not finite. Built in chapter 18.
    """
    a, b = _checked(a, least=1), sorted(_checked(b, least=1))
    return sum(bisect_left(b, value) + bisect_right(b, value) for value in a) / (2 * len(a) * len(b))


def power(difference: float, standard_error: float, df: float, level: float = LEVEL) -> float:
    """The chance that a true difference is seen by a two-sided t test."""
    stats = _scipy().stats
    edge, shift = stats.t.ppf((1 + level) / 2, df), difference / standard_error
    return float(stats.nct.sf(edge, df, shift) + stats.nct.sf(edge, df, -shift))  # the cdf at -edge is the same, or NaN


def detectable(sd: float, seeds: int, wanted: float = POWER, level: float = LEVEL) -> float:
    """The smallest true difference of two arms that `seeds` seeds each show with the `wanted` power, in sd's unit.

    sd: one arm's standard deviation over seeds, the same in both, seeds independent.
    """
    error, df = sd * math.sqrt(2 / seeds), 2 * (seeds - 1)
    return _scipy().optimize.brentq(lambda size: power(size, error, df, level) - wanted, 0.0, 20 * error)


def _scipy() -> ModuleType:
    return optional("scipy", "stats")  # a second to import


def _checked(values: Iterable[float], least: int = 2) -> list[float]:
    values = [float(value) for value in values]
    if len(values) < least or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values={values}: {('one', 'two')[least - 1]} or more finite numbers are needed")
    return values


def _estimate(value: float, error: float, df: float, level: float) -> Estimate:
    student_t = _scipy().stats.t
    half = float(student_t.ppf((1 + level) / 2, df)) * error
    p = float(2 * student_t.sf(abs(value) / error, df)) if error else float(value == 0)
    return Estimate(value, value - half, value + half, p, error, df, level)


def _correlation(groups: list[list[float]]) -> float | None:
    if any(len(set(group)) == 1 for group in groups):
        return None
    if len(groups[0]) == 2:
        return None  # two seeds are always on a line
    pairs = [float(_scipy().stats.pearsonr(a, b).statistic) for a, b in combinations(groups, 2)]
    return math.fsum(pairs) / len(pairs)
