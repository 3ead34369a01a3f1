"""Arms trained alike, each at its own best learning rate, measured over seeds: the shape of the paper's tables.

Seed 0 chooses: each arm at each rate, every run in full. The seeds from 11 on had no part in that choice and are the
measurement (chapter 5 has seen 1 to 8); seed s gives all arms the same batches. What is asked, expected and tested
stands in the experiment's `registration.md`, which was committed before its first run. Built in chapter 15.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any

from moemla.cells import Cell, model_config, train_config
from moemla.errors import MoemlaError
from moemla.experiments import one_run
from moemla.experiments.one_run import PROMPTS, Scale
from moemla.experiments.runner import Text
from moemla.results import Result, comparable
from moemla.statistics import Contrast, contrast, estimate, holm

FLOOR = 30  # the rate falls to this part of its peak


@dataclass(frozen=True)
class Arm:
    """One way to build or to train a model.

    `model` changes the preset of `variant` (`matched` among it), `train` the recipe. `rates` instead of the scale's; of
    a single one there is no sweep. `rate_of`: the arm whose choice it takes. `seeds` instead of the scale's. `steps`:
    as many times the scale's.
    """

    name: str
    variant: str
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] | None = None
    rate_of: str = ""
    seeds: int | None = None
    steps: int = 1


@dataclass(frozen=True)
class Asked:
    """A registered comparison: a weighted sum of arms' means, in nats.

    With a `margin` the question is whether the sum lies within it: two one-sided tests.
    """

    name: str
    weights: Mapping[str, float]
    margin: float | None = None


def versus(a: str, b: str, margin: float | None = None) -> Asked:
    """The difference of two arms, a - b."""
    return Asked(f"{a} - {b}", {a: 1, b: -1}, margin)


def synergy(name: str, neither: str, first: str, second: str, both: str) -> Asked:
    """(both - second) - (first - neither): negative where two changes do more together than apart."""
    return Asked(name, {both: 1, first: -1, second: -1, neither: 1})


@dataclass(frozen=True)
class Comparison:
    """An experiment of arms; see the package's docstring for what its attributes are to the runner.

    `arms` gives them for a scale. `asked`: the registered comparisons, the first one being the primary. `beside`: those
    that are predicted and not in their family, printed without a corrected p. `differ_in`: the settings in which its
    arms may differ, as in `results.comparable`.
    """

    NAME: str
    SCALES: Mapping[str, Scale]
    arms: Callable[[Scale], list[Arm]]
    asked: tuple[Asked, ...]
    differ_in: tuple[str, ...] = ("variant",)
    beside: tuple[Asked, ...] = ()
    sweep_of: "Comparison | None" = None  # whose sweep chooses the rates, where it has none of its own
    FILES: bool = False  # whether it is asked of text files alone

    def _arms(self, scale: str) -> list[Arm]:
        size = self.SCALES[scale]
        return [arm for arm in self.arms(size) if size.only is None or arm.name in size.only]

    def cells(self, scale: str, text: Text) -> list[Cell]:
        """The sweep: seed 0 of each arm that chooses a rate, at each rate."""
        if self.sweep_of:
            names = {arm.name for arm in self._arms(scale)}
            return [cell for cell in self.sweep_of.cells(scale, text) if cell.tags["arm"] in names]
        swept = [(arm, self._rates(arm, scale)) for arm in self._arms(scale) if not arm.rate_of]
        longest = max((len(rates) for _, rates in swept), default=0)
        order = [(arm, rates[i]) for i in range(longest) for arm, rates in swept if i < len(rates) > 1]
        return [self._cell(scale, text, arm, lr, 0) for arm, lr in order]

    def choose(self, results: Iterable[Result]) -> dict[str, float]:
        """Each swept arm's rate: the lowest loss of seed 0. MoemlaError where all diverged."""
        best: dict[str, tuple[float, float]] = {}
        swept = {}
        for result in results:
            arm, lr = result.settings["tags"]["arm"], result.settings["train"]["lr"]
            swept[arm] = True
            loss = result.measures.get("nats_per_token")
            if loss is not None:
                best[arm] = min(best.get(arm, (loss, lr)), (loss, lr))
        lost = sorted(swept.keys() - best.keys())
        if lost:
            raise MoemlaError(f"no learning rate came through for {', '.join(lost)}: try lower ones")
        return {arm: lr for arm, (_, lr) in best.items()}

    def measure(self, scale: str, text: Text, chosen: dict[str, float] | None, seeds: int | None = None) -> list[Cell]:
        """Each arm at its chosen rate with the seeds that measure; chosen=None: as many cells, any rate."""
        size, arms = self.SCALES[scale], self._arms(scale)
        rates = {arm.name: (chosen or {}).get(arm.rate_of or arm.name, self._rates(arm, scale)[0]) for arm in arms}
        fixed = size.only or scale == "smoke"  # the scale's own number
        counts = {arm.name: seeds or (size.seeds if fixed else arm.seeds or size.seeds) for arm in arms}
        return [
            self._cell(scale, text, arm, rates[arm.name], seed)
            for seed in range(size.first_seed, size.first_seed + max(counts.values()))
            for arm in arms
            if seed < size.first_seed + counts[arm.name]
        ]

    def _rates(self, arm: Arm, scale: str) -> tuple[float, ...]:
        size = self.SCALES[scale]
        rates = arm.rates or size.rates
        return rates[: len(size.rates)] if scale == "smoke" else rates[:1] if size.only else rates

    def _cell(self, scale: str, text: Text, arm: Arm, lr: float, seed: int) -> Cell:
        size = self.SCALES[scale]
        steps = size.steps * arm.steps
        model = {**dict(size=size.size), **arm.model}
        recipe = dict(optimizer=size.optimizer, precision=size.precision) | arm.train
        return Cell(
            experiment=self.NAME,
            scale=scale,
            data=text.data,
            tags=dict(arm=arm.name, text=text.source, scored=size.scored, samples=size.samples * len(PROMPTS)),
            model=model_config(
                model.pop("size"),
                arm.variant,
                vocab_size=text.vocab_size,
                max_seq_len=size.max_seq_len,
                **dict(dropout=size.dropout) | model,
            ),
            train=train_config(
                **dict(steps=steps, batch_size=size.batch_size, seq_len=size.seq_len, warmup=steps // 10) | recipe,
                lr=lr,
                min_lr=lr / FLOOR,
                seed=seed,
            ),
        )

    def work(self, cell: Cell, text: Text, scratch: Path, progress=None) -> dict[str, Any]:
        """One run, trained from its last checkpoint on, scored, looked at."""
        return one_run.work(cell, self.SCALES[cell.scale], text, scratch, progress)

    # ---- what came out

    def measured(self, results: Iterable[Result]) -> dict[str, list[Result]]:
        """The runs of each arm that measure, by seed, of one scale and text; ResultError for runs of two kinds."""
        runs = [run for run in results if run.experiment == self.NAME and run.settings["train"]["seed"] > 0]
        comparable(*runs, differ_in={*self.differ_in, "arm", "lr", "seed"})
        runs.sort(key=lambda run: run.settings["train"]["seed"])
        arms: dict[str, list[Result]] = {}
        for run in runs:
            arms.setdefault(run.settings["tags"]["arm"], []).append(run)
        for held in arms.values():
            comparable(*held, differ_in={"seed"})
        scale = runs[0].settings["scale"] if runs else "cpu"
        return {arm.name: arms[arm.name] for arm in self.arms(self.SCALES[scale]) if arm.name in arms}

    def contrasts(self, results: Iterable[Result]) -> dict[str, Contrast]:
        """The comparisons whose arms all came through; within seeds, those that the arms share."""
        arms, out = self.measured(results), {}
        for asked in (*self.asked, *self.beside):
            if not all(name in arms and all("nats_per_token" in run.measures for run in arms[name])
                       for name in asked.weights):  # fmt: skip
                continue
            losses = [by_seed(arms[name]) for name in asked.weights]
            seeds = sorted(set.intersection(*(set(one) for one in losses)))
            if len(seeds) > 1:
                shared = [[one[seed] for seed in seeds] for one in losses]
                out[asked.name] = contrast([one.values() for one in losses], asked.weights.values(), shared=shared)
        return out

    def corrected(self, results: Iterable[Result]) -> dict[str, float]:
        """p by Welch, corrected by Holm over the registered comparisons of the scale's arms; 1 where not judged."""
        results = list(results)
        seen, arms = self.contrasts(results), self._names(results)
        family = [asked.name for asked in self.asked if asked.weights.keys() <= arms]
        return holm({name: seen[name].welch.p if name in seen else 1.0 for name in family})

    def _names(self, results: list[Result]) -> set[str]:
        """The arms that results of this scale may have."""
        return {arm.name for arm in self._arms(results[0].settings["scale"])} if results else set()

    def choices(self, results: Iterable[Result]) -> dict[str, str]:
        """How each swept arm's rate was chosen: by how much over the next best, and whether it is the grid's edge."""
        tried: dict[str, dict[float, float]] = {}
        for run in results:
            train, arm = run.settings["train"], run.settings["tags"]["arm"]
            if train["seed"] == 0:
                tried.setdefault(arm, {})[train["lr"]] = run.measures.get("nats_per_token", math.inf)
        out = {}
        for arm, held in tried.items():
            (best, lr), *rest = sorted((loss, lr) for lr, loss in held.items())
            gap = f", {rest[0][0] - best:.4f} below the next" if rest and rest[0][0] < math.inf else ""
            out[arm] = f"{lr:g}{gap}" + ", the grid's edge" * (bool(rest) and lr in (min(held), max(held)))
        return out

    def at_common_rates(self, results: Iterable[Result]) -> dict[str, dict[float, float]]:
        """The registered comparisons of seed 0 with all arms at one rate, as the paper compares: no interval."""
        losses: dict[tuple[str, float], float] = {}
        for run in results:
            train = run.settings["train"]
            own = run.experiment == self.NAME and train["seed"] == 0
            if own and "nats_per_token" in run.measures:
                losses[run.settings["tags"]["arm"], train["lr"]] = run.measures["nats_per_token"]
        rates = sorted({lr for _, lr in losses})
        return {
            asked.name: held
            for asked in self.asked
            if (
                held := {
                    lr: sum(weight * losses[arm, lr] for arm, weight in asked.weights.items())
                    for lr in rates
                    if all((arm, lr) in losses for arm in asked.weights)
                }
            )
        }

    def table(self, results: Iterable[Result]) -> str:
        """Each arm at its own rate, then each registered comparison: paired and Welch, corrected by Holm.

        MFLOPs: forward, a token. Loads: CV in a batch and in a sequence, and how many times as much lies above the
        floor of uniform routing in a sequence, sqrt(CV^2 - floor^2). cpu s: of the first arm over those of the second.
        """
        results = list(results)
        head = f"{'arm':24}{'params':>12}{'active':>12}{'MFLOPs':>8}{'rate':>8}{'seeds':>6}"
        head += f"  {'nats per token, 95 %':22}{'bits/byte':>10}{'cpu s':>7}"
        out = [f"{head}  load CV in a batch, a sequence, above floors"]
        measured = self.measured(results)
        out += [_row(name, runs) for name, runs in measured.items()]
        seen, corrected, arms = self.contrasts(results), self.corrected(results), self._names(results)
        if seen:
            head = f"{'difference in nats':44}{'Welch, 95 %':22}{'paired, 95 %':22}{'corr.':>7}{'p Holm':>9}"
            out += ["", head + f"{'cpu s':>7}"]
        for asked in (*self.asked, *self.beside):
            if asked.name in seen:
                clock = _clock(*(measured[arm] for arm in asked.weights)) if len(asked.weights) == 2 else ""
                out.append(_line(asked, seen[asked.name], corrected.get(asked.name), clock))
            elif seen and asked.weights.keys() <= arms:
                out.append(f"{asked.name:44}not judged: an arm diverged, or has too few runs")
        if chosen := self.choices(results):
            out += ["", "rates, by one run each:", *(f"{arm:24}{choice}" for arm, choice in chosen.items())]
        common = self.at_common_rates(results)
        if common:
            out += ["", "seed 0, all arms at one rate (one run an arm; an interaction scatters by 0.02):"]
            out += [
                f"{name:44}" + "  ".join(f"{lr:g}: {value:+.4f}" for lr, value in held.items())
                for name, held in common.items()
            ]
        return "\n".join(out)


def by_seed(runs: Iterable[Result]) -> dict[int, float]:
    """Nats per token of each seed."""
    return {run.settings["train"]["seed"]: run.measures["nats_per_token"] for run in runs}


def mean_of(runs: list[Result], *path: str) -> float:
    """The mean of a measure, a path of keys, over the runs that have it; NaN where none has."""
    values = [reduce(lambda held, key: held.get(key, {}), path, run.measures) for run in runs]
    values = [value for value in values if value != {}]
    return sum(values) / len(values) if values else math.nan


def _row(name: str, runs: list[Result]) -> str:
    losses = [run.measures["nats_per_token"] for run in runs if "nats_per_token" in run.measures]
    first, rate = runs[0].measures, runs[0].settings["train"]["lr"]
    head = f"{name:24}{first['parameters']:12,}{first['active_parameters']:12,}"
    head += f"{first.get('flops_per_token', math.nan) / 1e6:8.2f}{rate:8g}{len(losses):6}  "
    if len(losses) < len(runs):
        return head + f"{len(runs) - len(losses)} of {len(runs)} diverged: no mean"
    half = f" ± {estimate(losses).half_width:.4f}" if len(losses) > 1 else ""
    mean = partial(mean_of, runs)
    said = f"{f'{sum(losses) / len(losses):.4f}{half}':22}{mean('bits_per_byte'):10.4f}{mean('cpu_seconds'):7.0f}"
    if "loads" in first:
        each = [(mean("loads", window, "cv"), mean("loads", window, "cv_floor")) for window in ("batch", "sequence")]
        batch, sequence = (math.sqrt(max(cv**2 - floor**2, 0)) for cv, floor in each)
        said += "".join(f"{cv:8.3f}" for cv, _ in each) + (f"{sequence / batch:8.1f}" if batch else f"{'-':>8}")
    return head + said


def _clock(first: list[Result], second: list[Result]) -> str:
    """Processor seconds of the first arm over those of the second."""
    return f"x{mean_of(first, 'cpu_seconds') / mean_of(second, 'cpu_seconds'):.2f}"


def _line(asked: Asked, one: Contrast, p: float | None, clock: str) -> str:
    within = "" if asked.margin is None else f"  within ± {asked.margin}: p {one.welch.p_within(asked.margin):.3f}"
    correlation = "-" if one.correlation is None else f"{one.correlation:+.2f}"
    welch, paired = (f"{each.value:+.4f} ± {each.half_width:.4f}" for each in (one.welch, one.paired))
    corrected = "-" if p is None else f"{p:.4f}"
    return f"{asked.name:44}{welch:22}{paired:22}{correlation:>7}{corrected:>9}{clock:>7}{within}"
