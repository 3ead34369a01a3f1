"""Arms at their own rates over seeds: who is run, who is chosen, what the table says; the registered experiments."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from moemla import complexity
from moemla.cells import differences
from moemla.errors import MoemlaError
from moemla.experiments import QUEUE, REGISTERED, find
from moemla.experiments.comparison import Arm, Comparison, synergy, versus
from moemla.experiments.one_run import CPU, scales
from moemla.experiments.runner import Text, planned
from moemla.results import ResultError, of

ROOT = Path(__file__).parents[2]
TEXT = Text("builtin", "0a" * 32)


def two(size):
    return [Arm("one", "mha-rope"), Arm("two", "mla-rope", seeds=7), Arm("third", "mla-rope", rate_of="two", steps=2)]


TWO = Comparison(
    "flops",
    scales(CPU),
    two,
    (versus("two", "one"), versus("third", "one")),
    ("variant", "train.steps", "train.warmup"),
)


def measured(cell, loss, **more):
    held = dict(nats_per_token=loss, parameters=10, active_parameters=8, bits_per_byte=0.5, cpu_seconds=3.0)
    held |= dict(flops_per_token=2_340_000)
    return of(cell, held | more, {})


def test_the_sweep_is_of_seed_0_and_seeds_from_11_on_measure():
    sweep = TWO.cells("cpu", TEXT)
    assert [(cell.tags["arm"], cell.train.lr, cell.train.seed) for cell in sweep] == [
        (arm, lr, 0) for lr in CPU.rates for arm in ("one", "two")
    ]
    assert all(math.isclose(cell.train.min_lr, cell.train.lr / 30) and cell.train.warmup == 60 for cell in sweep)
    measuring = TWO.measure("cpu", TEXT, {"one": 1e-2, "two": 2e-2})
    seeds = {arm.name: [c.train.seed for c in measuring if c.tags["arm"] == arm.name] for arm in two(CPU)}
    assert seeds == {"one": [*range(11, 16)], "two": [*range(11, 18)], "third": [*range(11, 16)]}
    assert {(cell.tags["arm"], cell.train.lr, cell.train.steps) for cell in measuring} == {
        ("one", 1e-2, 600),
        ("two", 2e-2, 600),
        ("third", 2e-2, 1200),  # at the rate of the arm that it names
    }
    assert {len(TWO.measure("cpu", TEXT, None)), len(measuring)} == {17}
    assert len(TWO.measure("cpu", TEXT, None, seeds=2)) == 6


def test_an_arm_takes_the_rate_that_came_out_lowest_and_none_where_all_diverged():
    cells = TWO.cells("cpu", TEXT)
    losses = dict(zip([(c.tags["arm"], c.train.lr) for c in cells], [3, 2, 1, 4, 2, 1, 4, 9], strict=True))
    runs = [measured(cell, losses[cell.tags["arm"], cell.train.lr]) for cell in cells]
    assert TWO.choose(runs) == {"one": 1e-2, "two": 2e-2}
    lost = [
        of(cell, dict(diverged=True), {}) if cell.tags["arm"] == "two" else run
        for cell, run in zip(cells, runs, strict=True)
    ]
    with pytest.raises(MoemlaError, match="no learning rate came through for two"):
        TWO.choose(lost)


def test_the_table_is_that_of_the_seeds_and_says_what_was_registered():
    sweep = [measured(cell, 2.0 + cell.train.lr) for cell in TWO.cells("cpu", TEXT)]
    loss = {"one": 1.0, "two": 1.1, "third": 0.9}
    loads = dict(batch=dict(cv=0.5, cv_floor=0.3), sequence=dict(cv=1.3, cv_floor=0.5))  # 0.4 and 1.2 above the floors
    more = {"one": {}, "two": dict(cpu_seconds=4.5, loads=loads), "third": {}}
    runs = [
        measured(cell, loss[cell.tags["arm"]] + 0.01 * (cell.train.seed % 3), **more[cell.tags["arm"]])
        for cell in TWO.measure("cpu", TEXT, TWO.choose(sweep))
    ]
    found = TWO.contrasts([*sweep, *runs])
    assert found["two - one"].paired.value == pytest.approx(0.1) and found["two - one"].correlation == pytest.approx(1)
    assert TWO.at_common_rates([*sweep, *runs]) == {"two - one": dict.fromkeys(CPU.rates, 0.0)}
    table = TWO.table([*sweep, *runs])
    assert re.search(r"^two .*\b2\.34 +0\.005 +7  1\.11\d\d ± .* 0\.500 +1\.300 +3\.0$", table, flags=re.M)
    line = r"^two - one +\+0\.1014 ± 0\.\d{4} +\+0\.1000 ± 0\.0000 +\+1\.00 +0\.\d{4} +x1\.50$"
    assert re.search(line, table, flags=re.M)
    shown = replace(TWO, asked=TWO.asked[1:], beside=TWO.asked[:1]).table(runs)
    assert re.search(r"^two - one .* \+1\.00 +- +x1\.50$", shown, flags=re.M)  # in no family, so not corrected
    assert re.search(r"^one +0\.005, 0\.0050 below the next, the grid's edge$", table, flags=re.M)
    diverged = [of_diverged(run) if run.settings["tags"]["arm"] == "third" else run for run in runs]
    assert "third - one" not in TWO.contrasts([*sweep, *diverged])
    table = TWO.table([*sweep, *diverged])
    assert re.search(r"^third .* \d of \d diverged: no mean$", table, flags=re.M)
    assert re.search(r"^third - one +not judged: an arm diverged", table, flags=re.M)
    assert TWO.corrected([*sweep, *diverged]) == {
        "two - one": pytest.approx(2 * found["two - one"].welch.p),
        "third - one": 1,
    }
    beside = replace(TWO, asked=TWO.asked[:1], beside=TWO.asked[1:]).table([*sweep, *diverged])
    assert re.search(r"^third - one +not judged: an arm diverged", beside, flags=re.M)


def of_diverged(run):
    return replace(run, measures=dict(parameters=10, active_parameters=8, diverged=True))


def test_runs_that_differ_in_more_than_the_question_are_refused_by_name():
    runs = [measured(cell, 1.0) for cell in TWO.measure("cpu", TEXT, None)]
    settings = runs[0].settings
    other = replace(runs[0], settings=settings | {"train": settings["train"] | {"batch_size": 9}}, key="x")
    with pytest.raises(ResultError, match=r"train\.batch_size=8 and train\.batch_size=9"):
        TWO.table([*runs[1:], other])


def test_a_contrast_of_arms_with_more_and_fewer_seeds_takes_those_they_share():
    losses = {"one": lambda s: s, "two": lambda s: 2 * s if s < 16 else 1000.0}
    runs = [
        measured(c, losses[c.tags["arm"]](c.train.seed))
        for c in TWO.measure("cpu", TEXT, None)
        if c.tags["arm"] != "third"
    ]
    found = TWO.contrasts(runs)["two - one"]
    assert found.paired.value == pytest.approx(13.0)
    lost = {arm: [losses[arm](run.settings["train"]["seed"]) for run in TWO.measured(runs)[arm]] for arm in losses}
    mean = {arm: sum(values) / len(values) for arm, values in lost.items()}
    assert found.welch.value == pytest.approx(mean["two"] - mean["one"]) and len(lost["two"]) > len(lost["one"])


def test_an_arm_has_one_rate():
    runs = [measured(cell, 1.0) for cell in TWO.measure("cpu", TEXT, None)]
    settings = runs[-1].settings
    other = replace(runs[-1], settings=settings | {"train": settings["train"] | {"lr": 0.03, "min_lr": 0.001}}, key="x")
    with pytest.raises(ResultError, match=r"train\.lr="):
        TWO.measured([*runs[:-1], other])


# ---- those that are registered


@pytest.mark.parametrize("name", REGISTERED)
def test_arms_differ_in_the_question_alone(name):
    """At every scale: two arms may differ in what `differ_in` names, and no registered comparison names a lost arm."""
    experiment = find(name)
    assert set(experiment.SCALES) >= ({"smoke", "cpu", "gpu", "paper"} if name in QUEUE else {"smoke", "gpu"})
    for scale in experiment.SCALES:
        cells = planned(experiment, scale, TEXT)
        runs = [measured(cell, 1.0) for cell in cells if cell.train.seed > 0 and cell.experiment == name]
        assert experiment.measured(runs)  # comparable
        arms = {cell.tags["arm"] for cell in cells}
        if scale == "cpu":
            assert {arm for asked in experiment.asked for arm in asked.weights} - arms <= {
                f"{kind}-{width}" for kind in ("dense", "total", "active") for width in (512, 768, 1024)
            }
            assert all(abs(sum(asked.weights.values())) < 1e-12 for asked in experiment.asked)


def test_the_primary_question_is_the_interaction():
    square = synergy("experts x latents, rotary, equal total", "mha-rope", "moe-mha-rope", "mla-rope", "moe-mla-rope")
    assert find("synergy").asked[0] == replace(square, margin=0.02)
    for name in ("synergy-adamw", "synergy-long", "synergy-rate", "real"):
        assert find(name).asked[0] == square


def total(cell):
    return complexity.parameters(cell.model).total


def first_of(name, scale="cpu"):
    return {cell.tags["arm"]: cell for cell in reversed(planned(find(name), scale, TEXT))}


def test_equal_totals_are_equal():
    compression = first_of("compression")
    for name, cell in compression.items():
        if name.endswith("-equal"):
            reference = compression[f"{name.split('-')[0]}-1-2"]
            assert abs(total(cell) / total(reference) - 1) < 0.006, name
    scaling = first_of("scaling")
    for width in (64, 128, 256):
        assert abs(total(scaling[f"total-{width}"]) / total(scaling[f"dense-{width}"]) - 1) < 0.06
    granularity = first_of("granularity")
    assert abs(total(granularity["total-64"]) / total(granularity["all-8"]) - 1) < 0.03
    active = {name: complexity.parameters(cell.model).active for name, cell in granularity.items()}
    assert abs(active["active-64"] / active["all-8"] - 1) < 0.03
    shared = first_of("shared-experts")
    sizes = [complexity.parameters(shared[f"shared-{n}"].model) for n in (0, 1, 2, 4)]
    assert max(s.active for s in sizes) / min(s.active for s in sizes) < 1.002
    assert abs(sizes[0].active / total(shared["dense"]) - 1) < 0.03
    flops = {name: cell.model for name, cell in first_of("flops").items()}
    counted = {name: complexity.flops_per_token(model, seq_len=256) for name, model in flops.items()}
    assert max(counted.values()) / min(counted.values()) < 1.06


def test_the_long_runs_take_the_rates_that_synergy_chose():
    long, square = find("synergy-long"), find("synergy")
    sweep = long.cells("cpu", TEXT)
    assert len(sweep) == 16 and all(cell in square.cells("cpu", TEXT) for cell in sweep)
    chosen = long.choose([measured(cell, abs(cell.train.lr - 2e-2)) for cell in sweep])
    runs = long.measure("cpu", TEXT, chosen)
    assert {(cell.experiment, cell.train.lr, cell.train.steps) for cell in runs} == {("synergy-long", 2e-2, 2400)}


def test_a_pilot_has_its_own_seeds_and_is_no_measurement():
    cells = planned(find("synergy"), "pilot", TEXT)
    assert [(c.tags["arm"], c.train.lr, c.train.seed) for c in cells] == [
        ("moe-mla-rope", 1e-2, s) for s in range(100, 106)
    ]
    assert differences(cells[0].settings, planned(find("synergy"), "cpu", TEXT)[-1].settings).keys() <= {
        *("scale", "train.seed", "train.lr", "train.min_lr", "tags.arm"),
        *(f"model.{name}" for name in ("d_expert", "attention", "ffn", "cache")),
    }
