"""Cells run once, a cut experiment goes on where it was, and what is finished is told from what is not."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from moemla import experiments
from moemla.experiments import runner
from moemla.experiments.runner import Text, finished, run_cells, tallies
from moemla.results import ResultError, load, of, path_of, read, write
from tests.runs import write_texts
from tests.test_results import ORIGIN, cell, result

ROOT = Path(__file__).parents[2]
CELLS = [cell(variant, seed=seed, experiment="demo") for variant in ("mha", "mla") for seed in (0, 1)]


def test_cells_run_once_and_in_order(tmp_path):
    ran, seen = [], []

    def work(cell, scratch):
        ran.append(cell)
        (scratch / "half").write_text("x")
        return {"value": cell.train.seed * 10}

    first = run_cells(CELLS, work, tmp_path, report=lambda n, total, r, was: seen.append((n, total, was)))
    assert ran == CELLS and [r.name for r in first] == [c.name for c in CELLS]
    assert seen == [(1, 4, False), (2, 4, False), (3, 4, False), (4, 4, False)]
    assert not any((tmp_path / ".work").iterdir())  # scratch folders go with their result
    again = run_cells([*reversed(CELLS)], work, tmp_path, report=lambda n, total, r, was: seen.append((n, total, was)))
    assert (
        len(ran) == 4 and again == first[::-1] and seen[4:] == [(1, 4, True), (2, 4, True), (3, 4, True), (4, 4, True)]
    )
    path_of(first[2], tmp_path).unlink()
    assert run_cells(CELLS, work, tmp_path)[2].name == CELLS[2].name and ran[4:] == [CELLS[2]]


def test_a_table_is_written_after_each_cell(tmp_path):
    rows = []

    def work(cell, scratch):
        table = tmp_path / "demo" / "cpu" / "table.csv"
        rows.append(len(table.read_text().splitlines()) if table.exists() else 0)
        return {"value": 1}

    run_cells(CELLS, work, tmp_path)
    assert rows == [0, 2, 3, 4]
    other = cell("mha", seed=7, experiment="demo")
    write(result(other, {"value": 2}), tmp_path)  # another call, on another text, has made it meanwhile
    run_cells([cell("mha", seed=8, experiment="demo")], work, tmp_path)
    assert len((tmp_path / "demo" / "cpu" / "table.csv").read_text().splitlines()) == 1 + 4 + 2


def test_a_folder_is_read_once(tmp_path, monkeypatch):
    done = run_cells(CELLS, lambda cell, scratch: {"value": 1}, tmp_path)
    opened = []
    monkeypatch.setattr(runner.results, "read", lambda path: opened.append(path) or read(path))
    more = [cell("mha", seed=seed, experiment="demo") for seed in range(10, 15)]
    assert run_cells([*CELLS, *more], lambda cell, scratch: {"value": 1}, tmp_path)[:4] == done
    assert len([path for path in opened if Path(path).exists()]) == len(CELLS)


def test_two_cells_of_one_name_are_refused_before_anything_runs(tmp_path):
    ran = []
    with pytest.raises(ValueError, match=r"two are called mha_lr0.01_seed0, and differ in train.warmup"):
        run_cells([*CELLS, cell("mha", experiment="demo", warmup=6)], lambda cell, scratch: ran.append(cell), tmp_path)
    assert not ran and not list(tmp_path.iterdir())


def test_a_result_of_other_settings_under_its_name_is_refused(tmp_path):
    run_cells(CELLS[:1], lambda cell, scratch: {"value": 1}, tmp_path)
    with pytest.raises(ResultError, match=r"train.warmup=60, this one with train.warmup=6"):
        run_cells([cell("mha", experiment="demo", warmup=6)], lambda cell, scratch: 1 / 0, tmp_path)


def test_two_texts_in_one_folder_never_share_a_result(tmp_path):
    texts = [cell("mha", experiment="demo", data=data * 32, tags=dict(text="files")) for data in ("aa", "bb")]
    found = run_cells(texts, lambda cell, scratch: {"value": cell.data[0]}, tmp_path)
    assert [one.measures["value"] for one in found] == ["a", "b"]
    assert {one.name for one in found} == {"mha_lr0.01_seed0_aaaaaa", "mha_lr0.01_seed0_bbbbbb"}


def test_a_failed_cell_keeps_its_scratch_and_the_others(tmp_path):
    def work(cell, scratch):
        steps = scratch / "steps"
        done = int(steps.read_text()) if steps.exists() else 0
        steps.write_text(str(done + 1))
        if cell == CELLS[1] and done < 2:
            raise KeyboardInterrupt
        return {"done": done}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_cells(CELLS, work, tmp_path)
        assert len(load(tmp_path)) == 1
    done = run_cells(CELLS, work, tmp_path)
    assert [r.measures["done"] for r in done] == [0, 2, 0, 0]
    assert [r.provenance["attempts"] for r in done] == [1, 3, 1, 1]


CHILD = """
import sys, time
from pathlib import Path
from moemla.experiments.runner import run_cells
from tests.test_results import cell

