"""Measured results: one JSON file a run with its provenance, and the runner that can be cut and continued.

A file is named EXPERIMENT.NAME.json and is complete or absent: it is written under a temporary name, synced
and renamed. A run that was killed repeats only the cell it was in. Nothing that names a person or a machine
is kept: no host, no user, no absolute path.

A cell is known by its settings, the hash of its data, the rate's floor and the warm-up among them (`IDENTITY`). Older
files have these three among their measures only; reading completes their settings.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moemla.errors import DataError, MoemlaError
from moemla.files import replacing, why

SCHEMA = 1
WORK = ".work"  # scratch folders of unfinished cells
IDENTITY = ("data_hash", "min_lr", "warmup")
PROVENANCE = ("moemla", "git", "date", "python", "torch", "machine", "seconds", "command")
_EXPERIMENT = re.compile(r"[a-z0-9][a-z0-9-]*")  # no dot: the first dot of a file name ends it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ABSOLUTE = re.compile(r"(?:(?<=^)|(?<=[\s=:,'\"]))(?:~?/(?!/)|[A-Za-z]:[\\/](?!/))(?:[^\s,'\"]*[\\/])?(?=[\w.])")
_ABOVE = re.compile(r"(?:\.\./)+(?:[^\s,'\"/]+/)*(?=[\w.])")


class ResultError(MoemlaError):
    """A result file that is not one, cannot be read, or cannot be written. Built in chapter 15."""


@dataclass(frozen=True)
class Result:
    """One run: what was set, what was measured, and where it came from. Built in chapter 15.

    `settings` and `measures` hold plain JSON values; measures are finite numbers, booleans, strings, or
    lists and mappings of these. `provenance` has the entries of `PROVENANCE`; `git` is None outside a
    repository.
    """

    experiment: str
    name: str
    settings: dict[str, Any]
    measures: dict[str, Any]
    provenance: dict[str, Any]
    schema: int = SCHEMA


def cell_key(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a cell's settings, whatever their order. Built in chapter 15."""
    text = json.dumps(_plain(settings, "settings"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def validate(data: Any, source: str = "result") -> Result:
    """The `Result` in a decoded JSON object, or `ResultError` with what is wrong in `source`.

    Built in chapter 15.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise ResultError(f"{source}: {problem}; move it out of the results folder or run it again")

    require(isinstance(data, dict), "is not a result of moemla: a JSON object was expected")
    wanted = {field.name for field in fields(Result)}
    for problem, names in (("lacks", wanted - set(data)), ("has unknown", set(data) - wanted)):
        require(not names, f"is not a result of moemla: it {problem} {', '.join(sorted(names))}")
    schema = data["schema"]
    require(schema == SCHEMA, f"has schema {schema!r}; this version reads {SCHEMA}")
    for field, pattern in (("experiment", _EXPERIMENT), ("name", _NAME)):
        value = data[field]
        fits = isinstance(value, str) and pattern.fullmatch(value)
        require(bool(fits), f"{field}={value!r} does not match {pattern.pattern}")
    for field in ("settings", "measures", "provenance"):
        require(isinstance(data[field], dict), f"{field} is not an object")
    missing = [name for name in PROVENANCE if name not in data["provenance"]]
    require(not missing, f"its provenance lacks {', '.join(missing)}")
    for path, value in _leaves(data):
        finite = not isinstance(value, float) or math.isfinite(value)
        require(finite, f"{path} is {value}; leave out what diverged and say so with a measure diverged=true")
        private = isinstance(value, str) and not path.startswith("measures") and _ABSOLUTE.search(value)
        require(not private, f"{path} holds an absolute path: {value!r}")
    return Result(**data | {"settings": _completed(data["settings"], data["measures"])})


def _completed(settings: dict[str, Any], measures: dict[str, Any]) -> dict[str, Any]:
    """The settings, with those of `IDENTITY` that only the measures hold."""
    training = measures.get("training")
    held = measures | (training if isinstance(training, dict) else {})
    return settings | {name: held[name] for name in IDENTITY if name in held and name not in settings}


def write(result: Result, folder: str | Path) -> Path:
    """Write one result, whole or not at all; returns its path. A file of the same name and settings is replaced.

    ResultError where the one that is there was made with others. Built in chapter 15.
    """
    data = _plain(asdict(result), "result")
    validate(data, f"result {result.experiment}.{result.name}")
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    folder = Path(folder)
    path = folder / f"{result.experiment}.{result.name}.json"
    if path.exists():
        old, new = read(path).settings, data["settings"]
        for name in [name for name in new if name in old and not isinstance(new[name], dict)]:
            if old[name] != new[name]:
                said = f"{name}={old[name]!r}, this one with {name}={new[name]!r}"
                raise ResultError(f"{path} was measured with {said}: name another folder, or delete it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ResultError(f"cannot write {path}: {why(error)}") from error
    except DataError as error:
        raise ResultError(str(error)) from error
    return path


def read(path: str | Path) -> Result:
    """One result file, validated. Built in chapter 15."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise ResultError(f"{path} is not JSON ({error}); delete it and run its experiment again") from error
    return validate(data, str(path))


def load(folder: str | Path, experiment: str | None = None, missing_ok: bool = False) -> list[Result]:
    """All results of a folder, or of one experiment in it, in the order of their names.

    Where there are none, one line says where they are expected (`ResultError`), unless missing_ok. Built in chapter 15.
    """
    pattern = f"{experiment}.*.json" if experiment else "*.json"
    paths = sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))
    if not paths and not missing_ok:
        raise ResultError(
            f"{folder} holds no results{f' of {experiment}' if experiment else ''}: those of the book lie in results/ "
            "beside book/; start there, or name that folder"
        )
    return [read(path) for path in paths]


