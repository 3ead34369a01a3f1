"""Runs the cells of an experiment in processes side by side, cut and continued at any point, each result a file.

A folder is read once. A finished cell is found again by its name and all its settings; a run that was killed repeats
only the cells that it was in, and these go on from what they left in their scratch folders. Built in chapter 15.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, NamedTuple

from moemla import results
from moemla.cells import BUILTIN, Cell, digest, distinct
from moemla.experiments import NAMES, find
from moemla.files import sha256
from moemla.results import Result, ResultError, folder_for, load, path_of, provenance, same, write

WORK = ".work"  # in a folder of results: prepared text, and scratch folders of unfinished cells
VOCAB_SIZE = 4096
WORKERS = 2  # runs at a time, of one thread each
Place = tuple[str, str, str]  # experiment, scale, name
Watch = Callable[[list[tuple[Cell, Path]]], None]  # what is at work now, and where its scratch folder is
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
    source: str = BUILTIN,
    tokenizer: str = "bpe",
) -> Text:
    """An experiment's text as tokens, in a work folder that it has to itself.

    Another text has another folder, so that runs on both may go side by side.
    """
    from moemla.data import prepare

    settings: dict[str, Any] = dict(source="files" if train_text else source, stories=stories, vocab_size=VOCAB_SIZE)
    if tokenizer != "bpe":
        settings |= dict(tokenizer=tokenizer, vocab_size=None)
    texts = dict(train=train_text, valid=valid_text)
    key = digest(settings | {split: sha256(path) for split, path in texts.items() if path})
    shards = Path(folder) / WORK / f"data-{settings['source']}-{key}"
    facts = prepare(shards, **settings, **texts)
    return Text(settings["source"], facts["hash"], facts["tokenizer"]["vocab_size"], shards)


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
    folder = folder_for(scale, folder)
    plan = planned_run(experiment, scale, folder, train_text, valid_text, seeds, progress)
    with pool_for([plan], workers) as (pool, slots):
        work_off([plan], folder, pool, slots, report)
    return plan.results()


def planned_run(
    experiment: Any,
    scale: str,
    folder: Path,
    train_text: str | Path | None = None,
    valid_text: str | Path | None = None,
    seeds: int | None = None,
    progress: Callable | None = None,
) -> "Plan":
    """The plan of an experiment on its text, which is prepared. ValueError for what it does not have."""
    name = experiment.NAME
    if scale not in experiment.SCALES:
        raise ValueError(f"scale={scale!r}: {name} has {' and '.join(experiment.SCALES)}")
    if seeds is not None and (seeds < 1 or not hasattr(experiment, "choose")):
        right = "must be at least 1" if hasattr(experiment, "choose") else f"{name} has one run"
        raise ValueError(f"seeds={seeds}: {right}")
    if getattr(experiment, "FILES", False) and not train_text:
        raise ValueError(f"train={train_text}: {name} asks about text of your own; name two files")
    size = experiment.SCALES[scale]
    source = {key: getattr(size, key) for key in ("source", "tokenizer") if hasattr(size, key)}
    text = prepared(folder, size.stories, train_text, valid_text, **source)
    alone = dict(progress=progress) if progress else {}
    return Plan(experiment, scale, text, seeds, partial(experiment.work, text=text, **alone))


def planned(experiment: Any, scale: str, text: Text, seeds: int | None = None) -> list[Cell]:
    """All cells of an experiment on a text; those that wait for a choice, as many, as if it had been made.

    ValueError where two have one name.
    """
    first = experiment.cells(scale, text)
    later = experiment.measure(scale, text, None, seeds) if hasattr(experiment, "choose") else []
    distinct([*first, *later])
    return [*first, *later]


class Plan:
    """An experiment at a scale on a text: its cells, as far as they are known, and their results."""

    def __init__(self, experiment: Any, scale: str, text: Text, seeds: int | None = None, work: Callable | None = None):
        self.experiment, self.scale, self.text, self.seeds, self.work = experiment, scale, text, seeds, work
        self.total = len(planned(experiment, scale, text, seeds))
        self.cells: list[Cell] = list(experiment.cells(scale, text))
        self.chooses, self.shelf = hasattr(experiment, "choose"), {}

    def open(self, shelf: dict["Place", Result]) -> list[Cell]:
        """The cells that have no result and wait for nothing; `shelf` is the results by place."""
        self.shelf = shelf
        missing = [cell for cell in self.cells if place(cell) not in shelf]
        if self.chooses and not missing:
            chosen = self.experiment.choose([shelf[place(cell)] for cell in self.cells])
            self.cells += self.experiment.measure(self.scale, self.text, chosen, self.seeds)
            self.chooses = False
            return self.open(shelf)
        return missing

    def results(self) -> list[Result]:
        """Those that are there, in the order of the cells."""
        return [self.shelf[place(cell)] for cell in self.cells if place(cell) in self.shelf]


def place(one: Cell | Result) -> Place:
    """Where its result lies, under whatever folder."""
    return one.experiment, one.settings["scale"], one.name


class Inline(Executor):
    """Runs what is submitted in this process, at once."""

    def submit(self, function, /, *arguments, **named) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments, **named))
        return future


def processes(workers: int) -> ProcessPoolExecutor:
    """A pool of workers of one thread each, at the lowest priority."""
    return ProcessPoolExecutor(workers, get_context("spawn"), _worker)


@contextmanager
def pool_for(plans: Iterable[Plan], workers: int) -> Iterator[tuple[Executor, int]]:
    """Where these plans run, and how many cells at a time: in this process where one has the machine to itself."""
    alone = workers == 0 or any(getattr(plan.experiment, "ALONE", False) for plan in plans)
    with Inline() if alone else processes(workers) as pool:
        yield pool, 1 if alone else workers


def _worker() -> None:
    """One thread for training, and one that waits: who started this process may be killed, and it goes then too."""
    import torch

    from moemla.devices import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    if hasattr(os, "nice"):
        os.nice(19)

    def leave() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=leave, daemon=True).start()


def work_off(
    plans: Iterable[Plan],
    folder: str | Path,
    pool: Executor,
    slots: int,
    report: Report | None = None,
    until: float = math.inf,
    watch: Watch | None = None,
) -> None:
    """Runs what the plans lack, the first plan's cells first, `slots` at a time; no cell begins after `until`.

    `until` is in seconds of `time.monotonic`. A plan that waits for its last runs before a choice leaves its place to
    the next one. `table.csv` is written anew after each cell. A cell that fails ends the rest.
    """
    plans, folder = list(plans), Path(folder)
    shelf = shelf_of(plans, folder)
    total, counted = sum(plan.total for plan in plans), set()
    running: dict[Future, tuple[Cell, Plan]] = {}

    def note(result: Result, was_there: bool) -> None:
        counted.add(place(result))
        if not was_there:
            shelf[place(result)] = result
            results.write_table(_with_new(shelf, result, folder), folder)
        if report:
            report(len(counted), total, result, was_there)

    def known() -> list[tuple[Cell, Plan]]:
        waiting = [(cell, plan) for plan in plans for cell in plan.open(shelf)]
        for cell in (cell for plan in plans for cell in plan.cells):
            if place(cell) in shelf and place(cell) not in counted:
                same(shelf[place(cell)], cell.settings, path_of(cell, folder))
                shutil.rmtree(scratch_of(cell, folder), ignore_errors=True)
                note(shelf[place(cell)], True)
        return waiting

    try:
        while True:
            busy = {place(cell) for cell, _ in running.values()}
            for cell, plan in known():
                if len(running) >= slots or time.monotonic() >= until:
                    break
                if place(cell) not in busy:
                    running[pool.submit(run_cell, cell, plan.work, folder)] = cell, plan
                    busy.add(place(cell))
                    if isinstance(pool, Inline):
                        break
            if not running:
                break
            finished_now, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in finished_now:
                running.pop(future)
                note(future.result(), False)
            if watch:
                watch([(cell, scratch_of(cell, folder)) for cell, _ in running.values()])
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def shelf_of(plans: Iterable[Plan], folder: Path) -> dict[Place, Result]:
    """The results that lie in `folder` for these plans; each table's files are read once."""
    plans = list(plans)
    names = dict.fromkeys((cell.experiment, plan.scale) for plan in plans for cell in plan.cells)
    names |= dict.fromkeys((plan.experiment.NAME, plan.scale) for plan in plans)
    return {place(result): result for name, scale in names for result in load(folder, name, scale, missing_ok=True)}


