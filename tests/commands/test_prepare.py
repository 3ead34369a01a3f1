"""`moemla prepare`: what it made, bad text in one line, and files of the user left alone."""

import pytest

from moemla.cli import main
from tests.commands.shell import failed
from tests.runs import STORIES, files_in, text_of


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


def test_the_toy_text_is_a_text(texts):
    assert texts["train"].read_text() == text_of(STORIES)
