"""The command as a person meets it: exit codes, one line for what went wrong, and nothing half-written."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import moemla
from moemla import checkpoint, generation
from moemla.checkpoint import checkpoints, load
from moemla.cli import main
from moemla.commands import COMMANDS
from moemla.commands.terminal import LiveLine, clock, print_json
from moemla.errors import MoemlaError
from moemla.evaluation import evaluate
from moemla.model import LanguageModel
from moemla.runs import read_metrics
from moemla.tokenizer import Tokenizer
from tests.runs import STORIES, files_in, text_of, wait_for, write_texts

SMALL = ["--batch-size", "2", "--seq-len", "16", "--log-every", "1", "--warmup", "1"]
PYTHON = [sys.executable, "-m", "moemla"]
SLOW_START = 120  # seconds that a child may take on a loaded machine


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def data(texts) -> Path:
    out = texts["train"].parent / "data"
    how = ["--train", str(texts["train"]), "--valid", str(texts["valid"]), "--vocab-size", "300"]
    assert main(["prepare", "--source", "files", *how, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def run(data) -> Path:
    """A run of three steps: it babbles, which is all that these tests need."""
    out = data.parent / "run"
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "3", *SMALL]) == 0
    return out


def child(*arguments, **how) -> subprocess.Popen:
    """A process with buffered output, as a shell starts it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return subprocess.Popen([*PYTHON, *map(str, arguments)], **pipes | how)


def failed(capsys, *arguments) -> str:
    """Runs a command that must fail with exit code 1 (2 for wrong values): the one line that it says."""
    code = main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert code in (1, 2) and err.startswith("moemla: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert len(err) < 700 and "Traceback" not in err
    return f"{code} {err}"


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert left.value.code in (0, None) and "usage: moemla" in out
    assert command or all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["train"],
        ["train", "--data", "d", "--out", "o", "--size", "huge"],
        ["train", "--data", "d", "--out", "o", "--variant", "moe"],
        ["train", "--data", "d", "--out", "o", "--optimizer", "sgd"],
        ["prepare"],
        ["prepare", "--out", "o", "--source", "web"],
        ["generate", "--run", "r", "--temprature", "1"],
        ["evaluate"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.err and "Traceback" not in captured.err and not list(tmp_path.iterdir())


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
    ],
    ids=" ".join,
)
def test_wrong_settings_of_training_exit_with_2(data, tmp_path, capsys, settings, named):
    said = failed(capsys, "train", "--data", data, "--out", tmp_path / "run", *SMALL, *settings)
    assert said.startswith("2") and named in said and not (tmp_path / "run").exists()
    assert not any(inner in said for inner in ("__", "train_config", "train-config", "class", "base 10", "_batch"))


