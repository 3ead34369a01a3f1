"""Besides metrics.jsonl: the rows of a run for TensorBoard or Weights & Biases. Built in chapter 13."""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moemla.config import require
from moemla.errors import optional
from moemla.runs import Progress


class Logger(ABC):
    """What is called with each row of a run, and closed at its end."""

    @abstractmethod
    def __call__(self, row: Progress) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Ends what was begun at the first row."""


class TensorBoard(Logger):
    """Writes the rows to OUT/tensorboard, for `tensorboard --logdir OUT`.

    Nothing is written before the first row. A run that goes on hides what was written past its checkpoint.
    """

    def __init__(self, out: str | os.PathLike, settings: dict[str, Any]):
        optional("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.open, self.folder, self.settings, self.writer = SummaryWriter, Path(out) / "tensorboard", settings, None

    def __call__(self, row: Progress) -> None:
        if self.writer is None:
            self.writer = self.open(os.fspath(self.folder), purge_step=row.step)
            for name, part in self.settings.items():
                self.writer.add_text(name, "  \n".join(f"{field}: {value}" for field, value in part.items()))
        for name, value in scalars(row):
            self.writer.add_scalar(name, value, row.step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases(Logger):
    """Writes the rows to OUT/wandb, as a run of the project "moemla" that is called as the folder.

    Nothing leaves this machine unless the environment's WANDB_MODE says so: without one the run is offline, and `wandb
    sync` sends it later. A run that goes on is another one of the same group.
    """

    def __init__(self, out: str | os.PathLike, settings: dict[str, Any]):
        self.wandb, self.out, self.settings, self.run = optional("wandb", "wandb"), Path(out), settings, None

    def __call__(self, row: Progress) -> None:
        if self.run is None:
            name = self.out.resolve().name
            told = dict(project="moemla", group=name, name=f"{name} from step {row.step}", dir=os.fspath(self.out))
            mode = os.environ.get("WANDB_MODE") or "offline"
            self.run = self.wandb.init(config=self.settings, mode=mode, **told)
        self.run.log(dict(scalars(row)), step=row.step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def make_logger(name: str, out: str | os.PathLike, settings: dict[str, Any]) -> Logger:
    """The logger of that name for the run in `out`.

    settings: what the run is, parts of plain values by name, say dict(model=config.to_dict()). ValueError for a name
    that there is not; MoemlaError, naming the extra, where its package is not installed.
    """
    require(name in LOGGERS, "logger", name, f"choose {' or '.join(LOGGERS)}")
    return LOGGERS[name](out, settings)


def scalars(row: Progress) -> Iterator[tuple[str, float]]:
    """The numbers of a row by name; of a list, each as NAME/layer-I, layers with experts counted from 0."""
    for name, value in asdict(row).items():
        if isinstance(value, list):
            yield from ((f"{name.removesuffix('_by_layer')}/layer-{i}", each) for i, each in enumerate(value))
        elif value is not None and name != "step":
            yield name, value
