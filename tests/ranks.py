"""What every rank does for tests/test_ranks.py, in processes of their own: results go to a file for each rank."""

import warnings

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import moemla
from moemla.balancing import Balancer
from moemla.config import TrainConfig
from moemla.model import LanguageModel, unwrapped
from moemla.optim import make_optimizers
from moemla.routing import Router, record_routing
from moemla.training import train_step
from tests.helpers import model_of, tokens_of

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


def train(model, optimizer: str, rule: str, rank: int = 0, world: int = 1, micro_batches: int = 1, group=None):
    """(losses, loads of each step, biases, weights) of a short training with every kind of loss."""
    settings = TrainConfig(batch_size=ROWS // world, micro_batches=micro_batches, switch_loss=0.5, z_loss=0.1, clip=1.0)
    optimizers, balancer = make_optimizers(model, optimizer, 1e-2), Balancer(model, rule, group=group)
    losses, loads = [], []
    for batch in batches(rank, world):
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


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        alone = [dist.new_group([one]) for one in range(world)]
        mesh = init_device_mesh("cpu", (world,))
        out = dict(sums=sums(fresh(), rank, world))
        wrapped = DistributedDataParallel(fresh())
        out["ddp"] = train(wrapped, "muon", "sign", rank, world, micro_batches=2)
        unwrapped(wrapped).save(f"{folder}/ddp-{rank}")
        out["story"] = moemla.generate(wrapped, torch.tensor([[3, 4]]), 5)
        out["own group"] = train(fresh(), "muon", "sign", rank, world, group=alone[rank])
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
