"""Runs the cells of an experiment in processes side by side, cut and continued at any point, each result a file.

A folder is read once. A finished cell is found again by its name and all its settings; a run that was killed repeats
only the cells that it was in, and these go on from what they left in their scratch folders. Built in chapter 15.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from moemla import results
from moemla.cells import BUILTIN, Cell, digest, distinct
from moemla.experiments import NAMES, find
from moemla.results import Result, ResultError, folder_for, load, path_of, provenance, same, write

WORK = ".work"  # in a folder of results: prepared text, and scratch folders of unfinished cells
VOCAB_SIZE = 4096
WORKERS = 2  # runs at a time, of one thread each
Report = Callable[[int, int, Result, bool], None]  # cells done, of how many, the last one, whether it was there


@dataclass(frozen=True)
class Text:
    """Stories as tokens: where they come from, the hash of what was prepared, and the folder of the shards.

    `folder` is None where results are only counted.
    """

    source: str  # "builtin" or "files"
    data: str
    vocab_size: int = VOCAB_SIZE
    folder: Path | None = None


def prepared(
    folder: str | Path,
    stories: int | None,
    train_text: str | Path | None = None,
    valid_text: str | Path | None = None,
) -> Text:
    """An experiment's text as tokens, in a work folder that it has to itself.

    Another text has another folder, so that runs on both may go side by side.
    """
    from moemla.data import prepare

    settings: dict[str, Any] = dict(source="files" if train_text else BUILTIN, stories=stories, vocab_size=VOCAB_SIZE)
    texts = dict(train=train_text, valid=valid_text)
    key = digest(settings | {split: _sha256(path) for split, path in texts.items() if path})
    shards = Path(folder) / WORK / f"data-{settings['source']}-{key}"
    facts = prepare(shards, **settings, **texts)
    return Text(settings["source"], facts["hash"], facts["tokenizer"]["vocab_size"], shards)


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(
    experiment: Any,
    scale: str,
    folder: str | Path | None = None,
    train_text: str | Path | None = None,
    valid_text: str | Path | None = None,
    seeds: int | None = None,
    workers: int = WORKERS,
    report: Report | None = None,
    progress: Callable | None = None,
) -> list[Result]:
    """All runs of an experiment at a scale that have no result yet; results of all of them.

    On the built-in stories or on two text files; each text has its own results. `folder` is results/ unless given,
    of smoke a new temporary one. `seeds`: instead of the scale's. `workers` processes, 0 for this one, as for an
    experiment that has the machine to itself: only there `progress(row)` is told of a training's steps.
    ValueError for a scale or seeds that the experiment does not have.
    """
    if scale not in experiment.SCALES:
        raise ValueError(f"scale={scale!r}: {experiment.NAME} has {' and '.join(experiment.SCALES)}")
    chooses = hasattr(experiment, "choose")
    if seeds is not None and (seeds < 1 or not chooses):
        raise ValueError(f"seeds={seeds}: " + ("must be at least 1" if chooses else f"{experiment.NAME} has one run"))
    folder = folder_for(scale, folder)
    text = prepared(folder, experiment.SCALES[scale].stories, train_text, valid_text)
    alone = workers == 0 or getattr(experiment, "ALONE", False)
    work = partial(experiment.work, text=text, **(dict(progress=progress) if alone else {}))
    total = len(planned(experiment, scale, text, seeds))
    with nullcontext() if alone else ProcessPoolExecutor(workers, get_context("spawn"), _worker) as pool:
        done = run_cells(experiment.cells(scale, text), work, folder, pool, report, total)
        if chooses:
            measuring = experiment.measure(scale, text, experiment.choose(done), seeds)
            done += run_cells(measuring, work, folder, pool, report, total, before=len(done))
    return done


def planned(experiment: Any, scale: str, text: Text, seeds: int | None = None) -> list[Cell]:
    """All cells of an experiment on a text; those that wait for a choice, as many, as if it had been made.

    ValueError where two have one name.
    """
    first = experiment.cells(scale, text)
    later = experiment.measure(scale, text, None, seeds) if hasattr(experiment, "choose") else []
    distinct([*first, *later])
    return [*first, *later]


def _worker() -> None:
    """One thread for training, and one that waits: who started this process may be killed, and it goes then too."""
    import torch

    torch.set_num_threads(1)

    def leave() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=leave, daemon=True).start()


def run_cells(
    cells: Iterable[Cell],
    work: Callable[..., Any],
    folder: str | Path,
    pool: Executor | None = None,
    report: Report | None = None,
    total: int | None = None,
    before: int = 0,
) -> list[Result]:
    """Run the cells of one experiment and scale that have no result in `folder`; results of all of them, in order.

    `work(cell, scratch=...)` returns the measures. `scratch` is a folder of the cell's own, kept until its result is
    written. In the processes of `pool`, or one after another in this one. `report` is called for each cell, `before`
    having been done of `total`; `table.csv` is written anew after each that was run. To repeat a cell, delete its file.
    Two cells of one name are refused before anything runs (ValueError). Provenance counts the `attempts`; its `seconds`
    are those of the attempt that finished.
    """
    cells, folder = list(cells), Path(folder)
    distinct(cells)
    if not cells:
        return []
    shelf = {result.name: result for result in load(folder, cells[0].experiment, cells[0].scale, missing_ok=True)}
    for cell in cells:
        if cell.name in shelf:
            same(shelf[cell.name], cell.settings, path_of(cell, folder))
            shutil.rmtree(_scratch(cell, folder), ignore_errors=True)
    done, total = {}, total or len(cells)

    def note(result: Result, was_there: bool) -> None:
        done[result.name] = shelf[result.name] = result
        if not was_there:
            results.write_table(_with_new(shelf, result, folder), folder)
        if report:
            report(before + len(done), total, result, was_there)

    waiting = [cell for cell in cells if cell.name not in shelf]
    for cell in cells:
        if cell.name in shelf:
            note(shelf[cell.name], True)
    for result in _all(waiting, work, folder, pool):
        note(result, False)
    return [done[cell.name] for cell in cells]


def _with_new(shelf: dict[str, Result], fresh: Result, folder: Path) -> Iterable[Result]:
    """The results read or made so far, and those that another call has written beside them since."""
    for path in path_of(fresh, folder).parent.glob("[!.]*.json"):
        if path.stem not in shelf:
            shelf[path.stem] = results.read(path)
    return shelf.values()


def _all(cells: list[Cell], work: Callable, folder: Path, pool: Executor | None) -> Iterable[Result]:
    """Runs the cells here or over the pool's processes; a process that fails ends the rest."""
    if pool is None:
        for cell in cells:
            yield _run_cell(cell, work, folder)
        return
    futures = [pool.submit(_run_cell, cell, work, folder) for cell in cells]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _scratch(cell: Cell, folder: Path) -> Path:
    return folder / WORK / f"{cell.experiment}.{cell.scale}.{cell.name}-{cell.key}"


