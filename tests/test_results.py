"""Result files are whole or absent, are what their path says, and name nobody; like is compared with like."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moemla import results
from moemla.cells import Cell, key_of, leaves, model_config, train_config
from moemla.results import (
    Result,
    ResultError,
    comparable,
    folder_for,
    load,
    path_of,
    read,
    table,
    validate,
    write,
    write_table,
)
from tools import move_results

ROOT = Path(__file__).parents[1]
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


def cell(arm="mha", lr=1e-2, seed=0, experiment="table2", scale="cpu", data="aa" * 32, **changes) -> Cell:
    """A cell of a small model; `changes` are of its training, but for `tags` and `model`."""
    tags, model = changes.pop("tags", {}), changes.pop("model", {})
    schedule = dict(steps=600, batch_size=8, seq_len=256, optimizer="muon", lr=lr, min_lr=lr / 30, warmup=60, seed=seed)
    return Cell(
        experiment=experiment,
        scale=scale,
        data=data,
        tags=dict(arm=arm) | tags,
        model=model_config("tiny", arm, **dict(vocab_size=4096, max_seq_len=512) | model),
        train=train_config(**schedule | changes),
    )


def result(of=None, measures=None, provenance=ORIGIN) -> Result:
    return results.of(of or cell(), measures or {"nats_per_token": 2.0}, provenance)


def test_written_and_read_back(tmp_path):
    given = result(measures={"loss": np.float32(0.5), "curve": (1, 2), "counts": np.arange(3), "diverged": False})
    path = write(given, tmp_path / "results")
    assert (
        path
        == tmp_path / "results" / "table2" / "cpu" / "mha_lr0.01_seed0.json"
        == path_of(given, tmp_path / "results")
    )
    back = read(path)
    assert back == given and back.measures == {"loss": 0.5, "curve": [1, 2], "counts": [0, 1, 2], "diverged": False}
    assert back.settings == cell().settings and back.key == cell().key and back.provenance == ORIGIN
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_experiments_and_scales_are_told_apart(tmp_path):
    for one in (cell(), cell(experiment="table2-long"), cell(scale="smoke"), cell(seed=1)):
        write(result(one), tmp_path)
    (tmp_path / "table2" / "registration.md").write_text("What is asked.")
    write_table([result()], tmp_path)
    assert [r.experiment for r in load(tmp_path)] == ["table2-long", "table2", "table2", "table2"]
    assert [r.settings["scale"] for r in load(tmp_path, "table2")] == ["cpu", "cpu", "smoke"]
    assert [r.name for r in load(tmp_path, "table2", "cpu")] == ["mha_lr0.01_seed0", "mha_lr0.01_seed1"]
    assert load(tmp_path, "table3", missing_ok=True) == load(tmp_path / "absent", missing_ok=True) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ('{"schema": 1', "is not JSON"),
        ('{"loss": NaN}', "NaN: no number"),
        ("[1, 2]", "a JSON object was expected"),
        ('{"loss": 1}', "lacks experiment"),
    ],
)
def test_foreign_and_corrupt_files_are_named(tmp_path, text, message):
    path = tmp_path / "table2" / "cpu" / "x.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ResultError, match=message) as error:
        load(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_bytes_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultError, match="is not JSON"):
        read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 3}, "schema 3; this version reads 2"),
        ({"experiment": "Table.2"}, "experiment='Table.2'"),
        ({"name": "../x"}, "name='../x'"),
        ({"measures": [1]}, "measures is not an object"),
        ({"provenance": {}}, "provenance lacks moemla, git"),
        ({"measures": {"a": {"loss": [1.0, float("nan")]}}}, r"measures.a.loss\[1\] is nan"),
        ({"provenance": ORIGIN | {"command": "moemla train --out=~/run"}}, "command holds an absolute path"),
        ({"settings": {"lr": 1}}, "its settings are not scale, data"),
        ({"settings": cell().settings | {"train": {}}}, "are not those of a cell"),
        ({"more": 1}, "has unknown more"),
    ],
)
def test_validation_says_what_is_wrong(changes, message):
    data = {**vars(result()), **changes}
    with pytest.raises(ResultError, match=message):
        validate(data)


def test_an_absolute_path_among_the_settings():
    with pytest.raises(ResultError, match=r"settings.tags.file holds an absolute path"):
        validate(vars(result(cell(tags=dict(file="/home/somebody/stories")))))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: data | {"name": "mha_lr0.01_seed1"},
            "called mha_lr0.01_seed1, and its settings are those of mha_",
        ),
        (lambda data: data | {"key": "0" * 12}, "has the key 000000000000, and its settings have"),
        (lambda data: json.loads(json.dumps(data).replace('"warmup": 60', '"warmup": 61')), "and its settings have"),
        (lambda data: json.loads(json.dumps(data).replace('"seed": 0', '"seed": 1')), "its settings are those of mha_"),
        (lambda data: data | {"experiment": "table3"}, "and its settings have"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(tmp_path, change, message):
    path = write(result(), tmp_path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ResultError, match=message) as error:
        load(tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["table2/cpu/mha_lr0.01_seed1.json", "table2/smoke/mha_lr0.01_seed0.json"])
def test_a_file_that_was_renamed_is_refused(tmp_path, place):
    path = write(result(), tmp_path)
    (tmp_path / place).parent.mkdir(exist_ok=True)
    path.rename(tmp_path / place)
    with pytest.raises(ResultError, match=r"holds the result of table2/cpu/mha_lr0.01_seed0.json"):
        load(tmp_path)


def test_another_cell_of_its_name_does_not_replace_a_result(tmp_path):
    path = write(result(), tmp_path)
    write(result(measures={"nats_per_token": 1.5}), tmp_path)  # measured anew
    assert read(path).measures == {"nats_per_token": 1.5}
    with pytest.raises(ResultError, match=r"train.warmup=60, this one with train.warmup=6: name another folder"):
        write(result(cell(warmup=6)), tmp_path)
    assert read(path).measures == {"nats_per_token": 1.5}


def test_a_value_json_cannot_hold_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"measures\.model: object"):
        write(result(measures={"model": object()}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_keeps_the_old_file(tmp_path):
    """A limit on file size in a child stands for a full disk: one line, and the old result whole."""
    path = write(result(), tmp_path)
    before = path.read_bytes()
    child = f"""