def run_cells(
    cells: Iterable[Cell], work: Callable[..., Any], folder: str | Path, report: Report | None = None
) -> list[Result]:
    """Run cells that have no result in `folder`, one after another in this process; results of all of them, in order.

    `work(cell, scratch=...)` returns the measures. `scratch` is a folder of the cell's own, kept until its result is
    written. To repeat a cell, delete its file. Two cells of one name are refused before anything runs (ValueError).
    Provenance counts the `attempts`; its `seconds` are those of the attempt that finished.
    """
    cells = list(cells)
    if not cells:
        return []
    alone = SimpleNamespace(NAME=cells[0].experiment, cells=lambda scale, text: cells)
    plan = Plan(alone, cells[0].scale, Text(BUILTIN, cells[0].data or ""), work=work)
    with Inline() as pool:
        work_off([plan], folder, pool, 1, report)
    return plan.results()


def _with_new(shelf: dict[Place, Result], fresh: Result, folder: Path) -> Iterable[Result]:
    """The results of one table, those that another call has written beside them since among them."""
    experiment, scale, _ = place(fresh)
    for path in path_of(fresh, folder).parent.glob("[!.]*.json"):
        if (experiment, scale, path.stem) not in shelf:
            shelf[experiment, scale, path.stem] = results.read(path)
    return [result for place, result in shelf.items() if place[:2] == (experiment, scale)]


