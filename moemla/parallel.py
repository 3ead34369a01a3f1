"""One model over many ranks: copies (DDP), shards (FSDP2), and experts that each live on one rank.

All three are torch's own engines but the way of a token to its expert and back, which is two all-to-alls. Whatever the
layout, `state_dict` names whole tensors (as DTensors where a rank holds a part), so that a checkpoint does not ask how
many ranks wrote it. Built in chapter 13.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moemla.distributed import World
from moemla.experts import Experts
from moemla.routing import Router


def wrap(model: nn.Module, world: World, param_dtype: torch.dtype | None = None) -> nn.Module:
    """`model` as the ranks of `world` train it: itself alone, else spread, sharded or copied, in place where it can be.

    Every rank must come with the same weights. Gradients become those of the mean of the ranks' losses. With
    `world.expert_parallel` > 1 each of that many neighbours keeps its share of the routed experts. "fsdp" keeps a
    rank's share of everything else, gathered block by block in `param_dtype` (routers always in their own), gradients
    summed in float32; "ddp" a copy. Blocks then take and give `param_dtype` too, where autocast alone keeps what is
    handed from block to block in float32. Make optimizers of what is returned. ValueError for more expert ranks than
    can be filled.
    """
    if world.size == 1:
        return model
    if world.expert_parallel > 1 and not _modules(model, Experts):
        raise ValueError(f"expert_parallel={world.expert_parallel}: the model has no experts")
    for experts in _modules(model, Experts):
        if world.expert_parallel > 1:
            _spread(experts, world)
    if world.parallel == "fsdp":
        return _sharded(model, world, param_dtype)
    spread = _spread_parameters(model)
    names = [name for name, parameter in model.named_parameters() if id(parameter) in spread]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model)
    wrapped.broadcast_buffers = False  # the balancing bias moves alike on every rank; the argument is deprecated
    return wrapped


def _modules(model: nn.Module, kind: type) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def _spread_parameters(model: nn.Module) -> set[int]:
    """The ids of those of experts that are spread over ranks."""
    return {id(p) for experts in _modules(model, Experts) if experts.dispatcher for p in experts.parameters()}


def _sharded(model: nn.Module, world: World, param_dtype: torch.dtype | None) -> nn.Module:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    wide = None if param_dtype is None else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=wide)
    for router in _modules(model, Router):
        fully_shard(router, mesh=world.mesh)  # first, and without the policy: it stays float32
    for experts in _modules(model, Experts):
        if experts.dispatcher:
            fully_shard(experts, mesh=world.grid["replica"], mp_policy=policy)
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    return fully_shard(model, mesh=world.mesh, mp_policy=policy)


# --- experts over ranks ---------------------------------------------------------------------------


def _spread(experts: Experts, world: World) -> None:
    """Leaves this rank's share of the experts, with the way to the others' and names that are whole."""
    n_experts, mesh = len(experts.w_in), world.grid
    share = -(-n_experts // world.expert_parallel)  # as torch.chunk and DTensor cut: the last one may have fewer
    if share * (world.expert_parallel - 1) >= n_experts:
        right = f"{n_experts} experts leave a rank without any; take fewer"
        raise ValueError(f"expert_parallel={world.expert_parallel}: {right}")
    place = mesh.get_local_rank("expert")
    with torch.no_grad():
        for name, whole in list(experts.named_parameters()):
            part = nn.Parameter(whole[place * share : (place + 1) * share].clone())
            setattr(experts, name, part)
            if world.parallel == "ddp":
                part.register_hook(partial(_mean, mesh=mesh["replica"]))
    neighbours = dict(group=mesh.get_group("expert"), share=1 / world.expert_parallel)
    experts.dispatcher = partial(RankDispatcher, n_experts=n_experts, **neighbours)
    experts.whole = partial(_whole, mesh=mesh, n_experts=n_experts)
    experts.register_state_dict_post_hook(_name_whole)
    experts.register_load_state_dict_pre_hook(partial(_take_share, mesh=mesh))


def _mean(grad: Tensor, mesh: dist.DeviceMesh) -> Tensor:
    """Over the copies of an expert, each of which has heard of its own neighbours' tokens."""
    if mesh.size() > 1:
        grad = grad / mesh.size()
        dist.all_reduce(grad, group=mesh.get_group())
    return grad


def _whole(tensor: Tensor, mesh: dist.DeviceMesh, n_experts: int) -> Tensor:
    """The DTensor of all experts, (E, ...), of which this rank holds `tensor`, (E', ...), which FSDP2 may have cut too.

    Shares its storage.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    local, placements = tensor, (Shard(0), Replicate())
    if isinstance(tensor, DTensor):
        local, placements = tensor.to_local(), (Shard(0), Shard(0))
    shape = torch.Size((n_experts, *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _name_whole(experts: Experts, state: dict, prefix: str, _) -> None:
    for name, _parameter in experts.named_parameters():
        state[prefix + name] = experts.whole(state[prefix + name])


def whole(model: nn.Module, parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """`tensor`, of a parameter's shape (its gradient, say), as what all ranks hold together: a DTensor if it is cut."""
    for experts in _modules(model, Experts):
        if experts.dispatcher and any(parameter is own for own in experts.parameters()):
            return experts.whole(tensor)
    return tensor


