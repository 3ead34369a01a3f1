"""A run's folder: what it holds, that it is not overwritten, and that runs of before are read as they were."""

import json
import math
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from moemla import training
from moemla.checkpoint import _sum_of, checkpoints, load
from moemla.config import ADDED, VERSION, ModelConfig, TrainConfig
from moemla.data import prepare
from moemla.errors import MoemlaError
from moemla.evaluation import evaluate
from moemla.measuring import matmul_rate
from moemla.optim import learning_rate
from moemla.runs import data_folder, read_metrics
from moemla.text import read_stories
from moemla.training import train
from tests.runs import Stop, files_in, micro, quick, stop_after, write_texts


@pytest.fixture(autouse=True)
def quick_measuring(monkeypatch):
    """The real measurement, of smaller matrices: what else it does to the run must still show."""
    monkeypatch.setattr(training, "matmul_rate", lambda device, dtype: matmul_rate(device, dtype, 64))


# --- the folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["metrics.jsonl", "train.json"])
def test_a_run_is_not_overwritten(tmp_path, data, left):
    train(micro(), quick(2), data, tmp_path / "run")
    if left == "metrics.jsonl":  # train.json is gone, checkpoints are not
        (tmp_path / "run" / "train.json").unlink()
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files_in(tmp_path / "run")}
    with pytest.raises(MoemlaError, match="--resume"):
        train(micro(), quick(2), data, tmp_path / "run")
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in files_in(tmp_path / "run")}


@pytest.mark.parametrize(
    "model,settings,named",
    [
        (dict(d_expert=16), {}, "d_expert"),
        (dict(dropout=0.1, top_k=1), {}, "dropout, top_k"),
        ({}, dict(lr=1e-3), "lr"),
        ({}, dict(steps=9, seed=4), "seed, steps"),
    ],
    ids=str,
)
def test_changed_settings_are_refused_by_name(tmp_path, data, model, settings, named):
    train(micro(), quick(2), data, tmp_path / "run")
    with pytest.raises(MoemlaError, match=rf"other settings \({named}\)"):
        train(micro(**model), replace(quick(2), **settings), data, tmp_path / "run", resume=True)


def test_other_data_is_refused(tmp_path, data):
    train(micro(), quick(2), data, tmp_path / "run")
    texts = write_texts(tmp_path)
    texts["train"].write_text(texts["train"].read_text().replace("cat", "cow"))
    prepare(tmp_path / "data", source="files", vocab_size=300, **texts)
    with pytest.raises(MoemlaError, match=r"other settings \(data\)"):
        train(micro(), quick(2), tmp_path / "data", tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["train.json", "metrics.jsonl"])
