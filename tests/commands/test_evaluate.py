"""`moemla evaluate`: one object or some lines, from a run, a saved model or a text."""

import json
import shutil
from dataclasses import replace

import pytest

from moemla.checkpoint import checkpoints, load
from moemla.cli import main
from moemla.evaluation import evaluate
from tests.commands.shell import SMALL, failed
from tests.runs import STORIES


def test_evaluate_prints_one_object(run, texts, capsys):
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1
    assert {"nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes"} <= found.keys()
    expected = evaluate(*load(run), STORIES[::7], context=16)  # the validation stories of the run's data
    assert found == pytest.approx(expected.to_dict())

    assert main(["evaluate", "--run", str(run), "--text", str(texts["train"]), "--context", "64"]) == 0
    out = capsys.readouterr().out
    wanted = evaluate(*load(run), STORIES, context=64)
    assert f"{wanted.nats_per_token:.4f} nats per token" in out and f"{wanted.bits_per_byte:.4f} bits per byte" in out
    assert f"CV {wanted.load_cv:.3f}" in out and f"{wanted.bytes:,} bytes" in out


def test_evaluate_a_saved_model(run, texts, tmp_path, capsys):
    model, tokenizer = load(run)
    model.save(tmp_path / "saved", tokenizer)
    line = failed(capsys, "evaluate", "--run", tmp_path / "saved")
    assert line.startswith("1") and "--text" in line
    assert main(["evaluate", "--run", str(tmp_path / "saved"), "--text", str(texts["valid"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    model.save(tmp_path / "mute")
    for command in ("evaluate", "generate"):
        line = failed(capsys, command, "--run", tmp_path / "mute")
        assert line.startswith("1") and "tokenizer.json" in line


def test_evaluate_names_a_text_that_cannot_be_read(run, tmp_path, capsys):
    assert "gone.txt" in failed(capsys, "evaluate", "--run", run, "--text", tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in failed(capsys, "evaluate", "--run", run, "--text", tmp_path / "empty.txt")


def test_a_perplexity_beyond_a_float_is_null(run, texts, capsys, monkeypatch):
    from moemla import evaluation

    real = evaluation.evaluate
    loud = lambda *args: replace(real(*args), nats_per_token=800.0, perplexity=evaluation.perplexity(800.0))  # noqa: E731
    monkeypatch.setattr(evaluation, "evaluate", loud)
    assert main(["evaluate", "--run", str(run), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["perplexity"] is None and json.loads(out)["nats_per_token"] == 800.0
    assert err == "moemla: the perplexity is more than a float holds: null\n"
    assert main(["evaluate", "--run", str(run)]) == 0
    assert "800.0000 nats per token, perplexity inf" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_one_line_and_the_older_one_is_scored(data, texts, tmp_path, capsys):
    run = tmp_path / "run"
    how = ["train", "--data", str(data), "--out", str(run), "--steps", "2", "--checkpoint-every", "1", *SMALL]
    assert main([*how, "--validate-every", "1"]) == 0
    (checkpoints(run)[-1] / "model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run)]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "step-00000001 is taken instead" in captured.err
    assert captured.err.startswith("moemla: ") and "nats per token" in captured.out
    assert main(["evaluate", "--run", str(run / "best"), "--text", str(texts["valid"])]) == 0


def test_evaluate_finds_the_data_from_another_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    assert main(["train", "--data", data.name, "--out", str(tmp_path / "run"), "--steps", "1", *SMALL]) == 0
    monkeypatch.chdir("/")
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0


def test_the_best_model_is_scored_as_its_run_is(run, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    model, tokenizer = load(run)
    model.save(copy / "best", tokenizer)
    said = []
    for folder in (copy, copy / "best"):
        assert main(["evaluate", "--run", str(folder)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "16 tokens at a time" in said[0]