def work(cell, scratch):
    steps = scratch / "steps"
    with steps.open("a") as file:
        for _ in range(len(steps.read_text()), 6):
            file.write("."); file.flush(); time.sleep(0.05)
    return {"steps": len(steps.read_text())}

run_cells([cell(seed=seed, experiment="kill") for seed in range(3)], work, Path(sys.argv[1]))
"""


def test_sigkill_leaves_whole_files_and_the_rest_is_finished(tmp_path):
    """Killed three times in the middle of a cell, the experiment still ends with every cell whole."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kept: dict[Path, bytes] = {}

    def steps() -> int:
        return sum(p.stat().st_size for p in tmp_path.glob(".work/*/steps"))

    for kill in range(12):
        before = steps()
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], env=environment)
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if kill < 3 and steps() > before:  # it has gone on from where the last one was: kill it
                time.sleep(0.02 * kill)
                child.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        child.wait()
        for path, content in kept.items():
            assert path.read_bytes() == content  # a finished cell is never touched again
        kept |= {path: path.read_bytes() for path in tmp_path.glob("kill/cpu/[!.]*.json")}
        load(tmp_path, missing_ok=True)
        if child.returncode == 0:
            break
    done = load(tmp_path)
    assert [r.settings["train"]["seed"] for r in done] == [0, 1, 2]
    assert all(r.measures["steps"] == 6 for r in done)
    assert sum(r.provenance["attempts"] for r in done) >= 6  # three kills, each in the middle of a cell
    assert json.loads(next(iter(kept.values())))["schema"] == 2


# ---- the registry


@pytest.mark.parametrize("name", experiments.NAMES)
def test_every_experiment_keeps_the_protocol(name):
    experiment = experiments.find(name)
    assert name == experiment.NAME and "smoke" in experiment.SCALES
    assert set(experiment.SCALES) <= set(experiments.SCALES)
    for scale, size in experiment.SCALES.items():
        for text in (Text("builtin", "0a" * 32), Text("files", "0b" * 32)):
            cells = runner.planned(experiment, scale, text)
            assert len(cells) == len({(cell.experiment, cell.name) for cell in cells}) >= 1
            assert {(cell.scale, cell.data) for cell in cells} == {(scale, text.data)}
            of_others = {cell.experiment for cell in cells} - {name}
            assert not of_others or of_others == {experiment.sweep_of.NAME}  # a choice that rests on another's runs
            assert size.steps >= 1
    for function in ("work", "table"):
        assert callable(getattr(experiment, function))


def test_every_module_of_the_folder_is_registered():
    here = {path.stem for path in (ROOT / "moemla" / "experiments").glob("[!_]*.py")}
    here -= {"runner", "queue", "comparison", "one_run"}
    assert here == {name.replace("-", "_") for name in experiments.NAMES}
    with pytest.raises(ValueError, match="name='chapter05': choose one of ten-minutes"):
        experiments.find("chapter05")


def test_the_command_takes_its_names_without_torch():
    code = "import sys, moemla.commands.experiment as e; assert e.NAMES and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def toy(**changes):
    """Two arms at two rates; the lower rate wins, and two seeds measure it."""

    def cells(scale, text):
        return [one(text, arm, lr, 0) for arm in ("mha", "mla") for lr in (1e-2, 2e-2)]

    def one(text, arm, lr, seed):
        return cell(arm, lr, seed, experiment="latent-cost", scale="smoke", data=text.data, tags=dict(text=text.source))

    def choose(results):
        return {
            arm: min(r.settings["train"]["lr"] for r in results if r.holds({"tags.arm": arm})) for arm in ("mha", "mla")
        }

    def measure(scale, text, chosen, seeds=None):
        rates = chosen or {"mha": 1e-2, "mla": 1e-2}
        return [one(text, arm, rates[arm], seed) for seed in range(1, 1 + (seeds or 2)) for arm in ("mha", "mla")]

    def work(cell, text, scratch, progress=None):
        return {"nats_per_token": cell.train.lr + cell.train.seed}

    size = SimpleNamespace(stories=40, seeds=2)
    return SimpleNamespace(
        **dict(NAME="latent-cost", SCALES={"smoke": size}, cells=cells, choose=choose, measure=measure, work=work)
        | changes
    )


