"""`moemla experiment`: runs an experiment. Built in chapter 15."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moemla.commands.terminal import LiveLine
from moemla.experiments import NAMES, find


@dataclass
class Experiment:
    """One of the book's or the paper's experiments; stops and goes on at any point.

    A finished run is a file in --folder; the same call again repeats only what is missing.
    """

    name: tyro.conf.Positional[Literal[NAMES]]
    scale: Literal["smoke", "cpu"] = "smoke"
    """How much of it: smoke takes seconds; cpu is meant for two cores."""
    folder: Path | None = None
    """Where results are kept, by experiment and scale. Default: results; of smoke a new temporary folder."""
    train: Path | None = None
    """Text files instead of the built-in stories, with a line <|endoftext|> between stories."""
    valid: Path | None = None
    seeds: int | None = None
    """latent-cost: seeds of each variant; default: the scale's."""

    def __call__(self) -> None:
        from moemla.experiments.runner import run
        from moemla.results import folder_for

        experiment, folder = find(self.name), folder_for(self.scale, self.folder)
        print(f"results go to {folder}", file=sys.stderr)
        line = LiveLine(experiment.SCALES[self.scale].steps)
        try:
            made = run(
                experiment, self.scale, folder, self.train, self.valid, self.seeds, report=_one_run, progress=line
            )
        finally:
            line.close()
        print(experiment.table(made))


def _one_run(done: int, total: int, result, was_there: bool) -> None:
    """A line for a run that is there."""
    loss = result.measures.get("nats_per_token")
    said = "  diverged" if result.measures.get("diverged") else f"  {loss:.4f} nats" if loss else ""
    print(f"{done}/{total}  {result.name}{said}", flush=True)
