"""The page of what came out: the tables are those of the runs, the verdicts those of the log."""

import re
from dataclasses import replace

import pytest

from moemla.experiments import REGISTERED, find, home
from moemla.experiments.runner import complete
from tools import outcomes
from tools.book import RESULTS

LOG = """# Log

## 2026-11-26

### Shared experts: 45 runs, four predictions

First.

| a | b |

### Shared experts and more

Second.

## 2026-11-25
"""


def test_the_verdict_is_the_section_of_that_name():
    assert outcomes.verdict("shared-experts", LOG) == (
        "Shared experts: 45 runs, four predictions",
        "First.\n\n| a | b |",
    )
    assert outcomes.verdict("shared-experts-and-more", LOG) == ("Shared experts and more", "Second.")
    assert outcomes.verdict("shared", LOG) is None


@pytest.mark.parametrize("name", REGISTERED)
def test_what_is_complete_has_a_verdict_in_the_log_for_each_prediction(name):
    if not complete(name, home(name), RESULTS):
        pytest.skip("not complete yet")
    registered = (RESULTS / name / "registration.md").read_text(encoding="utf-8").partition("## Predictions")[2]
    asked = set(map(int, re.findall(r"^\| (\d+) \|", registered, flags=re.M)))
    said = re.findall(r"^\| ([\d, ]+) \|.*\| .+ \|$", outcomes.verdict(name)[1], flags=re.M)
    assert {int(number) for cell in said for number in cell.split(",")} == asked


def test_the_tables_are_those_of_the_command():
    experiment, runs = find("shared-experts"), complete("shared-experts", "cpu", RESULTS)
    printed, page = experiment.table(runs), "\n".join(outcomes.outcome(experiment, runs)).replace("\u00a0", " ")
    for arm in experiment.measured(runs):
        row = re.search(rf"^{arm} .*?(\d\.\d{{4}} ± \d\.\d{{4}})", printed, flags=re.M)
        assert re.search(rf"^\| `{arm}` \|.* \| {re.escape(row[1])}<br>", page, flags=re.M), arm
    for asked in experiment.asked:
        line = next(
            line for line in printed.splitlines() if line.startswith(f"{asked.name}  ") and "p" not in line[:90]
        )
        for number in re.findall(r"[+-]\d\.\d{4} ± \d\.\d{4}| \d\.\d{4} ", line):
            assert f"| {number.strip()} |" in next(x for x in page.splitlines() if x.startswith(f"| {asked.name}")), (
                line
            )


def test_an_arm_that_diverged_has_no_mean_and_no_comparison():
    experiment, runs = find("shared-experts"), complete("shared-experts", "cpu", RESULTS)
    lost = [
        replace(run, measures={k: run.measures[k] for k in ("parameters", "active_parameters")} | dict(diverged=True))
        if run.settings["tags"]["arm"] == "dense" and run.settings["train"]["seed"] == 12
        else run
        for run in runs
    ]
    page = "\n".join(outcomes.outcome(experiment, lost))
    assert re.search(r"^\| `dense` \|.*\| 4 \| diverged<br>", page, flags=re.M)
    assert "| shared-2 - dense | not judged: an arm diverged |" in page