def _run_cell(cell: Cell, work: Callable, folder: Path) -> Result:
    scratch = _scratch(cell, folder)
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        starts = scratch / ".starts"
        with starts.open("a") as file:
            file.write("start\n")
        attempts = len(starts.read_text().splitlines())
    except OSError as error:
        raise ResultError(f"cannot work in {scratch}: {error.strerror}") from error
    begin = time.perf_counter()
    measures = work(cell, scratch=scratch)
    origin = provenance(time.perf_counter() - begin) | {"attempts": attempts}
    result = results.of(cell, measures, origin)
    write(result, folder)
    shutil.rmtree(scratch, ignore_errors=True)
    return result


# ---- what is finished


class Tally(NamedTuple):
    """How much of an experiment is there, at a scale and on a text."""

    experiment: str
    scale: str
    text: Text
    done: list[Result]  # of its cells, those that have a result
    total: int

    @property
    def complete(self) -> bool:
        """Whether all of it is there."""
        return len(self.done) == self.total


def tallies(runs: Iterable[Result]) -> list[Tally]:
    """What of the registered experiments is among these results, by scale and text."""
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for run in runs:
        if run.experiment in NAMES:
            groups.setdefault((run.experiment, run.settings["scale"], run.settings["data"]), []).append(run)
    return [_tally(find(name), scale, group) for (name, scale, _), group in sorted(groups.items())]


def _tally(experiment: Any, scale: str, runs: list[Result]) -> Tally:
    settings = runs[0].settings
    size = next((run.settings["model"]["vocab_size"] for run in runs if run.settings["model"]), VOCAB_SIZE)
    text = Text(settings["tags"].get("text", BUILTIN), settings["data"], size)
    if scale not in experiment.SCALES:  # of another version
        return Tally(experiment.NAME, scale, text, [], 1)
    shelf, first = {run.key: run for run in runs}, experiment.cells(scale, text)
    done, total = [shelf[cell.key] for cell in first if cell.key in shelf], len(first)
    if hasattr(experiment, "choose"):
        total += len(experiment.measure(scale, text, None))
        if len(done) == len(first):
            measuring = experiment.measure(scale, text, experiment.choose(done))
            done += [shelf[cell.key] for cell in measuring if cell.key in shelf]
    return Tally(experiment.NAME, scale, text, done, total)


def finished(runs: Iterable[Result]) -> list[Result]:
    """Of these results those that may be shown: of experiments that are complete on their text, and its cells only.

    Those of an experiment that is not registered are all shown.
    """
    runs = list(runs)
    kept = {id(run) for tally in tallies(runs) if tally.complete for run in tally.done}
    return [run for run in runs if run.experiment not in NAMES or id(run) in kept]