def test_a_choice_stands_between_the_first_runs_and_those_that_measure(tmp_path):
    told, texts = [], write_texts(tmp_path)
    found = runner.run(
        toy(),
        "smoke",
        tmp_path / "r",
        texts["train"],
        texts["valid"],
        workers=0,
        report=lambda *row: told.append(row[:2]),
    )
    assert told == [(n, 8) for n in range(1, 9)]
    assert [(r.settings["train"]["seed"], r.settings["train"]["lr"]) for r in found[4:]] == [(1, 0.01)] * 2 + [
        (2, 0.01)
    ] * 2
    more = runner.run(toy(), "smoke", tmp_path / "r", texts["train"], texts["valid"], seeds=3, workers=0)
    assert more[:8] == found and len(more) == 10


def test_a_name_that_stands_twice_is_refused_before_the_first_runs(tmp_path):
    """Also between the runs that choose and those that measure: not after hours of the former."""
    texts = write_texts(tmp_path)
    same = toy(measure=lambda scale, text, chosen, seeds=None: toy().cells(scale, text))
    with pytest.raises(ValueError, match=r"two are called mha_lr0.01_seed0_"):
        runner.run(same, "smoke", tmp_path / "r", texts["train"], texts["valid"], workers=0)
    assert not list((tmp_path / "r").glob("latent-cost*"))


def test_what_an_experiment_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scale='gpu': latent-cost has smoke"):
        runner.run(toy(), "gpu", tmp_path)
    with pytest.raises(ValueError, match="seeds=0: must be at least 1"):
        runner.run(toy(), "smoke", tmp_path, seeds=0)
    one = toy()
    del one.choose
    with pytest.raises(ValueError, match="seeds=3: latent-cost has one run"):
        runner.run(one, "smoke", tmp_path, seeds=3)
    assert not list(tmp_path.iterdir())


# ---- what is finished


def test_an_experiment_is_complete_when_all_its_cells_are_there(monkeypatch):
    """On each text by itself; runs beyond it (more seeds, another rate) are not shown, and change nothing."""
    monkeypatch.setattr(runner, "find", lambda name: toy())
    here, there = (Text("builtin", "aa" * 32), Text("files", "bb" * 32))
    made = {}
    for text in (here, there):
        cells = [*toy().cells("smoke", text), *toy().measure("smoke", text, {"mha": 1e-2, "mla": 1e-2}, 3)]
        made[text] = [of(one, {"nats_per_token": 1.0}, ORIGIN) for one in cells]
    wanted = made[here][:8]
    for count in range(1, 8):
        (tally,) = tallies(wanted[:count])
        assert (len(tally.done), tally.total, tally.complete) == (count, 8, False) and finished(wanted[:count]) == []
    assert finished(wanted) == wanted == finished(made[here])
    assert finished([*made[here], *made[there][:5]]) == wanted
    assert [len(tally.done) for tally in tallies([*made[here], *made[there][:5]])] == [8, 5]
    aside = result(cell(experiment="table2"))
    assert finished([aside, *made[there][:5]]) == [aside]  # an experiment that nobody registered
    other = [replace(run, settings=run.settings | {"scale": "paper"}) for run in made[here]]
    assert finished(other) == []  # a scale that it does not have


def test_of_the_committed_results_all_are_of_complete_experiments():
    runs = load(ROOT / "results")
    found = {(tally.experiment, tally.scale, tally.text.source): tally.complete for tally in tallies(runs)}
    assert found[("latent-cost", "cpu", "builtin")] and found[("latent-cost", "cpu", "files")]
    assert found[("ten-minutes", "cpu", "builtin")] and found[("ten-minutes", "cpu", "files")]
