"""Chapter 5's question: `mha`, `mha-rope`, `mla`, `mla-rope` of one size, trained alike, side by side.

Seed 0 chooses the learning rate: each variant at several rates, every run in full. (On the built-in stories runs of a
third of the steps are made too, to see what they would have chosen.) The seeds from 1 on, which had no part in that
choice, are the measurement, each variant at its own best rate; seed s gives all variants the same batches.
Built in chapter 5.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from moemla import complexity
from moemla.cells import BUILTIN, Cell, model_config, train_config
from moemla.checkpoint import checkpoints
from moemla.config import ModelConfig
from moemla.errors import Diverged, MoemlaError
from moemla.evaluation import evaluate, mean_interval
from moemla.experiments.runner import Text
from moemla.experiments.ten_minutes import counted
from moemla.files import read_json
from moemla.results import Result, comparable
from moemla.runs import read_metrics
from moemla.text import read_stories
from moemla.tokenizer import Tokenizer
from moemla.training import train

NAME = "latent-cost"
VARIANTS = ("mha", "mha-rope", "mla", "mla-rope")
ROTARY = ("mha-rope", "mla-rope")
MAX_SEQ_LEN = 512  # the length of a learned position table


@dataclass(frozen=True)
class Scale:
    """How large the experiment is."""

    steps: int  # of a run on the built-in stories
    steps_of_files: int  # real stories take longer until counting is left behind,
    variants_of_files: tuple[str, ...]  # and with learned positions longer than an afternoon
    rates: tuple[float, ...]  # peak learning rates tried
    seeds: int  # besides seed 0
    seeds_of_files: int
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
        seeds_of_files=2,
        stories=300,
        scored=8,
        batch_size=2,
        seq_len=32,
    ),
    "cpu": Scale(
        steps=600,
        steps_of_files=800,
        variants_of_files=ROTARY,
        rates=(5e-3, 1e-2, 2e-2, 4e-2),
        seeds=8,
        seeds_of_files=4,
    ),
}


def cells(scale: str, text: Text) -> list[Cell]:
    """What is counted, then each variant at each rate with seed 0, in both lengths."""
    parts = ("seed", "rate") if text.source == BUILTIN else ("seed",)
    sweep = [
        _cell(scale, text, variant, lr, 0, part)
        for part in parts
        for lr in SCALES[scale].rates
        for variant in _variants(scale, text)
    ]
    tags = dict(arm="counted", part="counted", text=text.source)
    return [Cell(experiment=NAME, scale=scale, data=text.data, tags=tags), *sweep]


def choose(results: Iterable[Result]) -> dict[str, float]:
    """Each variant's rate."""
    results = list(results)
    return best_rates(results, results[0].settings["data"])


def measure(scale: str, text: Text, chosen: dict[str, float] | None, seeds: int | None = None) -> list[Cell]:
    """Each variant at its chosen rate, with the seeds from 1 on."""
    size = SCALES[scale]
    own = size.seeds if text.source == BUILTIN else size.seeds_of_files
    variants = _variants(scale, text)
    chosen = chosen or dict.fromkeys(variants, size.rates[0])
    counted_from_one = range(1, 1 + (own if seeds is None else seeds))
    return [_cell(scale, text, variant, chosen[variant], seed) for seed in counted_from_one for variant in variants]


def _variants(scale: str, text: Text) -> tuple[str, ...]:
    return VARIANTS if text.source == BUILTIN else SCALES[scale].variants_of_files


