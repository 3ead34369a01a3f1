"""What the commands write: a live line on a terminal, some lines elsewhere, JSON without nan."""

import io
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import moemla
from moemla.commands.terminal import LiveLine, clock, print_json
from moemla.errors import MoemlaError


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


def test_the_line_shows_the_last_score_on_validation_text():
    file = io.StringIO()
    line = LiveLine(20, file)
    for step, score in ((1, None), (2, 3.25), (3, None)):
        line(row(step, valid_loss=score))
    before, scored, after = file.getvalue().splitlines()
    assert "valid" not in before and "valid 3.250" in scored and "valid 3.250" in after


def test_json_has_no_nan(capsys):
    for number in (float("nan"), float("inf")):
        with pytest.raises(MoemlaError, match="nan or inf, which JSON does not have"):
            print_json({"a": [number]})
    assert capsys.readouterr().out == ""
    for path in Path(moemla.__file__).parent.rglob("*.py"):
        for call in re.findall(r"json\.dumps\((?:[^()]|\([^()]*\))*\)", path.read_text()):
            assert "allow_nan=False" in call or "sort_keys" in call, (path, call)  # sorted: for a hash, nobody reads it
