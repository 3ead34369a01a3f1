"""Chapter 5's question: `mha`, `mha-rope`, `mla`, `mla-rope` of one size, trained alike, side by side.

First a learning rate for each variant, on the built-in stories: a few rates, one seed, a third of the steps. Then, with
each variant's own best rate, several seeds in full: seed s gives all variants the same batches. Runs have one thread
each and go side by side.
"""

import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from moemla import complexity
from moemla.checkpoint import checkpoints
from moemla.config import ModelConfig
from moemla.data import prepare, read_stories
from moemla.errors import Diverged, MoemlaError
from moemla.evaluation import evaluate
from moemla.experiments.results import WORK, Result, run_cells
from moemla.experiments.ten_minutes import counted
from moemla.tokenizer import Tokenizer
from moemla.training import TrainConfig, read_metrics, train

EXPERIMENT = "chapter05"
VARIANTS = ("mha", "mha-rope", "mla", "mla-rope")
ROTARY = ("mha-rope", "mla-rope")
MAX_SEQ_LEN = 512  # the length of a learned position table


@dataclass(frozen=True)
class Scale:
    """How large the experiment is. Built in chapter 5."""

    steps: int  # of a run in full on the built-in stories; a run for the rate has a third
    steps_of_files: int  # real stories take longer until counting is left behind,
    variants_of_files: tuple[str, ...]  # and with learned positions longer than an afternoon
    rates: tuple[float, ...]  # peak learning rates tried
    seeds: int
    stories: int | None = None  # to train on; None: all there are
    scored: int | None = None  # validation stories; None: all
    batch_size: int = 8
    seq_len: int = 256


SCALES = {
    "smoke": Scale(
        steps=12,
        steps_of_files=12,
        variants_of_files=ROTARY,
        rates=(1e-2, 2e-2),
        seeds=2,
        stories=300,
        scored=20,
        batch_size=4,
        seq_len=64,
    ),
    "cpu": Scale(steps=600, steps_of_files=800, variants_of_files=ROTARY, rates=(1e-2, 2e-2, 4e-2, 8e-2), seeds=5),
}


def run(
    scale: str = "cpu",
    folder: str | Path = "results",
    train_text: str | Path | None = None,
    valid_text: str | Path | None = None,
    seeds: int | None = None,
    workers: int = 2,
    report=None,
) -> list[Result]:
    """All runs of a scale, two at a time; each leaves a result in `folder`. Built in chapter 5.

    The rates are sought on the built-in stories; the seeds are run on these, or, with rotary positions only, on two
    text files. `seeds` may be fewer or more than the scale's. Cut and called again
    it goes on: finished runs are kept, others go on from their last checkpoint. `report(done, total, result)` is called
    after each. ValueError for a scale other than smoke and cpu.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: this experiment has {' and '.join(SCALES)}")
    size, folder = SCALES[scale], Path(folder)
    data = "files" if train_text else "builtin"
    steps, names = (size.steps_of_files, size.variants_of_files) if train_text else (size.steps, VARIANTS)
    seeds = size.seeds if seeds is None else seeds

    def work_on(data: str, **texts):
        shards = folder / WORK / f"{EXPERIMENT}-data-{scale}-{data}"
        return partial(_work, shards, prepare(shards, source=data, stories=size.stories, **texts))

    def cells(part: str, data: str, steps: int, which) -> list[dict]:
        sizes = dict(stories=size.stories, scored=size.scored, batch_size=size.batch_size, seq_len=size.seq_len)
        start, rest = dict(part=part), dict(steps=steps, data=data, size="tiny", **sizes)
        return [start | dict(variant=variant, lr=lr, seed=seed) | rest for variant, lr, seed in which]

    sweep = cells("rate", "builtin", size.steps // 3, [(name, lr, 0) for lr in size.rates for name in VARIANTS])
    count = dict(part="counted", data=data, stories=size.stories)
    total = 1 + len(sweep) + seeds * len(names)
    done: list[Result] = []

    def note(result: Result) -> None:
        done.append(result)
        if report:
            report(len(done), total, result)

    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        _all(sweep, work_on("builtin"), folder, pool, note)
        work = work_on(data, train=train_text, valid=valid_text)
        best = best_rates(done)
        runs = cells("seed", data, steps, [(name, best[name], seed) for seed in range(seeds) for name in names])
        # Is a difference one of rates? Each once at the rate of the one that it is compared with.
        others = [(name, best[name.replace(*(("mha", "mla") if "mha" in name else ("mla", "mha")))]) for name in names]
        runs += cells("swapped", data, steps, [(name, lr, 0) for name, lr in others if lr != best[name]])
        total = 1 + len(sweep) + len(runs)
        _all([count, *runs], work, folder, pool, note)
    return done


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
    shape = {name: settings[name] for name in ("steps", "batch_size", "seq_len", "lr", "seed")}
    how = TrainConfig(min_lr=settings["lr"] / 30, warmup=settings["steps"] // 10, **shape)
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


def best_rates(results: Iterable[Result]) -> dict[str, float]:
    """For each variant the learning rate with the lowest validation loss in the runs made for it.

    MoemlaError where a variant has none that came through. Built in chapter 5.
    """
    best: dict[str, tuple[float, float]] = {}
    for result in results:
        if result.settings["part"] == "rate" and not result.measures.get("diverged"):
            variant, tried = result.settings["variant"], (result.measures["nats_per_token"], result.settings["lr"])
            best[variant] = min(tried, best.get(variant, tried))
    if missing := set(VARIANTS) - set(best):
        raise MoemlaError(f"no learning rate came through for {', '.join(sorted(missing))}: try lower ones")
    return {variant: lr for variant, (_, lr) in best.items()}


def seeds_of(results: Iterable[Result], data: str) -> dict[str, list[Result]]:
    """The runs in full of each variant on that data, in the order of their seeds. Built in chapter 5."""
    runs = [result for result in results if result.settings["part"] == "seed" and result.settings["data"] == data]
    runs.sort(key=lambda result: result.settings["seed"])
    return {name: [run for run in runs if run.settings["variant"] == name] for name in VARIANTS}
