"""The training loop: batches, optimizers, the balancing bias, a log, and checkpoints from which it goes on as if
nothing had happened.
"""

import json
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal, get_args

import torch

from moemla import complexity
from moemla.balancing import Balancer, coefficient_of_variation, noise_floor, switch_loss, z_loss
from moemla.checkpoint import best_of, load_checkpoint, newest, save_best, save_checkpoint
from moemla.config import VERSION, ModelConfig, require, require_count, stored_fields
from moemla.data import Batches, TokenShard, check_tokenizer
from moemla.devices import require_known, undisturbed
from moemla.errors import DataError, Diverged, MoemlaError
from moemla.files import claimed, read_json, replacing, why, write_json
from moemla.measuring import matmul_rate
from moemla.model import LanguageModel
from moemla.optim import learning_rate, make_optimizers
from moemla.routing import Routing, record_routing
from moemla.tokenizer import Tokenizer

WARMUP = 50  # steps, where none are given
VALID_TOKENS = 65_536  # at most, scored at each validation
START = dict(step=0, seconds=0.0, losses=[], window=[])  # what a checkpoint holds besides tensors


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. The defaults are for the `tiny` model, ten minutes on two CPU cores. Built in chapter 5."""

    steps: int = 1000
    batch_size: int = 16  # sequences a step
    seq_len: int = 256  # tokens a sequence
    micro_batches: int = 1  # parts of a step whose gradients are summed
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 1e-2
    min_lr: float = 0.0
    warmup: int | None = None  # steps; 50
    weight_decay: float = 0.1
    clip: float = 1.0  # L2 norm of all gradients
    precision: Literal["float32", "bf16"] = "float32"  # bf16: autocast
    balance_rule: Literal["sign", "proportional", "algorithm-1", "equation-4", "quantile", "none"] = "sign"
    balance_rate: float | None = None  # the rule's own
    switch_loss: float = 0.0  # weight of the auxiliary loss, summed over layers; with micro-batches a pass more
    z_loss: float = 0.0  # weight of the router's z-loss
    seed: int = 0
    log_every: int = 10  # steps
    load_window: int = 16  # steps over which the load of the experts is counted

    def __post_init__(self):
        for name in ("optimizer", "precision", "balance_rule"):
            allowed = get_args(type(self).__annotations__[name])
            require(getattr(self, name) in allowed, name, getattr(self, name), f"choose one of {', '.join(allowed)}")
        for name in ("steps", "batch_size", "seq_len", "micro_batches", "log_every", "load_window"):
            require_count(name, getattr(self, name))
        right = f"must divide batch_size={self.batch_size}"
        require(self.batch_size % self.micro_batches == 0, "micro_batches", self.micro_batches, right)
        for name in ("warmup", "seed"):
            value = getattr(self, name)
            open_ = value is None and name == "warmup"
            right = "must be a whole number from 0 to 2**63 - 1"
            require(open_ or (type(value) is int and 0 <= value < 2**63), name, value, right)
        right = f"must be at most steps={self.steps}, or the rate never reaches lr"
        require(self.warmup is None or self.warmup <= self.steps, "warmup", self.warmup, right)
        object.__setattr__(self, "warmup", WARMUP if self.warmup is None else self.warmup)
        for name in ("lr", "clip", "balance_rate", "min_lr", "weight_decay", "switch_loss", "z_loss"):
            value = getattr(self, name)
            if value is None and name == "balance_rate":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(number and math.isfinite(value), name, value, "must be a finite number")
            positive = name in ("lr", "clip", "balance_rate")
            right = "must be above 0" if positive else "must be 0 or more"
            require(value > 0 if positive else value >= 0, name, value, right)
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"must be at most lr={self.lr}")
        rate = self.balance_rate
        share = self.balance_rule != "quantile" or rate is None or rate <= 1
        require(share, "balance_rate", rate, "the quantile rule goes a share of the way, at most 1")


@dataclass
class Progress:
    """One row of the log. Built in chapter 5.

    `loss` is the mean nats per token since the last row; `load_cv` the coefficient of variation of the experts' load
    over the last `load_window` steps, mean over layers, and `load_cv_floor` what uniform random routing would show
    there; `utilisation` the model's FLOPs (3 x forward) over this machine's own matrix-multiply rate; `valid_loss` the
    nats per token on the validation windows, in the rows of steps that were validated.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    seconds: float
    tokens_per_second: float
    utilisation: float
    seconds_left: float
    grad_norm: float
    load_cv: float | None = None
    load_cv_floor: float | None = None
    load_window: int | None = None  # steps
    valid_loss: float | None = None


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU. Built in chapter 5."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Interrupt:
    """Turns the first SIGINT or SIGTERM into a flag, so that a step is finished; the second one acts as usual."""

    def __init__(self):
        self.seen = False
        self.before = {}

    def __enter__(self):
        def note(number, frame):
            self.seen = True
            signal.signal(number, self.before[number])

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, note)
            except ValueError:  # not in the main thread (a notebook's, say): signals are not ours to handle
                self.before.clear()
                break
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(
    config: ModelConfig,
    train_config: TrainConfig,
    data: str | os.PathLike,
    out: str | os.PathLike,
    resume: bool = False,
    checkpoint_every: int | None = 200,
    device: torch.device | str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    validate_every: int = 0,
) -> LanguageModel:
    """Trains on the shards in `data` (made by `moemla.data.prepare`) and leaves a run in `out`. Built in chapter 5;
    runs in 13.

    `out` then holds config.json, train.json, tokenizer.json, metrics.jsonl and checkpoints; nothing before the first
    step has worked. With `resume` it goes on from the last checkpoint that can be read, or starts if there is none;
    batches, optimizer, balancing bias and random state continue exactly. Ctrl-C (or SIGTERM) ends after the step at
    hand with a checkpoint, and raises KeyboardInterrupt. With `validate_every` (steps; 0: never), the model is scored
    on the first windows of valid.bin, which changes nothing in the training, and the best one is kept in `best/`.

    ValueError or MoemlaError for settings, data or a folder that do not fit, or a run that another process writes;
    Diverged for a loss that is no longer a number. The caller's random state and settings of torch stay as they are.
    """
    data, out = Path(data), Path(out)
    device = usable_device(device) if device is not None else default_device()
    for name, value in (("checkpoint_every", checkpoint_every), ("validate_every", validate_every)):
        whole = type(value) is int and value >= 0
        require(whole or (value is None and name == "checkpoint_every"), name, value, "must be 0 (not at all) or more")
    tokenizer, shard = Tokenizer.load(data / "tokenizer.json"), TokenShard(data / "train.bin")
    check_tokenizer(shard, tokenizer)
    facts = read_json(data / "data.json")
    right = f"the tokenizer has {tokenizer.vocab_size} tokens"
    require(config.vocab_size == tokenizer.vocab_size, "vocab_size", config.vocab_size, right)
    right = f"must be at most max_seq_len={config.max_seq_len}"
    require(train_config.seq_len <= config.max_seq_len, "seq_len", train_config.seq_len, right)
    batches = Batches(shard, train_config.batch_size, train_config.seq_len, seed=train_config.seed)
    validation = _Validation(data, tokenizer, train_config, device) if validate_every else None
    run = _Run(data, out, config, train_config, tokenizer, facts)

    new = not out.exists()
    try:
        with claimed(out, "moemla train"), undisturbed(device):
            how = (resume, checkpoint_every, device, on_progress, validate_every)
            return _train(run, batches, validation, *how)
    finally:
        if new:
            with suppress(OSError):  # it holds something, as it should
                out.rmdir()


