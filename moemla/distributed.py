"""The processes that train one model together, each on its share of the rows. Built in chapter 13."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from moemla.errors import Elsewhere, MoemlaError

# What gloo and NCCL say when a rank has gone.
LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|DistNetworkError|DistBackendError")


@dataclass(frozen=True)
class World:
    """This process among those that train together: `rank`, counted from 0, of `size`.

    `World()` is one process alone and asks nothing of torch.distributed; the ranks of a larger one speak through its
    default group, and each calls its methods, `mesh` and `grid` as often as the others and in their order.
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
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            except RuntimeError as error:
                where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
                raise MoemlaError(f"the ranks cannot meet at {where}: {str(error).splitlines()[0]}") from error
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

    @property
    def _meeting(self) -> str:
        """Where a number is that all ranks compare."""
        return "cpu" if "cpu" in dist.get_backend_config() else "cuda"

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on one of the ranks."""
        return self.first(flag) is not None

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What one rank cannot do none does: its error is raised there, `Elsewhere` on the others."""
        failed = None
        try:
            yield
        except Exception as error:
            failed = error
        first = self.first(failed is not None)
        if failed is not None and first == self.rank:
            raise failed
        if first is not None:
            raise Elsewhere(f"rank {first} has failed, and says why") from failed

    def first(self, flag: bool) -> int | None:
        """The first rank on which `flag` is true; None where it is on none."""
        if self.size == 1:
            return 0 if flag else None
        mine = torch.tensor(self.rank if flag else self.size, device=self._meeting)
        dist.all_reduce(mine, dist.ReduceOp.MIN)
        return mine.item() if mine.item() < self.size else None

    def leave(self) -> None:
        """Ends the default group, at the end of a program that `current` began it for."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Says in one MoemlaError that another rank has ended, where torch says it in the words of its back end."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not lost(error):
                raise
            said = f"rank {self.rank} has lost the others: one has ended (its own line says why), or the network has"
            reason = " ".join(str(error).split())[-200:]  # the end of it: NCCL's "Last error"
            raise MoemlaError(f"{said} ({reason}); --resume goes on from the last checkpoint") from error

    def alike(self, number: int) -> bool:
        """Whether `number` is the same on all ranks."""
        if self.size == 1:
            return True
        ends = torch.tensor([number, -number], device=self._meeting)
        dist.all_reduce(ends, dist.ReduceOp.MIN)
        return bool(ends[0] == -ends[1])

    def wait(self) -> None:
        """Returns when every rank is here."""
        if self.size > 1:
            dist.barrier()


def lost(error: BaseException) -> bool:
    """Whether an error says that a rank cannot be heard any more."""
    return isinstance(error, RuntimeError) and bool(LOST.search(str(error)))


ALONE = World()
