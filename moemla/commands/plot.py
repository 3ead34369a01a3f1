"""`moemla plot`: curves of runs. Built in chapter 13."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moemla.config import require
from moemla.plots import CURVES, PICTURES


@dataclass
class Plot:
    """Draws curves of runs from their logs: a line for each run, an axis for each --what."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    what: tuple[Literal[tuple(CURVES)], ...] = ("loss",)
    """load: how unequal the experts' load is, beside what uniform random routing would show (dotted)."""
    out: Path = Path("curves.png")
    """File to write, .png or .svg; a picture that is there is replaced."""

    def __call__(self) -> None:
        from moemla.errors import MoemlaError
        from moemla.plots import curves, save
        from moemla.runs import read_metrics

        require(bool(self.runs), "runs", "", "name at least one folder of a run")
        require(bool(self.what), "what", "", f"name at least one of {', '.join(CURVES)}")
        require(self.out.suffix in PICTURES, "out", str(self.out), f"must end in {' or '.join(PICTURES)}")
        rows = {}
        for folder, name in zip(self.runs, _names(self.runs), strict=True):
            if not (folder / "metrics.jsonl").is_file():
                raise MoemlaError(f"{folder} is no run: it has no metrics.jsonl")
            rows[name] = read_metrics(folder)
            if not rows[name]:
                raise MoemlaError(f"{folder} has no row in its log yet")
        save(curves(rows, self.what), self.out)
        print(self.out)


def _names(folders: tuple[Path, ...]) -> list[str]:
    """The folders' own names, with as many of those above as tell them apart."""
    whole = [folder.resolve().parts for folder in folders]
    require(len(set(whole)) == len(whole), "runs", " ".join(map(str, folders)), "a folder is there twice")
    depth = 1
    while len({parts[-depth:] for parts in whole}) < len(whole):
        depth += 1
    return ["/".join(parts[-depth:]) for parts in whole]
