"""Four variants side by side: rates first, then seeds; a second call adds only what is missing."""

import json
import subprocess
import sys
import time

import pytest

from moemla.cells import Cell, model_config, train_config
from moemla.cli import main
from moemla.errors import MoemlaError
from moemla.evaluation import mean_interval
from moemla.experiments import latent_cost, runner, ten_minutes
from moemla.experiments.latent_cost import ROTARY, SCALES, VARIANTS, best_rates, rates_tried, seeds_of
from moemla.experiments.runner import Text, run
from moemla.results import load, of, table
from tests.runs import write_texts
from tools.browser import ROOT


def made(variant, lr, nats=None, seed=0, part="seed", data="builtin", hashed="aa", **changes):
    """A result; `changes` are of its training."""
    steps = 600 if part == "seed" else 200
    schedule = dict(
        steps=steps, batch_size=8, seq_len=256, optimizer="muon", lr=lr, min_lr=lr / 30, warmup=60, seed=seed
    )
    arm = variant if part == "seed" else f"{variant}-{steps}steps"
    cell = Cell(
        experiment="latent-cost",
        scale="cpu",
        data=hashed,
        tags=dict(arm=arm, variant=variant, part=part, text=data, scored=None),
        model=model_config("tiny", variant, vocab_size=4096, max_seq_len=512),
        train=train_config(**schedule | changes),
    )
    return of(cell, dict(diverged=True) if nats is None else dict(nats_per_token=nats), {})


TAGS = dict(arm="counted", part="counted", text="builtin")
COUNTED = of(Cell(experiment="latent-cost", scale="cpu", data="aa", tags=TAGS), {}, {})


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
        best_rates([*runs, made("mla-rope", 1.0, data="files")], "files")


def test_seeds_come_in_order_at_the_best_rate_without_the_one_that_chose_it():
    runs = [made("mha", 1e-3, 2.0, seed) for seed in (2, 0, 1)] + [made("mha", 1e-2, 2.5, seed) for seed in (0, 1)]
    found = seeds_of([*runs, COUNTED], "builtin")
    assert list(found) == ["mha"]
    trained = [run.settings["train"] for run in found["mha"]]
    assert [(train["seed"], train["lr"]) for train in trained] == [(1, 1e-3), (2, 1e-3)]
    assert seeds_of(runs, "files") == {}


def same(nats, seed=0, lr=1e-2, **changes):
    return made("mha", lr, nats, seed, data="files", **changes)


@pytest.mark.parametrize(
    "other, said",
    [
        (same(9.0, 1, hashed="bb"), "data='aa' and data='bb'"),
        (same(9.0, 1, warmup=6), "train.warmup=60 and train.warmup=6"),
        (same(9.0, 1, steps=120), "train.steps=600 and train.steps=120"),
        (same(9.0, 1, min_lr=0.0), "train.floor"),
    ],
)
def test_runs_of_another_kind_are_never_averaged(other, said):
    runs = [same(2.0), same(2.1, lr=2e-2), same(2.2, seed=1)]
    assert [run.measures["nats_per_token"] for run in seeds_of(runs, "files")["mha"]] == [2.2]
    for function in (seeds_of, rates_tried, best_rates):
        with pytest.raises(MoemlaError, match=said):
            function([*runs, other], "files")


def test_a_text_is_named_by_its_hash():
    runs = [same(2.0), same(2.2, seed=1), same(8.0, hashed="bb"), same(9.0, seed=1, hashed="bb")]
    for name, nats in (("aa", 2.2), ("bb", 9.0)):
        assert [run.measures["nats_per_token"] for run in seeds_of(runs, name)["mha"]] == [nats]


@pytest.mark.parametrize("data, cells", [("builtin", 1 + 4 * (4 + 4 + 8)), ("files", 1 + 2 * (4 + 4))])
def test_the_committed_results_are_found_again(tmp_path, monkeypatch, data, cells):
    """Nothing is trained a second time, and no file is touched."""
    (one,) = {run.settings["data"] for run in load(ROOT / "results", "latent-cost") if text_of(run) == data}
    monkeypatch.setattr(runner, "prepared", lambda *arguments: Text(data, one))
    before = {}
    for path in (ROOT / "results").glob("[!.]*/*/*"):
        copy = tmp_path / path.relative_to(ROOT / "results")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
        before[copy] = path.read_bytes()
    for experiment in (latent_cost, ten_minutes):
        monkeypatch.setattr(experiment, "train", lambda *arguments, **options: 1 / 0)
        found = run(experiment, "cpu", tmp_path, workers=0)
        assert len(found) == (cells if experiment is latent_cost else 1)
        assert {text_of(result) for result in found} == {data}
    assert {path: path.read_bytes() for path in tmp_path.glob("[!.]*/*/*")} == before


def text_of(result):
    return result.settings["tags"]["text"]


@pytest.mark.slow
def test_the_built_in_text_is_the_one_that_was_measured(tmp_path):
    """Otherwise every result of it would be measured anew."""
    trained = [run for run in load(ROOT / "results") if run.settings["tags"].get("text") == "builtin"]
    assert {run.settings["data"] for run in trained} == {runner.prepared(tmp_path, None).data}


