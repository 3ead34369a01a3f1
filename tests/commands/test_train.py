"""`moemla train`: refused starts leave nothing; signals, a full disk and a reader that leaves cost nothing."""

import json
import resource
import signal
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from moemla import training
from moemla.checkpoint import checkpoints, load
from moemla.cli import main
from moemla.commands.train import Train
from moemla.config import TrainConfig
from moemla.loggers import LOGGERS, Logger
from moemla.runs import read_metrics
from moemla.tokenizer import Tokenizer
from tests.commands.shell import SLOW_START, SMALL, child, failed
from tests.runs import files_in, wait_for


@pytest.mark.parametrize(
    "settings,named",
    [
        (["--steps", "0"], "--steps 0: must be a whole number of at least 1"),
        (["--micro-batches", "3"], "--micro-batches 3: must divide --batch-size 2"),
        (["--lr", "-1"], "--lr -1.0: must be"),
        (["--dropout", "1.5"], "--dropout 1.5: "),
        (["--checkpoint-every", "-1"], "--checkpoint-every -1: "),
        (["--device", "toaster"], "--device 'toaster'"),
        (["--device", "cuda:99"], "--device 'cuda:99'"),
        (["--seed", "-1"], "--seed -1: "),
        (["--steps", "many"], "--steps many: must be a whole number\n"),
        (["--steps", "1.5"], "--steps 1.5: must be a whole number\n"),
        (["--lr", "fast"], "--lr fast: must be a number\n"),
        (["--lr", "nan"], "--lr nan: must be a finite number"),
        (["--balance-rate", "x"], "--balance-rate x: must be a number or None\n"),
        (["--balance-rate", "nan"], "--balance-rate nan: "),
        (["--patience", "2"], "--patience 2: needs --validate-every N"),
        (["--decay", "2"], "--decay 2.0: a share of the steps, at most 1"),
        (["--recipe", "paper", "--steps", "100", "--warmup", "101"], "--warmup 101: must be at most --steps 100"),
    ],
    ids=" ".join,
)
def test_wrong_settings_of_training_exit_with_2(data, tmp_path, capsys, settings, named):
    said = failed(capsys, "train", "--data", data, "--out", tmp_path / "run", *SMALL, *settings)
    assert said.startswith("2") and named in said and not (tmp_path / "run").exists()
    assert not any(inner in said for inner in ("__", "train_config", "train-config", "class", "base 10", "_batch"))


@pytest.mark.parametrize("how,says", [("cut", "damaged"), ("foreign", "not a token shard"), ("gone", "train.bin")])
def test_a_shard_that_is_not_right_is_one_line(tmp_path, data, capsys, how, says):
    for name in files_in(data):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    shard = tmp_path / "train.bin"
    if how == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100] if how == "cut" else b"PK\x03\x04" + bytes(500))
    line = failed(capsys, "train", "--data", tmp_path, "--out", tmp_path / "run", "--steps", "2", *SMALL)
    assert line.startswith("1") and says in line and not (tmp_path / "run").exists()


