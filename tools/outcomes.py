"""What came out of a registered experiment, as tables of a page: its arms, its comparisons, the verdict of the log."""

import re
from collections.abc import Iterable
from math import isnan

from moemla.experiments import REGISTERED, find, home
from moemla.experiments.comparison import Asked, Comparison, mean_of
from moemla.experiments.runner import complete
from moemla.results import Result
from moemla.statistics import Estimate, estimate
from tools.book import RESULTS, ROOT
from tools.facts import plus_minus

LOG = ROOT / "LOG.md"


PAGE = """# What came out

The experiments that were [registered](registrations.md) and are complete: each arm, each comparison that was asked for,
and the verdict on each prediction, from the [log](log.md). What still runs is [counted](progress.md). Losses are nats a
token on validation stories, a mean over seeds with its 95 % interval, each arm at the rate that seed 0 chose;
differences are given twice, between groups of runs (Welch) and within seeds, and below zero where the first arm is
better. A load's CV is its standard deviation over experts, divided by the mean.

"""
ARMS = ("arm", "total / active, M", "rate", "seeds", "nats per token<br>bits per byte", "CPU s")
LOADS = "load CV<br>batch / sequence"
COMPARED = ("compared", "nats, by Welch", "within seeds", "correlation", "p, after Holm")


def page() -> str:
    """Tables and verdict of each registered experiment that is complete."""
    out, waiting = [PAGE.rstrip()], []
    for name in REGISTERED:
        registered = f"(#registration-{name})"
        if not (runs := complete(name, home(name), RESULTS)):
            waiting.append(f"[{name}]{registered}")
            continue
        out += ["", f"(outcome-{name})=", f"## {name}", "", f"[As it was registered]{registered}.", ""]
        out += outcome(find(name), runs)
        if said := verdict(name):
            title, body = said
            out += ["", f"### {title.partition(': ')[2].capitalize()}", "", body]
    if waiting:
        out += ["", "## Not complete", "", f"{', '.join(waiting)}."]
    return "\n".join(out) + "\n"


def outcome(experiment: Comparison, runs: Iterable[Result]) -> list[str]:
    """Lines of markdown: a row an arm, then a row a registered comparison."""
    runs = list(runs)
    return [*_arms(experiment, runs), "", *_comparisons(experiment, runs)]


def verdict(name: str, log: str | None = None) -> tuple[str, str] | None:
    """Title and text of the log's section about an experiment: `shared-experts` has "### Shared experts: ..."."""
    log = LOG.read_text(encoding="utf-8") if log is None else log
    for title, body in re.findall(r"^### ([^\n]*)\n(.*?)(?=^#|\Z)", log, flags=re.M | re.S):
        if title.partition(":")[0].lower().replace(" ", "-") == name:
            return title, body.strip()
    return None


def _arms(experiment: Comparison, runs: list[Result]) -> list[str]:
    chosen = experiment.choices(runs)
    loaded = any("loads" in run.measures for run in runs)
    out = _head(*ARMS, *[LOADS] * loaded)
    for arm, held in experiment.measured(runs).items():
        measures = [run.measures for run in held]
        losses = [one["nats_per_token"] for one in measures if "nats_per_token" in one]
        rate = chosen.get(arm) or f"{held[0].settings['train']['lr']:g}"
        sizes = "\u00a0/\u00a0".join(f"{measures[0][size] / 1e6:.2f}" for size in ("parameters", "active_parameters"))
        said = "diverged" if len(losses) < len(held) else _pm(estimate(losses), sign="")
        said += f"<br>{mean_of(held, 'bits_per_byte'):.4f}"
        shared = held[0].provenance["machine"]["gpus"]  # a GPU that several runs share: seconds say nothing
        means = ["-" if shared else f"{mean_of(held, 'cpu_seconds'):.0f}"]
        loads = [mean_of(held, "loads", window, "cv") for window in ("batch", "sequence")]
        means += ["-" if isnan(loads[0]) else f"{loads[0]:.2f}\u00a0/\u00a0{loads[1]:.2f}"] * loaded
        out.append(f"| `{arm}` | {sizes} | {rate} | {len(losses)} | {said} | {' | '.join(means)} |")
    return out


def _comparisons(experiment: Comparison, runs: list[Result]) -> list[str]:
    seen, corrected = experiment.contrasts(runs), experiment.corrected(runs)
    out = _head(*COMPARED)
    for asked in (*experiment.asked, *experiment.beside):
        if one := seen.get(asked.name):
            p = f"{corrected[asked.name]:.4f}" if asked.name in corrected else "-"
            both = (_pm(one.welch), _pm(one.paired), "-" if one.correlation is None else f"{one.correlation:+.2f}", p)
            out.append(f"| {asked.name}{_within(asked, one.welch)} | {' | '.join(both)} |")
        elif asked.name in corrected:
            out.append(f"| {asked.name} | not judged: an arm diverged | | | |")
    return out


def _head(first: str, *more: str) -> list[str]:
    return [f"| {' | '.join((first, *more))} |", f"|---|{'---:|' * len(more)}"]


def _within(asked: Asked, welch: Estimate) -> str:
    """What the two one-sided tests say, where sameness is asked."""
    return "" if asked.margin is None else f"<br>within ± {asked.margin}: p {welch.p_within(asked.margin):.3f}"


def _pm(one: Estimate, sign: str = "+") -> str:
    return plus_minus(one, 4, sign, blank="\u00a0")  # on one line
