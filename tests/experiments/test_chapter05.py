"""Four variants side by side: rates first, then seeds; a second call adds only what is missing."""

import json

import pytest

from moemla.cli import main
from moemla.errors import MoemlaError
from moemla.evaluation import mean_interval
from moemla.experiments import chapter05
from moemla.experiments.chapter05 import SCALES, VARIANTS, best_rates, run, seeds_of
from moemla.experiments.results import Result, load
from tests.runs import write_texts
from tools.browser import ROOT


def made(part, variant, lr, nats=None, **more):
    measures = dict(diverged=True) if nats is None else dict(nats_per_token=nats)
    return Result("chapter05", "x", dict(part=part, variant=variant, lr=lr, data="builtin", **more), measures, {})


def test_each_variant_has_its_own_rate_and_a_diverged_run_none():
    runs = [made("rate", name, lr, nats) for name in VARIANTS for lr, nats in ((1e-3, 2.0), (3e-3, 1.5), (1e-2, None))]
    runs += [
        made("rate", "mla", 1e-2, 1.4),
        made("seed", "mha", 5e-3, 0.1),
        Result("chapter05", "c", dict(part="counted"), {}, {}),
    ]
    assert best_rates(runs) == dict.fromkeys(VARIANTS, 3e-3) | {"mla": 1e-2}
    with pytest.raises(MoemlaError, match="no learning rate came through for mla-rope"):
        best_rates(run for run in runs if run.settings.get("variant") != "mla-rope")


def test_seeds_come_in_order_and_by_data():
    runs = [made("seed", "mha", 1e-3, 2.0, seed=seed) for seed in (2, 0, 1)] + [made("rate", "mha", 1e-3, 2.0, seed=0)]
    found = seeds_of(runs, "builtin")
    assert [result.settings["seed"] for result in found["mha"]] == [0, 1, 2] and found["mla"] == []
    assert seeds_of(runs, "files")["mha"] == []


def test_a_scale_that_is_not_there():
    with pytest.raises(ValueError, match="smoke and cpu"):
        run("gpu")


def test_smoke(tmp_path, capsys):
    """The command itself: every cell leaves a result, seeds share their batches, and more seeds are added later."""
    command = ["experiment", "chapter05", "--folder", str(tmp_path), "--seeds"]
    assert main([*command, "1"]) == 0
    size, printed = SCALES["smoke"], capsys.readouterr().out
    first = {result.name: result for result in load(tmp_path, chapter05.EXPERIMENT)}
    swapped = [result for result in first.values() if result.settings["part"] == "swapped"]
    assert len(first) - len(swapped) == 1 + len(VARIANTS) * (len(size.rates) + 1)
    assert len(first) == len(printed.splitlines())
    best = best_rates(first.values())
    partner = {"mha": "mla", "mla": "mha", "mha-rope": "mla-rope", "mla-rope": "mha-rope"}
    apart = {name for name in VARIANTS if best[name] != best[partner[name]]}
    assert {result.settings["variant"] for result in swapped} == apart
    assert all(result.settings["lr"] != best[result.settings["variant"]] for result in swapped)
    (counted,) = [result for result in first.values() if result.settings["part"] == "counted"]
    assert 0 < counted.measures["bits_per_byte"]["3"] < counted.measures["bits_per_byte"]["2"] < 8
    for name, (result,) in seeds_of(first.values(), "builtin").items():
        found = result.measures
        assert result.settings["lr"] == best_rates(first.values())[name] == found["training"]["lr"]
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


def test_real_stories(tmp_path):
    """Rates of the built-in stories, seeds on the files, with rotary positions only."""
    texts = write_texts(tmp_path)
    found = run("smoke", tmp_path / "results", texts["train"], texts["valid"], seeds=1, workers=1)
    assert {result.settings["data"] for result in found if result.settings["part"] == "rate"} == {"builtin"}
    runs = seeds_of(found, "files")
    assert [len(runs[name]) for name in VARIANTS] == [0, 1, 0, 1]
    assert seeds_of(found, "builtin")["mla-rope"] == []
    (counted,) = [result for result in found if result.settings["part"] == "counted"]
    assert counted.settings["data"] == "files"
    assert counted.measures["data_hash"] == runs["mla-rope"][0].measures["data_hash"]


def test_the_readme_says_what_was_measured():
    runs = seeds_of(load(ROOT / "results", chapter05.EXPERIMENT), "builtin")
    assert {name: len(found) for name, found in runs.items()} == dict.fromkeys(VARIANTS, 5)
    nats = {name: [run.measures["nats_per_token"] for run in found] for name, found in runs.items()}
    text = " ".join((ROOT / "README.md").read_text().split())
    mean, half = mean_interval([a - b for a, b in zip(nats["mla"], nats["mha"], strict=True)])
    assert f"`mla` - `mha` {mean:+.3f} ± {half:.3f}" in text