def test_smoke(tmp_path, capsys):
    """The command itself: every cell leaves a result, seeds share their batches, and more seeds are added later."""
    command = ["experiment", "latent-cost", "--folder", str(tmp_path), "--seeds"]
    assert main([*command, "1"]) == 0
    size, printed = SCALES["smoke"], capsys.readouterr().out
    first = {result.name: result for result in load(tmp_path, "latent-cost", "smoke")}
    count = 1 + len(VARIANTS) * (2 * len(size.rates) + 1)
    assert len(first) == count and f"\n{count}/{count}  " in printed
    for part, steps in (("seed", size.steps), ("rate", size.steps // 3)):
        tried = rates_tried(first.values(), "builtin", part)
        assert {name: tuple(losses) for name, losses in tried.items()} == dict.fromkeys(VARIANTS, size.rates)
        of_part = [run for run in first.values() if run.settings["tags"]["part"] == part]
        assert {run.settings["train"]["steps"] for run in of_part} == {steps}
    counted = first["counted"]
    assert 0 < counted.measures["bits_per_byte"]["3"] < counted.measures["bits_per_byte"]["2"] < 8
    best = best_rates(first.values(), "builtin")
    for name, (result,) in seeds_of(first.values(), "builtin").items():
        found, train = result.measures, result.settings["train"]
        assert result.name == f"{name}_lr{best[name]:g}_seed1"
        assert (train["lr"], train["seed"]) == (best[name], 1)
        assert found["tokens_seen"] == size.steps * size.batch_size * size.seq_len == found["curve"]["tokens"][-1]
        assert train["min_lr"] == best[name] / 30
        assert result.provenance["machine"]["threads"] == 1
        assert found["nats_per_token"] < 8.4 and found["tokens_per_cpu_second"] > 0
        assert found["cache_bytes_per_token"] == (2048 if "mha" in name else 1024)
        assert f"builtin   {name:10}{best[name]:7g}{1:7}   {found['nats_per_token']:.4f}" in printed
    assert len({result.measures["parameters"] for result in first.values() if result.settings["model"]}) <= 4

    assert main([*command, "2"]) == 0
    second = {result.name: result for result in load(tmp_path, "latent-cost", "smoke")}
    assert {name: second[name] for name in first} == first and len(second) == len(first) + len(VARIANTS)
    assert not any("nan" in json.dumps(result.measures).lower() for result in second.values())
    assert (tmp_path / "latent-cost" / "smoke" / "table.csv").read_text() == table(second.values())


def test_who_kills_the_experiment_kills_its_runs(tmp_path):
    code = (
        "import sys; from moemla.experiments import latent_cost, runner\n"
        "if __name__ == '__main__': runner.run(latent_cost, 'smoke', sys.argv[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, start_new_session=True) as running:
        wait_until(lambda: len(load(tmp_path, "latent-cost", missing_ok=True)) > 1)
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
    found = run(latent_cost, "smoke", tmp_path / "results", texts["train"], texts["valid"], seeds=1, workers=1)
    assert {text_of(result) for result in found} == {"files"}
    runs = seeds_of(found, "files")
    assert {name: len(theirs) for name, theirs in runs.items()} == dict.fromkeys(ROTARY, 1)
    (counted,) = [result for result in found if result.settings["tags"]["part"] == "counted"]
    assert counted.settings["data"] == runs["mla-rope"][0].settings["data"]
    assert counted.name == f"counted_{counted.settings['data'][:6]}"


# ---- what was measured

# As the files of November 2026 were read when they still were results/chapter05.*.json.
READ = json.loads((ROOT / "tests" / "kept" / "latent-cost.json").read_text())


@pytest.mark.parametrize("data", READ)
def test_the_numbers_are_those_of_before_to_the_last_digit(data):
    results, before = load(ROOT / "results", "latent-cost", "cpu"), READ[data]
    for part in ("seed", "rate"):
        tried = {name: dict(map(tuple, losses)) for name, losses in before["tried"][part].items()}
        assert rates_tried(results, data, part) == tried
    assert best_rates(results, data) == before["best"]
    runs = seeds_of(results, data)
    assert tuple(runs) == tuple(before["seeds"])
    for name, kept in before["seeds"].items():
        losses = [run.measures["nats_per_token"] for run in runs[name]]
        assert losses == kept["nats"] and list(mean_interval(losses)) == kept["interval"]


@pytest.mark.parametrize("data, names, seeds", [("builtin", VARIANTS, SCALES["cpu"].seeds), ("files", ROTARY, 4)])
def test_what_was_measured_is_whole_and_no_rate_lies_at_the_end_of_those_tried(data, names, seeds):
    results = load(ROOT / "results", "latent-cost", "cpu")
    best, tried, runs = best_rates(results, data), rates_tried(results, data), seeds_of(results, data)
    assert tuple(best) == tuple(runs) == names
    for name in names:
        assert tuple(tried[name]) == SCALES["cpu"].rates
        assert min(tried[name]) < best[name] < max(tried[name])
        assert [run.settings["train"]["seed"] for run in runs[name]] == list(range(1, seeds + 1))
        assert {run.settings["train"]["lr"] for run in runs[name]} == {best[name]}


def test_the_readme_says_what_was_measured():
    results = load(ROOT / "results", "latent-cost", "cpu")
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
