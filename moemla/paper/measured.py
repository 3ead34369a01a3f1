"""What finished experiments say of a claim: a mean, a ratio of two means, a registered comparison.

Built in chapter 19.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moemla import results
from moemla.cells import leaves
from moemla.experiments import NAMES, find
from moemla.experiments.runner import complete

Number = int | float


def measured(wanted: dict[str, Any], folder: str | Path) -> tuple[tuple[Number, Number, Number] | None, str]:
    """What a finished experiment says: a mean, a ratio of two, or a registered contrast in percent of the perplexity.

    Value and interval of a contrast; of the others the value three times. None where the experiment is not finished.

    {experiment, scale, measure, where}: the mean over the runs whose settings hold all of `where`, by dotted names
    ("tags.arm", "train.lr"; a measure within another too: "loads.batch.cv"). With `over`, settings as in `where`:
    by how many percent that mean is above the mean of those. {experiment, scale, contrast}: the comparison of that
    name, by Welch, as the change of perplexity in percent, with its 95 % interval.
    """
    experiment, scale = wanted["experiment"], wanted["scale"]
    stored = results.load(folder, experiment, scale, missing_ok=True)
    runs = complete(experiment, scale, folder)
    at = f"{experiment} at scale {scale}"
    if name := wanted.get("contrast"):
        one = find(experiment).contrasts(runs).get(name) if runs else None
        if one is None:
            return None, "not finished yet" if stored else "not measured yet"
        nats = f"{one.welch.value:+.4f} ± {one.welch.half_width:.4f} nats"
        value, low, high = (100 * math.expm1(x) for x in (one.welch.value, one.welch.low, one.welch.high))
        return (value, low, high), f"{name}: {nats}, {at}"
    if runs and experiment in NAMES and hasattr(find(experiment), "measured"):  # not those that chose the rate
        runs = [run for of_arm in find(experiment).measured(runs).values() for run in of_arm]
    mean, count = _mean(runs, wanted["measure"], wanted.get("where", {}))
    if mean is None:
        return None, "not finished yet" if stored else "not measured yet"
    if "over" in wanted:
        mean = 100 * (mean / _mean(runs, wanted["measure"], wanted["over"])[0] - 1)
    return (mean, mean, mean), f"mean of {count} runs of {at}"


def _mean(runs: Iterable[results.Result], measure: str, where: dict[str, Any]) -> tuple[Number | None, int]:
    held = [(run, dict(leaves(run.measures))) for run in runs if run.holds(where)]
    held = [(run, values[measure]) for run, values in held if measure in values]
    if not held:
        return None, 0
    results.comparable(*(run for run, _ in held), differ_in={"seed"})
    return math.fsum(value for _, value in held) / len(held), len(held)