def comparable(results: Iterable[Result], differ_in: Iterable[str] = ("seed",)) -> list[Result]:
    """The results, if their settings differ in `differ_in` and in nothing else; if not, `ResultError` names what.

    Asked before a mean or a comparison: runs on another text, of another length or with another warm-up measure
    something else. Built in chapter 15.
    """
    results, differ_in, seen = list(results), set(differ_in), {}
    for result in results:
        twin = seen.setdefault(cell_key(result.settings), result)
        if twin is not result:
            raise ResultError(
                f"{twin.name} and {result.name} of {result.experiment} are one cell: delete one of the two"
            )
    for result in results[1:]:
        first, other = results[0].settings, result.settings
        for name in sorted({*first, *other} - differ_in):
            if first.get(name) != other.get(name):
                raise ResultError(
                    f"results of {result.experiment} with {name}={first.get(name)!r} and {name}={other.get(name)!r} "
                    "are no runs of one kind: choose those of one, or keep them in folders of their own"
                )
    return results


def folder_for(scale: str, folder: str | Path | None = None) -> Path:
    """Where the results of a scale go: `folder` if given, else results/, and those of smoke a new temporary folder.

    A smoke run shows that all works and measures nothing: it stays out of what was measured. Built in chapter 15.
    """
    if folder is not None:
        return Path(folder)
    return Path(tempfile.mkdtemp(prefix="moemla-smoke-")) if scale == "smoke" else Path("results")


