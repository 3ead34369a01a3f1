"""Chapter 5's question: `mha`, `mha-rope`, `mla`, `mla-rope` of one size, trained alike, side by side.

Seed 0 chooses the learning rate: each variant at several rates, every run in full. (On the built-in stories runs of a
third of the steps are made too, to see what they would have chosen.) The seeds from 1 on, which had no part in that
choice, are the measurement, each variant at its own best rate; seed s gives all variants the same batches. Runs have
one thread each and go side by side.
"""

import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from moemla import complexity
from moemla.checkpoint import checkpoints
from moemla.config import ModelConfig, TrainConfig
from moemla.errors import Diverged, MoemlaError
from moemla.evaluation import evaluate
from moemla.experiments.ten_minutes import counted, prepared
from moemla.results import Result, ResultError, comparable, folder_for, run_cells
from moemla.runs import read_metrics
from moemla.text import read_stories
from moemla.tokenizer import Tokenizer
from moemla.training import train

EXPERIMENT = "chapter05"
VARIANTS = ("mha", "mha-rope", "mla", "mla-rope")
ROTARY = ("mha-rope", "mla-rope")
MAX_SEQ_LEN = 512  # the length of a learned position table


@dataclass(frozen=True)
class Scale:
    """How large the experiment is. Built in chapter 5."""

    steps: int  # of a run on the built-in stories
    steps_of_files: int  # real stories take longer until counting is left behind,
    variants_of_files: tuple[str, ...]  # and with learned positions longer than an afternoon
    rates: tuple[float, ...]  # peak learning rates tried
    seeds: int  # besides seed 0
    stories: int | None = None  # to train on; None: all there are
    scored: int | None = None  # validation stories; None: all
    batch_size: int = 8
    seq_len: int = 256


SCALES = {
    "smoke": Scale(
        steps=6,
        steps_of_files=6,
        variants_of_files=ROTARY,
        rates=(1e-2, 2e-2),
        seeds=2,
        stories=300,
        scored=8,
        batch_size=2,
        seq_len=32,
    ),
    "cpu": Scale(steps=600, steps_of_files=800, variants_of_files=ROTARY, rates=(5e-3, 1e-2, 2e-2, 4e-2), seeds=8),
}


