"""What every rank does for tests/test_parallel.py, in processes of their own."""

import resource
import shutil

import torch
import torch.distributed as dist

import moemla
from moemla import sharded, training
from moemla.balancing import RULES, Balancer
from moemla.checkpoint import save_checkpoint
from moemla.config import TrainConfig
from moemla.distributed import ALONE, World
from moemla.errors import MoemlaError
from moemla.model import LanguageModel, unwrapped
from moemla.optim import make_optimizers
from moemla.parallel import wrap
from moemla.precision import DTYPES, LossScaler
from moemla.training import train_step
from tests.helpers import model_of, tokens_of
from tests.runs import Stop, micro, quick

LAYOUTS = {
    "ddp": dict(),
    "fsdp": dict(parallel="fsdp"),
    "experts": dict(expert_parallel=2),
    "experts-fsdp": dict(expert_parallel=2, parallel="fsdp"),
}
ROWS = 12  # of a step, on all ranks together


def fresh(dtype: torch.dtype) -> LanguageModel:
    return model_of("mla-rope", dtype).train()  # seven experts: ranks have three and four


def weights_of(model) -> torch.Tensor:
    """All of them on each rank, the balancing bias included."""
    state = unwrapped(model).state_dict().values()
    whole = [tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor for tensor in state]
    return torch.cat([tensor.detach().flatten().double() for tensor in whole])


