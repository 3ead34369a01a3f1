"""One step of training, and the loop: it goes on from a checkpoint as if nothing had happened. Built in chapter 5."""

import math
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moemla.balancing import Balancer, switch_loss, z_loss
from moemla.checkpoint import best_of, load_checkpoint, newest, save_best, save_checkpoint
from moemla.config import ModelConfig, TrainConfig, require, stored_fields
from moemla.devices import default_device, rewound, undisturbed, usable_device
from moemla.distributed import ALONE, World
from moemla.errors import Diverged
from moemla.files import claimed, read_json
from moemla.measuring import matmul_rate
from moemla.model import LanguageModel
from moemla.optim import make_optimizers
from moemla.precision import DTYPES, LossScaler, autocast
from moemla.routing import Routing, record_routing
from moemla.runs import Log, Progress, Run
from moemla.schedules import rate_at
from moemla.shards import Batches, TokenShard, check_tokenizer
from moemla.tokenizer import Tokenizer
from moemla.validation import Validation

# What a checkpoint holds besides tensors; one from before an entry was there is read as if it held this.
START = dict(step=0, seconds=0.0, losses=[], window=[], scaler=None)


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
    world: World = ALONE,
) -> LanguageModel:
    """Trains on the shards in `data`, made by `moemla.data.prepare`; `out` becomes a run. Built in chapters 5 and 13.

    `out` then holds config.json, train.json, tokenizer.json, metrics.jsonl and checkpoints; nothing before the first
    step has worked. With `resume` it goes on from the last checkpoint that can be read, or starts if there is none;
    batches, optimizer, balancing bias and random state continue exactly. Ctrl-C (or SIGTERM) ends after the step at
    hand with a checkpoint, and raises KeyboardInterrupt. With `validate_every` (steps; 0: never), the model is scored
    on the first windows of valid.bin, which changes nothing in the training, and the best one is kept in `best/`.

    Each rank of a `world` calls this alike and takes its rows of a batch; the losses of the log are means over all, and
    only rank 0 writes and reports. A signal to one of them ends all after the same step. Dropout draws the same numbers
    on each, so that one random state serves a resume. An error of one rank is left to what started them: torchrun ends
    the others.

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
    batches = Batches(shard, train_config.batch_size, train_config.seq_len, train_config.seed, world)
    validation = Validation(data, tokenizer, train_config, device) if validate_every else None
    run = Run(data, out, config, train_config, tokenizer, facts)

    new = world.main and not out.exists()
    claim = claimed(out, "moemla train") if world.main else nullcontext()
    try:
        with claim, undisturbed(device):
            return _train(
                run, batches, validation, resume, checkpoint_every, device, on_progress, validate_every, world
            )
    finally:
        if new:
            with suppress(OSError):  # it holds something, as it should
                out.rmdir()


def _train(
    run: Run, batches: Batches, validation, resume: bool, checkpoint_every, device, on_progress, validate_every, world
) -> LanguageModel:
    out, train_config = run.out, run.settings
    run.check(resume)
    seed = torch.manual_seed if device.type == "cuda" else torch.default_generator.manual_seed
    seed(train_config.seed)
    torch.set_flush_denormal(True)  # denormal gradients make a CPU's products ten times slower
    model = LanguageModel(run.config, device=device).train()
    optimizers = make_optimizers(model, train_config.optimizer, train_config.lr, train_config.weight_decay)
    balancer = Balancer(model, train_config.balance_rule, train_config.balance_rate, world=world)
    state = newest(out, lambda path: load_checkpoint(path, model, optimizers)) if run.saved else START
    state = START | stored_fields("the state", START, state)
    scaler = LossScaler(**state["scaler"] or {}) if train_config.precision == "fp16" else None
    wrapped = world.wrap(model)
    best = ((best_of(out) if world.main else None) or {}).get("valid_loss", math.inf)
    rate = matmul_rate(device, DTYPES[train_config.precision])
    saved = state["step"]  # of the last checkpoint

    def save(step: int) -> int:
        if world.main:
            held = dict(step=step, scaler=scaler and asdict(scaler))
            save_checkpoint(out, model, optimizers, state | log.state() | held)
        world.wait()  # the end of one rank may be the end of all
        return step

    def diverged(step: int, why: str) -> Diverged:
        """The error of a run whose last step that was made is `step`; writes a checkpoint of it if that can be used."""
        nonlocal saved
        broken = _no_number(model, optimizers)
        if broken:
            why += f"; {broken} is not of numbers any more"
        elif step > saved:
            saved = save(step)
        stays = f"--init {out} goes on from the state after step {saved}, in another folder" if saved else "start again"
        return Diverged(f"{why}: {stays}, with a lower --lr")

    log = Log(out / "metrics.jsonl", state, run.config, train_config, device, rate * world.size, on_progress)
    with _Interrupt() as interrupt, log:
        for step in range(state["step"], train_config.steps):
            lr = rate_at(step, train_config)
            try:
                with rewound(device):  # what is saved if it fails is the state before it
                    loss, norm = train_step(
                        wrapped, optimizers, balancer, batches.batch(step), lr, train_config, scaler, world
                    )
            except Diverged as error:
                epoch, window = batches.epoch(step), step * batches.batch_size % batches.windows
                where = f"step {step + 1} (epoch {epoch}, from window {window} on)"
                raise diverged(step, f"{where}: {error}") from error
            if step == state["step"] and world.main:  # it works: a first step that does not leaves nothing
                run.begin()
                log.begin_writing()
            last = step + 1 == train_config.steps
            validated = validation and (last or (step + 1) % validate_every == 0)
            valid_loss = validation.loss(model) if validated else None
            log.add(step + 1, loss, norm, lr, balancer, valid_loss, scaler)
            if world.main and valid_loss is not None and valid_loss < best:
                best = valid_loss
                save_best(out, model, run.tokenizer, step + 1, best)
            stop = world.any(interrupt.seen)  # asked once: a signal after this line is the next step's
            if last or stop or (checkpoint_every and (step + 1) % checkpoint_every == 0):
                if _no_number(model, optimizers):
                    raise diverged(step + 1, f"step {step + 1}")
                saved = save(step + 1)
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; --resume continues")
    return model.eval()


def _no_number(model: LanguageModel, optimizers) -> str | None:
    """The name of a weight, or of one with something in an optimizer, that is no number: it could not be loaded."""
    for name, parameter in model.named_parameters():
        held = [value for optimizer in optimizers for value in optimizer.state.get(parameter, {}).values()]
        if not all(tensor.isfinite().all() for tensor in (parameter.detach(), *held)):
            return name
    return None


def train_step(
    model: torch.nn.Module,
    optimizers,
    balancer: Balancer,
    batch,
    lr: float,
    train_config: TrainConfig,
    scaler: LossScaler | None = None,
    world: World = ALONE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update from one batch (tokens, targets), each (B, T): (mean loss, gradient norm before clipping).

    Micro-batches change the memory and nothing else: every loss is that of the whole batch, whatever its parts hold.
    The Switch loss needs the counts of the whole step first, so with micro-batches it costs a pass without gradient
    more. The model may be wrapped (DDP, torch.compile); over ranks the batch is this one's, and all weigh alike; the
    loss is the mean over those of `world`.

    Nothing is updated where the loss or the norm is no number: Diverged says which gradient is to blame. With a
    `scaler`, for float16, a norm that is none is an overflow: the step is left out, balancing too.
    """
    device = next(model.parameters()).device
    parts, size = train_config.micro_batches, len(batch[0])
    edges = [part * size // parts for part in range(parts + 1)]
    rows = [slice(a, b) for a, b in pairwise(edges) if a < b]
    scored = [int((batch[1][part] >= 0).sum()) for part in rows]
    tokens, targets = (part.to(device, non_blocking=True) for part in batch)
    total = torch.zeros((), device=device)
    kind, precision = device.type, train_config.precision
    switch, z = (train_config.switch_loss, train_config.z_loss) if balancer.routers else (0.0, 0.0)
    counts = None  # (L, E), of the whole step
    if switch and len(rows) > 1:
        with autocast(kind, precision):
            counts = _counts_of_step(model, balancer, [(tokens[part], targets[part]) for part in rows])
    for part, here in zip(rows, scored, strict=True):
        with record_routing(model) if switch or z else nullcontext([]) as routings, autocast(kind, precision):
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
        if scaler is not None:
            loss = loss * scaler.scale
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if scaler is not None:
        scaler.unscale(gradients)
    sharded = get_total_norm(gradients)
    norm = sharded.full_tensor() if hasattr(sharded, "full_tensor") else sharded
    total = world.sum(total) / world.size
    numbers = torch.stack((total, norm)).isfinite().tolist()  # the one look that a GPU is waited for
    if not numbers[0] or not (numbers[1] or scaler):
        raise Diverged(f"the loss is {total.item():.4g}, {_worst_gradient(model)}")
    if scaler is None or scaler.update(numbers[1]):
        clip_grads_with_norm_(model.parameters(), train_config.clip, sharded)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        balancer.step()
    else:  # nor does the balancing bias move: the loads are those of a step that was not made
        balancer.counts = None
        for router in balancer.routers:
            router.forget()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return total, norm


def _worst_gradient(model: torch.nn.Module) -> str:
    """The first gradient with a number that is none, else the largest one."""
    largest, where = 0.0, "no parameter"
    for path, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        name = ".".join(part for part in path.split(".") if part not in ("module", "_orig_mod"))  # without wrappers
        grad = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
        numbers = int(grad.isfinite().sum())
        if numbers < grad.numel():
            return f"{grad.numel() - numbers:,} of {grad.numel():,} numbers in the gradient of {name} are nan or inf"
        largest, where = max((largest, where), (grad.abs().max().item(), name))
    return f"the largest gradient is {largest:.4g}, in {where}"


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
