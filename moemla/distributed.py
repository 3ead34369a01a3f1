"""The processes that train one model together, each on its share of the rows. Built in chapter 13."""

import os
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those that train together: `rank`, counted from 0, of `size`.

    `World()` is one process alone and asks nothing of torch.distributed; the ranks of a larger one speak through its
    default group, and each calls `sum`, `any`, `wait`, `mesh` and `grid` as often as the others and in their order.
    `parallel` says how they hold the model, "ddp" (copies) or "fsdp" (shards), and `expert_parallel` over how many
    neighbours its routed experts are spread; `moemla.parallel.wrap` does it. ValueError unless 0 <= rank < size, and
    `expert_parallel` divides the size.
    """

    rank: int = 0
    size: int = 1
    parallel: str = "ddp"
    expert_parallel: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}: must be at least 1")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank}: must be 0 to size - 1 = {self.size - 1}")
        if self.parallel not in ("ddp", "fsdp"):
            raise ValueError(f"parallel={self.parallel!r}: choose 'ddp' or 'fsdp'")
        if self.expert_parallel < 1 or self.size % self.expert_parallel:
            right = f"must divide the number of ranks, {self.size} (torchrun starts several)"
            raise ValueError(f"expert_parallel={self.expert_parallel}: {right}")

    @classmethod
    def current(cls, parallel: str = "ddp", expert_parallel: int = 1) -> "World":
        """That of torch.distributed's default group, or this process alone.

        In a process that torchrun has started, the group is begun where nobody has: gloo, and nccl for tensors on GPUs,
        of which this process then takes the one with its local rank.
        """
        layout = dict(parallel=parallel, expert_parallel=expert_parallel)
        if not dist.is_available():
            return cls(**layout)
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), **layout) if dist.is_initialized() else cls(**layout)

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    @cached_property
    def mesh(self) -> "dist.DeviceMesh | None":
        """All ranks in a row, as torch's wrappers want them; None alone."""
        if self.size == 1:
            return None
        return dist.init_device_mesh(self._device_type, (self.size,))

    @cached_property
    def grid(self) -> "dist.DeviceMesh | None":
        """The ranks as ("expert", "replica"): neighbours hold different experts, the same ones are some ranks apart.

        The first axis is outermost, so that a shard of a shard of the experts is a run of experts. None alone.
        """
        if self.size == 1:
            return None
        ranks = torch.arange(self.size, device="cpu").view(-1, self.expert_parallel).T
        return dist.DeviceMesh(self._device_type, ranks, mesh_dim_names=("expert", "replica"))

    @property
    def _device_type(self) -> str:
        return "cuda" if "nccl" in dist.get_backend_config() else "cpu"

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on one of the ranks."""
        if self.size == 1:
            return flag
        device = "cpu" if "cpu" in dist.get_backend_config() else "cuda"
        return self.sum(torch.tensor(int(flag), device=device)).item() > 0

    def wait(self) -> None:
        """Returns when every rank is here."""
        if self.size > 1:
            dist.barrier()


ALONE = World()