import resource, signal, sys
from tests.test_results import result
from moemla.results import ResultError, write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
try:
    write(result(measures=dict(curve=list(range(1000)))), {str(tmp_path)!r})
except ResultError as error:
    sys.exit(7 if "cannot write" in str(error) else 8)
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert subprocess.run([sys.executable, "-c", child], cwd=ROOT).returncode == 7
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


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
    package.mkdir()
    source = package / "results.py"
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


def test_where_there_is_nothing_one_line_says_where_it_is_expected(tmp_path):
    """A reader who runs a chapter in another folder is told of results/, not to measure for hours."""
    for folder, experiment, said in (
        (tmp_path / "results", None, "holds no results:"),
        (tmp_path, "a", "results of a:"),
    ):
        with pytest.raises(ResultError, match=said) as error:
            load(folder, experiment)
        assert str(folder) in str(error.value) and "results/" in str(error.value) and "\n" not in str(error.value)


def test_a_thousand_results_load_in_a_fifth_of_a_second(tmp_path):
    """A queue over hundreds of runs looks for what is there before each start."""
    curve = dict(tokens=list(range(0, 6_000_000, 100_000)), loss=[8.0 - 0.1234 * n for n in range(60)])
    made = write(result(measures=dict(nats_per_token=1.0, curve=curve)), tmp_path)
    data, folder = json.loads(made.read_text()), made.parent
    for seed in range(1, 1000):
        settings = data["settings"] | {"train": data["settings"]["train"] | {"seed": seed}}
        one = data | dict(name=f"mha_lr0.01_seed{seed}", key=key_of("table2", settings), settings=settings)
        (folder / f"{one['name']}.json").write_text(json.dumps(one, indent=1))
    child = f"""
import time
from moemla.results import load
took = []
for _ in range(5):
    begin = time.process_time()
    assert len(load({str(tmp_path)!r}, "table2", "cpu")) == 1000
    took.append(time.process_time() - begin)
print(min(took))
"""  # in a process of its own: here each call is type-checked
    said = subprocess.run([sys.executable, "-c", child], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert float(said) < 0.2


# ---- tables


def test_a_table_has_a_row_a_run_in_the_order_of_names(tmp_path):
    runs = [
        result(cell("mla", seed=1), {"nats_per_token": 1.25, "seconds": 3.5, "stories": 8, "curve": [1, 2]}),
        result(cell("mha", lr=5e-3, data="bb" * 32, tags=dict(text="files")), {"diverged": True}),
        result(Cell(experiment="table2", scale="cpu", tags=dict(arm="counted")), {"bits_per_byte": {"2": 1.0}}),
    ]
    write_table(runs, tmp_path)
    assert (tmp_path / "table2" / "cpu" / "table.csv").read_text() == (
        "arm,lr,seed,text,nats_per_token,bits_per_byte,seconds,diverged,stories\n"
        "counted,,,builtin,,,,,\n"
        "mha,0.005,0,files,,,,True,\n"
        "mla,0.01,1,builtin,1.25,,3.5,,8\n"
    )
    assert table(reversed(runs)) == table(runs)


def test_what_differs_is_named():
    runs = [result(cell(seed=seed)) for seed in range(3)]
    assert comparable(*runs, differ_in={"seed"}) == runs and comparable(differ_in=()) == []
    other = result(cell(seed=3, data="bb" * 32))
    with pytest.raises(ResultError, match=f"data='{'aa' * 32}' and data='{'bb' * 32}'"):
        comparable(*runs, other, differ_in={"seed"})
    assert len(comparable(*runs, other, differ_in={"seed", "data"})) == 4
    with pytest.raises(ResultError, match=r"train.seed=0 and train.seed=1"):
        comparable(*runs, differ_in=())
    with pytest.raises(ResultError, match=r"mha_lr0.01_seed0 of table2 stands there twice"):  # it would count twice
        comparable(*runs, result(measures={"nats_per_token": 3.0}), differ_in={"seed"})
    with pytest.raises(ResultError, match="experiment='table2' and experiment='table3'"):
        comparable(runs[0], result(cell(seed=1, experiment="table3")), differ_in={"seed"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(warmup=6), "train.warmup=60 and train.warmup=6"),
        (dict(steps=1200), "train.steps=600 and train.steps=1200"),
        (dict(optimizer="adamw"), "train.optimizer='muon' and train.optimizer='adamw'"),
        (dict(min_lr=0.0), "train.floor="),  # another share of its rate
        (dict(model=dict(dropout=0.1)), "model.dropout=0.0 and model.dropout=0.1"),
        (dict(model=dict(vocab_size=300)), "model.vocab_size=4096 and model.vocab_size=300"),
        (dict(scale="smoke"), "scale='cpu' and scale='smoke'"),
        (dict(tags=dict(scored=8)), "tags.scored=None and tags.scored=8"),
    ],
)
def test_a_question_is_of_variants_and_rates_and_of_nothing_else(changes, said):
    runs = [result(cell(arm, lr, seed)) for arm in ("mha", "mla-rope") for lr in (5e-3, 1e-2) for seed in (0, 1)]
    assert comparable(*runs, differ_in={"variant", "lr", "seed"}) == runs
    with pytest.raises(ResultError, match=re.escape(said)):
        comparable(*runs, result(cell("mla", 2e-2, 2, **changes)), differ_in={"variant", "lr", "seed"})


