"""The command as a person meets it: exit codes, one line for what went wrong, and nothing half-written."""

import io
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

import moemla
from moemla import bench, checkpoint, devices
from moemla.checkpoint import load
from moemla.cli import main
from moemla.commands import COMMANDS
from moemla.errors import MoemlaError
from tests.commands.shell import SLOW_START, child, failed
from tests.runs import STORIES, text_of

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


@pytest.mark.parametrize("ends", [RuntimeError("out\nof memory"), KeyboardInterrupt("stopped at 3"), None], ids=repr)
def test_what_goes_wrong_is_written_line_by_line(run, monkeypatch, ends):
    """Two ranks, or torchrun, that say something at the same time do not mix their words within a line."""

    class Unbuffered(io.StringIO):
        def write(self, text):
            written.append(text)

    def loads(path, device=None):
        if ends is not None:
            raise ends
        warnings.warn("a warning\nin two lines", stacklevel=2)
        return load(path, device)

    written = []
    monkeypatch.setattr(checkpoint, "load", loads)
    monkeypatch.setattr(sys, "stderr", Unbuffered())
    main(["generate", "--run", str(run), "--max-new-tokens", "2"])
    said = [text for text in written if text.strip()]
    assert [text.startswith("moemla: ") and text.endswith("\n") for text in said] == [True], said


def test_an_error_that_nobody_expected_is_one_line_too(run, capsys, monkeypatch):
    def broken(path, device=None):
        raise RuntimeError("out of\n  memory")

    monkeypatch.setattr(checkpoint, "load", broken)
    assert failed(capsys, "evaluate", "--run", run) == "1 moemla: RuntimeError: out of memory (--debug shows where)\n"
    with pytest.raises(RuntimeError):
        main(["evaluate", "--run", str(run), "--debug"])


# --- what several commands have in common -------------------------------------------------------------


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


def test_the_device_is_passed_on(run, texts, capsys, monkeypatch):
    asked = []
    real = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda path, device=None: asked.append(device) or real(path, device))
    assert main(["evaluate", "--run", str(run), "--device", "cpu", "--json"]) == 0
    assert main(["generate", "--run", str(run), "--device", "cpu", "--max-new-tokens", "2"]) == 0
    assert main(["generate", "--run", str(run), "--max-new-tokens", "2"]) == 0
    assert asked[:2] == [torch.device("cpu")] * 2 and asked[2].type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    "arguments", [["generate", "--max-new-tokens", "400", "--count", "50"], ["evaluate", "--json"]], ids=lambda a: a[0]
)
def test_a_reader_that_leaves_is_no_error_message(run, arguments):
    process = child(*arguments, "--run", run)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(SLOW_START) == 1 and err == ""


def test_the_command_starts_without_what_it_does_not_need():
    """`moemla --help` must not pay for data sets or plots."""
    code = "import moemla.cli, sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"datasets", "matplotlib", "scipy", "transformers", "triton", "yaml"} & set(out)


def test_a_bench_of_training_keeps_freed_memory_as_training_does(monkeypatch):
    kept = []
    monkeypatch.setattr(devices, "keep_freed_memory", lambda: kept.append("train"))
    monkeypatch.setattr(bench, "run", lambda **chosen: SimpleNamespace(measures=dict(rows=[])))
    assert main(["bench", "decode"]) == main(["bench", "train"]) == 0
    assert kept == ["train"]
