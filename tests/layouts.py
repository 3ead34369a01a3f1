"""What every rank does for tests/test_parallel.py, in processes of their own."""

import resource
import shutil

import torch
import torch.distributed as dist

import moemla
from moemla import training
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


def without_room(folder: str, world: World) -> list[str]:
    """What each rank says when the last one has no room for its part of a checkpoint."""
    model = wrap(fresh(torch.float32), world)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        save_checkpoint(folder, model, make_optimizers(model), dict(step=9), world=world)
        said = "saved"
    except MoemlaError as error:
        said = f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    every = [None] * world.size
    dist.all_gather_object(every, said)
    return every


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
                )
        if rank == 0:
            torch.save(out, f"{folder}/found-{size}-{resume}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