def _train(
    run: "_Run", batches: Batches, validation, resume: bool, checkpoint_every, device, on_progress, validate_every
) -> LanguageModel:
    out, train_config = run.out, run.settings
    run.check(resume)
    seed = torch.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
    seed(train_config.seed)
    torch.set_flush_denormal(True)  # denormal gradients make a CPU's products ten times slower
    model = LanguageModel(run.config, device=device).train()
    optimizers = make_optimizers(model, train_config.optimizer, train_config.lr, train_config.weight_decay)
    balancer = Balancer(model, train_config.balance_rule, train_config.balance_rate)
    state = newest(out, lambda path: load_checkpoint(path, model, optimizers)) if run.saved else START
    state = START | stored_fields("the state", START, state)
    best = (best_of(out) or {}).get("valid_loss", math.inf)
    log = _Log(out / "metrics.jsonl", state, run.config, train_config, device, on_progress)
    with _Interrupt() as interrupt, log:
        for step in range(state["step"], train_config.steps):
            lr = learning_rate(
                step,
                lr=train_config.lr,
                min_lr=train_config.min_lr,
                warmup=train_config.warmup,
                steps=train_config.steps,
            )
            loss, norm = train_step(model, optimizers, balancer, batches.batch(step), lr, train_config)
            if step == state["step"]:  # it works: a first step that does not leaves nothing
                run.begin()
                log.begin_writing()
            last = step + 1 == train_config.steps
            validated = validation and (last or (step + 1) % validate_every == 0)
            valid_loss = validation.loss(model) if validated else None
            log.add(step + 1, loss, norm, lr, balancer, valid_loss)
            if valid_loss is not None and valid_loss < best:
                best = valid_loss
                save_best(out, model, run.tokenizer, step + 1, best)
            stop = interrupt.seen  # asked once: a signal after this line is the next step's
            if last or stop or (checkpoint_every and (step + 1) % checkpoint_every == 0):
                log.check(step + 1, norm)
                save_checkpoint(out, model, optimizers, dict(step=step + 1) | log.state())
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; --resume continues")
    return model.eval()


