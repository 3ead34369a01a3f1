"""`moemla train`: trains a model on prepared data. Built in chapter 5."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moemla.commands.terminal import Flag, Flat, LiveLine, clock, say
from moemla.config import CHOICES, MATCHES, SIZES, VARIANTS, TrainConfig, setting


@dataclass
class Train:
    """Trains a model on prepared data; --resume goes on after an interruption.

    The defaults (tiny, moe-mla-rope) take less than ten minutes on two CPU cores.
    """

    data: Path
    """Folder that `moemla prepare` made."""
    out: Path
    """Folder of the run: config, tokenizer, log and checkpoints."""
    train_config: Flat[TrainConfig]
    size: Literal[tuple(SIZES)] = "tiny"
    variant: Literal[VARIANTS] = "moe-mla-rope"
    matched: Literal[MATCHES] = "parameters"
    reading: Literal["working", "literal"] = "working"
    norm: Literal[CHOICES["norm"]] = "layernorm"
    activation: Literal[CHOICES["activation"]] = "gelu"
    no_bias: Flag[bool] = False
    """No bias terms. With rmsnorm, swiglu and a decoupled variant `moemla export` makes a DeepseekV3."""
    dropout: float = 0.0
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end."""
    validate_every: int = 0
    """Steps between scores on validation text; the best model is kept in OUT/best. 0: none."""
    set: tuple[str, ...] = ()
    """Any field of the model's config as FIELD=VALUE: --set n_experts=14 top_k=2."""
    resume: Flag[bool] = False
    """Go on from the last checkpoint in --out, or start if there is none."""
    device: str | None = None
    """cpu, cuda, cuda:1; default: the GPU if there is one."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: each process holds a copy of the model, or shards of it (FSDP2)."""
    expert_parallel: int = 1
    """Under torchrun: over how many neighbouring processes the routed experts are spread."""

    def __call__(self) -> None:
        from moemla.distributed import World

        world = World.current(self.parallel, self.expert_parallel)
        try:
            self._train(world)
        finally:
            world.leave()

    def _train(self, world) -> None:
        from moemla import complexity
        from moemla.config import ModelConfig
        from moemla.tokenizer import Tokenizer
        from moemla.training import train

        vocab_size = Tokenizer.load(self.data / "tokenizer.json").vocab_size
        length = max(ModelConfig.max_seq_len, self.train_config.seq_len)
        changes = dict(reading=self.reading, dropout=self.dropout, max_seq_len=length)
        changes |= dict(norm=self.norm, activation=self.activation, bias=not self.no_bias)
        changes |= dict(setting(text) for text in self.set)
        config = ModelConfig.preset(self.size, self.variant, matched=self.matched, vocab_size=vocab_size, **changes)
        mine, dense = complexity.parameters(config), complexity.parameters(config.reference())
        apart = mine.total / dense.total - 1
        tell = say if world.main else lambda text: None
        tell(
            f"{self.size} {self.variant}: {mine.total:,} parameters, {mine.active / mine.total:.0%} active, "
            f"{apart:+.1%} against dense multi-head attention"
        )
        begin = time.perf_counter()
        line = LiveLine(self.train_config.steps)
        try:
            options = {name: getattr(self, name) for name in ("resume", "checkpoint_every", "validate_every", "device")}
            shown = line if world.main else None
            train(config, self.train_config, self.data, self.out, on_progress=shown, world=world, **options)
        finally:
            line.close()
        tell(f"done in {clock(time.perf_counter() - begin)}; `moemla evaluate --run {self.out}` scores it")
