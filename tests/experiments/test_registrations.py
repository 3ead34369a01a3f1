"""What is asked and expected was committed before the first run of it."""

import re
import subprocess
from pathlib import Path

import pytest

from moemla.experiments import NAMES, REGISTERED, UNREGISTERED, find
from moemla.results import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
PARTS = ("Question", "Arms", "Primary measure", "Seeds", "Statistics", "Predictions", "Left out")
WITHOUT = {*UNREGISTERED, "bench", "speedrun"}  # were measured before registrations began, or ask nothing


def git(*arguments):
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else None


def test_every_experiment_is_registered_or_listed_as_not():
    folders = {path.name for path in RESULTS.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders <= {*NAMES, *WITHOUT}
    for name in (*NAMES, *folders):
        assert (RESULTS / name / "registration.md").exists() == (name not in WITHOUT), name


@pytest.mark.parametrize("name", REGISTERED)
def test_a_registration_says_all_of_it(name):
    text = (RESULTS / name / "registration.md").read_text(encoding="utf-8")
    assert text.startswith(f"# Registration: {name}\n")
    assert tuple(re.findall(r"^## (.*)$", text, flags=re.M)) == PARTS
    part = dict(zip(PARTS, re.split(r"^## .*$", text, flags=re.M)[1:], strict=True))
    experiment = find(name)
    rows = re.findall(r"^\| \d+ \| (.*?) \| (.*?) \| (.*?) \|$", part["Predictions"], flags=re.M)
    assert len(rows) >= 2
    for what, predicted, _ in rows:
        assert re.search(r"\d", predicted), what
    assert ("90 %" in part["Seeds"] and "standard deviation" in part["Seeds"]) or name == "real"
    differences = [asked.name for asked in experiment.asked if " - " in asked.name and " at " not in asked.name]
    missing = [asked for asked in differences if f"`{asked}`" not in part["Arms"]]
    assert not missing, f"compared and not registered: {missing}"
    assert all(any(asked.name in what for what, *_ in rows) for asked in experiment.beside)


@pytest.mark.parametrize("name", REGISTERED)
def test_its_commit_is_older_than_every_result(name):
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("no history here: the order of registration and results cannot be looked up")
    file = f"results/{name}/registration.md"
    commits = (git("log", "--format=%H", "--", file) or "").split()
    if not commits:
        pytest.skip("not committed yet")
    assert len(commits) == 1, f"{file} was changed after it was committed"
    for run in load(RESULTS, name, missing_ok=True):
        if run.settings["scale"] in ("pilot", "smoke"):
            continue
        origin = run.provenance["git"]
        assert origin and not origin["dirty"], f"{run.name} was made by code that no commit has"
        older = subprocess.run(["git", "-C", str(ROOT), "merge-base", "--is-ancestor", commits[0], origin["commit"]])
        assert older.returncode == 0, f"{run.name} was made at {origin['commit'][:7]}, before its registration"


def test_an_amendment_is_older_than_every_run_that_measures():
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("no history here")
    for file in sorted(RESULTS.glob("*/amendment*.md")):
        name = file.parent.name
        assert file.read_text(encoding="utf-8").startswith(f"# Amendment: {name}\n")
        commits = (git("log", "--format=%H", "--", f"results/{name}/{file.name}") or "").split()
        assert len(commits) <= 1, f"{file} was changed after it was committed"
        for run in load(RESULTS, name, "cpu", missing_ok=True):
            if commits and run.settings["train"]["seed"] > 0:
                origin = run.provenance["git"]["commit"]
                older = ["git", "-C", str(ROOT), "merge-base", "--is-ancestor", commits[0], origin]
                assert subprocess.run(older).returncode == 0, f"{run.name} was made at {origin[:7]}, before it"


def test_pilots_used_seeds_that_measure_nothing():
    for name in REGISTERED:
        for run in load(RESULTS, name, "pilot", missing_ok=True):
            assert run.settings["train"]["seed"] >= 100
        for run in load(RESULTS, name, "cpu", missing_ok=True):
            assert run.settings["train"]["seed"] < 100
