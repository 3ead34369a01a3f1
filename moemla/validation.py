"""The score on validation text during a training; and the end of a run that gets no better. Built in chapter 13."""

import math
from pathlib import Path

import torch

from moemla.config import TrainConfig
from moemla.errors import DataError
from moemla.model import LanguageModel
from moemla.precision import autocast
from moemla.shards import TokenShard, check_tokenizer
from moemla.tokenizer import Tokenizer

VALID_TOKENS = 65_536  # at most, scored at each validation


class Validation:
    """Nats per token on the first windows of valid.bin, the best of a run, and how many came since.

    `ended` is True after `patience` scores in a row that were no better than the best; never with 0.
    """

    def __init__(
        self, data: Path, tokenizer: Tokenizer, settings: TrainConfig, device: torch.device, patience: int = 0
    ):
        shard = TokenShard(data / "valid.bin")
        check_tokenizer(shard, tokenizer)
        if len(shard.tokens) < 2:
            raise DataError(f"{shard.path} has no token to score: prepare with more stories")
        size = min(settings.seq_len, len(shard.tokens) - 1)
        count = max(1, min(len(shard.tokens) - 1, VALID_TOKENS) // size)
        tokens = torch.from_numpy(shard.tokens[: count * size + 1].astype("int64"))
        self.tokens, self.targets = tokens[:-1].view(count, size), tokens[1:].view(count, size)
        self.rows, self.device = settings.batch_size // settings.micro_batches, device
        self.precision, self.patience = settings.precision, patience
        self.best, self.waited = math.inf, 0

    @torch.no_grad()
    def loss(self, model: LanguageModel) -> float:
        """The score of the model, which is in training mode before and after."""
        total = 0.0
        model.eval()
        try:
            for tokens, targets in zip(self.tokens.split(self.rows), self.targets.split(self.rows), strict=True):
                with autocast(self.device.type, self.precision):
                    total += model(tokens.to(self.device), targets.to(self.device)).item() * len(tokens)
        finally:
            model.train()
        return total / len(self.tokens)

    def note(self, loss: float) -> None:
        """Takes a score in."""
        better = loss < self.best
        self.best, self.waited = (loss, 0) if better else (self.best, self.waited + 1)

    @property
    def ended(self) -> bool:
        """Whether the last `patience` scores were no better."""
        return 0 < self.patience <= self.waited

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return dict(best=self.best if math.isfinite(self.best) else None, waited=self.waited)
