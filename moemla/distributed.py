"""The processes that train one model together: each has the whole of it and takes a share of the rows.

Built in chapter 13.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among those that train together: `rank`, counted from 0, of `size`.

    `World()` is one process alone and asks nothing of torch.distributed; the ranks of a larger one speak through its
    default group, and each calls `sum`, `any`, `wait`, `mesh` and `wrap` as often as the others and in their order.
    ValueError unless 0 <= rank < size.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size={self.size}: must be at least 1")
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank={self.rank}: must be 0 to size - 1 = {self.size - 1}")

    @classmethod
    def current(cls) -> "World":
        """That of torch.distributed's default group, or this process alone.

        In a process that torchrun has started, the group is begun where nobody has: gloo, and nccl for tensors on GPUs.
        """
        if not dist.is_available():
            return cls()
        if dist.is_torchelastic_launched() and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    @property
    def main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    @cached_property
    def mesh(self) -> "dist.DeviceMesh | None":
        """All ranks in a row, as torch's wrappers want them; None alone."""
        if self.size == 1:
            return None
        return dist.init_device_mesh("cuda" if "nccl" in dist.get_backend_config() else "cpu", (self.size,))

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

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` as it is trained: itself alone, else under DDP.

        Every rank begins with the weights of rank 0 and takes the mean of all gradients. Buffers are not handed round
        at each pass: the balancing bias moves alike on every rank.
        """
        if self.size == 1:
            return model
        wrapped = DistributedDataParallel(model)
        wrapped.broadcast_buffers = False  # the argument is deprecated, and would leave rank 0's buffers out
        return wrapped


ALONE = World()