@pytest.mark.parametrize(
    "arguments,named",
    [
        (["evaluate", "--context", "0"], "--context 0: must be 1 to max_seq_len=512"),
        (["evaluate", "--context", "-3"], "--context -3: "),
        (["evaluate", "--context", "513"], "--context 513: must be 1 to max_seq_len=512"),
        (["evaluate", "--context", "x"], "--context x: must be a whole number or None"),
        (["evaluate", "--device", "toaster"], "--device 'toaster': "),
        (["generate", "--device", "toaster"], "--device 'toaster': "),
        (["generate", "--device", "cuda:99"], "--device 'cuda:99': "),
        (["generate", "--device", "mps"], "--device 'mps': "),
        (["generate", "--temperature", "-1"], "--temperature -1.0: must be a number"),
        (["generate", "--temperature", "nan"], "--temperature nan: must be a number"),
        (["generate", "--temperature", "inf"], "--temperature inf: must be a number"),
        (["generate", "--top-p", "2"], "--top-p 2.0: must be above 0 and at most 1"),
        (["generate", "--top-p", "2", "--temperature", "0"], "--top-p 2.0: "),
        (["generate", "--top-p", "nan"], "--top-p nan: "),
        (["generate", "--top-k", "0"], "--top-k 0: "),
        (["generate", "--max-new-tokens", "-1"], "--max-new-tokens -1: must be 0 or more"),
        (["generate", "--count", "0"], "--count 0: must be a whole number of at least 1"),
        (["generate", "--count", "-1"], "--count -1: "),
        (["generate", "--count", "two"], "--count two: must be a whole number\n"),
        (["generate", "--seed", str(2**70)], f"--seed {2**70}: must be between"),
        (["generate", "--prompt", "cat " * 600], "max_seq_len=512"),
        (["bench", "decode", "--seconds", "nan"], "--seconds nan: "),
        (["bench", "decode", "--seconds", "inf"], "--seconds inf: "),
        (["bench", "decode", "--seconds", "-1"], "--seconds -1.0: "),
        (["bench", "decode", "--batch-size", "0"], "--batch-size 0: "),
        (["bench", "moe", "--tokens", "4", "-1"], "--tokens -1: "),
        (["bench", "moe", "--tokens", "x"], "--tokens x: must be whole numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_settings_of_other_commands_exit_with_2(run, capsys, arguments, named):
    code = main([*arguments, *([] if arguments[0] == "bench" else ["--run", str(run)])])
    out, err = capsys.readouterr()
    assert code == 2 and err.startswith("moemla: ") and named in err and err.count("\n") == 1, err
    assert not any(inner in err for inner in ("__", "class", "base 10", "top_", "max_new"))
    assert out == "" or "--prompt" in arguments  # nothing is written before it is known


def test_version_and_module(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moemla {moemla.__version__}\n"
    process = child("--version")
    assert process.communicate(timeout=SLOW_START) == (f"moemla {moemla.__version__}\n", "") and process.returncode == 0


def test_a_reader_that_leaves_the_help_is_no_error_message():
    process = child("train", "--help")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(SLOW_START) == 1


def test_debug_shows_the_traceback(tmp_path, capsys):
    gone = ["evaluate", "--run", str(tmp_path)]
    with pytest.raises(MoemlaError):
        main([*gone, "--debug"])
    with pytest.raises(MoemlaError):
        main(["--debug", *gone])
    process = child(*gone, "--debug")
    out, err = process.communicate(timeout=SLOW_START)
    assert process.returncode == 1 and out == "" and "Traceback" in err and "holds no model" in err
    assert "holds no model" in failed(capsys, *gone)


def test_an_error_that_nobody_expected_is_one_line_too(run, capsys, monkeypatch):
    def broken(path, device=None):
        raise RuntimeError("out of\n  memory")

    monkeypatch.setattr(checkpoint, "load", broken)
    assert failed(capsys, "evaluate", "--run", run) == "1 moemla: RuntimeError: out of memory (--debug shows where)\n"
    with pytest.raises(RuntimeError):
        main(["evaluate", "--run", str(run), "--debug"])


# --- prepare --------------------------------------------------------------------------------------


def test_prepare_says_what_it_made_and_remembers(data, texts, capsys):
    how = ["--train", str(texts["train"]), "--valid", str(texts["valid"]), "--vocab-size", "300"]
    stamp = (data / "train.bin").stat().st_mtime_ns
    assert main(["prepare", "--source", "files", *how, "--out", str(data)]) == 0
    out = capsys.readouterr().out
    assert f"train: {len(STORIES)} stories" in out and "bytes a token" in out and "valid: 5 stories" in out
    assert (data / "train.bin").stat().st_mtime_ns == stamp
    assert files_in(data) == {"tokenizer.json", "train.bin", "valid.bin", "valid.txt", "data.json"}


def test_bad_text_is_one_line_and_leaves_nothing(tmp_path, texts, capsys):
    bad = tmp_path / "bad.txt"
    out, valid = tmp_path / "out", texts["valid"]

    def said(train=bad, valid=valid, *more):
        line = failed(capsys, "prepare", "--source", "files", "--train", train, "--valid", valid, "--out", out, *more)
        assert not out.exists() or files_in(out) == set()
        return line

    bad.write_bytes(b"")
    assert (line := said()).startswith("1") and "bad.txt is empty" in line
    bad.write_bytes(b"Tom saw a \xff cat.\n<|endoftext|>\n")
    assert (line := said()).startswith("1") and "not UTF-8" in line and "offset 10" in line
    assert (line := said(texts["train"], valid, "--vocab-size", "65537")).startswith("2") and "65536" in line
    assert (line := said(tmp_path / "gone.txt")).startswith("1") and "gone.txt" in line
    assert (line := said(texts["train"], valid, "--stories", "0")).startswith("2") and "stories" in line
    line = failed(capsys, "prepare", "--source", "files", "--out", out)
    assert line.startswith("2") and "needs both" in line
    bad.write_bytes(b"a file, no folder")
    line = failed(capsys, "prepare", "--source", "files", "--train", texts["train"], "--valid", valid, "--out", bad)
    assert line.startswith("1") and "bad.txt" in line


@pytest.mark.parametrize(
    "how,says",
    [
        (["--tokenizer", "gpt2", "--vocab-size", "400"], "--vocab-size 400: gpt2 has"),
        (["--source", "hub", "--seed", "3"], "--seed 3: only the built-in"),
        (["--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--stories", "-5"], "--stories -5: must be a whole number"),
        (["--train", "a.txt", "--valid", "b.txt"], "source 'files' needs both, the others neither"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, capsys, how, says):
    line = failed(capsys, "prepare", "--out", tmp_path / "out", *how)
    assert line.startswith("2") and says in line and not (tmp_path / "out").exists()


def test_prepare_leaves_files_of_the_user_alone(tmp_path, texts, capsys):
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_text("mine")
    line = failed(capsys, "prepare", "--out", tmp_path)
    assert line.startswith("1") and "train.txt is there already and not from `moemla prepare`" in line
    how = ["--source", "files", "--train", texts["train"], "--valid", tmp_path / "valid.txt"]
    assert failed(capsys, "prepare", "--out", tmp_path, *how).startswith("2")
    assert {name: (tmp_path / name).read_text() for name in files_in(tmp_path)} == dict.fromkeys(
        ("train.txt", "valid.txt"), "mine"
    )


def test_prepare_warns_once_of_marks_inside_lines(tmp_path, texts, capsys):
    odd = tmp_path / "odd.txt"
    odd.write_bytes(b"One.<|endoftext|>\n" + texts["train"].read_bytes())
    how = ["--source", "files", "--train", str(odd), "--valid", str(texts["valid"]), "--vocab-size", "300"]
    assert main(["prepare", "--out", str(tmp_path / "out"), *how]) == 0
    err = capsys.readouterr().err
    assert err.startswith("moemla: warning: ") and err.count("\n") == 1 and "(the first is line 1)" in err
    odd.write_text("One.<|endoftext|>\nTwo.<|endoftext|>\n")
    line = failed(capsys, "prepare", "--out", tmp_path / "out", *how)
    assert line.startswith("1") and "put it on its own line" in line


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


# --- train ----------------------------------------------------------------------------------------


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


# --- evaluate -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_run_that_is_not_there_or_damaged_is_one_line(command, run, tmp_path, capsys):
    line = failed(capsys, command, "--run", tmp_path / "nowhere")
    assert line.startswith("1") and "nowhere" in line
    copies = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("model.safetensors", "checkpoints/step-00000003/config.json", "tokenizer.json", "train.json"):
        for content in (b"", b'{"a": ', b"\xff\xfe\x00", bytes(300)):
            for path, kept in copies.items():
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).write_bytes(kept)
            place = tmp_path / (f"checkpoints/step-00000003/{name}" if name == "model.safetensors" else name)
            place.write_bytes(content)
            line = failed(capsys, command, "--run", tmp_path)
            assert line.startswith("1") and (place.name in line or str(place.parent) in line), line


def test_evaluate_names_a_text_that_cannot_be_read(run, tmp_path, capsys):
    assert "gone.txt" in failed(capsys, "evaluate", "--run", run, "--text", tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in failed(capsys, "evaluate", "--run", run, "--text", tmp_path / "empty.txt")


def test_a_model_that_is_no_number_is_one_line_everywhere(run, tmp_path, capsys):
    """A file as a damaged disk or another program leaves it: exit 1, nothing that looks like a result."""
    model, tokenizer = load(run)
    with torch.no_grad():
        model.blocks[0].norm1.weight[0] = torch.nan
    model.save(tmp_path / "broken", tokenizer)
    (tmp_path / "text.txt").write_text(text_of(STORIES[:2]))
    for command in (
        ["evaluate", "--text", tmp_path / "text.txt"],
        ["evaluate", "--json", "--text", tmp_path / "text.txt"],
        ["generate", "--temperature", "0"],
        ["generate"],
        ["export", "--out", tmp_path / "out"],
    ):
        code = main([*map(str, command), "--run", str(tmp_path / "broken")])
        out, err = capsys.readouterr()
        assert code == 1 and err.startswith("moemla: ") and err.count("\n") == 1 and "nan" not in out.lower(), err
    assert not (tmp_path / "out").exists()


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


def test_json_has_no_nan(capsys):
    for number in (float("nan"), float("inf")):
        with pytest.raises(MoemlaError, match="nan or inf, which JSON does not have"):
            print_json({"a": [number]})
    assert capsys.readouterr().out == ""
    for path in Path(moemla.__file__).parent.rglob("*.py"):
        for call in re.findall(r"json\.dumps\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "allow_nan=False" in call or "sort_keys" in call, (path, call)  # sorted: for a hash, nobody reads it


def test_the_device_is_passed_on(run, texts, capsys, monkeypatch):
    asked = []
    real = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, device=None: asked.append(device) or real(path, device))
    assert main(["evaluate", "--run", str(run), "--device", "cpu", "--json"]) == 0
    assert main(["generate", "--run", str(run), "--device", "cpu", "--max-new-tokens", "2"]) == 0
    assert main(["generate", "--run", str(run), "--max-new-tokens", "2"]) == 0
    assert asked[:2] == [torch.device("cpu")] * 2 and asked[2].type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- claims ---------------------------------------------------------------------------------------


def test_claims_prints_an_entry_whole(capsys):
    from moemla.paper import claims

    (claim,) = [claim for claim in claims.load_claims() if claim.id == "A1"]
    outcome = claims.evaluate(claim)
    assert main(["claims", "a1"]) == 0
    out = capsys.readouterr().out
    entry = " ".join(out.split("A1-")[0].split())
    for part in (claim.where, claim.printed, claims.show(claim, outcome), outcome.status, claim.note):
        assert " ".join(part.split()) in entry
    assert entry.startswith("A1 where") and entry.endswith(f"chapter {claim.chapter}")
    assert main(["claims", "A1", "A2", "--json"]) == 0
    ids = [one["id"] for one in json.loads(capsys.readouterr().out)["claims"]]
    assert ids[0] == "A1" and all(one.split("-")[0] in ("A1", "A2") for one in ids)


def test_an_unknown_claim_suggests_near_ones(capsys):
    line = failed(capsys, "claims", "A1", "a9-heds")
    assert line.startswith("1") and "no claim 'a9-heds'; near: A9-heads" in line
    assert "see moemla claims" in failed(capsys, "claims", "pudding")


# --- generate -------------------------------------------------------------------------------------


def said(capsys, run, *arguments) -> str:
    assert main(["generate", "--run", str(run), "--max-new-tokens", "30", *arguments]) == 0
    return capsys.readouterr().out


def test_generate_prints_the_prompt_and_a_story(run, capsys):
    out = said(capsys, run, "--prompt", "Tom saw", "--seed", "3")
    model, tokenizer = load(run)
    prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode("Tom saw")]])
    tokens = generation.generate(model, prompt, 30, seed=3, stop=tokenizer.eot)[0]
    assert out == tokenizer.decode(tokens) + "\n" and out.startswith("Tom saw") and len(out) > 12
    assert said(capsys, run, "--prompt", "Tom saw", "--seed", "3") == out
    assert said(capsys, run, "--prompt", "Tom saw", "--seed", "4") != out


@pytest.mark.parametrize("sampling", [["--temperature", "0"], ["--top-p", "0.9"], ["--top-k", "5", "--seed", "9"]])
def test_the_cache_changes_nothing(run, capsys, monkeypatch, sampling):
    cached = said(capsys, run, *sampling)
    monkeypatch.setattr(LanguageModel, "new_cache", None)
    assert cached == said(capsys, run, *sampling, "--no-cache")


def test_several_stories_have_their_own_seeds(run, capsys):
    first, second = said(capsys, run, "--count", "2", "--seed", "5").split("\n\n---\n\n")
    assert first + "\n" == said(capsys, run, "--seed", "5") and second == said(capsys, run, "--seed", "6")


def test_a_story_is_streamed(run, monkeypatch):
    """Each token is written and flushed before the next one is made; the prompt before all."""

    class Screen(io.StringIO):
        shown = ""

        def flush(self):
            self.shown = self.getvalue()

    screen, seen = Screen(), []
    real = generation._draw

    def draw(*args):
        seen.append(screen.shown)
        return real(*args)

    monkeypatch.setattr(generation, "_draw", draw)
    monkeypatch.setattr(sys, "stdout", screen)
    assert main(["generate", "--run", str(run), "--max-new-tokens", "20", "--prompt", "Mia"]) == 0
    assert seen[0] == "Mia" and len(set(seen)) > 10  # (a character may need more than one token)
    assert all(after.startswith(before) for before, after in pairwise(seen))


def test_a_prompt_that_is_no_text_is_named(run, capsys):
    line = failed(capsys, "generate", "--run", run, "--prompt", "Tom \udcff")
    assert line.startswith("2") and "surrogate" in line


# --- export ---------------------------------------------------------------------------------------


def test_export_of_a_form_that_only_moemla_has(run, tmp_path, capsys):
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "moemla.load" in out and "attention='mla'" in out
    (model, tokenizer), (exported, words) = load(run), load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), exported.parameters(), strict=True))
    assert words.hash == tokenizer.hash
    line = failed(capsys, "export", "--run", run, "--out", tmp_path / "out")
    assert line.startswith("1") and "not empty" in line
    line = failed(capsys, "export", "--run", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert line.startswith("1") and "holds no model" in line and not (tmp_path / "new").exists()


def test_export_of_a_run_that_transformers_reads(data, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    how = ["--variant", "moe-mla-decoupled", "--norm", "rmsnorm", "--activation", "swiglu", "--no-bias"]
    how += ["--steps", "2", "--dropout", "0.1", *SMALL]  # dropout is of the training: it stays behind
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *how]) == 0
    capsys.readouterr()
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "DeepseekV3" in out and "since" not in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, tokenizer = load(tmp_path / "run")
    assert model.blocks[0].feedforward.router.bias.any()
    prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode("Tom saw")]])
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("Tom saw").input_ids == prompt[0].tolist()
    expected = generation.generate(model, prompt, 20, temperature=0.0, stop=tokenizer.eot)
    assert torch.equal(theirs.generate(prompt, max_new_tokens=20, do_sample=False), expected)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = failed(capsys, "export", "--run", tmp_path / "run", "--out", tmp_path / "new")
    assert line.startswith("1") and "moemla[interop]" in line and not (tmp_path / "new").exists()


