"""Measured results: one JSON file a run with its provenance, in folders by experiment and scale.

`results/EXPERIMENT/SCALE/NAME.json` holds the run that its path says: the name follows from the settings (`cells`). A
file is complete or absent: it is written under a temporary name, synced and renamed. Nothing that names a person or a
machine is kept: no host, no user, no absolute path. `table.csv` beside the files has a row a run, to read and to diff.
Built in chapter 15.
"""

import csv
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moemla import cells
from moemla.cells import Cell, differences, key_of, leaves, name_of
from moemla.errors import DataError, MoemlaError
from moemla.files import replacing, why

SCHEMA = 2
FOLDER = "results"
TABLE = "table.csv"
PROVENANCE = ("moemla", "git", "date", "python", "torch", "machine", "seconds", "command")
SETTINGS = ("scale", "data", "tags", "model", "train")
FIRST = ("nats_per_token", "bits_per_byte", "seconds")  # columns of a table, before the other measures
# What a comparison may be over, where it is more than one setting.
_FORM = ("attention", "n_kv_heads", "latent_dim", "d_nope", "d_rope", "d_value", "cache", "positions", "rope_layout")
_WIDTHS = ("ffn", "d_ff", "n_experts", "n_shared", "top_k", "d_expert")
QUESTIONS = {
    "arm": ("tags.arm", "tags.variant"),
    "variant": ("tags.arm", "tags.variant", *(f"model.{name}" for name in _FORM + _WIDTHS)),
    "lr": ("train.lr", "train.min_lr"),
    "seed": ("train.seed",),
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ABSOLUTE = re.compile(r"(?:(?<=^)|(?<=[\s=:,'\"]))(?:~?/(?!/)|[A-Za-z]:[\\/](?!/))(?:[^\s,'\"]*[\\/])?(?=[\w.])")
_ABOVE = re.compile(r"(?:\.\./)+(?:[^\s,'\"/]+/)*(?=[\w.])")


class ResultError(MoemlaError):
    """A result file that is not one, cannot be read, or cannot be written."""


@dataclass(frozen=True)
class Result:
    """One run: what was set, what was measured, and where it came from.

    `settings` are those of its `Cell`, whose name and key are `name` and `key`. `measures` hold finite numbers,
    booleans, strings, or lists and mappings of these. `provenance` has the entries of `PROVENANCE`; `git` is None
    outside a repository; `before` has the name and the settings of a file that was moved. Files of schema 1 have no
    key, and settings of their experiment's own.
    """

    experiment: str
    name: str
    settings: dict[str, Any]
    measures: dict[str, Any]
    provenance: dict[str, Any]
    key: str = ""
    schema: int = SCHEMA

    def holds(self, where: Mapping[str, Any]) -> bool:
        """Whether its settings have these values, by dotted names ("tags.arm", "train.lr")."""
        held = dict(leaves(self.settings))
        return all(name in held and held[name] == value for name, value in where.items())


def of(cell: Cell, measures: Mapping[str, Any], origin: Mapping[str, Any]) -> Result:
    """The result of a cell."""
    measures, origin = _plain(measures, "measures"), _plain(origin, "provenance")
    return Result(cell.experiment, cell.name, _plain(cell.settings, "settings"), measures, origin, cell.key)


def path_of(result: Result | Cell, folder: str | Path) -> Path:
    """Where a result lies: FOLDER/EXPERIMENT/SCALE/NAME.json."""
    return Path(folder) / result.experiment / result.settings["scale"] / f"{result.name}.json"


def validate(data: Any, source: str = "result") -> Result:
    """The `Result` in a decoded JSON object, all of it looked at; `ResultError` with what is wrong in `source`."""
    result = _result(data, source)
    for path, value in _leaves(data):
        finite = not isinstance(value, float) or math.isfinite(value)
        _require(finite, source, f"{path} is {value}; leave out what diverged and say so with a measure diverged=true")
        private = isinstance(value, str) and not path.startswith("measures") and _ABSOLUTE.search(value)
        _require(not private, source, f"{path} holds an absolute path: {value!r}")
    return result


def _require(condition: Any, source: str, problem: str) -> None:
    if not condition:
        raise ResultError(f"{source}: {problem}; move it out of the results folder or run it again")


def _result(data: Any, source: str) -> Result:
    """What every reading looks at: the shape, and that name and key are those of the settings."""
    _require(isinstance(data, dict), source, "is not a result of moemla: a JSON object was expected")
    older = data.get("schema") == 1
    wanted = _FIELDS - {"key"} if older else _FIELDS
    for problem, names in (("lacks", wanted - data.keys()), ("has unknown", data.keys() - wanted)):
        _require(not names, source, f"is not a result of moemla: it {problem} {', '.join(sorted(names))}")
    schema, settings = data["schema"], data["settings"]
    _require(older or schema == SCHEMA, source, f"has schema {schema!r}; this version reads {SCHEMA}")
    for name, pattern in (("experiment", cells.EXPERIMENT), ("name", _NAME)):
        fits = isinstance(data[name], str) and pattern.fullmatch(data[name])
        _require(fits, source, f"{name}={data[name]!r} does not match {pattern.pattern}")
    for name in ("settings", "measures", "provenance"):
        _require(isinstance(data[name], dict), source, f"{name} is not an object")
    missing = [name for name in PROVENANCE if name not in data["provenance"]]
    _require(not missing, source, f"its provenance lacks {', '.join(missing)}")
    if older:
        return Result(**data)
    _require(settings.keys() == set(SETTINGS), source, f"its settings are not {', '.join(SETTINGS)}")
    try:
        name, key = name_of(settings), key_of(data["experiment"], settings)
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{source}: its settings are not those of a cell ({error!r}); run it again") from error
    _require(data["name"] == name, source, f"is called {data['name']}, and its settings are those of {name}")
    _require(data["key"] == key, source, f"has the key {data['key']}, and its settings have {key}")
    return Result(**data)


_FIELDS = {field.name for field in fields(Result)}


def write(result: Result, folder: str | Path) -> Path:
    """Write one result, whole or not at all; returns its path. A file of the same cell is replaced.

    ResultError where a file of that name has other settings.
    """
    data = _plain(asdict(result), "result")
    validate(data, f"result {result.experiment} {result.name}")
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    path = path_of(result, folder)
    if path.exists():
        same(read(path), result.settings, path)
    _write(path, text)
    return path


def same(result: Result, settings: Mapping[str, Any], path: str | Path) -> None:
    """ResultError, naming a setting, where a result has others than a cell of its name."""
    for name, (was, now) in differences(result.settings, settings).items():
        said = f"{name}={was!r}, this one with {name}={now!r}"
        raise ResultError(f"{path} was measured with {said}: name another folder, or delete it")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise ResultError(f"cannot write {path}: {why(error)}") from error
    except DataError as error:
        raise ResultError(str(error)) from error


def read(path: str | Path) -> Result:
    """One result file. ResultError where it is not one, or not the one that its path says."""
    try:
        with open(path, "rb") as file:
            data = json.loads(file.read(), parse_constant=_no_number)
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # JSON and UTF-8 errors alike
        raise ResultError(f"{path} is not JSON ({error}); delete it and run its experiment again") from error
    result = _result(data, str(path))
    if result.schema == SCHEMA:
        place = os.path.join(result.experiment, result.settings["scale"], f"{result.name}.json")
        _require(os.path.abspath(path).endswith(os.sep + place), str(path), f"holds the result of {place}")
    return result


def _no_number(text: str) -> None:
    raise ValueError(f"{text}: no number of JSON")


def load(
    folder: str | Path, experiment: str | None = None, scale: str | None = None, missing_ok: bool = False
) -> list[Result]:
    """All results of a folder, or of one experiment, or of one scale, in the order of their paths.

    Where there are none, one line says where they are expected (`ResultError`), unless missing_ok.
    """
    any_name = "[!.]*"
    paths = sorted(map(str, Path(folder).glob(f"{experiment or any_name}/{scale or any_name}/{any_name}.json")))
    if not paths:
        old = sorted(path.name for path in Path(folder).glob("*.*.json"))
        if old:
            raise ResultError(
                f"{folder} has results of an older moemla ({old[0]}): python -m tools.move_results {folder}"
            )
    if not paths and not missing_ok:
        of_what = f" of {experiment}" if experiment else ""
        raise ResultError(
            f"{folder} holds no results{of_what}{f' at scale {scale}' if scale else ''}: those of the book lie in "
            "results/ beside book/; start there, or name that folder"
        )
    return [read(path) for path in paths]


def comparable(*runs: Result, differ_in: Iterable[str]) -> list[Result]:
    """The runs, if their settings differ in `differ_in` and in nothing else; if not, `ResultError` names what.

    Asserted before a mean and under every table: runs on another text, of another length or with another warm-up
    measure something else. differ_in: names of settings ("train.lr", "tags.text") or of `QUESTIONS`; where it has "lr",
    the rate's floor stays the same share of it. Settings that came later than a run are completed.
    """
    differ_in = set(differ_in)
    allowed = {setting for name in differ_in for setting in QUESTIONS.get(name, (name,))}
    seen: dict[str, Result] = {}
    for run in runs:
        twin = seen.setdefault(run.key, run)
        if twin is not run:
            raise ResultError(f"{twin.name} of {run.experiment} stands there twice, and would count twice")
        apart = differences(_scaled(runs[0], differ_in), _scaled(run, differ_in))
        if run.experiment != runs[0].experiment:
            apart["experiment"] = (runs[0].experiment, run.experiment)
        for name, (one, other) in apart.items():
            if name not in allowed:
                raise ResultError(
                    f"results of {run.experiment} with {name}={one!r} and {name}={other!r} are no runs of one kind: "
                    "choose those of one"
                )
    return list(runs)


def _scaled(run: Result, differ_in: set[str]) -> dict[str, Any]:
    """The settings; the rate's floor as its share of the rate, where the rate may differ."""
    train = run.settings["train"]
    if train is None or "lr" not in differ_in:
        return run.settings
    return run.settings | {"train": train | {"floor": round(train["min_lr"] / train["lr"], 6)}}


def folder_for(scale: str, folder: str | Path | None = None) -> Path:
    """Where the results of a scale go: `folder` if given, else results/, and those of smoke a new temporary folder.

    A smoke run shows that all works and measures nothing: it stays out of what was measured.
    """
    if folder is not None:
        return Path(folder)
    return Path(tempfile.mkdtemp(prefix="moemla-smoke-")) if scale == "smoke" else Path(FOLDER)


def table(runs: Iterable[Result]) -> str:
    """The runs as CSV, a row each by name: arm, rate, seed, text, and what was measured as a number."""
    rows = []
    for run in sorted(runs, key=lambda run: run.name):
        tags, train = run.settings["tags"], run.settings["train"] or {}
        row = dict(arm=tags["arm"], lr=train.get("lr"), seed=train.get("seed"), text=tags.get("text", cells.BUILTIN))
        rows.append(row | {name: value for name, value in run.measures.items() if isinstance(value, int | float)})
    measured = {name for row in rows for name in row} - {"arm", "lr", "seed", "text", *FIRST}
    file = io.StringIO()
    columns = ["arm", "lr", "seed", "text", *FIRST, *sorted(measured)]
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def write_table(runs: Iterable[Result], folder: str | Path) -> None:
    """Writes `table` beside the files of these runs, of one experiment and scale."""
    runs = list(runs)
    if runs:
        _write(path_of(runs[0], folder).with_name(TABLE), table(runs))


# Where a result comes from.


def provenance(seconds: float, command: list[str] | None = None) -> dict[str, Any]:
    """Versions, commit, date, machine class and command line of this process.

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