def train(
    dtype: torch.dtype,
    steps: int,
    lr: float,
    optimizer: str,
    world: World = ALONE,
    parts: int = 1,
    precision: str = "float32",
) -> dict:
    """Losses, gradient norms and weights of a training in which every rule of balancing has its turn."""
    model = wrap(fresh(dtype), world, None if precision == "float32" else DTYPES[precision])
    sizes = dict(batch_size=ROWS // world.size, micro_batches=parts, precision=precision)
    settings = TrainConfig(switch_loss=0.5, z_loss=0.1, clip=1.0, **sizes)
    scaler = LossScaler(2.0**10) if precision == "fp16" else None
    optimizers, rules = make_optimizers(model, optimizer, lr), list(RULES)
    losses, norms = [], []
    for step in range(steps):
        if step % (-(-steps // len(rules))) == 0:
            balancer = Balancer(model, rules[len(losses) * len(rules) // steps], world=world)
        tokens = (tokens_of(ROWS, 9, seed=step) % 5 + 3 * torch.arange(ROWS)[:, None]) % 37
        batch = [part.chunk(world.size)[world.rank] for part in (tokens, tokens.roll(-1, 1))]
        loss, norm = train_step(model, optimizers, balancer, batch, lr, settings, scaler, world)
        losses.append(loss)
        norms.append(norm)
    return dict(losses=torch.stack(losses), norms=torch.stack(norms), weights=weights_of(model))


def run(data: str, out: str, world: World = ALONE, resume: bool = False, stop: bool = False) -> torch.Tensor | None:
    """The weights that `moemla.train` ends with, in float64; `stop`: after the checkpoint of step 3."""
    settings = quick(6, batch_size=ROWS, micro_batches=2, switch_loss=0.1, balance_rule="quantile")
    step = training.train_step
    count = iter(range(3))

    def stopping(*arguments):
        if stop and next(count, None) is None:
            raise Stop
        return step(*arguments)

    training.train_step = stopping
    torch.set_default_dtype(torch.float64)
    try:
        how = dict(resume=resume, validate_every=2, checkpoint_every=3, world=world)
        model = moemla.train(micro(n_experts=5), settings, data, out, **how)
    except Stop:
        return None
    finally:
        torch.set_default_dtype(torch.float32)
        training.train_step = step
    return weights_of(model)


def heard(world: World) -> list[int]:
    """How often copies speak in a step: of one part, and of three."""
    counts = []
    for parts in (1, 3):
        model, said = wrap(fresh(torch.float64), world), []

        def hook(_, bucket, said=said):
            said.append(bucket.index())
            return (
                dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0] / world.size)
            )

        model.register_comm_hook(None, hook)
        settings = TrainConfig(batch_size=ROWS // world.size, micro_batches=parts)
        batch = [
            part.chunk(world.size)[world.rank] for part in (tokens_of(ROWS, 9) % 37, tokens_of(ROWS, 9, seed=1) % 37)
        ]
        train_step(model, make_optimizers(model), Balancer(model, world=world), batch, 1e-2, settings, world=world)
        counts.append(len(said))
    return counts


def said(call, *arguments, world: World) -> list[str]:
    """What each rank says of a call, which takes the world too: its error, or that it worked."""
    try:
        call(*arguments, world=world)
        mine = "it worked"
    except MoemlaError as error:
        mine = f"{type(error).__name__}: {error}"
    every = [None] * world.size
    dist.all_gather_object(every, mine)
    return every


def without_room(folder: str, world: World) -> list[str]:
    """What each rank says when the last one has no room for its part of a checkpoint."""
    model = wrap(fresh(torch.float32), world)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        return said(save_checkpoint, folder, model, make_optimizers(model), dict(step=9), world=world)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def gone(folder: str, world: World) -> list[str]:
    """What each rank says when rank 0 does not see what the last one wrote."""
    model = wrap(fresh(torch.float32), world)
    write = sharded.write

    def unseen(part, tensors):
        write(part, tensors)
        if world.rank == world.size - 1:
            (own,) = part.glob(f"shard-{world.size:05d}-*.safetensors")
            own.unlink()

    sharded.write = unseen
    try:
        return said(save_checkpoint, folder, model, make_optimizers(model), dict(step=9), world=world)
    finally:
        sharded.write = write


def worse(data: str, out: str, world: World) -> int | str:
    """The last step of a run that ends at a score that is no better, with a checkpoint behind each step; or its end."""
    how = dict(validate_every=1, checkpoint_every=1, patience=1, world=world)
    rows = []
    settings = quick(30, batch_size=ROWS, lr=0.6, warmup=12, optimizer="adamw")
    try:
        moemla.train(micro(n_experts=5), settings, data, out, on_progress=rows.append, **how)
    except MoemlaError as error:
        return str(error)
    return rows[-1].step if rows else 0


def spoilt(data: str, out: str, world: World) -> list[str]:
    """What each rank says of a gradient that is no number in the last one's part."""
    real = training.gradient_norm

    def poisoned(model, world):
        if world.rank == world.size - 1:
            name = "blocks.0.feedforward.experts.w_in"
            gradients = {path.split("module.")[-1]: parameter.grad for path, parameter in model.named_parameters()}
            grad = gradients[name]
            (grad.to_local() if hasattr(grad, "to_local") else grad).fill_(float("nan"))
        return real(model, world)

    training.gradient_norm = poisoned
    try:
        return said(moemla.train, micro(n_experts=5), quick(2, batch_size=ROWS), data, out, world=world)
    finally:
        training.gradient_norm = real


def work(rank: int, size: int, folder: str, resume: bool) -> None:
    """Two ranks train and stop; with `resume`, whatever their number, they go on with copies of what is there."""
    torch.set_num_threads(1)
    training.matmul_rate = lambda device, dtype: 1e9  # two that measure at once would wait for each other
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}-{resume}", rank=rank, world_size=size)
    out = {}
    try:
        for name, layout in LAYOUTS.items():
            world = World(rank, size, **layout)
            if resume:
                copy = f"{folder}/{name}-on-{size}"
                if world.main:
                    shutil.copytree(f"{folder}/{name}", copy)
                world.wait()
                out[name] = run(f"{folder}/data", copy, world, resume=True)
            else:
                run(f"{folder}/data", f"{folder}/{name}", world, stop=True)
                out[name] = dict(
                    double=train(torch.float64, 50, 1e-2, "muon", world, parts=2),
                    adamw=train(torch.float64, 10, 1e-2, "adamw", world),
                    single=train(torch.float32, 25, 3e-4, "muon", world),
                    **{kind: train(torch.float32, 6, 3e-4, "muon", world, precision=kind) for kind in ("bf16", "fp16")},
                    full=without_room(f"{folder}/{name}", world),
                    gone=gone(f"{folder}/{name}", world),
                    worse=worse(f"{folder}/data", f"{folder}/{name}-worse", world),
                    spoilt=spoilt(f"{folder}/data", f"{folder}/{name}-spoilt", world) if "experts" in name else None,
                    heard=heard(world) if name in ("ddp", "experts") else None,
                )
        if rank == 0:
            torch.save(out, f"{folder}/found-{size}-{resume}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
