"""`moemla experiment`: runs an experiment."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moemla.commands.terminal import LiveLine, print_json


@dataclass
class Experiment:
    """One of the book's or the paper's experiments; stops and goes on at any point. Built in chapter 15.

    A finished part is a file in --folder; the same call again repeats only what is missing.
    """

    name: tyro.conf.Positional[Literal["ten-minutes", "chapter05"]]
    scale: Literal["smoke", "cpu"] = "smoke"
    """How much of it: smoke takes seconds; cpu is meant for two cores."""
    folder: Path | None = None
    """Where results are kept, one JSON file each. Default: results; of smoke a new temporary folder."""
    train: Path | None = None
    """Text files instead of the built-in stories, with a line <|endoftext|> between stories."""
    valid: Path | None = None
    seeds: int | None = None
    """chapter05: seeds of each variant; default: the scale's."""

    def __call__(self) -> None:
        from moemla.experiments import chapter05, ten_minutes
        from moemla.results import folder_for

        folder = folder_for(self.scale, self.folder)
        print(f"results go to {folder}", file=sys.stderr)
        if self.name == "chapter05":
            chapter05.run(self.scale, folder, self.train, self.valid, self.seeds, report=_one_run)
            return
        line = LiveLine(ten_minutes.SCALES[self.scale]["steps"])
        try:
            found = ten_minutes.run(self.scale, folder, self.train, self.valid, on_progress=line)
        finally:
            line.close()
        for result in found:
            shown = {key: value for key, value in result.measures.items() if key not in ("samples", "training")}
            print_json({"settings": result.settings, "measures": shown}, indent=1)


def _one_run(done: int, total: int, result) -> None:
    """A line for a finished run of an experiment."""
    what = " ".join(
        f"{result.settings[key]}" for key in ("part", "data", "variant", "lr", "seed") if key in result.settings
    )
    loss = result.measures.get("nats_per_token")
    print(f"{done}/{total}  {what}" + (f"  {loss:.4f} nats" if loss else ""), flush=True)
