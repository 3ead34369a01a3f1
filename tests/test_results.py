"""Result files are whole or absent, name no person or machine, and a cut experiment goes on where it was."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moemla import results
from moemla.results import (
    Result,
    ResultError,
    cell_key,
    comparable,
    folder_for,
    load,
    read,
    run_cells,
    validate,
    write,
)

ORIGIN = {
    "moemla": "0",
    "git": None,
    "date": "2026-01-01T00:00:00+00:00",
    "python": "3.11",
    "torch": "2.13",
    "machine": {"cpu": "a cpu", "cores": 2, "threads": 1, "gpus": None},
    "seconds": 1.5,
    "command": "moemla experiment table2",
}


def result(**changes) -> Result:
    values = dict(experiment="table2", name="M-0", settings={"seed": 0}, measures={"loss": 2.0}, provenance=ORIGIN)
    return Result(**values | changes)


def test_written_and_read_back(tmp_path):
    given = result(measures={"loss": np.float32(0.5), "curve": (1, 2), "counts": np.arange(3), "diverged": False})
    path = write(given, tmp_path / "results")
    assert path.name == "table2.M-0.json"
    back = read(path)
    assert back.measures == {"loss": 0.5, "curve": [1, 2], "counts": [0, 1, 2], "diverged": False}
    assert back.settings == {"seed": 0} and back.provenance == ORIGIN
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_experiments_with_a_common_beginning_are_told_apart(tmp_path):
    write(result(), tmp_path)
    write(result(experiment="table2-long"), tmp_path)
    assert [r.experiment for r in load(tmp_path)] == ["table2-long", "table2"]
    assert [r.experiment for r in load(tmp_path, "table2")] == ["table2"]
    assert load(tmp_path, "table3", missing_ok=True) == load(tmp_path / "absent", missing_ok=True) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"schema": 1', "is not JSON"),
        ("[1, 2]", "a JSON object was expected"),
        ('{"loss": 1}', "lacks experiment"),
    ],
)
def test_foreign_and_corrupt_files_are_named(tmp_path, text, message):
    path = tmp_path / "table2.x.json"
    path.write_text(text)
    with pytest.raises(ResultError, match=message) as error:
        load(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    (tmp_path / "table2.x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="is not JSON"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "schema 2; this version reads 1"),
        ({"experiment": "Table.2"}, "experiment='Table.2'"),
        ({"name": "../x"}, "name='../x'"),
        ({"measures": [1]}, "measures is not an object"),
        ({"provenance": {}}, "provenance lacks moemla, git"),
        ({"measures": {"a": {"loss": [1.0, float("nan")]}}}, r"measures.a.loss\[1\] is nan"),
        ({"settings": {"data": "/home/somebody/stories"}}, "settings.data holds an absolute path"),
        ({"provenance": ORIGIN | {"command": "moemla train --out=~/run"}}, "command holds an absolute path"),
        ({"more": 1}, "has unknown more"),
    ],
)
def test_validation_says_what_is_wrong(changes, message):
    data = {**vars(result()), **changes}
    with pytest.raises(ResultError, match=message):
        validate(data)


def test_a_value_json_cannot_hold_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"result\.measures\.model: object"):
        write(result(measures={"model": object()}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_keeps_the_old_file(tmp_path):
    """A limit on file size in a child stands for a full disk: one line, and the old result whole."""
    path = write(result(), tmp_path)
    before = path.read_bytes()
    child = f"""
import resource, signal, sys
from tests.experiments.test_results import result
from moemla.results import ResultError, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    write(result(measures=dict(curve=list(range(1000)))), {str(tmp_path)!r})
except ResultError as error:
    sys.exit(7 if "cannot write" in str(error) else 8)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert subprocess.run([sys.executable, "-c", child], cwd=Path(__file__).parents[2]).returncode == 7
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_provenance_says_where_from_and_names_nobody(monkeypatch):
    origin = results.provenance(
        1.23456, ["/usr/local/bin/moemla", "experiment", "t2", "--data=/srv/x/stories", "../../y/z.txt", "runs/a"]
    )
    assert set(origin) == set(results.PROVENANCE)
    assert origin["command"] == "moemla experiment t2 --data=stories z.txt runs/a"
    assert origin["seconds"] == 1.235
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", origin["date"])
    machine = origin["machine"]
    assert machine["cpu"] and 1 <= machine["cores"] <= os.cpu_count() and machine["threads"] >= 1
    validate(vars(result(provenance=origin)))