def test_a_run_is_whole_by_itself(run, data):
    assert {"config.json", "train.json", "tokenizer.json", "metrics.jsonl"} <= files_in(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[-1]["tokens"] == 3 * 2 * 16
    assert all({"step", "tokens", "loss", "lr", "seconds"} <= row.keys() for row in rows)
    assert json.loads((run / "train.json").read_text())["data"] == json.loads((data / "data.json").read_text())["hash"]


def test_a_run_is_continued_or_refused(data, tmp_path, capsys):
    how = ["train", "--data", data, "--out", tmp_path / "run", *SMALL]
    assert main([*map(str, how), "--steps", "2", "--resume"]) == 0  # an empty folder starts
    assert "+" in capsys.readouterr().out  # the difference in parameters that matching left
    line = failed(capsys, *how, "--steps", "2")
    assert line.startswith("1") and "--resume" in line
    line = failed(capsys, *how, "--steps", "3", "--lr", "0.5", "--resume")
    assert line.startswith("1") and "(lr, steps)" in line
    line = failed(capsys, *how, "--steps", "2", "--variant", "mha-rope", "--resume")
    assert line.startswith("1") and "attention" in line and "ffn" in line
    assert main([*map(str, how), "--steps", "2", "--resume"]) == 0
    assert "done in" in capsys.readouterr().out


def test_missing_or_damaged_input_of_training_is_one_line(data, tmp_path, capsys):
    how = ["--out", tmp_path / "run", "--steps", "2", *SMALL]
    line = failed(capsys, "train", "--data", tmp_path / "nowhere", *how)
    assert line.startswith("1") and "nowhere" in line
    for name in files_in(data):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    Tokenizer.train(["x y z"], 300).save(tmp_path / "tokenizer.json")
    line = failed(capsys, "train", "--data", tmp_path, *how)
    assert line.startswith("1") and "tokenizer" in line
    line = failed(capsys, "train", "--data", data, "--out", data / "data.json", "--steps", "2", *SMALL)
    assert line.startswith("1") and "data.json" in line
    assert not (tmp_path / "run").exists()


def asked_of_train(monkeypatch, data, *arguments) -> tuple:
    """(model, training, options) of the call that a command makes."""
    asked = []
    monkeypatch.setattr(training, "train", lambda *how, **options: asked.append((*how[:2], options)))
    assert main(["train", "--data", str(data), "--out", "run", *arguments]) == 0
    return asked[0]


@pytest.mark.parametrize("spelt", [["--recipe", "paper"], ["--recipe=paper"]], ids=" ".join)
def test_the_papers_recipe_is_what_is_not_given(data, monkeypatch, spelt):
    config, settings, _ = asked_of_train(monkeypatch, data, *spelt)
    assert settings == TrainConfig.paper() and config.dropout == 0.1 and config.max_seq_len == 512
    given = ["--steps", "900", "--warmup", "50", "--lr", "0.01", "--dropout", "0", "--batch-size", "16"]
    config, settings, _ = asked_of_train(monkeypatch, data, *given, *spelt, "--precision", "float32")
    expected = dict(steps=900, warmup=50, lr=0.01, batch_size=16, precision="float32")
    assert settings == TrainConfig.paper(**expected) and config.dropout == 0
    for plain in ([], ["--recipe", "tiny"]):
        config, settings, _ = asked_of_train(monkeypatch, data, *plain)
        assert settings == TrainConfig() and config.dropout == 0


def test_options_of_the_loop_reach_it(data, monkeypatch):
    every = ["--validate-every", "5", "--patience", "3", "--init", "pretrained/x", "--compile", "--recompute"]
    _, _, options = asked_of_train(monkeypatch, data, *every)
    expected = dict(validate_every=5, patience=3, init="pretrained/x", compile=True, recompute=True)
    assert options.items() >= expected.items()
    _, _, options = asked_of_train(monkeypatch, data)
    assert options.items() >= dict(patience=0, init=None, compile=False, recompute=False).items()


def test_the_help_of_the_papers_recipe_shows_its_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "paper", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--steps INT (default: 50000)" in said and "--dropout FLOAT (default: 0.1)" in said


def test_rows_go_to_every_logger_that_is_asked_for(data, tmp_path, monkeypatch):
    made = []

    class Noting(list, Logger):
        def __init__(self, out, told):
            made.append(self)
            self.out, self.told, self.closed = out, told, 0

        def __call__(self, row):
            self.append(row.step)

        def close(self):
            self.closed += 1

    (field,) = [field for field in fields(Train) if field.name == "logger"]
    assert get_args(get_args(field.type)[0]) == tuple(LOGGERS)
    for name in LOGGERS:
        monkeypatch.setitem(LOGGERS, name, Noting)
    how = ["train", "--data", str(data), "--out", str(tmp_path / "run"), "--steps", "3", *SMALL]
    assert main([*how, "--logger", "wandb", "tensorboard", "wandb"]) == 0
    assert made == [[1, 2, 3], [1, 2, 3]] and [logger.closed for logger in made] == [1, 1]
    assert (
        made[0].out == tmp_path / "run" and made[0].told["train"]["steps"] == 3 and "d_model" in made[0].told["model"]
    )


def test_a_logger_that_is_not_installed_is_one_line(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = failed(capsys, "train", "--data", data, "--out", tmp_path / "run", "--logger", "wandb")
    assert line == "1 moemla: wandb is not installed: pip install 'moemla[wandb]'\n" and not (tmp_path / "run").exists()


def test_a_run_in_float16_begins_with_another_and_ends_early(data, run, tmp_path, capsys):
    how = ["--data", str(data), "--out", str(tmp_path / "run"), "--steps", "40", *SMALL, "--lr", "1.0"]
    how += ["--init", str(run), "--validate-every", "1", "--patience", "2", "--precision", "fp16"]
    assert main(["train", *how]) == 0
    rows = read_metrics(tmp_path / "run")
    said = capsys.readouterr().out
    assert f"ended after step {rows[-1].step}: 2 scores were no better" in said and rows[-1].step < 40
    assert rows[0].loss_scale and rows[0].loss < read_metrics(run)[0].loss


def test_a_loss_that_is_no_number_is_one_line(data, tmp_path, capsys):
    how = ["--lr", "1e30", "--clip", "1e30", "--optimizer", "adamw", "--steps", "30"]
    line = failed(capsys, "train", "--data", data, "--out", tmp_path / "run", *SMALL, *how)
    assert line.startswith("1") and ("nan" in line or "inf" in line) and "--lr" in line


@pytest.fixture(scope="module")
def stopped(data) -> tuple[Path, list[str], str]:
    """A run that Ctrl-C ended; the arguments that made it; what it said."""
    out = data.parent / "stopped"
    how = ["train", "--data", str(data), "--out", str(out), "--steps", "60", *SMALL, "--checkpoint-every", "1000"]
    process = child(*how)
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) >= 2, SLOW_START)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=SLOW_START)
    finally:
        process.kill()
    assert process.returncode == 130
    return out, how, err


