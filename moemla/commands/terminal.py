"""What commands print with: a live line, JSON, times; and the two shapes of their options. Built in chapter 13."""

import json
import os
import shutil
import sys
from typing import Any

import tyro

from moemla.errors import MoemlaError

Flat = tyro.conf.OmitArgPrefixes
Flag = tyro.conf.FlagCreatePairsOff


class LiveLine:
    """One line that is written over on a terminal; elsewhere a line for each twentieth of the run."""

    def __init__(self, steps: int, stream=None):
        self.stream = stream or sys.stdout
        self.steps, self.terminal, self.open = steps, self.stream.isatty(), False
        self.part = 0  # twentieths of the run that have had their line
        self.valid = ""  # the last score on validation text

    def __call__(self, row) -> None:
        load = ""
        if row.load_cv is not None:
            load = f"  load CV {row.load_cv:.2f} over {row.load_window} steps (uniform {row.load_cv_floor:.2f})"
        if row.valid_loss is not None:
            self.valid = f"  valid {row.valid_loss:.3f}"
        text = (
            f"step {row.step}/{self.steps}  {clock(row.seconds_left)} left  loss {row.loss:.3f}{self.valid}  "
            f"{row.tokens_per_second:,.0f} tokens/s  {row.utilisation:.0%} of matmul{load}"
        )
        part = 20 * row.step // self.steps
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be written over
            say(f"\r\x1b[2K{text[:width]}", self.stream, end="")
            self.open = True
        elif part > self.part:
            say(text, self.stream)
            self.part = part

    def close(self) -> None:
        """Ends the line."""
        if self.open:
            say("", self.stream)


def say(text: str, stream=None, end: str = "\n") -> None:
    """Prints for who watches; when the reader (head, less) has gone, the work goes on and says nothing more.

    It is one write, also where a stream keeps nothing back: what several processes say does not mix within a line.
    """
    stream = stream or sys.stdout
    try:
        stream.write(text + end)
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def device_of(name: str | None) -> Any:
    """The device of that name; None: the GPU if there is one, else the CPU."""
    from moemla.devices import default_device, usable_device

    return default_device() if name is None else usable_device(name)


def print_json(value: Any, indent: int | None = None) -> None:
    """Prints JSON that every reader takes; MoemlaError for nan and inf, which it does not have."""
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise MoemlaError("the result holds nan or inf, which JSON does not have") from error
    print(text)