def test_the_commit_is_of_the_package_or_absent(tmp_path):
    """Tracked: commit and dirty flag. Untracked inside somebody's repository, or outside of any: None."""

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e@x", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    package = tmp_path / "moemla"
    (package / "experiments").mkdir(parents=True)
    source = package / "experiments" / "results.py"
    source.write_text("one = 1\n")
    assert results._git(package) is None
    git("init")
    assert results._git(package) is None
    git("add", ".")
    git("commit", "-m", "first")
    found = results._git(package)
    assert re.fullmatch(r"[0-9a-f]{40}", found["commit"]) and found["dirty"] is False
    (tmp_path / "results.json").write_text("{}")  # outside the package: the code is still the commit's
    assert results._git(package)["dirty"] is False
    source.write_text("one = 2\n")
    assert results._git(package)["dirty"] is True


def test_key_is_of_the_values_not_their_order():
    assert cell_key({"a": 1, "b": (1, 2)}) == cell_key({"b": [1, 2], "a": np.int64(1)})
    assert cell_key({"a": 1}) != cell_key({"a": 2})


CELLS = [{"variant": v, "seed": s} for v in ("mha", "mla") for s in (0, 1)]


def test_cells_run_once_and_in_order(tmp_path):
    ran = []

    def work(settings, scratch):
        ran.append(settings)
        (scratch / "half").write_text("x")
        return {"value": settings["seed"] * 10}

    seen = []
    first = run_cells("demo", CELLS, work, tmp_path, lambda i, n, r, was: seen.append((i, n, was)))
    assert ran == CELLS and [r.settings for r in first] == CELLS and [i for i, _, _ in seen] == [0, 1, 2, 3]
    assert not any((tmp_path / ".work").iterdir())  # scratch folders go with their result
    again = run_cells("demo", [*reversed(CELLS)], work, tmp_path)
    assert len(ran) == 4 and again == first[::-1]
    (tmp_path / f"demo.{first[2].name}.json").unlink()
    assert run_cells("demo", CELLS, work, tmp_path)[2].settings == CELLS[2] and ran[4:] == [CELLS[2]]


def test_a_cell_that_stands_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stands twice, at 0 and 2"):
        run_cells("demo", [CELLS[0], CELLS[1], CELLS[0]], lambda settings, scratch: {}, tmp_path)


def test_a_failed_cell_keeps_its_scratch_and_the_others(tmp_path):
    def work(settings, scratch):
        steps = scratch / "steps"
        done = int(steps.read_text()) if steps.exists() else 0
        steps.write_text(str(done + 1))
        if settings == CELLS[1] and done < 2:
            raise KeyboardInterrupt
        return {"done": done}

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_cells("demo", CELLS, work, tmp_path)
        assert len(load(tmp_path)) == 1
    finished = run_cells("demo", CELLS, work, tmp_path)
    assert [r.measures["done"] for r in finished] == [0, 2, 0, 0]
    assert [r.provenance["attempts"] for r in finished] == [1, 3, 1, 1]


CHILD = """
import sys, time
from pathlib import Path
from moemla.results import run_cells

def work(settings, scratch):
    steps = scratch / "steps"
    with steps.open("a") as file:
        for _ in range(len(steps.read_text()), 6):
            file.write("."); file.flush(); time.sleep(0.05)
    return {"steps": len(steps.read_text())}

run_cells("kill", [{"cell": c} for c in range(3)], work, Path(sys.argv[1]))
"""