def usable_device(name: torch.device | str) -> torch.device:
    """The device of that name; ValueError where there is none, or nothing here has run on it. Built in chapter 5."""
    require_known(name)
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise ValueError(f"device={str(name)!r}: {str(error).splitlines()[0]}") from error
    require(device.type != "meta", "device", str(name), "holds no numbers; choose cpu or cuda")
    return device


def train_step(
    model: torch.nn.Module, optimizers, balancer: Balancer, batch, lr: float, train_config: TrainConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update from one batch (tokens, targets), each (B, T): (mean loss, gradient norm before clipping).

    Micro-batches change the memory and nothing else: every loss is that of the whole batch, whatever its parts hold.
    The Switch loss needs the counts of the whole step first, so with micro-batches it costs a pass without gradient
    more. The model may be wrapped (DDP, torch.compile); ranks are weighed alike. Built in chapter 5.
    """
    device = next(model.parameters()).device
    parts, size = train_config.micro_batches, len(batch[0])
    edges = [part * size // parts for part in range(parts + 1)]
    rows = [slice(a, b) for a, b in pairwise(edges) if a < b]
    scored = [int((batch[1][part] >= 0).sum()) for part in rows]
    tokens, targets = (part.to(device, non_blocking=True) for part in batch)
    total = torch.zeros((), device=device)
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=train_config.precision == "bf16")
    switch, z = (train_config.switch_loss, train_config.z_loss) if balancer.routers else (0.0, 0.0)
    counts = None  # (L, E), of the whole step
    if switch and len(rows) > 1:
        with autocast():
            counts = _counts_of_step(model, balancer, [(tokens[part], targets[part]) for part in rows])
    for part, here in zip(rows, scored, strict=True):
        with record_routing(model) if switch or z else nullcontext([]) as routings, autocast():
            loss = model(tokens[part], targets[part])
        loss = loss / (sum(scored) / here) if here else loss * 0
        total = total + loss.detach()
        if switch and counts is None:
            counts = balancer.sum_over_ranks(_counts(routings))
        shares = size / len(tokens[part])
        for layer, routing in enumerate(routings):
            if switch:
                loss = loss + switch / shares * switch_loss(routing, counts=counts[layer])
            if z:
                loss = loss + z / shares * z_loss(routing)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
    balancer.step()
    return total, norm


@torch.no_grad()
def _counts_of_step(model: torch.nn.Module, balancer: Balancer, parts: list) -> torch.Tensor:
    """(L, E): the tokens that each expert will get in the whole step, on all ranks.

    The passes leave no trace: routers in eval mode count nothing, and dropout draws the same numbers again.
    """
    modes = [router.training for router in balancer.routers]
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    counts = []
    try:
        for router in balancer.routers:
            router.eval()
        with torch.random.fork_rng(devices):
            for tokens, targets in parts:
                with record_routing(model) as routings:
                    model(tokens, targets)
                counts.append(_counts(routings))
    finally:
        for router, mode in zip(balancer.routers, modes, strict=True):
            router.train(mode)
    return balancer.sum_over_ranks(torch.stack(counts).sum(0))


def _counts(routings: list[Routing]) -> torch.Tensor:
    return torch.stack([routing.counts for routing in routings])


class _Run:
    """What a run is, and the files that say so."""

    def __init__(self, data: Path, out: Path, config: ModelConfig, settings: TrainConfig, tokenizer, facts: dict):
        self.out, self.config, self.settings, self.tokenizer = out, config, settings, tokenizer
        if "unfinished" in facts:
            raise MoemlaError(f"{data} was not finished: run `moemla prepare` again")
        try:
            run = dict(model=config.to_dict(), train=asdict(settings), data=facts["hash"], splits=facts["splits"])
        except KeyError as error:
            raise MoemlaError(f"{data}/data.json is damaged ({error} is missing): prepare again") from error
        absolute = os.fspath(data.resolve())
        try:
            folder = os.path.relpath(absolute, out.resolve())  # a run and its data may be moved together
        except ValueError:  # another drive
            folder = absolute
        places = dict(folder=folder, absolute_folder=absolute)
        self.facts = dict(version=VERSION) | run | dict(tokenizer=tokenizer.hash) | places
        self.saved = False  # whether there is a checkpoint to go on from

    def check(self, resume: bool) -> None:
        """MoemlaError if another run lies in the folder, or this one and it is not to go on."""
        out = self.out
        self.saved = any((out / "checkpoints").glob("step-*"))
        if not ((out / "train.json").exists() or self.saved):
            return
        if not resume:
            raise MoemlaError(f"{out} already holds a run: continue it with --resume, or name another folder")
        try:
            before = read_json(out / "train.json")
            version = before.get("version", 0)
            before = stored_fields("a run", self.facts, before)
            for part, name in (("model", "ModelConfig"), ("train", "TrainConfig")):
                if isinstance(before.get(part), dict):
                    before[part] = stored_fields(name, self.facts[part], before[part], version)
        except ValueError as error:
            raise MoemlaError(f"{out / 'train.json'}: {error}") from error
        for part in ("model", "train", "data", "tokenizer"):
            if before.get(part) != self.facts[part]:
                was, now = before.get(part), self.facts[part]
                names = sorted(was.keys() | now.keys()) if isinstance(was, dict) and isinstance(now, dict) else ()
                changed = ", ".join(name for name in names if was.get(name) != now.get(name)) or part
                raise MoemlaError(
                    f"{out} holds a run with other settings ({changed}): repeat them, or name another folder"
                )

    def begin(self) -> None:
        """Writes them where they are not there."""
        if not (self.out / "train.json").exists():
            self.tokenizer.save(self.out / "tokenizer.json")
            write_json(self.out / "config.json", dict(version=VERSION) | self.config.to_dict())
            write_json(self.out / "train.json", self.facts)


class _Validation:
    """Nats per token on the first windows of valid.bin."""

    def __init__(self, data: Path, tokenizer: Tokenizer, settings: TrainConfig, device: torch.device):
        shard = TokenShard(data / "valid.bin")
        check_tokenizer(shard, tokenizer)
        if len(shard.tokens) < 2:
            raise DataError(f"{shard.path} has no token to score: prepare with more stories")
        size = min(settings.seq_len, len(shard.tokens) - 1)
        count = max(1, min(len(shard.tokens) - 1, VALID_TOKENS) // size)
        tokens = torch.from_numpy(shard.tokens[: count * size + 1].astype("int64"))
        self.tokens, self.targets = tokens[:-1].view(count, size), tokens[1:].view(count, size)
        self.rows, self.device = settings.batch_size // settings.micro_batches, device
        self.bf16 = settings.precision == "bf16"

    @torch.no_grad()
    def loss(self, model: LanguageModel) -> float:
        total = 0.0
        model.eval()
        try:
            for tokens, targets in zip(self.tokens.split(self.rows), self.targets.split(self.rows), strict=True):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    total += model(tokens.to(self.device), targets.to(self.device)).item() * len(tokens)
        finally:
            model.train()
        return total / len(self.tokens)


class _Log:
    """metrics.jsonl, one row each `log_every` steps; on a resumed run, rows past the checkpoint are dropped first."""

    def __init__(self, path: Path, state: dict, config: ModelConfig, train_config: TrainConfig, device, on_progress):
        self.path, self.config, self.settings, self.on_progress = path, config, train_config, on_progress
        self.before, self.first, self.begin = state["seconds"], state["step"], time.perf_counter()
        flops = complexity.training_flops_per_token(config, seq_len=train_config.seq_len)
        dtype = torch.bfloat16 if train_config.precision == "bf16" else torch.float32
        self.peak_tokens = matmul_rate(device, dtype) / flops  # tokens a second if there were nothing but products
        self.losses = [torch.tensor(loss, device=device) for loss in state["losses"]]
        counts = (torch.tensor(counts, device=device) for counts in state["window"])
        self.window = deque(counts, maxlen=train_config.load_window)
        self.kept = [row for row in _rows(path) if row["step"] <= self.first] if path.exists() else []
        self.file = None
        self.begin = time.perf_counter()

    def begin_writing(self) -> None:
        with replacing(self.path) as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in self.kept).encode())
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed in __exit__)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with suppress(OSError, AttributeError):  # each row was flushed when it was written; or it never was opened
            self.file.close()

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.begin

    def state(self) -> dict:
        """What the next row needs, for a checkpoint between two rows."""
        return dict(
            seconds=self.seconds,
            losses=[loss.item() for loss in self.losses],
            window=[counts.tolist() for counts in self.window],
        )

    def check(self, step: int, norm) -> None:
        """MoemlaError unless the losses since the last row and the last gradient are numbers."""
        mean = torch.stack([*self.losses, norm]).mean().item()
        if not math.isfinite(mean):
            raise Diverged(
                f"the loss or its gradient at step {step} is {mean}: start again in another folder with a lower --lr"
            )

    def add(self, step: int, loss, norm, lr: float, balancer: Balancer, valid_loss: float | None = None) -> None:
        self.losses.append(loss)
        if balancer.counts is not None:
            self.window.append(torch.stack(balancer.counts))
        if step % self.settings.log_every and step != self.settings.steps and valid_loss is None:
            return
        self.check(step, norm)
        mean = torch.stack(self.losses).mean().item()
        self.losses.clear()
        elapsed, each = time.perf_counter() - self.begin, self.settings.batch_size * self.settings.seq_len
        rate = (step - self.first) * each / elapsed
        row = Progress(
            step=step,
            tokens=step * each,
            loss=mean,
            lr=lr,
            seconds=self.seconds,
            tokens_per_second=rate,
            utilisation=rate / self.peak_tokens,
            seconds_left=(self.settings.steps - step) * each / rate,
            grad_norm=float(norm),
            valid_loss=valid_loss,
        )
        if self.window:
            counts = torch.stack(tuple(self.window)).sum(0)
            row.load_cv = sum(coefficient_of_variation(layer) for layer in counts) / len(counts)
            row.load_cv_floor = noise_floor(self.config.n_experts, self.config.top_k, len(self.window) * each)
            row.load_window = len(self.window)
        try:
            self.file.write(json.dumps(asdict(row), allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise MoemlaError(f"cannot write {self.path}: {why(error)}") from error
        if self.on_progress is not None:
            self.on_progress(row)


def _rows(path: Path) -> list[dict]:
    """The rows, without the last one if a killed process left it without its end."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except (OSError, ValueError) as error:
        raise MoemlaError(f"{path} cannot be read: {error}") from error


def read_metrics(run: str | os.PathLike) -> list[Progress]:
    """The rows of a run's metrics.jsonl. MoemlaError where there is none. Built in chapter 13."""
    known = {field.name for field in fields(Progress)}
    rows = _rows(Path(run) / "metrics.jsonl")
    return [Progress(**{key: value for key, value in row.items() if key in known}) for row in rows]