def test_a_damaged_run_is_one_clear_line(tmp_path, data, name):
    train(micro(), quick(2), data, tmp_path / "run")
    (tmp_path / "run" / name).write_text('{"step": 1, \n')
    with pytest.raises(MoemlaError, match=name) as error:
        train(micro(), quick(2), data, tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_data_json_is_one_clear_line(tmp_path, data, content):
    for name in ("train.bin", "tokenizer.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(MoemlaError, match=r"data\.json") as error:
        train(micro(), quick(2), tmp_path, tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


# --- the log --------------------------------------------------------------------------------------


def test_rows_of_the_log(tmp_path, data):
    settings = quick(10, log_every=4, load_window=3)
    seen = []
    train(micro(), settings, data, tmp_path / "run", on_progress=seen.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in lines] == [4, 8, 10]  # each log_every steps, and the last
    for row in lines:
        assert {"step", "tokens", "loss", "lr", "seconds"} <= row.keys()
        assert row["tokens"] == row["step"] * 4 * 16
        assert row["lr"] == learning_rate(row["step"] - 1, lr=settings.lr, min_lr=0.0, warmup=2, steps=10)
        assert row["load_cv_floor"] == pytest.approx(math.sqrt((1 - 2 / 4) * 4 / (3 * 64 * 2)))
        assert row["load_cv"] >= 0 and row["grad_norm"] > 0
    assert read_metrics(tmp_path / "run") == seen
    assert seen[-1].seconds_left == 0 and seen[0].utilisation > 0

    train(micro(), replace(settings, log_every=1), data, tmp_path / "fine")
    fine = [row.loss for row in read_metrics(tmp_path / "fine")]
    for row, first, last in zip(lines, (0, 4, 8), (4, 8, 10), strict=True):
        assert row["loss"] == pytest.approx(sum(fine[first:last]) / (last - first), rel=1e-6)


def test_the_load_of_each_layer(tmp_path, data, monkeypatch):
    """Over the window's steps, the first layer first; a leading dense layer has none."""
    steps, real = [], training.train_step

    def noting(model, optimizers, balancer, *rest):
        out = real(model, optimizers, balancer, *rest)
        steps.append(balancer.counts and torch.stack(balancer.counts))
        return out

    monkeypatch.setattr(training, "train_step", noting)
    train(micro(n_layers=3, n_dense_layers=1), quick(5, load_window=3), data, tmp_path / "run")
    for step, row in enumerate(read_metrics(tmp_path / "run"), 1):
        loads = torch.stack(steps[max(0, step - 3) : step]).sum(0).double()
        assert loads.shape == (2, 4)
        for layer, counts in enumerate(loads):
            ratios = counts / counts.mean() - 1
            assert row.load_cv_by_layer[layer] == pytest.approx(ratios.square().mean().sqrt().item())
            assert row.max_violation_by_layer[layer] == pytest.approx(ratios.max().item())
        assert row.load_cv == pytest.approx(sum(row.load_cv_by_layer) / 2)
    train(micro(ffn="dense"), quick(1), data, tmp_path / "dense")
    (row,) = read_metrics(tmp_path / "dense")
    assert row.load_cv is row.load_cv_by_layer is row.max_violation_by_layer is None


def test_rows_of_before_are_read(tmp_path):
    """They have fewer fields, and one from later may have more."""
    old = dict(step=1, tokens=64, loss=5.0, lr=0.1, seconds=1.0, tokens_per_second=64.0, utilisation=0.1)
    old |= dict(seconds_left=2.0, grad_norm=0.5, load_cv=0.3)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(old | dict(step=2, later=7)) + "\n")
    first, second = read_metrics(tmp_path)
    assert (first.load_cv, first.load_cv_by_layer, first.skipped, second.step) == (0.3, None, None, 2)


def test_a_row_that_was_cut_is_dropped(tmp_path, data):
    with pytest.raises(Stop):
        train(micro(), quick(6), data, tmp_path / "run", checkpoint_every=2, on_progress=stop_after(5))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "tokens": 3')
    assert [row.step for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    train(micro(), quick(6), data, tmp_path / "run", resume=True)
    assert [row.step for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_the_log_needs_a_run(tmp_path):
    with pytest.raises(MoemlaError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


# --- runs of before -------------------------------------------------------------------------------

KEPT = Path(__file__).parent / "kept" / "version-0"  # made by the code before files had versions; never made again


@pytest.fixture
def kept(tmp_path) -> tuple[Path, dict]:
    shutil.copytree(KEPT, tmp_path / "kept")
    return tmp_path / "kept", json.loads((KEPT / "expected.json").read_text())


def test_a_run_of_before_is_loaded_and_scored_as_then(kept, tmp_path, monkeypatch):
    folder, expected = kept
    monkeypatch.chdir(tmp_path)  # its data is named relative to another folder
    model, tokenizer = load(folder / "run")
    found = evaluate(model, tokenizer, read_stories(data_folder(folder / "run") / "valid.txt"), 16).to_dict()
    assert {name: found[name] for name in ("stories", "tokens", "bytes")} == dict(stories=5, tokens=219, bytes=498)
    assert found["nats_per_token"] == pytest.approx(expected["evaluation"]["nats_per_token"], rel=1e-5)


def test_a_run_of_before_goes_on_as_then(kept):
    folder, expected = kept
    facts = json.loads((folder / "run" / "train.json").read_text())
    config, settings = ModelConfig.from_dict(facts["model"]), TrainConfig(**ADDED["TrainConfig"] | facts["train"])
    train(config, settings, folder / "data", folder / "run", resume=True, device="cpu")
    losses = [row.loss for row in read_metrics(folder / "run")]
    assert losses == pytest.approx(expected["losses"], rel=1e-4) and len(losses) == 6
    assert json.loads((folder / "run" / "train.json").read_text()) == facts


def test_fields_that_came_since_have_a_value_that_repeats_what_was_done():
    facts = json.loads((KEPT / "run" / "train.json").read_text())
    for kind, part in ((ModelConfig, "model"), (TrainConfig, "train")):
        missing = {field.name for field in fields(kind)} - facts[part].keys()
        assert missing <= ADDED[kind.__name__].keys(), f"give {missing} a value in config.ADDED"


def test_a_run_without_a_field_that_came_since_goes_on(tmp_path, data, monkeypatch):
    with pytest.raises(Stop):
        train(micro(), quick(4), data, tmp_path / "run", checkpoint_every=2, on_progress=stop_after(3))
    path = tmp_path / "run" / "train.json"
    facts = json.loads(path.read_text())
    assert facts["version"] == VERSION
    del facts["train"]["z_loss"], facts["model"]["routed_scale"]
    path.write_text(json.dumps(facts))
    with pytest.raises(MoemlaError, match="routed_scale"):
        train(micro(), quick(4), data, tmp_path / "run", resume=True)
    monkeypatch.setitem(ADDED, "ModelConfig", {"routed_scale": 1.0})
    monkeypatch.setitem(ADDED, "TrainConfig", {"z_loss": 0.0})
    train(micro(), quick(4), data, tmp_path / "run", resume=True)
    monkeypatch.setitem(ADDED, "TrainConfig", {"z_loss": 0.5})  # not what this run did
    with pytest.raises(MoemlaError, match=r"other settings \(z_loss\)"):
        train(micro(), quick(4), data, tmp_path / "run", resume=True)


@pytest.mark.parametrize("where", ["train.json", "train", "model", "config.json", "state.json"])
def test_a_run_of_a_newer_version_is_refused_by_name(tmp_path, data, where):
    train(micro(), quick(2), data, tmp_path / "run")
    name = "config.json" if where == "config.json" else "train.json"
    folder = checkpoints(tmp_path / "run")[-1] if where in ("config.json", "state.json") else tmp_path / "run"
    path = folder / (where if where == "state.json" else name)
    facts = json.loads(path.read_text())
    part = facts[where] if where in ("train", "model") else facts
    part["hyper"] = 1
    facts["version"] = VERSION + 1
    if where == "state.json":
        facts.pop("sha256")
        facts |= {"sha256": {"state": _sum_of({key: facts[key] for key in facts if key != "version"})}}
    elif where == "config.json":
        (folder / "state.json").write_text('{"step": 2}')
    path.write_text(json.dumps(facts))
    with pytest.raises(MoemlaError, match=rf"newer moemla.*version {VERSION + 1}") as error:
        if where == "config.json":
            load(tmp_path / "run")
        else:
            train(micro(), quick(2), data, tmp_path / "run", resume=True)
    assert "\n" not in str(error.value) and (where == "state.json" or "hyper" in str(error.value))


def test_the_data_of_a_run_is_found_from_anywhere(tmp_path, data, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.copytree(data, tmp_path / "a" / "data")
    monkeypatch.chdir(tmp_path / "a")
    train(micro(), quick(1), "data", "b/run")
    monkeypatch.chdir("/")
    run = tmp_path / "a" / "b" / "run"
    assert data_folder(run).samefile(tmp_path / "a" / "data")
    shutil.copytree(run, tmp_path / "elsewhere")  # the run alone
    assert data_folder(tmp_path / "elsewhere").samefile(tmp_path / "a" / "data")
    os.replace(tmp_path / "a", tmp_path / "moved")  # both together
    assert data_folder(tmp_path / "moved" / "b" / "run").samefile(tmp_path / "moved" / "data")
    for damage in (dict(hash="0" * 64), None):  # another text has taken the place, or none is there
        record = tmp_path / "moved" / "data" / "data.json"
        record.unlink() if damage is None else record.write_text(json.dumps(damage))
        with pytest.raises(MoemlaError, match="--text"):
            data_folder(tmp_path / "moved" / "b" / "run")
