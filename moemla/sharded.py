"""Tensors of many ranks in one folder of safetensors, read by any number of ranks.

Written and read by torch.distributed.checkpoint: each rank writes what it holds, a copy is written once, and whoever
reads takes the parts that it needs, in its own layout, from one file or from many. Tensors only, by flat names: a
nested state would be written without complaint and could not be read. Built in chapter 13.
"""

import logging
import os
import warnings
from contextlib import contextmanager

import torch
from torch import Tensor

from moemla.errors import MoemlaError


def write(folder: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    """Writes `tensors`, of which each rank holds copies or parts (DTensors); every rank calls it with the same names.

    Any failure on one of them is raised on all.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(os.fspath(folder), save_distributed=True)
    with _plainly():
        checkpoint.save({name: _with_axis(tensor) for name, tensor in tensors.items()}, storage_writer=writer)


def contents(folder: str | os.PathLike) -> dict[str, Tensor]:
    """What a folder's safetensors hold: by name, whole tensors without their numbers (on the meta device).

    MoemlaError where a file cannot be read, or the parts do not make up a tensor.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        tensors = HuggingFaceStorageReader(os.fspath(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise MoemlaError(f"{folder} cannot be read: {' '.join(str(error).split())[:300]}") from error
    for name, tensor in tensors.items():
        held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
        if held != tensor.size.numel():
            raise MoemlaError(f"{folder}: parts of {name} hold {held} numbers of {tensor.size.numel()}: one is missing")
    return {name: torch.empty(one.size, dtype=one.properties.dtype, device="meta") for name, one in tensors.items()}


def read(folder: str | os.PathLike, tensors: dict[str, Tensor], held: dict[str, Tensor]) -> None:
    """Fills `tensors`, in place, from a folder that any number of ranks wrote; `held` is what `contents` found there.

    Ranks need not wait for each other. MoemlaError for a name or a shape that is not there.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    wanted = {name: _with_axis(tensor) for name, tensor in tensors.items()}
    for name, tensor in wanted.items():
        if name not in held:
            raise MoemlaError(f"{folder} holds no {name}")
        if held[name].dim() == 0:  # written by one process
            wanted[name] = tensor = tensors[name]
        if held[name].shape != tensor.shape:
            raise MoemlaError(f"{folder}: {name} is {tuple(held[name].shape)} there, {tuple(tensor.shape)} here")
    with _plainly():
        checkpoint.load(wanted, storage_reader=HuggingFaceStorageReader(os.fspath(folder)), no_dist=True)


def _with_axis(tensor: Tensor) -> Tensor:
    """A view with an axis: a number without one has no place that a part could be taken from."""
    return tensor.detach().reshape(1) if tensor.dim() == 0 else tensor.detach()


@contextmanager
def _plainly():
    """One rank's error as itself, and none of torch's remarks (that there are no ranks, no metadata file)."""
    from torch.distributed.checkpoint.api import CheckpointException

    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as errors:  # of all ranks, and no Exception by torch's reckoning
        rank, (error, _) = min(errors.failures.items())
        raise error if isinstance(error, RuntimeError) else MoemlaError(f"rank {rank}: {error}") from None
    finally:
        logger.setLevel(level)
