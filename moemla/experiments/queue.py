"""All registered experiments in one queue, the most valuable first: what is missing, and how long that takes.

Built in chapter 15.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

from moemla import complexity
from moemla.cells import Cell
from moemla.config import TrainConfig
from moemla.experiments import QUEUE, find
from moemla.experiments.runner import Place, Plan, place, planned, planned_run, shelf_of
from moemla.results import Result

UTILISATION = 0.4  # of the machine's matrix products, where no run has shown it yet


def plans(
    scale: str, folder: Path, train_text: Path | None = None, valid_text: Path | None = None
) -> tuple[list[Plan], list[str]]:
    """The plans of the registered experiments, in the order of QUEUE, and the names of those left out.

    Left out are those that ask about text files where none are named; the files are for them alone.
    """
    made, left_out = [], []
    for name in QUEUE:
        experiment = find(name)
        files = getattr(experiment, "FILES", False)
        if files and not train_text:
            left_out.append(name)
            continue
        texts = (train_text, valid_text) if files else (None, None)
        made.append(planned_run(experiment, scale, folder, *texts))
    return made, left_out


class Left(NamedTuple):
    """What an experiment lacks."""

    experiment: str
    done: int
    total: int
    minutes: float  # processor minutes of a missing run, mean
    hours: float  # processor hours of all of them


def left(plans: Iterable[Plan], folder: Path) -> list[Left]:
    """What each plan lacks, and its processor time: as runs of the same model took, else by FLOPs."""
    plans = list(plans)
    shelf = shelf_of(plans, folder)
    seconds_of = _clock(shelf)
    out, told = [], set()
    for plan in plans:
        plan.open(shelf)
        cells = plan.cells if not plan.chooses else planned(plan.experiment, plan.scale, plan.text, plan.seeds)
        own = [cell for cell in cells if place(cell) not in told]
        told.update(map(place, own))
        missing = [seconds_of(cell) for cell in own if place(cell) not in shelf]
        seconds = sum(missing)
        mean = seconds / len(missing) / 60 if missing else 0.0
        out.append(Left(plan.experiment.NAME, len(own) - len(missing), len(own), mean, seconds / 3600))
    return out


def _clock(shelf: Mapping[Place, Result]):
    """Processor seconds of a cell: tokens over the tokens per processor second that such a model was seen to reach."""
    seen: dict[str, list[float]] = {}
    flops: list[float] = []
    for run in shelf.values():
        rate = run.measures.get("tokens_per_cpu_second")
        if rate and run.settings["model"]:
            seen.setdefault(_model(run.settings), []).append(rate)
            flops.append(3 * run.measures["flops_per_token"] * rate)

    @cache
    def fallback() -> float:
        if flops:
            return median(flops)
        import torch

        from moemla.measuring import matmul_rate

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return UTILISATION * matmul_rate(torch.device("cpu"), torch.float32)
        finally:
            torch.set_num_threads(threads)

    def seconds(cell: Cell) -> float:
        settings = cell.settings
        train: TrainConfig = cell.train
        rates = seen.get(_model(settings))
        if rates:
            rate = median(rates)
        else:
            rate = fallback() / complexity.training_flops_per_token(cell.model, seq_len=train.seq_len)
        return train.steps * train.batch_size * train.seq_len / rate

    return seconds


def _model(settings: Mapping) -> str:
    """What of the settings decides a run's speed."""
    train = settings["train"]
    return repr((sorted(settings["model"].items(), key=str), train["batch_size"], train["seq_len"], train["precision"]))