def run(
    scale: str = "cpu",
    folder: str | Path | None = None,
    train_text: str | Path | None = None,
    valid_text: str | Path | None = None,
    seeds: int | None = None,
    workers: int = 2,
    report=None,
) -> list[Result]:
    """All runs of a scale, two at a time; each leaves a result in `folder`. Built in chapter 5.

    On the built-in stories, or, with rotary positions only, on two text files; each text has results of its own.
    `folder` is results/ unless given, of smoke a new temporary one. `seeds` may be fewer or more than the
    scale's. Cut and called again it goes on: finished runs are kept, others go on from their last checkpoint.
    `report(done, total, result)` is called after each. ValueError for a scale other than smoke and cpu.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: this experiment has {' and '.join(SCALES)}")
    size, folder = SCALES[scale], folder_for(scale, folder)
    shards, facts = prepared(folder, size.stories, train_text, valid_text)
    data = facts["settings"]["source"]
    steps, names = (size.steps_of_files, size.variants_of_files) if train_text else (size.steps, VARIANTS)
    seeds = size.seeds if seeds is None else seeds

    def cell(variant: str, lr: float, seed: int, part: str = "seed") -> dict[str, Any]:
        length = steps if part == "seed" else steps // 3
        settings = dict(part=part, variant=variant, lr=lr, seed=seed, steps=length, data=data, size="tiny")
        sizes = dict(stories=size.stories, scored=size.scored, batch_size=size.batch_size, seq_len=size.seq_len)
        return settings | sizes | dict(data_hash=facts["hash"], min_lr=lr / 30, warmup=length // 10)

    counted = dict(part="counted", data=data, stories=size.stories, data_hash=facts["hash"])
    parts = ("seed",) if train_text else ("seed", "rate")
    sweep = [cell(name, lr, 0, part) for part in parts for lr in size.rates for name in names]
    done: list[Result] = []

    def note(result: Result) -> None:
        done.append(result)
        if report:
            report(len(done), 1 + len(sweep) + seeds * len(names), result)

    with ProcessPoolExecutor(workers, get_context("spawn"), _worker) as pool:
        work = partial(_work, shards, facts)
        _all([counted, *sweep], work, folder, pool, note)
        best = best_rates(done, facts["hash"])
        _all([cell(name, best[name], seed + 1) for seed in range(seeds) for name in names], work, folder, pool, note)
    return done


def _worker() -> None:
    """One thread for training, and one that waits: who started this process may be killed, and it goes then too."""
    torch.set_num_threads(1)

    def leave() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=leave, daemon=True).start()


def _all(cells, work, folder, pool, note) -> None:
    """Runs the cells over the pool's processes; a process that fails ends the rest."""
    futures = [pool.submit(run_cells, EXPERIMENT, [cell], work, folder) for cell in cells]
    try:
        for future in as_completed(futures):
            note(*future.result())
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _work(shards: Path, facts: dict[str, Any], settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
    found = dict(data_hash=facts["hash"])
    if settings["part"] == "counted":
        return found | dict(bits_per_byte=counted(shards, facts["splits"]["valid"]["bytes"]))
    config = ModelConfig.preset(
        settings["size"], settings["variant"], vocab_size=facts["tokenizer"]["vocab_size"], max_seq_len=MAX_SEQ_LEN
    )
    shape = ("steps", "batch_size", "seq_len", "lr", "min_lr", "warmup", "seed")
    how = TrainConfig(**{name: settings[name] for name in shape})
    found |= dict(training=asdict(how), parameters=complexity.parameters(config).total)
    found["cache_bytes_per_token"] = complexity.cache_bytes_per_token(config, dtype_bytes=2)
    out = scratch / "run"
    before = max((int(path.name.removeprefix("step-")) for path in checkpoints(out)), default=0)
    begin = time.process_time()
    try:
        model = train(config, how, shards, out, resume=True)
    except Diverged:
        return found | dict(diverged=True)
    tokens = (how.steps - before) * how.batch_size * how.seq_len
    found["tokens_per_cpu_second"] = tokens / (time.process_time() - begin)
    rows = read_metrics(out)
    found |= dict(seconds=rows[-1].seconds, tokens_seen=rows[-1].tokens)
    found["curve"] = dict(tokens=[row.tokens for row in rows], loss=[round(row.loss, 4) for row in rows])
    texts = islice(read_stories(shards / "valid.txt"), settings["scored"])
    scored = evaluate(model, Tokenizer.load(shards / "tokenizer.json"), texts, how.seq_len)
    return found | {key: value for key, value in scored.to_dict().items() if value is not None}


def rates_tried(results: Iterable[Result], data: str, part: str = "seed") -> dict[str, dict[float, float | None]]:
    """For each variant the validation loss of seed 0 at each learning rate; None where it diverged.

    Of the runs in full, or with part="rate" of those of a third of the steps. `data` is "builtin", "files", or the hash
    of one text where a folder has runs on several. ResultError where runs differ in more than variant, rate and seed.
    Built in chapter 5.
    """
    tried: dict[str, dict[float, float | None]] = {}
    for result in sorted(_runs(results, data, part), key=lambda result: result.settings["lr"]):
        if result.settings["seed"] == 0:
            losses = tried.setdefault(result.settings["variant"], {})
            losses[result.settings["lr"]] = result.measures.get("nats_per_token")
    return {name: tried[name] for name in VARIANTS if name in tried}


def best_rates(results: Iterable[Result], data: str, part: str = "seed") -> dict[str, float]:
    """For each variant the rate with the lowest loss in `rates_tried`; MoemlaError where all diverged.

    Built in chapter 5.
    """
    best = {}
    for name, losses in rates_tried(results, data, part).items():
        came_through = [(loss, lr) for lr, loss in losses.items() if loss is not None]
        if not came_through:
            raise MoemlaError(f"no learning rate came through for {name}: try lower ones")
        best[name] = min(came_through)[1]
    return best


def seeds_of(results: Iterable[Result], data: str) -> dict[str, list[Result]]:
    """Each variant's runs on that data at its best rate, seeds 1, 2 and so on. Built in chapter 5."""
    runs = sorted(_runs(results, data), key=lambda result: result.settings["seed"])
    best = best_rates(runs, data)
    chosen = [run for run in runs if run.settings["seed"] > 0 and run.settings["lr"] == best[run.settings["variant"]]]
    return {name: [run for run in chosen if run.settings["variant"] == name] for name in best}


def _runs(results: Iterable[Result], data: str, part: str = "seed") -> list[Result]:
    """The runs of one kind: the same text, length, warm-up and floor of the rate (as a share of it), each run once."""
    found = [result for result in results if result.settings["part"] == part]
    found = [result for result in found if data in (result.settings["data"], result.settings.get("data_hash"))]
    comparable(found, differ_in=("variant", "lr", "seed", "min_lr"))
    floors = {round(run.settings["min_lr"] / run.settings["lr"], 6) for run in found if "min_lr" in run.settings}
    if len(floors) > 1:
        raise ResultError(f"min_lr: runs whose rate falls to {sorted(floors)} of its peak are no runs of one kind")
    return found
