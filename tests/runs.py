"""Runs of a micro model on a toy text, and children that can be killed, for the tests of training and checkpoints."""

import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from moemla.config import ModelConfig, TrainConfig
from moemla.data import prepare
from moemla.errors import MoemlaError
from moemla.tokenizer import EOT

NAMES = ("Tom", "Mia", "Sam", "Lily", "Ben", "Anna")
PLACES = ("park", "forest", "garden", "shop", "river")
STORIES = [
    f"Once upon a time {name} went to the {place}.\nIt was sunny. \"Look!\" said {name}. {name} saw a cat and was glad."
    for name in NAMES
    for place in PLACES
]  # fmt: skip
MICRO = dict(d_model=16, n_layers=2, n_heads=2, n_experts=4, n_shared=1, top_k=2, d_expert=8, max_seq_len=64)
QUICK = dict(batch_size=4, seq_len=16, lr=1e-2, log_every=1)
RESULT, FAILED = 0, 70  # exit codes of a child: all went well, an exception that nobody expected


def text_of(stories: list[str]) -> str:
    return "".join(f"{story}\n{EOT}\n" for story in stories)


def write_texts(folder: Path) -> dict[str, Path]:
    files = {"train": folder / "in-train.txt", "valid": folder / "in-valid.txt"}
    files["train"].write_text(text_of(STORIES))
    files["valid"].write_text(text_of(STORIES[::7]))
    return files


def make_data(folder: Path) -> Path:
    """Prepared data of the toy text with a vocabulary of 300 tokens."""
    prepare(folder / "data", source="files", vocab_size=300, **write_texts(folder))
    return folder / "data"


def micro(**changes) -> ModelConfig:
    return ModelConfig(**dict(MICRO, vocab_size=300) | changes)


def quick(steps: int, **changes) -> TrainConfig:
    return TrainConfig(steps=steps, **QUICK | dict(warmup=min(2, steps)) | changes)


def fork(task: Callable[[], object]) -> int:
    """Runs `task` in a copy of this process and returns its id: it exits with 0, with 1 on a MoemlaError, with 130
    when it was interrupted. A copy, because starting Python and torch anew takes seconds.
    """
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        task()
        code = RESULT
    except MoemlaError as error:
        print(error, flush=True)
        code = 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def code_of(child: int, seconds: float = 60) -> int:
    """Waits for a child, at last with SIGKILL; its exit code, or minus the signal that ended it."""
    limit = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.002)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Stop(Exception):
    """Raised by a test from inside a run, as a process that dies."""


def stop_after(step: int):
    def on_progress(row):
        if row.step >= step:
            raise Stop

    return on_progress


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    mine, other = a.state_dict(), b.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def what_was_learnt(run: Path) -> list[dict]:
    """The rows of the log without the clock's."""
    clock = {"seconds", "tokens_per_second", "utilisation", "seconds_left"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]