# --- pipes and screens ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["generate", "--max-new-tokens", "400", "--count", "50"], ["evaluate", "--json"]], ids=lambda a: a[0]
)
def test_a_reader_that_leaves_is_no_error_message(run, arguments):
    process = child(*arguments, "--run", run)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(SLOW_START) == 1 and err == ""


def row(step: int, **changes):
    values = dict(step=step, loss=2.5, tokens_per_second=12345.6, utilisation=0.4, seconds_left=3661.0)
    return SimpleNamespace(
        **values | dict(load_cv=0.25, load_cv_floor=0.125, load_window=16, valid_loss=None) | changes
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_is_written_over_on_a_terminal(monkeypatch):
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((200, 20)))
    monkeypatch.delenv("COLUMNS", raising=False)
    screen = Terminal()
    line = LiveLine(100, screen)
    for step in (10, 20, 100):
        line(row(step))
    line.close()
    shown = screen.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n") and shown.count("\r") == 3
    last = shown.rsplit("\r", 1)[1]
    for part in (
        "step 100/100",
        "loss 2.500",
        "12,346 tokens/s",
        "40% of matmul",
        "load CV 0.25",
        "0.1",
        "1:01:01 left",
    ):
        assert part in last


def test_the_line_fits_the_terminal(monkeypatch):
    """A line that wraps could not be written over."""
    monkeypatch.setenv("COLUMNS", "60")
    screen = Terminal()
    LiveLine(100, screen)(row(10))
    assert len(screen.getvalue().split("\x1b[2K")[1]) <= 59


