"""`moemla train`: trains a model on prepared data. Built in chapter 5."""

import signal
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from moemla.commands.terminal import Flag, Flat, LiveLine, clock, say
from moemla.config import CHOICES, MATCHES, SIZES, VARIANTS, TrainConfig, setting

TINY, PAPER = TrainConfig(), TrainConfig.paper()


@dataclass
class Train:
    """Trains a model on prepared data; --resume goes on after an interruption.

    The defaults (tiny, moe-mla-rope) take less than ten minutes on two CPU cores. --recipe paper has other defaults;
    the size is --size's.
    """

    data: Path
    """Folder that `moemla prepare` made."""
    out: Path
    """Folder of the run: config, tokenizer, log and checkpoints."""
    train_config: Flat[TrainConfig] = TINY
    recipe: Literal["tiny", "paper"] = "tiny"
    """What options that are not given are: for a laptop, or the paper's (section 3.3, and its dropout of 0.1)."""
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
    patience: int = 0
    """End after so many scores in a row that are no better than the best. 0: never."""
    init: str | None = None
    """Begin with the weights of this run or saved model (pretrained/NAME too), with a schedule of its own."""
    compile: Flag[bool] = False
    """Train through torch.compile: a minute to begin with; dropout draws other numbers. No faster on two cores."""
    recompute: Flag[bool] = False
    """Make the passes of the blocks again in backward: the same numbers, a fraction of the memory, more time."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Rows for these too, in OUT. wandb stays offline (`wandb sync` sends a run) unless WANDB_MODE says otherwise."""
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

    @classmethod
    def chosen(cls, arguments: list[str]) -> type["Train"]:
        """The class whose defaults the arguments ask for."""
        paper = any(pair == ("--recipe", "paper") for pair in pairwise(arguments)) or "--recipe=paper" in arguments
        return _Paper if paper else cls

    def __call__(self) -> None:
        from moemla.devices import keep_freed_memory
        from moemla.distributed import World

        keep_freed_memory()
        world = World.current(self.parallel, self.expert_parallel)
        try:
            self._train(world)
        except Exception:
            if world.size > 1:  # torchrun ends this process as soon as another has; what it has to say comes first
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise
        finally:
            world.leave()

    def _train(self, world) -> None:
        from moemla import complexity
        from moemla.loggers import make_logger
        from moemla.training import train

        with world.agreed():
            config = self._config()
            told = dict(model=config.to_dict(), train=asdict(self.train_config))
            loggers = [make_logger(name, self.out, told) for name in dict.fromkeys(self.logger)]
        mine, dense = complexity.parameters(config), complexity.parameters(config.reference())
        apart = mine.total / dense.total - 1
        tell = say if world.main else lambda text: None
        if self.parallel == "fsdp" and world.size == 1:
            tell("one process alone: --parallel fsdp takes effect under torchrun")
        tell(
            f"{self.size} {self.variant}: {mine.total:,} parameters, {mine.active / mine.total:.0%} active, "
            f"{apart:+.1%} against dense multi-head attention"
        )
        begin, steps = time.perf_counter(), self.train_config.steps
        done = 0

        def progress(row) -> None:
            nonlocal done
            done = row.step
            for shown in (line, *loggers):
                shown(row)

        line = LiveLine(steps)
        names = ("resume", "checkpoint_every", "validate_every", "device", "patience", "init", "compile", "recompute")
        try:
            options = {name: getattr(self, name) for name in names}
            train(config, self.train_config, self.data, self.out, on_progress=progress, world=world, **options)
        finally:
            for shown in (line, *loggers):
                shown.close()
        if 0 < done < steps:
            tell(f"ended after step {done}: {self.patience} scores were no better; OUT/best holds the best model")
        tell(f"done in {clock(time.perf_counter() - begin)}; `moemla evaluate --run {self.out}` scores it")

    def _config(self):
        from moemla.config import ModelConfig
        from moemla.tokenizer import Tokenizer

        vocab_size = Tokenizer.load(self.data / "tokenizer.json").vocab_size
        length = max(ModelConfig.max_seq_len, self.train_config.seq_len)
        changes = dict(vocab_size=vocab_size, reading=self.reading, dropout=self.dropout, max_seq_len=length)
        changes |= dict(norm=self.norm, activation=self.activation, bias=not self.no_bias)
        changes |= dict(setting(text) for text in self.set)
        return ModelConfig.preset(self.size, self.variant, matched=self.matched, **changes)


@dataclass
class _Paper(Train):
    """Trains a model on prepared data as the paper does (section 3.3); --resume goes on after an interruption.

    Its defaults were made for eight GPUs: on less, --micro-batches, --recompute, and --steps with --warmup.
    """

    train_config: Flat[TrainConfig] = PAPER
    recipe: Literal["tiny", "paper"] = "paper"
    dropout: float = 0.1