def test_a_run_of_before_a_setting_came_is_comparable():
    """Its file does not hold the setting: it is completed with what was done then."""
    run, newer = result(), result(cell(seed=1))
    model = {name: value for name, value in run.settings["model"].items() if name != "n_dense_layers"}
    older = replace(run, settings=run.settings | {"model": model})
    validate(vars(older))
    assert comparable(older, newer, differ_in={"seed"})


def test_smoke_stays_out_of_the_measured_results(tmp_path):
    assert folder_for("cpu") == Path("results")
    first, second = folder_for("smoke"), folder_for("smoke")
    try:
        assert first != second and not list(first.iterdir()) and Path.cwd() not in first.parents
    finally:
        first.rmdir(), second.rmdir()
    assert folder_for("smoke", tmp_path) == folder_for("cpu", str(tmp_path)) == tmp_path


# ---- what lies in results/


def test_every_committed_result_is_whole_and_has_its_data():
    found = load(ROOT / "results")
    for one in found:
        validate(vars(one), one.name)
        assert one.experiment == "bench" or re.fullmatch("[0-9a-f]{64}", one.settings["data"]), one.name
    assert len({one.key for one in found}) == len(found) > 80


def test_tables_lie_beside_the_results_and_say_what_they_say():
    places = {(one.experiment, one.settings["scale"]) for one in load(ROOT / "results")}
    assert len(places) >= 3
    for experiment, scale in places:
        told = (ROOT / "results" / experiment / scale / "table.csv").read_text()
        assert told == table(load(ROOT / "results", experiment, scale))


