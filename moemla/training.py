"""One step of training, and the loop: it goes on from a checkpoint as if nothing had happened. Built in chapter 5."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from moemla.balancing import Balancer, switch_loss, z_loss
from moemla.checkpoint import best_of, save_best, shipped
from moemla.config import ModelConfig, TrainConfig, require
from moemla.devices import default_device, rewound, undisturbed, usable_device
from moemla.distributed import ALONE, World
from moemla.errors import Diverged
from moemla.files import claimed, read_json
from moemla.measuring import matmul_rate
from moemla.model import LanguageModel, unwrapped
from moemla.parallel import clip, gradient_norm, gradients
from moemla.precision import DTYPES, LossScaler, autocast
from moemla.routing import Routing, record_routing
from moemla.runs import Progress, Run
from moemla.schedules import rate_at
from moemla.session import Session
from moemla.shards import Batches, TokenShard, check_tokenizer
from moemla.tokenizer import Tokenizer
from moemla.validation import Validation


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
    *,
    patience: int = 0,
    init: str | os.PathLike | None = None,
    compile: bool = False,
    recompute: bool = False,
) -> LanguageModel:
    """Trains on the shards in `data`, made by `moemla.data.prepare`; `out` becomes a run. Built in chapters 5 and 13.

    `out` then holds config.json, train.json, tokenizer.json, metrics.jsonl and checkpoints; nothing before the first
    step has worked. With `resume` it goes on from the last checkpoint that can be read, or starts if there is none;
    batches, optimizer, balancing bias and random state continue exactly. Ctrl-C (or SIGTERM) ends after the step at
    hand with a checkpoint, and raises KeyboardInterrupt. With `validate_every` (steps; 0: never), the model is scored
    on the first windows of valid.bin, which changes nothing in the training, and the best one is kept in `best/`; after
    `patience` scores that are no better than the best the run is finished (0: never).

    `init`, another run or a saved model, brings the first weights and balancing bias; optimizer and schedule begin
    anew, and a run that goes on does not read it again. `compile` trains through torch.compile and `recompute` inside
    `recomputed`, for time and for memory.

    Each rank of a `world` calls this alike and takes its rows of a batch; the losses of the log are means over all, and
    only rank 0 reports, and writes all but the parts of a checkpoint. A signal to one of them ends all after the same
    step. Dropout draws the same numbers on each, so that one random state serves a resume. What one rank cannot do none
    does; one that is gone the others name, and end (over NCCL, torchrun ends them).

    ValueError or MoemlaError for settings, data or a folder that do not fit, or a run that another process writes;
    Diverged for a loss or a gradient that is no number: the state before that step is kept, as a checkpoint. The
    caller's random state and settings of torch stay as they are.
    """
    data, out = Path(data), Path(out)
    new = world.main and not out.exists()
    try:
        with ExitStack() as held:
            with world.agreed():
                device = usable_device(device) if device is not None else default_device()
                own = world.size == 1 or device.type != "cuda" or device.index in (None, torch.cuda.current_device())
                require(own, "device", str(device), "each process has a GPU of its own: leave out the number")
                counts = dict(checkpoint_every=checkpoint_every, validate_every=validate_every, patience=patience)
                _check_counts(**counts)
                tokenizer, shard = Tokenizer.load(data / "tokenizer.json"), TokenShard(data / "train.bin")
                _check_fit(config, train_config, tokenizer, shard)
                batches = Batches(shard, train_config.batch_size, train_config.seq_len, train_config.seed, world)
                validation = Validation(data, tokenizer, train_config, device, validate_every, patience)
                init, computed = None if init is None else shipped(init), dict(compile=compile, recompute=recompute)
                facts = read_json(data / "data.json")
                run = Run(data, out, config, train_config, tokenizer, facts, init, computed)
                if world.main:
                    held.enter_context(claimed(out, "moemla train"))
                held.enter_context(undisturbed(device))
                run.check(resume)
            with world.together():
                rate = matmul_rate(device, DTYPES[train_config.precision])
                session = Session(run, device, world, rate, init, on_progress)
                with recomputed(session.model) if recompute else nullcontext():
                    model = torch.compile(session.wrapped, dynamic=False) if compile else session.wrapped
                    _train(session, model, batches, validation, checkpoint_every)
                return session.model.eval()
    finally:
        if new:
            with suppress(OSError):  # it holds something, as it should
                out.rmdir()


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        whole = type(value) is int and value >= 0
        require(whole or (value is None and name == "checkpoint_every"), name, value, "must be 0 (not at all) or more")
    patience = counts["patience"]
    right = "needs validate_every=N, steps between scores"
    require(not patience or counts["validate_every"] > 0, "patience", patience, right)


def _check_fit(config: ModelConfig, train_config: TrainConfig, tokenizer: Tokenizer, shard: TokenShard) -> None:
    check_tokenizer(shard, tokenizer)
    right = f"the tokenizer has {tokenizer.vocab_size} tokens"
    require(config.vocab_size == tokenizer.vocab_size, "vocab_size", config.vocab_size, right)
    right = f"must be at most max_seq_len={config.max_seq_len}"
    require(train_config.seq_len <= config.max_seq_len, "seq_len", train_config.seq_len, right)


def _train(session: Session, model: torch.nn.Module, batches: Batches, validation, checkpoint_every) -> None:
    """The loop; `model` is the session's, wrapped as it is trained."""
    run, world, log, settings = session.run, session.world, session.log, session.run.settings
    optimizers, balancer, scaler, first = session.optimizers, session.balancer, session.scaler, session.state["step"]
    device = session.model.embedding.weight.device
    validation.take_up(session.state, best_of(run.out) if world.main else None)
    with _Interrupt() as interrupt, log:
        for step in range(first, settings.steps):
            if validation.ended:
                break
            lr, batch = rate_at(step, settings), batches.batch(step)
            try:
                with rewound(device):  # what is saved if it fails is the state before it
                    loss, norm = train_step(model, optimizers, balancer, batch, lr, settings, scaler, world)
            except Diverged as error:
                window = step * batches.batch_size % batches.windows
                where = f"step {step + 1} (epoch {batches.epoch(step)}, from window {window} on)"
                said = session.diverged(step, f"{where}: {error}", **validation.state())
                speaks = world.first("nan or inf" in str(error))  # the rank that holds the gradient to blame
                with world.agreed():  # all have seen it, one says it
                    if speaks in (None, world.rank):
                        raise said from error
            if step == first and world.main:  # it works: a first step that does not leaves nothing
                run.begin()
                log.begin_writing()
            valid_loss = None
            if validation.due(step + 1):
                valid_loss = validation.loss(session.model, world)
                better = validation.note(valid_loss)
                if world.any(world.main and better):  # who writes knows what is kept
                    save_best(run.out, session.model, run.tokenizer, step + 1, valid_loss, world)
            last = step + 1 == settings.steps or validation.ended
            log.add(step + 1, loss, norm, lr, balancer, valid_loss, scaler, last)
            stop = world.any(interrupt.seen)  # asked once: a signal after this line is the next step's
            if last or stop or (checkpoint_every and (step + 1) % checkpoint_every == 0):
                session.save(step + 1, **validation.state())
            if stop:
                raise KeyboardInterrupt(f"stopped after step {step + 1}; --resume continues")


@contextmanager
def recomputed(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the blocks of `model` keep nothing of a pass but their inputs, and backward makes the rest again.

    Activation checkpointing: a third more work for a fraction of the memory. The numbers stay what they are, dropout
    and the loads of the experts too, and no parameter has another name. The model may be wrapped. Built in chapter 13.
    """
    blocks = unwrapped(model).blocks
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class has one


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
        unheard = part is not rows[-1] and hasattr(model, "no_sync")  # copies speak once a step, not once a part
        with model.no_sync() if unheard else nullcontext():
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
    if scaler is not None:
        scaler.unscale(gradients(model))
    norm = gradient_norm(model, world)
    total = world.sum(total) / world.size
    numbers = torch.stack((total, norm)).isfinite().tolist()  # the one look that a GPU is waited for
    if not numbers[0] or not (numbers[1] or scaler):
        raise Diverged(f"the loss is {total.item():.4g}, {_worst_gradient(model)}")
    if scaler is None or scaler.update(numbers[1]):
        clip(model, train_config.clip, norm)
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
