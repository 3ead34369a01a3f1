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

from moemla.config import VERSION, ModelConfig
from moemla.devices import undisturbed
from moemla.errors import MoemlaError
from moemla.files import read_json, write_json
from moemla.model import LanguageModel, unwrapped
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


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    for name in names:
        try:
            if summed and sums.get(name) != _sum(folder / name):
                raise MoemlaError(f"{folder / name} is damaged: its checksum does not fit")
        except OSError as error:
            raise MoemlaError(f"{folder / name} cannot be read: {error.strerror}") from error
    return state


def _optimizer_tensors(optimizers, names: dict[nn.Parameter, str]) -> dict[str, torch.Tensor]:
    return {
        f"{number}/{field}/{names[parameter]}": value.contiguous()
        for number, optimizer in enumerate(optimizers)
        for parameter, state in optimizer.state.items()
        for field, value in state.items()
    }


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


def save_checkpoint(run: str | os.PathLike, model: nn.Module, optimizers, state: dict, keep: int = 2) -> Path:
    """Writes model, optimizers, `state` (plain values; needs "step") and torch's random state; keeps the last `keep`.

    MoemlaError when it cannot be written (no space left): nothing half-written stays, earlier checkpoints do.
    """
    from safetensors.torch import save_file

    model = unwrapped(model)
    folder = Path(run) / "checkpoints"
    target = folder / f"step-{state['step']:08d}"
    part = folder / f".{target.name}.part"
    names = {parameter: name for name, parameter in model.named_parameters()}
    device = model.embedding.weight.device
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".step-*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        model.save(part)
        save_file(_optimizer_tensors(optimizers, names) | _random_state(device), part / "optimizer.safetensors")
        sums = {path.name: _sum(path) for path in sorted(part.iterdir())} | {"state": _sum_of(state)}
        write_json(part / "state.json", {"version": VERSION} | state | {"sha256": sums})
        _sync(part)
        if target.exists():
            _remove(target)
        os.replace(part, target)
        _sync(folder)
        for old in checkpoints(run)[:-keep]:
            _remove(old)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise MoemlaError(f"checkpoint {target} could not be written: {_brief(error)}") from error
    return target


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """What dropout draws from: the CPU's generator and the GPU's own."""
    state = {"rng": torch.get_rng_state()}
    return state | {"rng-cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def load_checkpoint(path: str | os.PathLike, model: nn.Module, optimizers=()) -> dict:
    """Puts weights, optimizer and random state back; returns the saved `state`.

    MoemlaError if it does not fit, is damaged, or holds a number that is none.
    """
    from safetensors.torch import load_file

    path, model = Path(path), unwrapped(model)
    state = _checked(path, "model.safetensors", "optimizer.safetensors")
    _load_weights(model, path)
    try:
        tensors = load_file(path / "optimizer.safetensors")
        random, on_gpu = tensors.pop("rng"), tensors.pop("rng-cuda", None)
        for name, tensor in tensors.items():
            _require_numbers(name, tensor)
        torch.set_rng_state(random)
        if on_gpu is not None and model.embedding.weight.is_cuda:
            torch.cuda.set_rng_state(on_gpu, model.embedding.weight.device)
        parameters = dict(model.named_parameters())
        for number, optimizer in enumerate(optimizers):
            optimizer.state.clear()  # of a checkpoint that could be read in part
            mine = {key: value for key, value in tensors.items() if key.startswith(f"{number}/")}
            for key, value in mine.items():
                _, field, name = key.split("/", 2)
                parameter = parameters[name]
                optimizer.state[parameter][field] = value.to(parameter.device)  # a fused AdamW counts its steps there
    except Exception as error:
        raise MoemlaError(f"checkpoint {path} cannot be read: {_brief(error)}") from error
    return state


def _brief(error: Exception) -> str:
    """One line, and not the names of all tensors."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."


def _require_numbers(name: str, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """MoemlaError naming the tensor if it is not of floats, or one of them is none, or is none as a `dtype`."""
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise MoemlaError(f"{name} holds {kind}: numbers of 16, 32 or 64 bits with a point are wanted")
    if not tensor.to(dtype or tensor.dtype).isfinite().all():
        large = f"a number too large for {str(dtype).removeprefix('torch.')}"
        raise MoemlaError(f"{name} holds {large if tensor.isfinite().all() else 'NaN or inf'}")


def _load_weights(model: LanguageModel, folder: Path) -> None:
    from safetensors.torch import load_file

    try:
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


def data_folder(run: str | os.PathLike) -> Path:
    """Where the prepared data of a run lies now: by its place beside the run, else by its place at the time.

    The folder's data.json must hold the hash that the run was trained on; MoemlaError where none does.
    """
    run = Path(run)
    facts = read_json(run / "train.json")
    folder = str(facts.get("folder", ""))
    if facts.get("version", 0):
        candidates = [run / folder, Path(str(facts.get("absolute_folder", folder)))]
    else:  # relative to where the training was started
        candidates = [Path(folder), *(parent / folder for parent in run.resolve().parents)]
    for candidate in candidates:
        record = candidate / "data.json"
        if record.is_file() and read_json(record).get("hash") == facts.get("data"):
            return candidate
    raise MoemlaError(f"the data of {run} is not in {candidates[0]} (any more): name stories to score with --text FILE")


def save_best(run: str | os.PathLike, model: LanguageModel, tokenizer: Tokenizer, step: int, valid_loss: float) -> None:
    """Makes this model the one in `best/`, whole or not at all."""
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
