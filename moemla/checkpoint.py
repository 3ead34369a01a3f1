"""Saving and resuming: whole or not at all, safetensors and JSON, no pickle.

A run's folder holds `config.json`, `tokenizer.json`, `train.json`, `metrics.jsonl` and `checkpoints/step-00001000/`. A
checkpoint is written under another name, flushed to the disk and renamed: whatever kills the process, the last complete
one can be loaded.
"""

import os
import shutil
from pathlib import Path

import torch
from torch import nn

from moemla.config import ModelConfig
from moemla.errors import MoemlaError
from moemla.files import read_json, write_json
from moemla.model import LanguageModel, unwrapped
from moemla.tokenizer import Tokenizer


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


def _remove(path: Path) -> None:
    """Takes a checkpoint away under another name first: one that is half deleted is none."""
    hidden = path.with_name(f".{path.name}.old")
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def save_checkpoint(run: str | os.PathLike, model: nn.Module, optimizers, state: dict, keep: int = 2) -> Path:
    """Writes model, optimizers, `state` (plain values; needs "step") and torch's random state; keeps the last `keep`.
    Built in chapter 13.

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
        write_json(part / "state.json", state)
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

    MoemlaError if it does not fit. Built in chapter 13.
    """
    from safetensors.torch import load_file

    path, model = Path(path), unwrapped(model)
    _load_weights(model, path)
    try:
        tensors = load_file(path / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("rng"))
        on_gpu = tensors.pop("rng-cuda", None)
        if on_gpu is not None and model.embedding.weight.is_cuda:
            torch.cuda.set_rng_state(on_gpu, model.embedding.weight.device)
        parameters = dict(model.named_parameters())
        for number, optimizer in enumerate(optimizers):
            mine = {key: value for key, value in tensors.items() if key.startswith(f"{number}/")}
            for key, value in mine.items():
                _, field, name = key.split("/", 2)
                parameter = parameters[name]
                optimizer.state[parameter][field] = value.to(parameter.device)  # a fused AdamW counts its steps there
    except Exception as error:
        raise MoemlaError(f"checkpoint {path} cannot be read: {_brief(error)}") from error
    return read_json(path / "state.json")


def _brief(error: Exception) -> str:
    """One line, and not the names of all tensors."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."


def _load_weights(model: LanguageModel, folder: Path) -> None:
    from safetensors.torch import load_file

    try:
        weights = load_file(folder / "model.safetensors")
        model.load_state_dict(weights)
    except Exception as error:
        raise MoemlaError(f"weights in {folder} cannot be loaded: {_brief(error)}") from error


def load(path: str | os.PathLike, device=None) -> tuple[LanguageModel, Tokenizer | None]:
    """(model, tokenizer) from a folder that `model.save` wrote or from a run (its last checkpoint). Built in chapter 5.

    The model comes in float32 and in eval mode; the tokenizer is None where the folder has none. MoemlaError if nothing
    is there, a file is damaged, or the tokenizer is not the run's.
    """
    path = Path(path)
    weights = path
    if not (path / "model.safetensors").is_file():
        if not checkpoints(path):
            raise MoemlaError(f"{path} holds no model: neither model.safetensors nor a complete checkpoint")
        weights = checkpoints(path)[-1]
    try:
        config = ModelConfig.from_dict(read_json(weights / "config.json"))
    except (TypeError, ValueError) as error:
        raise MoemlaError(f"{weights / 'config.json'} cannot be used: {_brief(error)}") from error
    model = LanguageModel(config, device=device)
    _load_weights(model, weights)
    tokenizer = Tokenizer.load(path / "tokenizer.json") if (path / "tokenizer.json").is_file() else None
    _check_tokenizer(path, config, tokenizer)
    return model.eval(), tokenizer


def _check_tokenizer(path: Path, config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        return
    expected = read_json(path / "train.json").get("tokenizer") if (path / "train.json").is_file() else None
    if tokenizer.vocab_size != config.vocab_size or expected not in (None, tokenizer.hash):
        raise MoemlaError(
            f"{path / 'tokenizer.json'} ({tokenizer.vocab_size} tokens, {tokenizer.hash[:12]}) is not the tokenizer of "
            f"this model ({config.vocab_size} tokens{f', {expected[:12]}' if expected else ''}): put that one back"
        )