def _take_share(experts: Experts, state: dict, prefix: str, *_, mesh) -> None:
    for name, parameter in experts.named_parameters():
        tensor = state.get(prefix + name)
        if tensor is not None:
            tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            start = mesh.get_local_rank("expert") * -(-len(tensor) // mesh["expert"].size())
            state[prefix + name] = tensor[start : start + len(parameter)]


class RankDispatcher:
    """Rows to the ranks that hold their experts, and back, by all-to-all; see `moemla.experts.LocalDispatcher`.

    Each rank sends every other as many rows as chose its experts, however many: nothing is dropped or padded. The
    numbers go first, in an all-to-all of their own, for which the host waits. `share` is what a weight's gradient is
    multiplied by, 1 / ranks where each rank's loss is the mean of its own rows.
    """

    def __init__(self, expert: Int[Tensor, "m"], n_experts: int, group: "dist.ProcessGroup", share: float = 1.0):
        self.group, self.share, size = group, share, group.size()
        most = -(-n_experts // size)
        chosen = torch.zeros(size * most, dtype=torch.int64, device=expert.device)  # padded: the last may have fewer
        chosen = chosen.scatter_add(0, expert, torch.ones_like(expert))
        leaving = chosen.view(size, most)
        coming = torch.empty_like(leaving)
        dist.all_to_all_single(coming, leaving, group=group)
        self.leaving, self.coming = torch.stack([leaving.sum(1), coming.sum(1)]).tolist()
        here = min(most, n_experts - group.rank() * most)
        self.counts = coming.sum(0)[:here]
        expert = torch.arange(most, device=expert.device).repeat(size).repeat_interleave(coming.flatten())
        self.order = expert.argsort(stable=True)  # rows come by rank and are wanted by expert

    def dispatch(self, rows: Float[Tensor, "m w"]) -> Float[Tensor, "n w"]:
        """Rows (M, W), sorted by expert -> (M', W), those of the experts here, sorted by expert."""
        came = rows.new_empty(sum(self.coming), rows.shape[1])
        dist.all_to_all_single(came, rows.contiguous(), self.coming, self.leaving, group=self.group)
        return came[self.order]

    def combine(self, rows: Float[Tensor, "n w"]) -> Float[Tensor, "m w"]:
        """Rows (M', W) back to where they came from: (M, W)."""
        by_rank = torch.empty_like(rows)
        by_rank[self.order] = rows
        back = rows.new_empty(sum(self.leaving), rows.shape[1])
        dist.all_to_all_single(back, by_rank, self.leaving, self.coming, group=self.group)
        return back


# --- what the optimizers ask ----------------------------------------------------------------------


def _parts(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Each parameter, and whether it is an expert's that is spread over ranks."""
    spread = _spread_parameters(model)
    for parameter in model.parameters():
        yield parameter, id(parameter) in spread


def gradients(model: nn.Module) -> list[Tensor]:
    """All gradients that there are, of each the part that this rank holds."""
    held = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    return [grad.to_local() if hasattr(grad, "to_local") else grad for grad in held]


@torch.no_grad()
def gradient_norm(model: nn.Module, world: World) -> Tensor:
    """The norm of all gradients, of which ranks hold copies or parts: the same number on every rank.

    One that is not finite on any rank is so on all.
    """
    if world.expert_parallel == 1:
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    copied, cut = [], []
    for parameter, spread in _parts(model):
        if parameter.grad is None:
            continue
        if hasattr(parameter.grad, "to_local"):
            cut.append(parameter.grad.to_local())
        elif spread:  # held by as many ranks as there are copies of the experts
            cut.append(parameter.grad / (world.size // world.expert_parallel) ** 0.5)
        else:
            copied.append(parameter.grad)
    none = torch.zeros((), device=next(model.parameters()).device)
    norms = [nn.utils.get_total_norm(part) if part else none.clone() for part in (copied, cut)]
    return (norms[0].square() + world.sum(norms[1].square())).sqrt()


@torch.no_grad()
def clip(model: nn.Module, max_norm: float, norm: Tensor) -> None:
    """Shortens all gradients, whose norm is `norm`, to one of `max_norm`, as `torch.nn.utils.clip_grad_norm_` does."""
    torch._foreach_mul_(gradients(model), (max_norm / (norm + 1e-6)).clamp(max=1.0))
