"""`moemla experiment`: runs an experiment, or the queue of all that are registered. Built in chapter 15."""

import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from moemla.commands.terminal import Flag, LiveLine, clock, say
from moemla.config import require
from moemla.experiments import NAMES, SCALES, find


@dataclass
class Experiment:
    """One of the book's or the paper's experiments, or all that are registered; stops and goes on at any point.

    A finished run is a file in --folder; the same call again repeats only what is missing. Runs are made side by side,
    with one thread each and at low priority.
    """

    name: tyro.conf.Positional[Literal[(*NAMES, "all")]]
    """all: the registered ones, the most valuable first."""
    scale: Literal[SCALES] = "smoke"
    """How much of it: smoke takes seconds; cpu is meant for two cores; pilot measures the spread over seeds."""
    folder: Path | None = None
    """Where results are kept, by experiment and scale. Default: results; of smoke a new temporary folder."""
    train: Path | None = None
    """Text files instead of the built-in stories, with a line <|endoftext|> between stories; of all, for `real`."""
    valid: Path | None = None
    seeds: int | None = None
    """Seeds that measure, of an experiment with a choice; default: the scale's."""
    workers: int = 2
    """Runs at a time."""
    hours: float | None = None
    """No run begins after so many hours; those at work are finished."""
    dry_run: Flag[bool] = False
    """Only print what is missing: runs, minutes a run, hours."""

    def __call__(self) -> None:
        from moemla.experiments import queue, runner
        from moemla.results import folder_for

        require(self.workers >= 1, "workers", self.workers, "must be at least 1")
        require(self.hours is None or self.hours > 0, "hours", self.hours, "must be above 0")
        every = self.name == "all"
        require(not every or self.seeds is None, "seeds", self.seeds, "registrations fix those of all")
        until = math.inf if self.hours is None else time.monotonic() + 3600 * self.hours
        folder = folder_for(self.scale, self.folder)
        say(f"results go to {folder}", sys.stderr)
        left_out = []
        if every:
            plans, left_out = queue.plans(self.scale, folder, self.train, self.valid)
        else:
            experiment = find(self.name)
            alone = getattr(experiment, "ALONE", False)
            line = LiveLine(experiment.SCALES[self.scale].steps) if self.scale in experiment.SCALES and alone else None
            texts = (self.train, self.valid)
            plans = [runner.planned_run(experiment, self.scale, folder, *texts, self.seeds, line)]
        for name in left_out:
            say(f"{name} is left out: it asks about text files (--train, --valid)", sys.stderr)
        if self.dry_run:
            print(_left(queue.left(plans, folder), self.workers))
            return
        watching = None if not every and alone else _Watching(lambda: queue.left(plans, folder), self.workers)
        try:
            with runner.pool_for(plans, self.workers) as (pool, slots):
                runner.work_off(plans, folder, pool, slots, _one_run(every, watching), until, watching)
        finally:
            for one in (watching, None if every else line):
                if one:
                    one.close()
        for plan in plans:
            made = plan.results()
            if made and (not every or len(made) == plan.total):
                print(f"\n{plan.experiment.NAME}" if every else "", plan.experiment.table(made), sep="\n" * every)


def _left(rows: list[Any], workers: int) -> str:
    """What is missing, as a table."""
    out = [f"{'experiment':18}{'runs':>6}{'there':>7}{'missing':>9}{'minutes each':>14}{'hours':>8}"]
    for row in rows:
        missing = row.total - row.done
        each = f"{row.minutes:.1f}" if missing else "-"
        out.append(f"{row.experiment:18}{row.total:6}{row.done:7}{missing:9}{each:>14}{row.hours:8.1f}")
    hours = sum(row.hours for row in rows)
    missing = sum(row.total - row.done for row in rows)
    out.append(f"{'all':18}{'':13}{missing:9}{'':14}{hours:8.1f}")
    return "\n".join(out) + f"\nof one processor each; with {workers} at a time about {hours / workers:.1f} hours"


def _one_run(every: bool, watching: Any):
    """Prints a line for a run; of a queue only for those that were made now."""

    def show(done: int, total: int, result: Any, was_there: bool) -> None:
        if watching:
            watching.clear()
        if every and was_there:
            return
        loss = result.measures.get("nats_per_token")
        said = "  diverged" if result.measures.get("diverged") else f"  {loss:.4f} nats" if loss else ""
        name = f"{result.experiment} {result.name}" if every else result.name
        say(f"{done}/{total}  {name}{said}")

    return show


class _Watching:
    """The live line of runs side by side: where each is, and the hours that are left of all."""

    def __init__(self, left: Any, workers: int):
        self.left, self.workers, self.terminal = left, workers, sys.stdout.isatty()
        self.hours, self.asked, self.open = 0.0, -math.inf, False

    def __call__(self, running: list[tuple[Any, Path]]) -> None:
        from moemla.runs import read_metrics

        if not self.terminal:
            return
        if time.monotonic() - self.asked > 60:
            self.hours, self.asked = sum(row.hours for row in self.left()), time.monotonic()
        parts = []
        for cell, scratch in running:
            here = scratch / "run"
            rows = read_metrics(here) if (here / "metrics.jsonl").exists() else []
            state = f"{rows[-1].step}/{cell.train.steps} {rows[-1].loss:.3f}" if rows else "begins"
            parts.append(f"{cell.name} {state}")
        text = f"{clock(3600 * self.hours / self.workers)} left  " + "  ".join(parts)
        say(f"\r\x1b[2K{text[: shutil.get_terminal_size().columns - 1]}", end="")
        self.open = True

    def clear(self) -> None:
        """Makes room for another line."""
        if self.open:
            say("\r\x1b[2K", end="")

    def close(self) -> None:
        """Ends the line."""
        if self.open:
            say("")