def scratch_of(cell: Cell, folder: Path) -> Path:
    """The folder that a cell works in, until its result is written."""
    return folder / WORK / f"{cell.experiment}.{cell.scale}.{cell.name}-{cell.key}"


def run_cell(cell: Cell, work: Callable, folder: Path) -> Result:
    """Works on one cell and writes its result."""
    scratch = scratch_of(cell, folder)
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
    shelf: dict[str, Result] = {}  # an experiment's choice may rest on another's runs
    for run in runs:
        if run.experiment in NAMES:
            shelf[run.key] = run
            groups.setdefault((run.experiment, run.settings["scale"], run.settings["data"]), []).append(run)
    return [_tally(find(name), scale, group, shelf) for (name, scale, _), group in sorted(groups.items())]


def _tally(experiment: Any, scale: str, runs: list[Result], shelf: dict[str, Result]) -> Tally:
    settings = runs[0].settings
    size = next((run.settings["model"]["vocab_size"] for run in runs if run.settings["model"]), VOCAB_SIZE)
    text = Text(settings["tags"].get("text", BUILTIN), settings["data"], size)
    if scale not in experiment.SCALES:  # of another version
        return Tally(experiment.NAME, scale, text, [], 1)
    first = experiment.cells(scale, text)
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


def complete(name: str, scale: str, folder: str | Path) -> list[Result]:
    """An experiment's own runs where all of them are in `folder`, with those that its choice rests on; else none."""
    of_others = getattr(find(name), "sweep_of", None) if name in NAMES else None
    names = [name, *([of_others.NAME] if of_others else [])]
    runs = [run for one in names for run in load(folder, one, scale, missing_ok=True)]
    return [run for run in finished(runs) if run.experiment == name]