KEPT = ROOT / "tests" / "kept" / "results-1"  # as they lay in results/ before cells were values
MOVED = {
    "bench.moe-tiny-8-float32-cpu": "bench/cpu/moe-tiny-8-float32",
    "chapter05.counted-builtin-0b6aed9bbd86": "latent-cost/cpu/counted",
    "chapter05.rate-mha-0.005-0-200-builtin-tiny-8-256-22ef5f6ff993": "latent-cost/cpu/mha-200steps_lr0.005_seed0",
    "chapter05.seed-mla-rope-0.04-0-800-files-tiny-8-256-1aaadbd66a4e": "latent-cost/cpu/mla-rope_lr0.04_seed0_654b2f",
    "ten-minutes.builtin-tiny-moe-mla-rope-4096-1000-79c5f38b7f47": "ten-minutes/cpu/moe-mla-rope_lr0.01_seed0",
}


@pytest.mark.parametrize("old", MOVED)
def test_a_result_of_before_is_read_and_moved_with_all_its_numbers(tmp_path, old):
    (tmp_path / f"{old}.json").write_bytes((KEPT / f"{old}.json").read_bytes())
    with pytest.raises(ResultError, match=r"results of an older moemla .* python -m tools.move_results"):
        load(tmp_path)
    before = read(tmp_path / f"{old}.json")
    move_results.main(tmp_path)
    assert not list(tmp_path.glob("*.json"))
    (now,) = load(tmp_path)
    assert path_of(now, tmp_path) == tmp_path / f"{MOVED[old]}.json"
    assert {path.name for path in path_of(now, tmp_path).parent.iterdir()} == {f"{now.name}.json", "table.csv"}
    left = {"data_hash": now.settings["data"], "training": before.measures.get("training")}
    assert before.measures == now.measures | {name: left[name] for name in left if name in before.measures}
    for name, value in (left["training"] or {}).items():
        assert now.settings["train"][name] == value
    assert now.provenance.pop("before") == {"file": f"{old}.json", "settings": before.settings}
    assert now.provenance == before.provenance
    held = {name for name in before.settings if name not in ("config", "size", "stories", "vocab_size")}
    flat = {name.rpartition(".")[2]: value for name, value in leaves(now.settings)}
    for name in held - {"data"}:
        assert flat[name] == before.settings[name]
    if "config" in before.settings:
        assert now.settings["model"] == before.settings["config"]
    else:
        assert now.settings["tags"]["text"] == before.settings["data"]
