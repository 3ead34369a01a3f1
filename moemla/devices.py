"""What devices and number types ask for.

Tensors that stay wide in a narrow model, weights drawn later, tensors that are one, devices that are refused, and
settings and random states given back. Built in chapter 13.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's, malloc.h
_OF_MKL = ("acos", "asin", "atan", "cos", "cosh", "erf", "erfc", "erfinv", "exp", "expm1", "lgamma", "log", "log10")
_OF_MKL += ("log1p", "log2", "sin", "sinh", "sqrt", "tan", "tanh")


def _settle() -> None:
    """Calls each elementwise function of MKL once, on one number and so from one thread.

    Its first call looks for the code that suits the processor. Where two threads make that call at once, one of them
    may get code of low accuracy, for its half and that once (pytorch/pytorch#188792): square roots wrong by 2e-4 were
    seen in float32, and rotary tables wrong by 7e-9 in float64.
    """
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for name in _OF_MKL:
            getattr(number, name)()


_settle()


def at_least_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn`, as `Module._apply` hands it down, without its narrowing: a move still moves, float64 is still allowed.

    Built in chapter 8.
    """

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrow = moved.is_floating_point() and moved.element_size() < 4
        return tensor.to(moved.device) if narrow else moved

    return apply


class Layer(nn.Module):
    """A module made of modules.

    `reset_parameters` draws the initial weights again: the numbers that the constructor draws from the same seed.
    """

    def reset_parameters(self) -> None:
        """Initial weights, drawn in the constructor's order; what `to_empty` leaves behind becomes a new layer."""
        for child in self.children():
            for layer in child if isinstance(child, nn.ModuleList) else [child]:
                if hasattr(layer, "reset_parameters"):  # dropout has none
                    layer.reset_parameters()


def same_storage(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same numbers in the same place, so that what is written into one is read in the other."""
    if a is b:
        return True
    where = [(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return where[0] == where[1]  # a pointer to the storage itself: on the meta device all data pointers are 0


def require_known(device: torch.device | str) -> None:
    """ValueError for Apple's GPU ("mps"), on which nothing here has been run. Built in chapter 5."""
    if str(device).startswith("mps"):
        raise ValueError(f"device={str(device)!r}: nothing here has been run on Apple's GPU yet; use 'cpu'")


def keep_freed_memory() -> bool:
    """Lets glibc keep what is freed for the next step, instead of handing it back and asking for clean pages again.

    For the whole process: a program that trains may do it, a library not. False where there is another allocator. Built
    in chapter 15.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    largest_block, never = 32 << 20, 2**31 - 1
    return bool(mallopt(_MMAP_THRESHOLD, largest_block) and mallopt(_TRIM_THRESHOLD, never))


@contextmanager
def undisturbed(device: torch.device | str | None = None) -> Iterator[None]:
    """The caller's random states and flush-denormal setting are at the end what they were before, whatever happens.

    The GPUs' random states are kept where `device` is one; what runs on the CPU must not touch them.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    smallest = torch.full((), torch.finfo(torch.float32).tiny, dtype=torch.float32, device="cpu")
    flushed = (smallest / 2).item() == 0  # torch has no question for it
    with torch.random.fork_rng(gpus):
        try:
            yield
        finally:
            torch.set_flush_denormal(flushed)


@contextmanager
def rewound(device: torch.device) -> Iterator[None]:
    """An error inside leaves the random state, that of `device` too, as it was before."""
    cpu, gpu = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    except BaseException:
        torch.set_rng_state(cpu)
        if gpu is not None:
            torch.cuda.set_rng_state(gpu, device)
        raise


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU. Built in chapter 5."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def usable_device(name: torch.device | str) -> torch.device:
    """The device of that name; ValueError where there is none, or nothing here has run on it. Built in chapter 5."""
    require_known(name)
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such device, or torch was built without it
        raise ValueError(f"device={str(name)!r}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError(f"device={str(name)!r}: holds no numbers; choose cpu or cuda")
    return device
