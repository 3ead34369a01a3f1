"""Saving and resuming: whole or not at all, safetensors and JSON, no pickle.

A run's folder holds `config.json`, `tokenizer.json`, `train.json`, `metrics.jsonl` and `checkpoints/step-00001200/`. A
checkpoint is written under another name, flushed to the disk and renamed: whatever kills the process, the last complete
one can be loaded.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from moemla.config import ModelConfig
from moemla.errors import MoemlaError
from moemla.model import LanguageModel
from moemla.tokenizer import Tokenizer


def write_json(path: Path, value) -> None:
    """Writes JSON under a temporary name, flushes it and renames it. Built in chapter 13."""
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def checkpoints(run: str | os.PathLike) -> list[Path]:
    """The complete checkpoints of a run, oldest first. Built in chapter 13."""
    return sorted(path for path in (Path(run) / "checkpoints").glob("step-*") if (path / "state.json").is_file())


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


def save_checkpoint(run: str | os.PathLike, model: LanguageModel, optimizers, state: dict, keep: int = 2) -> Path:
    """Writes model, optimizers, `state` (plain values; needs "step") and torch's random state; keeps the last `keep`.
    Built in chapter 13.

    MoemlaError when it cannot be written (no space left): nothing half-written stays, earlier checkpoints do.
    """
    from safetensors.torch import save_file

    folder = Path(run) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{state['step']:08d}"
    part = folder / f".{target.name}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        model.save(part)
        save_file(
            _optimizer_tensors(optimizers, names) | {"rng": torch.get_rng_state()}, part / "optimizer.safetensors"
        )
        write_json(part / "state.json", state)
        _sync(part)
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
        _sync(folder)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        raise MoemlaError(f"checkpoint {target} could not be written: {error}") from error
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(path: str | os.PathLike, model: LanguageModel, optimizers=()) -> dict:
    """Puts weights, optimizer and random state back; returns the saved `state`.

    MoemlaError if it does not fit. Built in chapter 13.
    """
    from safetensors.torch import load_file

    path = Path(path)
    _load_weights(model, path)
    try:
        tensors = load_file(path / "optimizer.safetensors")
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise MoemlaError(f"checkpoint {path} cannot be read: {error}") from error
    torch.set_rng_state(tensors.pop("rng"))
    parameters = dict(model.named_parameters())
    for number, optimizer in enumerate(optimizers):
        mine = {key: value for key, value in tensors.items() if key.startswith(f"{number}/")}
        for key, value in mine.items():
            _, field, name = key.split("/", 2)
            device = parameters[name].device if value.dim() else value.device
            optimizer.state[parameters[name]][field] = value.to(device)
    return state


def _load_weights(model: LanguageModel, folder: Path) -> None:
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "model.safetensors")
        if model.config.tie_embeddings:
            weights["head.weight"] = weights["embedding.weight"]
        model.load_state_dict(weights)
    except Exception as error:
        raise MoemlaError(f"weights in {folder} cannot be loaded: {error}") from error


def load(path: str | os.PathLike, device=None) -> tuple[LanguageModel, Tokenizer | None]:
    """(model, tokenizer) from a folder that `model.save` wrote or from a run (its last checkpoint). Built in chapter 5.

    The model comes in float32 and in eval mode; the tokenizer is None where the folder has none. MoemlaError if nothing
    is there.
    """
    path = Path(path)
    weights = path
    if not (path / "model.safetensors").is_file():
        if not checkpoints(path):
            raise MoemlaError(f"{path} holds no model: neither model.safetensors nor a complete checkpoint")
        weights = checkpoints(path)[-1]
    try:
        config = ModelConfig.from_dict(json.loads((weights / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MoemlaError(f"{weights / 'config.json'} cannot be used: {error}") from error
    model = LanguageModel(config, device=device)
    _load_weights(model, weights)
    vocabulary = path / "tokenizer.json"
    return model.eval(), Tokenizer.load(vocabulary) if vocabulary.is_file() else None
