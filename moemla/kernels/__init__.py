"""Triton kernels, and whether they can be used: each equals a plain function that lives with its idea.

Off until asked for: `enable()`, MOEMLA_KERNELS=1, or backend="triton" for experts alone. Asked for where they cannot
run (no Triton, a Mac, an old GPU, a type they do not know), the plain function runs, with one warning. With
TRITON_INTERPRET=1 they run on any CPU, slowly: to read and to test. Built in chapter 10.
"""

import os
import warnings
from functools import cache

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # sums are float32 in each
CAPABILITY = (8, 0)  # the first with bfloat16 and asynchronous copies
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton itself looks when it is imported

_enabled = os.environ.get("MOEMLA_KERNELS") == "1"


def enable(on: bool = True) -> bool:
    """Lets RoPE, router, decode and `backend="auto"` use kernels where they can; returns what was set before.

    Off by default: alone they are faster than the plain functions (`moemla bench kernels`), but a single step of decode
    from Python waits for the starts of operations, and there a layer with them is no faster.
    """
    global _enabled
    before, _enabled = _enabled, on
    return before


def enabled(*tensors: Tensor) -> bool:
    """Whether kernels are on and can take these tensors; an exported program has none."""
    return _enabled and not torch.compiler.is_exporting() and usable(*tensors)


def decodes(q: Tensor, other: Tensor, rank: int, joint: bool) -> bool:
    """Whether a decode kernel can take queries (B, H, ..., K) of latents R wide: `enabled`, and a tile can be held."""
    if not enabled(q, other):
        return False
    from moemla.kernels import tiling

    heads, width = q.shape[1], q.shape[-1]
    if joint:
        tile = tiling.joint_decode(q, heads, rank, width - rank)
    else:
        tile = tiling.latent_decode(q, heads, width // 2, rank)
    if tile is None and not torch.compiler.is_compiling():
        _warn(f"latents {rank} wide in {q.dtype} do not fit into the shared memory of a program")
    return tile is not None


def usable(*tensors: Tensor) -> bool:
    """Whether kernels can take these tensors; says once why not.

    ValueError for tensors on different devices.
    """
    reason = why_not(*tensors)
    if reason is not None and not torch.compiler.is_compiling():
        _warn(reason)
    return reason is None


def why_not(*tensors: Tensor) -> str | None:
    """The reason why kernels cannot take these tensors, or None. ValueError for different devices."""
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"device={', '.join(sorted(map(str, devices)))}: move the tensors to one device")
    (device,) = devices
    if (missing := _no_triton()) is not None:
        return missing
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "nothing here has been run on AMD's GPUs"
        gpu = torch.cuda.get_device_properties(device)
        if (gpu.major, gpu.minor) < CAPABILITY:
            return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, they need 8.0"
    elif device.type != "cpu" or not INTERPRETED:
        return f"they run on an NVIDIA GPU, and these tensors are on {device.type}"
    if INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in tensors):
        return "Triton's interpreter multiplies bfloat16 wrongly"
    strange = {str(tensor.dtype) for tensor in tensors if tensor.is_floating_point() and tensor.dtype not in DTYPES}
    return f"they do not know {', '.join(sorted(strange))}" if strange else None


@cache
def _no_triton() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed (pip install triton, on Linux)"
    return None


@cache
def _warn(reason: str) -> None:
    warnings.warn(f"Triton kernels are not used: {reason}. The plain functions run instead.", stacklevel=4)
