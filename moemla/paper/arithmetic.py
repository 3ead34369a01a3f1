"""Percentages, means and statistics of numbers that the paper prints; `claims.yml` names these functions.

Arguments are printed numbers, given in the ledger by the id of the claim that holds them. Each returns the
value in the unit that its claim prints, and a line of detail. Built in chapter 19.
"""

import math
from itertools import pairwise

Value = tuple[int | float, str]


def equals(value: float) -> Value:
    """The same quantity where it is printed elsewhere."""
    return value, ""


def multiply(*factors: float, scale: int | float = 1) -> Value:
    """A product, divided by `scale`."""
    return math.prod(factors) / scale, ""


def add(*terms: float) -> Value:
    """A sum."""
    return sum(terms), ""


def difference(whole: float, part: float) -> Value:
    """One number less another."""
    return whole - part, ""


def ratio(over: float, under: float) -> Value:
    """One number over another."""
    return over / under, ""


def percent_of(part: float, whole: float) -> Value:
    """A part of a whole, in percent."""
    return 100 * part / whole, ""


def percent_change(before: float, after: float) -> Value:
    """Change of a perplexity in percent; the detail gives the change of its logarithm, the loss."""
    loss = 100 * (math.log(after) / math.log(before) - 1)
    return 100 * (after / before - 1), f"{loss:+.2f} % in nats"


def reduction(before: float, after: float) -> Value:
    """How much smaller, in percent."""
    return 100 * (1 - after / before), ""


def loss_reduction(before: float, after: float) -> Value:
    """How much smaller the loss (ln of the perplexity) is, in percent; the detail has the perplexity's own."""
    value = 100 * (1 - math.log(after) / math.log(before))
    return value, f"ln {before} = {math.log(before):.4f}, ln {after} = {math.log(after):.4f}"


def beyond_the_sum(neither: float, first: float, second: float, both: float) -> Value:
    """Change by two things together less the changes by each, in percent; the detail has the same of logarithms."""
    one, two, together = (100 * (value / neither - 1) for value in (first, second, both))
    nats = math.log(both) - math.log(first) - math.log(second) + math.log(neither)
    return together - one - two, f"{together:+.1f} % against {one:+.1f} % and {two:+.1f} %; {nats:+.3f} nats"


def architecture_over_scaling(*perplexities: float) -> Value:
    """The largest gain from MHA to experts at one size, less the smallest from one size of MHA to the next, in %."""
    dense, moe = perplexities[::2], perplexities[1::2]
    by_form = [100 * (1 - b / a) for a, b in zip(dense, moe, strict=True)]
    by_size = [100 * (1 - b / a) for a, b in pairwise(dense)]
    said = (f"{', '.join(f'{gain:.1f}' for gain in gains)} %" for gains in (by_form, by_size))
    return max(by_form) - min(by_size), " by form; ".join(said) + " by size"


def nearest_larger_dense(*perplexities: float) -> Value:
    """The least that a size with experts is above the next size of MHA."""
    dense, moe = perplexities[::2], perplexities[1::2]
    above = [b - a for a, b in zip(dense[1:], moe, strict=False)]
    return min(above), ", ".join(f"{distance:+.2f}" for distance in above)


def mean(*values: float) -> Value:
    """Arithmetic mean."""
    return sum(values) / len(values), ""


def mean_spread(*deviations: float) -> Value:
    """Standard deviation of the mean of independent parts."""
    return math.hypot(*deviations) / len(deviations), ""


def paired_p(mean_a: float, sd_a: float, mean_b: float, sd_b: float, correlation: float = 0.0) -> Value:
    """Two-sided p of a paired t over three seeds, from printed means and deviations and an assumed correlation.

    With two degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    """
    spread = math.sqrt(sd_a**2 + sd_b**2 - 2 * correlation * sd_a * sd_b)
    t = abs(mean_a - mean_b) / (spread / math.sqrt(3))
    needed = (1 - 1e-3) * math.sqrt(2 / (1 - (1 - 1e-3) ** 2))
    return 1 - t / math.sqrt(t**2 + 2), f"t = {t:.1f}; {needed:.1f} is needed for 0.001 (correlation {correlation})"


def interval_percent(mean_a: float, sd_a: float, mean_b: float, sd_b: float) -> Value:
    """Half of a 95 % interval of the relative improvement of b over a, in percent, by t over three seeds."""
    relative = mean_b / mean_a * math.hypot(sd_a / mean_a, sd_b / mean_b)
    p = 0.95
    t = p * math.sqrt(2 / (1 - p**2))  # two degrees of freedom
    z = 1.959964  # of the normal distribution
    error = 100 * relative / math.sqrt(3)
    return t * error, f"{z * error:.2f} % by the normal distribution"


# The columns of Table 6.


MILLION = 1e6 / 2**20  # bytes, in the unit that makes the table's cache right


def fp16_megabytes(millions: float) -> Value:
    """Bytes of that many million parameters at two bytes each, in MiB."""
    one = MILLION * millions
    return 2 * one, f"{4 * one:.0f} MiB in fp32, {one:.0f} in int8"


def total_megabytes(parameters: float, cache: float, activations: float, bytes_each: int | None = None) -> Value:
    """A column of Table 6 summed; `bytes_each` takes its first row for a count in millions."""
    return (parameters if bytes_each is None else bytes_each * MILLION * parameters) + cache + activations, ""


def memory_rise(*columns: float, bytes_each: int | None = None) -> Value:
    """Percent by which the second column of Table 6 (parameters, cache, activations) exceeds the first."""
    first, second = (total_megabytes(*column, bytes_each=bytes_each)[0] for column in (columns[:3], columns[3:]))
    return 100 * (second / first - 1), f"{second:.0f} against {first:.0f}"