def test_elsewhere_a_line_for_each_twentieth():
    for steps, every in ((1200, 10), (1234, 10), (50, 10), (7, 1), (100_000, 10)):
        file = io.StringIO()
        line = LiveLine(steps, file)
        for step in [*range(every, steps, every), steps]:
            line(row(step, load_cv=None))
        line.close()
        lines = file.getvalue().splitlines()
        assert len(lines) == min(20, -(-steps // every)) and lines[-1].startswith(f"step {steps}/{steps} "), steps
        assert "\r" not in file.getvalue() and "load" not in file.getvalue()


def test_a_line_that_was_never_written_is_not_ended():
    screen = Terminal()
    LiveLine(10, screen).close()
    assert screen.getvalue() == ""


def test_clocks():
    shown = [clock(seconds) for seconds in (0.0, 59.4, 59.6, 3599.0, 3600.0, 90061.0)]
    assert shown == ["0:00", "0:59", "1:00", "59:59", "1:00:00", "25:01:01"]


def test_the_command_starts_without_what_it_does_not_need():
    """`moemla --help` must not pay for data sets or plots."""
    code = "import moemla.cli, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"datasets", "matplotlib", "scipy", "transformers", "triton", "yaml"} & set(out)


def test_the_toy_text_is_a_text(texts):
    assert texts["train"].read_text() == text_of(STORIES)


def test_the_line_shows_the_last_score_on_validation_text():
    file = io.StringIO()
    line = LiveLine(20, file)
    for step, score in ((1, None), (2, 3.25), (3, None)):
        line(row(step, valid_loss=score))
    before, scored, after = file.getvalue().splitlines()
    assert "valid" not in before and "valid 3.250" in scored and "valid 3.250" in after


# --- train: refused starts, readers that leave, data in another folder ----------------------------


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