def test_sigkill_leaves_whole_files_and_the_rest_is_finished(tmp_path):
    """Killed three times in the middle of a cell, the experiment still ends with every cell whole."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    kept: dict[str, bytes] = {}

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
        for name, content in kept.items():
            assert (tmp_path / name).read_bytes() == content  # a finished cell is never touched again
        kept |= {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
        load(tmp_path, missing_ok=True)
        if child.returncode == 0:
            break
    done = load(tmp_path)
    assert [r.settings["cell"] for r in sorted(done, key=lambda r: r.settings["cell"])] == [0, 1, 2]
    assert all(r.measures["steps"] == 6 for r in done)
    assert sum(r.provenance["attempts"] for r in done) >= 6  # three kills, each in the middle of a cell
    assert json.loads(next(iter(kept.values())))["schema"] == 1


def test_where_there_is_nothing_one_line_says_where_it_is_expected(tmp_path):
    """A reader who runs a chapter in another folder is told of results/, not to measure for hours."""
    for folder, experiment, said in (
        (tmp_path / "results", None, "holds no results:"),
        (tmp_path, "a", "results of a:"),
    ):
        with pytest.raises(ResultError, match=said) as error:
            load(folder, experiment)
        assert str(folder) in str(error.value) and "results/" in str(error.value) and "\n" not in str(error.value)


# ---- what decides a result is a part of its cell


def test_older_files_are_completed_from_their_measures(tmp_path):
    training = {"min_lr": 0.25, "warmup": 5, "steps": 7}
    older = result(measures={"data_hash": "aa", "training": training, "loss": 1.0})
    (given,) = [read(write(older, tmp_path))]
    assert given.settings == {"seed": 0, "data_hash": "aa", "min_lr": 0.25, "warmup": 5}
    newer = result(name="M-1", settings=given.settings | {"warmup": 6}, measures=older.measures)
    assert read(write(newer, tmp_path)).settings["warmup"] == 6  # what a cell says itself stays


@pytest.mark.parametrize("name", results.IDENTITY)
def test_a_cell_is_found_by_all_that_decides_its_result(tmp_path, name):
    """An older file, whose settings are completed, is found again; another text, floor or warm-up is another cell."""
    full = {"seed": 0, "data_hash": "aa", "min_lr": 0.25, "warmup": 5}
    measures = {"data_hash": "aa", "training": {"min_lr": 0.25, "warmup": 5}, "value": 1}
    write(result(experiment="demo", measures=measures), tmp_path)
    ran = []

    def work(settings, scratch):
        ran.append(settings)
        return {"value": 2}

    assert run_cells("demo", [full], work, tmp_path)[0].measures["value"] == 1 and not ran
    other = full | {name: "bb" if name == "data_hash" else 9}
    assert [found.measures["value"] for found in run_cells("demo", [full, other], work, tmp_path)] == [1, 2]
    assert ran == [other] and len(load(tmp_path)) == 2


def test_every_committed_result_has_its_identity():
    """Of the runs of chapters 1, 2 and 5; a bench has no data, and what was counted no rate."""
    found = [one for one in load(Path(__file__).parents[2] / "results") if one.experiment != "bench"]
    for one in found:
        wanted = {"data_hash"} if one.settings.get("part") == "counted" else set(results.IDENTITY)
        assert wanted <= set(one.settings), one.name
        assert one.settings["data_hash"] == one.measures["data_hash"]
    keys = [(one.experiment, cell_key(one.settings)) for one in found]
    assert len(set(keys)) == len(keys) > 80


def test_what_differs_is_named():
    runs = [result(settings={"seed": seed, "data_hash": "aa"}) for seed in range(3)]
    assert comparable(runs) == runs and comparable([]) == []
    other = result(settings={"seed": 3, "data_hash": "bb"})
    with pytest.raises(ResultError, match="data_hash='aa' and data_hash='bb'"):
        comparable([*runs, other])
    assert len(comparable([*runs, other], differ_in={"seed", "data_hash"})) == 4
    with pytest.raises(ResultError, match="seed=0 and seed=1"):
        comparable(runs, differ_in=())
    with pytest.raises(ResultError, match="M-0 and M-1 of table2 are one cell"):  # it would count twice in a mean
        comparable([*runs, result(name="M-1", settings=runs[0].settings)])


def test_smoke_stays_out_of_the_measured_results(tmp_path):
    assert folder_for("cpu") == Path("results")
    first, second = folder_for("smoke"), folder_for("smoke")
    try:
        assert first != second and not list(first.iterdir()) and Path.cwd() not in first.parents
    finally:
        first.rmdir(), second.rmdir()
    assert folder_for("smoke", tmp_path) == folder_for("cpu", str(tmp_path)) == tmp_path
