"""`moemla plot`: a picture of runs, and one line for what is no run or no picture."""

import shutil
import sys

import pytest

from moemla.cli import main
from moemla.commands.plot import _names
from tests.commands.shell import failed


def test_runs_are_drawn(run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    out = tmp_path / "all.svg"
    arguments = ["plot", str(run), str(other), "--what", "loss", "lr", "load", "tokens-per-second", "--out", str(out)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{out}\n"
    text = out.read_text(encoding="utf-8")
    for what in ("loss", "lr", "load", "tokens-per-second"):
        assert f'id="{what} run"' in text and f'id="{what} other"' in text


def test_the_default_is_the_loss_as_a_png_here(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plot", str(run)]) == 0 and capsys.readouterr().out == "curves.png\n"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart(tmp_path):
    assert _names((tmp_path / "a", tmp_path / "b")) == ["a", "b"]
    assert _names((tmp_path / "x" / "run", tmp_path / "y" / "run")) == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="a folder is there twice"):
        _names((tmp_path / "a", tmp_path / "b" / ".." / "a"))


def test_what_is_no_run_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no run: it has no metrics.jsonl" in failed(capsys, "plot", run, tmp_path)
    assert "nowhere is no run" in failed(capsys, "plot", tmp_path / "nowhere")
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "metrics.jsonl").write_text("")
    assert "fresh has no row in its log yet" in failed(capsys, "plot", fresh)
    (fresh / "metrics.jsonl").write_text("{torn\n")
    assert "metrics.jsonl cannot be read" in failed(capsys, "plot", fresh)
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--out", "x.jpg"], "2 moemla: --out 'x.jpg': must end in .png or .svg\n"),
        (["--out", "x"], "2 moemla: --out 'x': must end in .png or .svg\n"),
        (["--what"], "2 moemla: --what '': name at least one of loss, lr, load, tokens-per-second\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line(run, arguments, line, capsys):
    assert failed(capsys, "plot", run, *arguments) == line


def test_no_run_at_all(capsys):
    assert failed(capsys, "plot") == "2 moemla: runs '': name at least one folder of a run\n"


def test_a_file_that_is_no_picture_stays(run, tmp_path, capsys):
    (tmp_path / "thesis.png").write_text("two years of work")
    assert "no .png picture" in failed(capsys, "plot", run, "--out", tmp_path / "thesis.png")
    assert (tmp_path / "thesis.png").read_text() == "two years of work"


def test_without_matplotlib_one_line_names_the_extra(run, tmp_path, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = failed(capsys, "plot", run, "--out", tmp_path / "x.png")
    assert line == "1 moemla: matplotlib is not installed: pip install 'moemla[plots]'\n"
