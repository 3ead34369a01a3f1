"""What a process holds of a run while it trains: begun, taken up from a checkpoint, or begun with another's weights.

Built in chapter 13.
"""

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict

import torch

from moemla.balancing import Balancer
from moemla.checkpoint import load, load_checkpoint, newest, save_checkpoint
from moemla.config import architecture, stored_fields
from moemla.distributed import World
from moemla.errors import Diverged, MoemlaError
from moemla.model import LanguageModel
from moemla.optim import make_optimizers
from moemla.parallel import wrap
from moemla.precision import DTYPES, LossScaler
from moemla.runs import Log, Progress, Run
from moemla.tokenizer import Tokenizer

# What a checkpoint holds besides tensors. One that is older than an entry is read as if it held this.
START = dict(step=0, seconds=0.0, losses=[], window=[], scaler=None, best=None, waited=0)


class Session:
    """The model of a run, what trains it, and its log; `state` is what the checkpoint held that it went on from.

    A run that has a checkpoint goes on from the last one that can be read. Else the seed decides the weights, or
    `init` brings them; see `begin_with`. `rate` is this machine's FLOP/s, for the log. MoemlaError for what cannot be
    read or does not fit.
    """

    def __init__(
        self,
        run: Run,
        device: torch.device,
        world: World,
        rate: float,
        init: str | os.PathLike | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        settings = run.settings
        self.run, self.world = run, world
        run.saved = world.any(run.saved)  # a rank that does not see the folder will say so
        seed = torch.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
        seed(settings.seed)
        torch.set_flush_denormal(True)  # denormal gradients make a CPU's products ten times slower
        self.model = LanguageModel(run.config, device=device).train()
        if init is not None and not run.saved:
            with world.agreed():
                run.begins_with(begin_with(self.model, init, run.tokenizer))
        narrow = None if settings.precision == "float32" else DTYPES[settings.precision]
        self.wrapped = wrap(self.model, world, narrow)
        self.optimizers = make_optimizers(self.model, settings.optimizer, settings.lr, settings.weight_decay)
        self.balancer = Balancer(self.model, settings.balance_rule, settings.balance_rate, world=world)
        self.state = START
        if run.saved:
            with world.agreed():
                state = newest(run.out, lambda path: load_checkpoint(path, self.model, self.optimizers))
                self.state = START | stored_fields("the state", START, state)
            step = self.state["step"]
            if not world.alike(step):
                raise MoemlaError(f"ranks have read different checkpoints of {run.out}, this one that of step {step}")
        self.scaler = LossScaler(**self.state["scaler"] or {}) if settings.precision == "fp16" else None
        self.saved = self.state["step"]  # of the last checkpoint
        path = run.out / "metrics.jsonl"
        self.log = Log(path, self.state, run.config, settings, device, rate * world.size, on_progress)

    def save(self, step: int, **more) -> None:
        """Writes a checkpoint of step `step`; `more` are plain values of its state. Every rank calls it.

        Diverged for weights that are no numbers.
        """
        with self.world.agreed():
            if broken := self._no_number():
                raise self._diverged(f"step {step}: {broken} is not of numbers any more")
        state = self.state | self.log.state() | dict(step=step, scaler=self.scaler and asdict(self.scaler)) | more
        save_checkpoint(self.run.out, self.model, self.optimizers, state, world=self.world)
        self.world.wait()  # the end of one rank may be the end of all
        self.saved = step

    def diverged(self, step: int, why: str, **more) -> Diverged:
        """The error of a run in which `step` is the last step that was made; a checkpoint of it is written."""
        if step > self.saved:
            broken = self._no_number()
            if self.world.any(broken is not None):
                return self._diverged(f"{why}; {broken or 'a weight'} is not of numbers any more")
            self.save(step, **more)
        return self._diverged(why)

    def _diverged(self, why: str) -> Diverged:
        out, kept = self.run.out, self.saved
        stays = f"--init {out} goes on from the state after step {kept}, in another folder" if kept else "start again"
        return Diverged(f"{why}: {stays}, with a lower --lr")

    def _no_number(self) -> str | None:
        """The name of a weight, or of one with something in an optimizer, that is no number: it could not be loaded."""
        for name, parameter in self.model.named_parameters():
            states = [optimizer.state.get(parameter, {}) for optimizer in self.optimizers]
            held = [parameter.detach(), *(value for state in states for value in state.values())]
            here = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
            if not all(tensor.isfinite().all() for tensor in here):
                return name
        return None


def begin_with(model: LanguageModel, path: str | os.PathLike, tokenizer: Tokenizer) -> str:
    """Gives `model` the weights and the balancing bias of a run or a saved model; returns their sha256 in hex.

    `path` as `moemla.load` takes it: a run's last checkpoint, a saved model, "pretrained/NAME". MoemlaError, naming the
    fields, unless both compute the same (dropout may differ) and read the same tokens.
    """
    source, words = load(path, model.embedding.weight.device)
    theirs, ours = (architecture(config.to_dict()) for config in (source.config, model.config))
    apart = [name for name in ours if ours[name] != theirs[name] and name != "dropout"]
    if apart:
        values = ", ".join(f"{name} {theirs[name]!r}, not {ours[name]!r}" for name in apart)
        raise MoemlaError(f"{path} holds another model ({values}): train one of its kind")
    if words is None:
        raise MoemlaError(f"{path} has no tokenizer.json: put the one there that its model was trained with")
    if words.hash != tokenizer.hash:
        hashes = f"{words.hash[:12]}, not {tokenizer.hash[:12]}"
        raise MoemlaError(f"{path} was trained with another tokenizer ({hashes}): take data that was prepared with it")
    model.load_state_dict(source.state_dict())
    sum_ = hashlib.sha256()
    for name, tensor in sorted(source.state_dict().items()):
        sum_.update(name.encode())
        sum_.update(tensor.cpu().contiguous().numpy().tobytes())
    return sum_.hexdigest()
