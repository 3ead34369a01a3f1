"""What devices and number types ask for: tensors that stay wide in a narrow model, and devices that are refused."""

from collections.abc import Callable

import torch
from torch import Tensor


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, as `Module._apply` hands it down, without its narrowing: a move still moves, float64 is still allowed.

    Built in chapter 8.
    """

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrow = moved.is_floating_point() and moved.element_size() < 4
        return tensor.to(moved.device) if narrow else moved

    return apply


def require_known(device: torch.device | str) -> None:
    """ValueError for Apple's GPU ("mps"), on which nothing here has been run. Built in chapter 5."""
    if str(device).startswith("mps"):
        raise ValueError(f"device={str(device)!r}: nothing here has been run on Apple's GPU yet; use 'cpu'")
