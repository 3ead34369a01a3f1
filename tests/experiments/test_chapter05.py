"""Four variants side by side: rates first, then seeds; a second call adds only what is missing."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest

from moemla.cli import main
from moemla.errors import MoemlaError
from moemla.evaluation import mean_interval
from moemla.experiments import chapter05, ten_minutes
from moemla.experiments.chapter05 import ROTARY, SCALES, VARIANTS, best_rates, rates_tried, run, seeds_of
from moemla.results import Result, load
from tests.runs import write_texts
from tools.browser import ROOT


def made(variant, lr, nats=None, seed=0, part="seed", data="builtin"):
    measures = dict(diverged=True) if nats is None else dict(nats_per_token=nats)
    settings = dict(part=part, variant=variant, lr=lr, seed=seed, data=data)
    return Result("chapter05", "x", settings, measures, {})


COUNTED = Result("chapter05", "c", dict(part="counted", data="builtin"), {}, {})


def test_each_variant_has_its_own_rate_and_a_diverged_run_none():
    runs = [made(name, lr, nats) for lr, nats in ((1e-2, None), (1e-3, 2.0), (3e-3, 1.5)) for name in VARIANTS]
    others = [
        made("mla", 3e-2, 0.1, seed=1),
        made("mla", 3e-2, 0.1, part="rate"),
        made("mla", 3e-2, 0.1, data="files"),
        COUNTED,
    ]
    runs += [made("mla", 2e-2, 1.4), *others]
    assert best_rates(runs, "builtin") == dict.fromkeys(VARIANTS, 3e-3) | {"mla": 2e-2}
    tried = rates_tried(runs, "builtin")
    assert tuple(tried) == VARIANTS
    assert list(tried["mla"].items()) == [(1e-3, 2.0), (3e-3, 1.5), (1e-2, None), (2e-2, 1.4)]
    assert best_rates(runs, "builtin", "rate") == best_rates(runs, "files") == {"mla": 3e-2}
    with pytest.raises(MoemlaError, match="no learning rate came through for mla-rope"):
        best_rates([*runs, made("mla-rope", 1.0, data="x")], "x")


def test_seeds_come_in_order_at_the_best_rate_without_the_one_that_chose_it():
    runs = [made("mha", 1e-3, 2.0, seed) for seed in (2, 0, 1)] + [made("mha", 1e-2, 2.5, seed) for seed in (0, 1)]
    found = seeds_of([*runs, COUNTED], "builtin")
    assert list(found) == ["mha"]
    assert [(run.settings["seed"], run.settings["lr"]) for run in found["mha"]] == [(1, 1e-3), (2, 1e-3)]
    assert seeds_of(runs, "files") == {}


def same(nats, seed=0, lr=1e-2, **settings):
    run = made("mha", lr, nats, seed, data="files")
    return replace(run, settings=run.settings | dict(data_hash="aa", min_lr=lr / 30, warmup=60, steps=600) | settings)


@pytest.mark.parametrize(
    "other, said",
    [
        (same(9.0, 1, data_hash="bb"), "data_hash='aa' and data_hash='bb'"),
        (same(9.0, 1, warmup=6), "warmup=60 and warmup=6"),
        (same(9.0, 1, steps=12), "steps=600 and steps=12"),  # a smoke run in the same folder
        (same(9.0, 1, min_lr=0.0), "min_lr"),
    ],
)
def test_runs_of_another_kind_are_never_averaged(other, said):
    runs = [same(2.0), same(2.1, lr=2e-2), same(2.2, seed=1)]
    assert [run.measures["nats_per_token"] for run in seeds_of(runs, "files")["mha"]] == [2.2]
    for function in (seeds_of, rates_tried, best_rates):
        with pytest.raises(MoemlaError, match=said):
            function([*runs, other], "files")


def test_a_text_is_named_by_its_hash():
    runs = [same(2.0), same(2.2, seed=1), same(8.0, data_hash="bb"), same(9.0, seed=1, data_hash="bb")]
    for name, nats in (("aa", 2.2), ("bb", 9.0)):
        assert [run.measures["nats_per_token"] for run in seeds_of(runs, name)["mha"]] == [nats]


@pytest.mark.parametrize("data, cells", [("builtin", 1 + 4 * (4 + 4 + 8)), ("files", 1 + 2 * (4 + 4))])
def test_the_committed_results_are_found_again(tmp_path, monkeypatch, data, cells):
    """They were made before data hash, floor and warm-up stood in a cell: nothing is trained a second time."""
    (one,) = {run.settings["data_hash"] for run in load(ROOT / "results") if run.settings.get("data") == data}
    facts = dict(hash=one, settings=dict(source=data))

    def find(cells, work, folder, pool, note):
        for result in chapter05.run_cells(chapter05.EXPERIMENT, cells, lambda settings, scratch: 1 / 0, folder):
            note(result)

    monkeypatch.setattr(chapter05, "prepared", lambda *arguments: (None, facts))
    monkeypatch.setattr(chapter05, "ProcessPoolExecutor", lambda *arguments: nullcontext())
    monkeypatch.setattr(chapter05, "_all", find)
    monkeypatch.setattr(ten_minutes, "prepared", lambda *arguments: (None, facts))
    for path in (ROOT / "results").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    texts = ("a", "b") if data == "files" else ()
    assert len(run("cpu", tmp_path, *texts, seeds=4 if texts else None)) == cells
    monkeypatch.setattr(ten_minutes, "train", lambda *arguments, **options: 1 / 0)
    (found,) = ten_minutes.run("cpu", tmp_path, *texts)
    assert found.measures["data_hash"] == one
    assert len(list(tmp_path.glob("*.json"))) == len(list((ROOT / "results").glob("*.json")))


@pytest.mark.slow
def test_the_built_in_text_is_the_one_that_was_measured(tmp_path):
    """Otherwise every result of it would be measured anew."""
    measured = {run.settings["data_hash"] for run in load(ROOT / "results") if run.settings.get("data") == "builtin"}
    assert measured == {ten_minutes.prepared(tmp_path, None)[1]["hash"]}


def test_a_scale_that_is_not_there():
    with pytest.raises(ValueError, match="smoke and cpu"):
        run("gpu")


def test_smoke(tmp_path, capsys):
    """The command itself: every cell leaves a result, seeds share their batches, and more seeds are added later."""
    command = ["experiment", "chapter05", "--folder", str(tmp_path), "--seeds"]
    assert main([*command, "1"]) == 0
    size, printed = SCALES["smoke"], capsys.readouterr().out
    first = {result.name: result for result in load(tmp_path, chapter05.EXPERIMENT)}
    assert len(first) == 1 + len(VARIANTS) * (2 * len(size.rates) + 1) == len(printed.splitlines())
    for part, steps in (("seed", size.steps), ("rate", size.steps // 3)):
        tried = rates_tried(first.values(), "builtin", part)
        assert {name: tuple(losses) for name, losses in tried.items()} == dict.fromkeys(VARIANTS, size.rates)
        assert {run.settings["steps"] for run in first.values() if run.settings["part"] == part} == {steps}
    (counted,) = [result for result in first.values() if result.settings["part"] == "counted"]
    assert 0 < counted.measures["bits_per_byte"]["3"] < counted.measures["bits_per_byte"]["2"] < 8
    best = best_rates(first.values(), "builtin")
    for name, (result,) in seeds_of(first.values(), "builtin").items():
        found = result.measures
        assert result.settings["lr"] == best[name] == found["training"]["lr"] and result.settings["seed"] == 1
        assert found["tokens_seen"] == size.steps * size.batch_size * size.seq_len == found["curve"]["tokens"][-1]
        assert found["training"]["min_lr"] == result.settings["lr"] / 30
        assert result.provenance["machine"]["threads"] == 1
        assert found["nats_per_token"] < 8.4 and found["tokens_per_cpu_second"] > 0
        assert found["cache_bytes_per_token"] == (2048 if "mha" in name else 1024)
    assert len({result.measures["parameters"] for result in first.values() if "variant" in result.settings}) <= 4

    assert main([*command, "2"]) == 0
    second = {result.name: result for result in load(tmp_path, chapter05.EXPERIMENT)}
    assert {name: second[name] for name in first} == first and len(second) == len(first) + len(VARIANTS)
    assert not any("nan" in json.dumps(result.measures).lower() for result in second.values())


def test_who_kills_the_experiment_kills_its_runs(tmp_path):
    code = "import sys; from moemla.experiments.chapter05 import run; run('smoke', sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True) as running:
        wait_until(lambda: len(load(tmp_path, chapter05.EXPERIMENT, missing_ok=True)) > 1)
        running.kill()
    wait_until(lambda: not processes_of(running.pid))


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def processes_of(session):
    """That still run; a process that has ended and that nobody waits for does not count."""
    listed = subprocess.run(["ps", "-eo", "sid=,stat="], capture_output=True, text=True, check=True).stdout
    return [line for line in map(str.split, listed.splitlines()) if line[0] == str(session) and line[1][0] != "Z"]


def test_real_stories(tmp_path):
    """Rates and seeds on the files, with rotary positions only."""
    texts = write_texts(tmp_path)
    found = run("smoke", tmp_path / "results", texts["train"], texts["valid"], seeds=1, workers=1)
    assert {result.settings["data"] for result in found} == {"files"}
    runs = seeds_of(found, "files")
    assert {name: len(theirs) for name, theirs in runs.items()} == dict.fromkeys(ROTARY, 1)
    (counted,) = [result for result in found if result.settings["part"] == "counted"]
    assert counted.measures["data_hash"] == runs["mla-rope"][0].measures["data_hash"]


@pytest.mark.parametrize("data, names, seeds", [("builtin", VARIANTS, SCALES["cpu"].seeds), ("files", ROTARY, 4)])
def test_what_was_measured_is_whole_and_no_rate_lies_at_the_end_of_those_tried(data, names, seeds):
    results = load(ROOT / "results", chapter05.EXPERIMENT)
    best, tried, runs = best_rates(results, data), rates_tried(results, data), seeds_of(results, data)
    assert tuple(best) == tuple(runs) == names
    for name in names:
        assert tuple(tried[name]) == SCALES["cpu"].rates
        assert min(tried[name]) < best[name] < max(tried[name])
        assert [run.settings["seed"] for run in runs[name]] == list(range(1, seeds + 1))
        assert {run.settings["lr"] for run in runs[name]} == {best[name]}


def test_the_readme_says_what_was_measured():
    results = load(ROOT / "results", chapter05.EXPERIMENT)
    text = " ".join((ROOT / "README.md").read_text().split())
    for data, ours, other in (
        ("builtin", "mla", "mha"),
        ("builtin", "mla-rope", "mha-rope"),
        ("files", "mla-rope", "mha-rope"),
    ):
        runs = seeds_of(results, data)
        pairs = zip(runs[ours], runs[other], strict=True)
        mean, half = mean_interval([a.measures["nats_per_token"] - b.measures["nats_per_token"] for a, b in pairs])
        said = "On real stories, 4 seeds," if data == "files" else f"`{ours}` - `{other}`"
        assert f"{said} {mean:+.3f} ± {half:.3f}" in text