def test_ctrl_c_leaves_a_checkpoint(stopped):
    out, _, err = stopped
    step = read_metrics(out)[-1].step
    assert [path.name for path in checkpoints(out)] == [f"step-{step:08d}"] and step < 60
    assert err == f"\nmoemla: stopped after step {step}; --resume continues\n"


@pytest.mark.parametrize("limit", [100, 1_500_000], ids=["no log", "no weights"])
def test_no_space_left_is_one_line_and_keeps_what_was_there(stopped, limit):
    out, how, _ = stopped
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    process = child(
        *(argument if argument != "1000" else "1" for argument in how),
        "--resume",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, err = process.communicate(timeout=SLOW_START)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.count("\n") == 1 and err.startswith("moemla: "), err
    assert "no space left" in err or "File too large" in err
    assert files_in(out) == before.keys() and not list(out.rglob(".*"))
    changed = {name for name in before if (out / name).read_bytes() != before[name]}
    assert changed <= {"metrics.jsonl"} and load(out)
    rows = read_metrics(out)
    assert [row.step for row in rows] == list(range(1, len(rows) + 1))


def test_resume_goes_on_after_ctrl_c(stopped, capsys):
    """Runs last of the three: the run is finished after it."""
    out, how, _ = stopped
    assert main([*how, "--resume"]) == 0
    assert [row.step for row in read_metrics(out)] == list(range(1, 61))
    assert checkpoints(out)[-1].name == "step-00000060" and "60/60" in capsys.readouterr().out
    assert read_metrics(out)[-1].loss < read_metrics(out)[0].loss


@pytest.mark.parametrize(
    "wrong",
    [
        ["--balance-rule", "quantile", "--balance-rate", "3"],
        ["--seed", str(2**70)],
        ["--device", "meta"],
        ["--seq-len", "5000"],
        ["--min-lr", "0.5"],
        ["--warmup", "9"],
        ["--lr", "inf"],
        ["--validate-every", "-1"],
    ],
    ids=lambda wrong: wrong[-2],
)
def test_a_refused_start_leaves_no_run(data, tmp_path, capsys, wrong):
    out = tmp_path / "run"
    with suppress(SystemExit):  # what tyro finds itself
        failed(capsys, "train", "--data", data, "--out", out, "--steps", "2", *SMALL, *wrong)
    assert not out.exists()


def test_the_corrected_command_works_after_a_refused_one(data, tmp_path, capsys):
    how = ["train", "--data", data, "--out", tmp_path / "run", "--steps", "1", *SMALL]
    failed(capsys, *how, "--device", "meta")
    assert main([str(argument) for argument in how]) == 0


def test_training_goes_on_when_its_reader_has_gone(data, tmp_path):
    how = ["--data", data, "--out", tmp_path / "run", "--steps", "30", *SMALL]
    process = child("train", *how)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(SLOW_START) == 0 and err == ""
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000030"]
