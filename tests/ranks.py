"""What every rank does for tests/test_ranks.py, in processes of their own: results go to a file for each rank."""

import signal
import warnings
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import moemla
from moemla import training
from moemla.balancing import Balancer
from moemla.config import TrainConfig
from moemla.distributed import ALONE, World
from moemla.model import LanguageModel, unwrapped
from moemla.moe import MixtureOfExperts
from moemla.optim import make_optimizers
from moemla.parallel import RankDispatcher, wrap
from moemla.routing import Router, record_routing
from moemla.training import train_step
from tests.helpers import model_of, shake, tokens_of
from tests.runs import micro, quick

ROWS, STEPS = 12, 2  # rows of a step on all ranks together; steps


def batches(rank: int = 0, world: int = 1):
    """The same steps for any number of ranks, each of which takes its share of the rows; rows differ in length of
    their words, so that ranks and micro-batches prefer other experts.
    """
    for step in range(STEPS):
        tokens = (tokens_of(ROWS, 9, seed=step) % 5 + 3 * torch.arange(ROWS)[:, None]) % 37
        yield tuple(part.chunk(world)[rank] for part in (tokens, tokens.roll(-1, 1)))


def fresh() -> LanguageModel:
    return model_of("mla-rope", torch.float64).train()


def train(model, optimizer: str, rule: str, rank: int = 0, size: int = 1, micro_batches: int = 1, **balanced):
    """(losses, loads of each step, biases, weights) of a short training with every kind of loss."""
    settings = TrainConfig(batch_size=ROWS // size, micro_batches=micro_batches, switch_loss=0.5, z_loss=0.1, clip=1.0)
    optimizers, balancer = make_optimizers(model, optimizer, 1e-2), Balancer(model, rule, **balanced)
    losses, loads = [], []
    for batch in batches(rank, size):
        loss, _ = train_step(model, optimizers, balancer, batch, 1e-2, settings)
        losses.append(loss)
        loads.append(torch.stack(balancer.counts))
    weights = [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
    return dict(
        losses=torch.stack(losses),
        loads=torch.stack(loads),
        biases=torch.stack([router.bias for router in balancer.routers]),
        weights=torch.cat([weight.flatten() for weight in weights]),
    )


def sums(model, rank: int, world: int) -> dict:
    """Loads and histograms under DDP's defaults, of micro-batches with `no_sync` and without."""
    wrapped = DistributedDataParallel(model)
    balancer = Balancer(wrapped, "quantile")
    tokens, targets = next(batches(rank, world))
    with wrapped.no_sync():
        for part in (slice(0, 1), slice(1, 2)):
            wrapped(tokens[part], targets[part]).backward()
    for part in (slice(2, 3), slice(3, None)):
        wrapped(tokens[part], targets[part]).backward()
    own = [router.load.clone() for router in balancer.routers]
    margins = [router.margins.clone() for router in balancer.routers]
    balancer.step()
    biases = torch.stack([router.bias for router in balancer.routers])
    return dict(own=torch.stack(own), margins=torch.stack(margins), all=torch.stack(balancer.counts), biases=biases)


def sharded(model, mesh, param_dtype=None, routers_first: bool = True):
    policy = MixedPrecisionPolicy(param_dtype=param_dtype)
    if routers_first:
        for module in model.modules():
            if isinstance(module, Router):
                fully_shard(module, mesh=mesh)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def wide(mesh, rank: int, world: int, routers_first: bool) -> dict:
    """What the routers make of bfloat16 tokens under FSDP2's mixed precision, and what they were given."""
    model = sharded(fresh().float(), mesh, torch.bfloat16, routers_first)
    given = []
    for block in model.blocks:
        block.feedforward.router.register_forward_pre_hook(lambda _, args: given.append(args[0].detach()))
    with warnings.catch_warnings(record=True) as said, record_routing(model) as routings:
        warnings.simplefilter("always")
        loss = model(*next(batches(rank, world)))
    (loss + sum(routing.logits.square().mean() for routing in routings)).backward()
    routers = [block.feedforward.router for block in model.blocks]
    return dict(
        given=torch.stack(given),
        logits=torch.stack([routing.logits.detach() for routing in routings]),
        gates=torch.stack([routing.gate.detach() for routing in routings]),
        weights=torch.stack([router.weight.full_tensor().detach() for router in routers]),
        grads=torch.stack([router.weight.grad.full_tensor() for router in routers]),
        biases=torch.stack([router.bias for router in routers]),
        said=[str(one.message) for one in said if "router.weight" in str(one.message)],
    )


def together(world: World) -> dict:
    """What each rank hears of a world."""
    last = world.rank == world.size - 1
    return dict(
        ranks=[world.rank, world.size],
        sum=world.sum(torch.tensor([1, 10**world.rank])),
        alone=ALONE.sum(torch.tensor([1, 10**world.rank])),
        any=[world.any(last), world.any(True), world.any(False)],
        alike=[world.alike(7), world.alike(world.rank)],
        mesh=[world.mesh.size(), world.mesh.get_local_rank()],
    )


E = 6  # experts of `layer`, which 2 and 3 ranks can share


def layer() -> tuple[MixtureOfExperts, torch.Tensor]:
    """(a layer, seven sequences)"""
    moe = shake(MixtureOfExperts(d_model=8, n_experts=E, top_k=2, d_expert=5, dtype=torch.float64))
    return moe, torch.randn(7, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def passed(moe: MixtureOfExperts, x: torch.Tensor) -> dict:
    """The output and all gradients."""
    x = x.clone().requires_grad_()
    out = moe(x)
    out.square().sum().backward()
    grads = dict(w_in=moe.experts.w_in.grad, w_out=moe.experts.w_out.grad, router=moe.router.weight.grad)
    return dict(out=out.detach(), x=x.grad, **grads)


def spread(world: World, idle: bool) -> dict:
    """A layer whose experts are spread over the ranks, each with sequences of its own; `idle`: rank 0 has none."""
    moe, x = layer()
    routed = moe.experts
    routed.w_in, routed.w_out = (nn.Parameter(w.chunk(world.size)[world.rank]) for w in (routed.w_in, routed.w_out))
    routed.dispatcher = partial(RankDispatcher, n_experts=E, group=dist.group.WORLD)
    parts = [x[:0], *x.tensor_split(world.size - 1)] if idle else x.tensor_split(world.size)
    return passed(moe, parts[world.rank])


def trained(data: str, out: str, world: World = ALONE, resume: bool = False) -> dict:
    """What `moemla.train` reported and learnt, in float64."""
    settings = quick(6, batch_size=6, micro_batches=2, switch_loss=0.5, z_loss=0.1, clip=0.5, log_every=2)
    rows = []
    torch.set_default_dtype(torch.float64)
    try:
        how = dict(resume=resume, validate_every=4, on_progress=rows.append, world=world)
        model = moemla.train(micro(), settings, data, out, **how)
    finally:
        torch.set_default_dtype(torch.float32)
    weights = torch.cat([p.detach().flatten() for p in model.state_dict().values()])
    return dict(rows=[asdict(row) for row in rows], weights=weights)


def stopped(data: str, out: str, world: World) -> str:
    """What the interruption says when a signal reaches the last rank alone, in step 3."""
    step, signals = training.train_step, iter([False, False, world.rank == world.size - 1])

    def signalled(*how):
        if next(signals, False):
            signal.raise_signal(signal.SIGINT)
        return step(*how)

    training.train_step = signalled
    try:
        trained(data, out, world)
    except KeyboardInterrupt as stop:
        return str(stop)
    finally:
        training.train_step = step


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        alone = [dist.new_group([one]) for one in range(world)]
        here = World.current()
        mesh = here.mesh
        out = dict(sums=sums(fresh(), rank, world), together=together(here))
        wrapped = wrap(fresh(), here)
        out["ddp"] = train(wrapped, "muon", "sign", rank, world, micro_batches=2)
        unwrapped(wrapped).save(f"{folder}/ddp-{rank}")
        out["story"] = moemla.generate(wrapped, torch.tensor([[3, 4]]), 5)
        out["own group"] = train(fresh(), "muon", "sign", rank, world, group=alone[rank])
        out["own world"] = train(fresh(), "muon", "sign", rank, world, world=ALONE)
        out["spread"] = [spread(here, idle) for idle in (False, True)]
        training.matmul_rate = lambda device, dtype: 1e9  # two that measure at once would wait for each other
        out["trained"] = trained(f"{folder}/data", f"{folder}/run-all", here)
        out["stopped"] = stopped(f"{folder}/data", f"{folder}/run", here)
        out["resumed"] = trained(f"{folder}/data", f"{folder}/run", here, resume=True)
        model = sharded(fresh(), mesh)
        out["fsdp"] = train(model, "muon", "sign", rank, world, micro_batches=2)
        model.save(f"{folder}/fsdp")
        try:
            moemla.generate(model, torch.tensor([[3, 4]]), 5)
        except ValueError as error:
            out["refused"] = str(error)
        out["routers first"] = wide(mesh, rank, world, True)
        out["as it comes"] = wide(mesh, rank, world, False)
        torch.save(out, f"{folder}/rank-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
