"""Saving and resuming: whole or not at all, safetensors and JSON, no pickle.

A run's folder holds `config.json`, `tokenizer.json`, `train.json`, `metrics.jsonl` and `checkpoints/step-00001000/`. A
checkpoint is written under another name, flushed to the disk and renamed: whatever kills the process, the last complete
one can be loaded. `state.json` holds the checksums of the other files; where the last checkpoint has been damaged
since, the one before it is taken, with a warning. Built in chapter 13.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from moemla import sharded
from moemla.config import VERSION, ModelConfig
from moemla.devices import undisturbed
from moemla.distributed import ALONE, World, lost
from moemla.errors import Elsewhere, MoemlaError
from moemla.files import read_json, sha256, write_json
from moemla.model import LanguageModel, unwrapped
from moemla.parallel import whole
from moemla.tokenizer import Tokenizer

Content = TypeVar("Content")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # what weights may be stored in


def checkpoints(run: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in (Path(run) / "checkpoints").glob("step-*") if (path / "state.json").is_file())


def newest(run: str | os.PathLike, read: Callable[[Path], Content]) -> Content:
    """`read` of the last checkpoint from which it can be done; those passed over are named in one warning.

    MoemlaError, that of the last one, if none can be read.
    """
    failed: list[tuple[Path, MoemlaError]] = []
    for path in sorted((Path(run) / "checkpoints").glob("step-*"), reverse=True):
        try:
            content = read(path)
        except MoemlaError as error:
            failed.append((path, error))
            continue
        for _, error in failed:
            warnings.warn(f"{error}; {path.name} is taken instead", stacklevel=3)
        return content
    if failed:
        raise failed[0][1]
    raise MoemlaError(f"{run} holds no model: neither model.safetensors nor a complete checkpoint")


def _sum_of(state: dict) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _checked(folder: Path, *names: str) -> dict:
    """The state of a checkpoint, of which the files `names` are those that were written."""
    path = folder / "state.json"
    state = read_json(path)
    summed = "version" in state or "sha256" in state  # before version 1 there were none
    version, sums = state.pop("version", 0), state.pop("sha256", {})
    if summed and (not isinstance(sums, dict) or sums.pop("state", None) != _sum_of(state)):
        raise MoemlaError(f"{path} is damaged: its checksum does not fit")
    if isinstance(version, int) and version > VERSION:
        right = f"version {version}, this one knows {VERSION}"
        raise MoemlaError(f"{path} was written by a newer moemla ({right}): use that one")
    shards = [name for name in sums if name.startswith("shard-")]
    if shards:  # of more than one rank: no file holds the weights alone
        names = (*(name for name in names if not name.endswith(".safetensors")), *shards, "random.safetensors")
    for name in names:
        try:
            if summed and sums.get(name) != sha256(folder / name):
                raise MoemlaError(f"{folder / name} is damaged: its checksum does not fit")
        except OSError as error:
            raise MoemlaError(f"{folder / name} cannot be read: {error.strerror}") from error
    return state


def _optimizer_tensors(model: nn.Module, optimizers) -> dict[str, torch.Tensor]:
    """By "number/field/name of the parameter", as what all ranks hold together."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    held = {}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for field, value in state.items():  # a fused AdamW counts its steps in a tensor
                value = value if field == "step" else whole(model, parameter, value).contiguous()
                held[f"{number}/{field}/{names[parameter]}"] = value
    return held


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def _remove(path: Path) -> None:
    """Takes a checkpoint away under another name first: one that is half deleted is none."""
    hidden = path.with_name(f".{path.name}.old")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def save_checkpoint(
    run: str | os.PathLike, model: nn.Module, optimizers, state: dict, keep: int = 2, world: World = ALONE
) -> Path:
    """Writes model, optimizers, `state` (plain values; needs "step") and torch's random state; keeps the last `keep`.

    Each rank of a `world` calls it and writes its part; rank 0 opens all parts again and looks for every tensor, whole,
    before the checkpoint counts: all must see one folder. MoemlaError on every rank when one cannot write (no space
    left): nothing half-written stays, earlier checkpoints do.
    """
    model = unwrapped(model)
    folder = Path(run) / "checkpoints"
    target = folder / f"step-{state['step']:08d}"
    part = folder / f".{target.name}.part"
    try:
        with world.agreed():
            if world.main:
                _begin(folder, part)
        with world.agreed():
            _write(part, model, optimizers, world)
        with world.agreed():
            if world.main:
                _finish(run, target, part, model, optimizers, state, keep)
    except Exception as error:
        if world.main:
            shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, Elsewhere) or lost(error):
            raise
        raise MoemlaError(f"checkpoint {target} could not be written: {_brief(error)}") from error
    return target