def run_cells(
    experiment: str,
    cells: Iterable[Mapping[str, Any]],
    work: Callable[[dict[str, Any], Path], Mapping[str, Any]],
    folder: str | Path,
    report: Callable[[int, int, Result, bool], None] | None = None,
) -> list[Result]:
    """Run the cells of an experiment that have no result yet; results of all of them, in order.

    `work(settings, scratch)` returns the measures. `scratch` is a folder of the cell's own, kept until its
    result is written, so that a cell which was cut may go on from what it left there. A cell is found by
    its settings, which hold whatever decides its result; to repeat one, delete its file.
    `report(index, total, result, was_there)` is called after each cell. Provenance counts the `attempts`;
    its `seconds` are those of the attempt that finished. Built in chapter 15.
    """
    cells = [_plain(cell, "settings") for cell in cells]
    keys = [cell_key(cell) for cell in cells]
    for index, key in enumerate(keys):
        if key in keys[:index]:
            raise ValueError(f"cells: {cells[index]} stands twice, at {keys.index(key)} and {index}; each cell once")
    folder = Path(folder)
    done = {cell_key(result.settings): result for result in load(folder, experiment, missing_ok=True)}
    results = []
    for index, (key, cell) in enumerate(zip(keys, cells, strict=True)):
        if was_there := key in done:
            result = done[key]
        else:
            result = _run_cell(experiment, key, cell, work, folder)
        shutil.rmtree(folder / WORK / f"{experiment}.{key}", ignore_errors=True)
        results.append(result)
        if report:
            report(index, len(cells), result, was_there)
    return results


def _run_cell(experiment: str, key: str, cell: dict[str, Any], work: Callable, folder: Path) -> Result:
    scratch = folder / WORK / f"{experiment}.{key}"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        starts = scratch / ".starts"
        with starts.open("a") as file:
            file.write("start\n")
        attempts = len(starts.read_text().splitlines())
    except OSError as error:
        raise ResultError(f"cannot work in {scratch}: {error.strerror}") from error
    begin = time.perf_counter()
    measures = dict(work(dict(cell), scratch))
    origin = provenance(time.perf_counter() - begin) | {"attempts": attempts}
    values = "-".join(str(v) for k, v in cell.items() if isinstance(v, str | int | float) and k not in IDENTITY)
    label = re.sub(r"[^A-Za-z0-9.]+", "-", values)[:80].strip("-.")
    result = Result(experiment, f"{label}-{key}".lstrip("-"), cell, measures, origin)
    write(result, folder)
    return Result(**_plain(asdict(result), "result"))


# Where a result comes from.


def provenance(seconds: float, command: list[str] | None = None) -> dict[str, Any]:
    """Versions, commit, date, machine class and command line of this process. Built in chapter 15.

    `machine` has the CPU's model, its cores, torch's threads and the names of the GPUs (None without one).
    Paths in the command that are absolute or climb above the project are cut to their last part.
    """
    import torch

    import moemla

    command = sys.argv if command is None else command
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    else:
        gpus = ["Apple MPS"] if torch.backends.mps.is_available() else None
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "moemla": getattr(moemla, "__version__", None) or importlib.metadata.version("moemla"),
        "git": _git(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": {"cpu": _cpu(), "cores": usable, "threads": torch.get_num_threads(), "gpus": gpus},
        "seconds": round(seconds, 3),
        "command": shlex.join(_shorten(part) for part in command),
    }


def _shorten(argument: str) -> str:
    """A path that is absolute or climbs above the project, cut to its last part."""
    return _ABOVE.sub("", _ABSOLUTE.sub("", argument))


def _cpu() -> str:
    """The processor's model name: /proc/cpuinfo on Linux, sysctl on a Mac, else what Python knows."""
    try:
        if sys.platform == "darwin":
            query = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return platform.processor() or platform.machine()


def _git(package: Path | None = None) -> dict[str, Any] | None:
    """Commit, and whether the package's own files differ from it; None where they are not tracked.

    An installed copy may lie inside somebody else's repository: its commit would say nothing about this code.
    """
    package = package or Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        run = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True, timeout=30
        )
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "results.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return None


# JSON values.


def _plain(value: Any, where: str) -> Any:
    """JSON's own types: tuples become lists, scalars of numpy and torch Python numbers, keys strings."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where}: the key {key!r} is not a string")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if hasattr(value, "tolist"):
        return value.tolist()
    raise ValueError(
        f"{where}: {type(value).__name__} cannot be kept in JSON; give numbers, strings, lists or mappings"
    )


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value