def _cell(scale: str, text: Text, variant: str, lr: float, seed: int, part: str = "seed") -> Cell:
    size = SCALES[scale]
    steps = size.steps if text.source == BUILTIN else size.steps_of_files
    steps, arm = (steps, variant) if part == "seed" else (steps // 3, f"{variant}-{steps // 3}steps")
    return Cell(
        experiment=NAME,
        scale=scale,
        data=text.data,
        tags=dict(arm=arm, variant=variant, part=part, text=text.source, scored=size.scored),
        model=_model(variant, text.vocab_size),
        train=train_config(
            steps=steps,
            batch_size=size.batch_size,
            seq_len=size.seq_len,
            optimizer="muon",
            lr=lr,
            min_lr=lr / 30,
            warmup=steps // 10,
            seed=seed,
        ),
    )


@cache
def _model(variant: str, vocab_size: int) -> ModelConfig:
    return model_config("tiny", variant, vocab_size=vocab_size, max_seq_len=MAX_SEQ_LEN)


def work(cell: Cell, text: Text, scratch: Path, progress=None) -> dict[str, Any]:
    """One run, trained and scored; of the counted cell, bits per byte."""
    shards = text.folder
    if cell.model is None:
        return dict(bits_per_byte=counted(shards, read_json(shards / "data.json")["splits"]["valid"]["bytes"]))
    measures: dict[str, Any] = dict(parameters=complexity.parameters(cell.model).total)
    measures["cache_bytes_per_token"] = complexity.cache_bytes_per_token(cell.model, dtype_bytes=2)
    out, trained = scratch / "run", cell.train
    before = max((int(path.name.removeprefix("step-")) for path in checkpoints(out)), default=0)
    begin = time.process_time()
    try:
        model = train(cell.model, trained, shards, out, resume=True, on_progress=progress)
    except Diverged:
        return measures | dict(diverged=True)
    tokens = (trained.steps - before) * trained.batch_size * trained.seq_len
    measures["tokens_per_cpu_second"] = tokens / (time.process_time() - begin)
    rows = read_metrics(out)
    measures |= dict(seconds=rows[-1].seconds, tokens_seen=rows[-1].tokens)
    measures["curve"] = dict(tokens=[row.tokens for row in rows], loss=[round(row.loss, 4) for row in rows])
    texts = islice(read_stories(shards / "valid.txt"), cell.tags["scored"])
    scored = evaluate(model, Tokenizer.load(shards / "tokenizer.json"), texts, trained.seq_len)
    return measures | {key: value for key, value in scored.to_dict().items() if value is not None}


def table(results: Iterable[Result]) -> str:
    """Nats per token of each variant at its own best rate, mean over the seeds and 95 %."""
    results = list(results)
    out = [f"{'text':10}{'variant':10}{'rate':>7}{'seeds':>7}   nats per token, 95 %"]
    for data in dict.fromkeys(result.settings["data"] for result in results):
        for variant, runs in seeds_of(results, data).items():
            if not runs:
                continue
            losses = [run.measures["nats_per_token"] for run in runs if "nats_per_token" in run.measures]
            mean, half = mean_interval(losses) if len(losses) > 1 else (sum(losses) / max(1, len(losses)), None)
            source, rate = runs[0].settings["tags"]["text"], runs[0].settings["train"]["lr"]
            interval = f" ± {half:.4f}" if half is not None else ""
            out.append(f"{source:10}{variant:10}{rate:7g}{len(losses):7}   {mean:.4f}{interval}")
    return "\n".join(out)


def rates_tried(results: Iterable[Result], data: str, part: str = "seed") -> dict[str, dict[float, float | None]]:
    """For each variant the validation loss of seed 0 at each learning rate; None where it diverged.

    Of the runs in full, or with part="rate" of those of a third of the steps. `data` is "builtin", "files", or the hash
    of one text where a folder has runs on several. ResultError where runs differ in more than variant, rate and seed.
    """
    tried: dict[str, dict[float, float | None]] = {}
    for result in sorted(_runs(results, data, part), key=lambda result: result.settings["train"]["lr"]):
        if result.settings["train"]["seed"] == 0:
            losses = tried.setdefault(result.settings["tags"]["variant"], {})
            losses[result.settings["train"]["lr"]] = result.measures.get("nats_per_token")
    return {name: tried[name] for name in VARIANTS if name in tried}


def best_rates(results: Iterable[Result], data: str, part: str = "seed") -> dict[str, float]:
    """For each variant the rate with the lowest loss in `rates_tried`; MoemlaError where all diverged."""
    best = {}
    for name, losses in rates_tried(results, data, part).items():
        came_through = [(loss, lr) for lr, loss in losses.items() if loss is not None]
        if not came_through:
            raise MoemlaError(f"no learning rate came through for {name}: try lower ones")
        best[name] = min(came_through)[1]
    return best


def seeds_of(results: Iterable[Result], data: str) -> dict[str, list[Result]]:
    """Each variant's runs on that data at its best rate, seeds 1, 2 and so on."""
    runs = sorted(_runs(results, data), key=lambda result: result.settings["train"]["seed"])
    best = best_rates(runs, data)
    of_variant: dict[str, list[Result]] = {name: [] for name in best}
    for run in runs:
        variant, train = run.settings["tags"]["variant"], run.settings["train"]
        if train["seed"] > 0 and train["lr"] == best[variant]:
            of_variant[variant].append(run)
    return of_variant


def _runs(results: Iterable[Result], data: str, part: str = "seed") -> list[Result]:
    """The runs of one kind: the same text, length, warm-up and floor of the rate (as a share of it), each run once."""
    runs = [result for result in results if result.settings["tags"]["part"] == part]
    runs = [result for result in runs if data in (result.settings["tags"]["text"], result.settings["data"])]
    return comparable(*runs, differ_in=("variant", "lr", "seed"))