def _begin(folder: Path, part: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir()


def _write(part: Path, model: LanguageModel, optimizers, world: World) -> None:
    from safetensors.torch import save_file

    held = _optimizer_tensors(model, optimizers)
    if world.size > 1:
        sharded.write(part, model.weights() | held)
    else:
        model.save(part)
        save_file(held | _random_state(model), part / "optimizer.safetensors")


def _finish(
    run: str | os.PathLike, target: Path, part: Path, model: LanguageModel, optimizers, state: dict, keep: int
) -> None:
    from safetensors.torch import save_file

    if not (part / "optimizer.safetensors").exists():
        write_json(part / "config.json", {"version": VERSION} | model.described.to_dict())
        held = sharded.contents(part)
        for name, tensor in (model.weights() | _optimizer_tensors(model, optimizers)).items():
            if name not in held or held[name].shape != (tensor.shape or (1,)):  # a number was given an axis
                raise MoemlaError(f"{name} is not whole in it: all ranks must see one folder")
        save_file(_random_state(model), part / "random.safetensors")
    sums = {path.name: sha256(path) for path in sorted(part.iterdir())} | {"state": _sum_of(state)}
    write_json(part / "state.json", {"version": VERSION} | state | {"sha256": sums})
    _sync(part)
    if target.exists():
        _remove(target)
    os.replace(part, target)
    _sync(target.parent)
    for old in [one for one in checkpoints(run) if one <= target][:-keep]:  # a later one could not be read
        _remove(old)


def _random_state(model: LanguageModel) -> dict[str, torch.Tensor]:
    """What dropout draws from: the CPU's generator and the GPU's own; the same on every rank."""
    device = model.embedding.weight.device
    state = {"rng": torch.get_rng_state()}
    return state | {"rng-cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def load_checkpoint(path: str | os.PathLike, model: nn.Module, optimizers=()) -> dict:
    """Puts weights, optimizer and random state back; returns the saved `state`.

    However many ranks wrote it, and however many there are now: each calls this with its model as it is trained.
    MoemlaError if it does not fit, is damaged, or holds a number that is none.
    """
    from safetensors import safe_open

    path, model = Path(path), unwrapped(model)
    state = _checked(path, "model.safetensors", "optimizer.safetensors")
    _load_weights(model, path)
    try:
        _load_optimizers(path, model, optimizers)
        file = path / ("random.safetensors" if is_sharded(path) else "optimizer.safetensors")
        with safe_open(file, framework="pt") as held:
            torch.set_rng_state(held.get_tensor("rng"))
            if "rng-cuda" in held.keys() and model.embedding.weight.is_cuda:  # noqa: SIM118
                torch.cuda.set_rng_state(held.get_tensor("rng-cuda"), model.embedding.weight.device)
    except Exception as error:
        raise MoemlaError(f"checkpoint {path} cannot be read: {_brief(error)}") from error
    return state


def _load_optimizers(path: Path, model: LanguageModel, optimizers) -> None:
    parameters, tensors = dict(model.named_parameters()), {}
    for optimizer in optimizers:
        optimizer.state.clear()  # of a checkpoint that could be read in part
    held = sharded.contents(path)
    for key in held:
        number, _, rest = key.partition("/")
        if not rest or int(number) >= len(optimizers):
            continue
        field, name = rest.split("/", 1)
        parameter = parameters[name]
        count = field == "step"  # of a fused AdamW: where its parameter is
        value = torch.zeros((), device=parameter.device) if count else torch.zeros_like(parameter)
        optimizers[int(number)].state[parameter][field] = value
        tensors[key] = value if count else whole(model, parameter, value)
    _read(path, tensors, held)


def _read(path: Path, tensors: dict[str, torch.Tensor], held: dict[str, torch.Tensor]) -> None:
    """Fills them in place; MoemlaError where one of their numbers is none, or was not meant for this."""
    for name in held.keys() & tensors.keys():
        _require_floats(name, held[name])
    sharded.read(path, tensors, held)
    for name, tensor in tensors.items():
        _require_numbers(name, tensor.to_local() if hasattr(tensor, "to_local") else tensor)


def is_sharded(folder: Path) -> bool:
    """Whether more than one rank wrote it."""
    return any(folder.glob("shard-*.safetensors"))


def _brief(error: Exception) -> str:
    """One line, and not the names of all tensors."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."


def _require_numbers(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """MoemlaError naming the tensor if it is not of floats, or one of them is none, or is none as a `dtype`."""
    _require_floats(name, tensor)
    if not tensor.to(dtype or tensor.dtype).isfinite().all():
        large = f"a number too large for {str(dtype).removeprefix('torch.')}"
        raise MoemlaError(f"{name} holds {large if tensor.isfinite().all() else 'NaN or inf'}")


def _require_floats(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise MoemlaError(f"{name} holds {kind}: numbers of 16, 32 or 64 bits with a point are wanted")


def _load_weights(model: LanguageModel, folder: Path) -> None:
    from safetensors.torch import load_file

    try:
        if is_sharded(folder) or any(hasattr(tensor, "to_local") for tensor in model.state_dict().values()):
            _read(folder, model.weights(), sharded.contents(folder))
            return
        weights, own = load_file(folder / "model.safetensors"), model.state_dict()
        for name, tensor in weights.items():
            _require_numbers(name, tensor, own[name].dtype if name in own else None)
        model.load_state_dict(weights)
    except Exception as error:
        raise MoemlaError(f"weights in {folder} cannot be loaded: {_brief(error)}") from error


def load(path: str | os.PathLike, device=None) -> tuple[LanguageModel, Tokenizer | None]:
    """(model, tokenizer) from a folder that `model.save` wrote or from a run (its last checkpoint). Built in chapter 5.

    Where there is no such folder, "pretrained/NAME" is a model that ships with the package. The model comes in float32
    and in eval mode; the tokenizer is None where the folder has none. MoemlaError if nothing is there, a file is
    damaged, or the tokenizer is not the run's.
    """
    path = shipped(path)
    whole = (path / "model.safetensors").is_file()
    with undisturbed(device):
        if whole:
            model = _model(path, device, is_checkpoint=(path / "state.json").is_file())
        else:
            model = newest(path, lambda folder: _model(folder, device, is_checkpoint=True))
    tokenizer = Tokenizer.load(path / "tokenizer.json") if (path / "tokenizer.json").is_file() else None
    _check_tokenizer(path, model.config, tokenizer)
    return model.eval(), tokenizer


SHIPPED = "pretrained"


def shipped(path: str | os.PathLike) -> Path:
    """The folder, if there is one; else the model of that name that ships, in the wheel or beside it in a checkout."""
    path = Path(path)
    if not path.exists() and path.parent == Path(SHIPPED):
        package = Path(__file__).resolve().parent
        for place in (package, package.parent):
            if (place / path / "config.json").is_file():
                return place / path
    return path


def _model(folder: Path, device, is_checkpoint: bool) -> LanguageModel:
    if is_checkpoint:
        _checked(folder, "config.json", "model.safetensors")
    try:
        config = ModelConfig.from_dict(read_json(folder / "config.json"))
    except (TypeError, ValueError) as error:
        raise MoemlaError(f"{folder / 'config.json'} cannot be used: {_brief(error)}") from error
    model = LanguageModel(config, device=device, dtype=torch.float32)
    _load_weights(model, folder)
    return model


def save_best(
    run: str | os.PathLike,
    model: LanguageModel,
    tokenizer: Tokenizer,
    step: int,
    valid_loss: float,
    world: World = ALONE,
) -> None:
    """Makes this model the one in `best/`, whole or not at all; every rank of a `world` calls it."""
    if not world.main:
        if world.parallel == "fsdp" or world.expert_parallel > 1:
            model.save(run)  # lends its parts and writes nothing
        return
    target, part, old = (Path(run) / name for name in ("best", ".best.part", ".best.old"))
    try:
        shutil.rmtree(part, ignore_errors=True)  # by a process that was killed
        model.save(part, tokenizer)
        write_json(part / "best.json", dict(version=VERSION, step=step, valid_loss=valid_loss))
        _sync(part)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(part, target)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise MoemlaError(f"{target} could not be written: {_brief(error)}") from error


def best_of(run: str | os.PathLike) -> dict | None:
    """`step` and `valid_loss` of the model in a run's `best/`; None where there is none."""
    target, before = Path(run) / "best", Path(run) / ".best.old"
    if before.is_dir() and not target.exists():  # killed while the two were exchanged
        os.replace(before, target)
    return read_json(target / "best.json") if target.is_dir() else None


def _check_tokenizer(path: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        return
    expected = read_json(path / "train.json").get("tokenizer") if (path / "train.json").is_file() else None
    if tokenizer.vocab_size != config.vocab_size or expected not in (None, tokenizer.hash):
        raise MoemlaError(
            f"{path / 'tokenizer.json'} ({tokenizer.vocab_size} tokens, {tokenizer.hash[:12]}) is not the tokenizer of "
            f"this model ({config.vocab_size} tokens{f', {expected[:12]}' if expected else ''}): put that one back"
        )
