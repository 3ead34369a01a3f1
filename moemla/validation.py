"""The score on validation text during a training; and the end of a run that gets no better. Built in chapter 13."""

import math
from pathlib import Path

import torch
from torch import Tensor

from moemla.config import TrainConfig
from moemla.distributed import ALONE, World
from moemla.errors import DataError
from moemla.model import LanguageModel
from moemla.precision import autocast
from moemla.shards import TokenShard, check_tokenizer
from moemla.tokenizer import Tokenizer

VALID_TOKENS = 65_536  # at most, scored at each validation


class Validation:
    """Nats per token on the first windows of valid.bin, each `every` steps of a run and at its end (0: never).

    `best` is the lowest so far and `waited` how many came since; `ended` is True when these are `patience` (0: never).
    """

    def __init__(
        self,
        data: Path,
        tokenizer: Tokenizer,
        settings: TrainConfig,
        device: torch.device,
        every: int = 1,
        patience: int = 0,
    ):
        self.settings, self.device, self.every, self.patience = settings, device, every, patience
        self.best, self.kept, self.waited = math.inf, math.inf, 0
        if every:
            self.tokens, self.targets = _windows(data / "valid.bin", tokenizer, settings.seq_len)

    def due(self, step: int) -> bool:
        """Whether the model is scored after step `step`, counted from 1."""
        return self.every > 0 and (step % self.every == 0 or step == self.settings.steps)

    @torch.no_grad()
    def loss(self, model: LanguageModel, world: World = ALONE) -> float:
        """The score of the model, which is in training mode before and after; the same number on every rank."""
        settings = self.settings
        total, rows = 0.0, max(1, settings.batch_size // settings.micro_batches // world.size)  # of a pass in training
        model.eval()
        try:
            for tokens, targets in zip(self.tokens.split(rows), self.targets.split(rows), strict=True):
                with autocast(self.device.type, settings.precision):
                    total += model(tokens.to(self.device), targets.to(self.device)).item() * len(tokens)
        finally:
            model.train()
            if hasattr(model, "reshard"):  # FSDP2's outermost module stays whole until a backward pass
                model.reshard()
        each = torch.tensor(total / len(self.tokens), dtype=torch.float64, device=self.device)
        return world.sum(each).item() / world.size

    def note(self, loss: float) -> bool:
        """Takes a score in; whether it is better than that of the model in `best/`."""
        self.best, self.waited = (loss, 0) if loss < self.best else (self.best, self.waited + 1)
        before, self.kept = self.kept, min(loss, self.kept)
        return loss < before

    @property
    def ended(self) -> bool:
        """Whether the last `patience` scores were no better."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return dict(best=self.best if math.isfinite(self.best) else None, waited=self.waited)

    def take_up(self, state: dict, kept: dict | None) -> None:
        """Goes on from a checkpoint's `state`; `kept` says what is in `best/`, which may be of a later step."""
        self.best, self.waited = math.inf if state["best"] is None else state["best"], state["waited"]
        self.kept = kept["valid_loss"] if kept else math.inf


def _windows(path: Path, tokenizer: Tokenizer, seq_len: int) -> tuple[Tensor, Tensor]:
    """(tokens, targets), each (N, T)."""
    shard = TokenShard(path)
    check_tokenizer(shard, tokenizer)
    if len(shard.tokens) < 2:
        raise DataError(f"{shard.path} has no token to score: prepare with more stories")
    size = min(seq_len, len(shard.tokens) - 1)
    count = max(1, min(len(shard.tokens) - 1, VALID_TOKENS) // size)
    tokens = torch.from_numpy(shard.tokens[: count * size + 1].astype("int64"))
    return tokens[:-1].view(count, size), tokens[1:].view(count, size)
