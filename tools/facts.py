"""Sentences that hold numbers, in the README and the preface: written from the contents, the ledger and `results/`.

A block stands between `<!-- NAME, written by tools/pages.py -->` and `<!-- end of NAME -->`.
"""

import re
import textwrap
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from tools.book import BOOK, RESULTS, plan

_BLOCK = re.compile(r"(<!-- ([a-z-]+), written by tools/pages\.py -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def chapters(book: Path = BOOK) -> str:
    """How many chapters of the plan are there, and which."""
    chapters = plan(book)
    to_come = [chapter.title for chapter in chapters if not chapter.written]
    if not to_come:
        return f"All {len(chapters)} chapters are written."
    return f"{len(chapters) - len(to_come)} of {len(chapters)} chapters are written. To come: {'; '.join(to_come)}."


@cache
def judged() -> list[tuple[Any, Any]]:
    """Each claim of the ledger and what it comes to here."""
    from moemla.paper import claims

    return [(claim, claims.evaluate(claim, RESULTS)) for claim in claims.load_claims()]


@cache
def ledger() -> str:
    """How many claims of the paper have which status, and whether the tables are complete."""
    from moemla.paper import claims

    rows = judged()
    found = claims.counts(rows)
    cells, missing = claims.cells(), claims.missing_cells([claim for claim, _ in rows])
    readings = sum(outcome.detail.startswith("holds if") for _, outcome in rows)
    total = sum(found[status] for status in claims.STATUSES)
    texts = [
        f"{found['computed']} follow from settings that the paper states",
        f"{found['consistent']} agree with its other numbers",
        f"{found['measured'] or 'none'} {'was' if found['measured'] == 1 else 'were'} measured here",
        f"{found['contradicted']} are contradicted",
        f"{found['undetermined']} cannot be decided from the text ({readings} of them hold under a reading that it "
        "does not state)",
        f"{found['not run']} need a run that has not been made",
    ]
    sentence = (
        f"The ledger has {total} claims and {found['input']} settings of the paper, with "
        f"{len(cells) - len(missing)} of the {len(cells)} cells of its eight tables among them. "
        f"Of the claims {', '.join(texts[:-1])}, and {texts[-1]}."
    )
    return textwrap.fill(sentence, 128)


def measured_here(experiment: str | None = None) -> list[Any]:
    """What pages speak of: results of complete experiments. A run that ends in the night makes no page stale."""
    from moemla import results
    from moemla.experiments.runner import finished

    return [run for run in finished(results.load(RESULTS, experiment)) if run.settings["scale"] != "smoke"]


def ten_minutes() -> str:
    """The two runs of `moemla experiment ten-minutes`."""
    lines, changed = [], False
    for data, text in (("builtin", "On {n} CPU cores"), ("files", "On real TinyStories")):
        (run,) = (r for r in measured_here("ten-minutes") if r.holds({"scale": "cpu", "tags.text": data}))
        counted = run.measures["counted_bits_per_byte"]["4"]
        changed |= bool(run.provenance["git"] and run.provenance["git"]["dirty"])
        lines.append(
            f"{text.format(n=run.provenance['machine']['cores'])} training takes {run.measures['seconds'] / 60:.1f} "
            f"minutes and reaches {run.measures['bits_per_byte']:.3f} bits per byte on {run.measures['stories']} new "
            f"stories; a counted 4-gram has {counted:.3f}."
        )
    if changed:
        lines.append("(At least one of the two was made while the package differed from its commit.)")
    return "\n".join(lines)


def benches() -> str:
    """Tokens per second beside transformers."""
    cases = [
        ("training, tiny (V 4,096, experts 64 wide)", "train", "tiny", 64, "ours auto"),
        ("training, XS (V 50,257, experts 128 wide)", "train", "XS", 128, "ours auto"),
        ("decoding one sequence, tiny", "decode", "tiny", 64, "ours"),
        ("decoding one sequence, XS", "decode", "XS", 128, "ours"),
    ]
    out = ["| tokens per second | moemla | compiled | transformers |", "|---|---|---|---|"]
    found = [r for r in measured_here("bench") if r.settings["scale"] == "cpu"]
    for label, what, size, width, program in cases:
        wanted = {"tags.what": what, "tags.size": size, "tags.d_expert": width}
        (result,) = (r for r in found if r.holds(wanted))
        speed = {row["program"]: row["tokens"] / row["seconds"] for row in result.measures["rows"]}
        shown = [f"{speed[name]:,.0f}" if name in speed else "" for name in (program, "ours compiled", "transformers")]
        out.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(out)


def latent_cost() -> str:
    """Table 2's difference between MLA and MHA, and the one that chapter 5 measured."""
    import math

    import numpy as np

    from moemla.evaluation import mean_interval
    from moemla.experiments import latent_cost
    from moemla.paper import claims

    ledger = {claim.id: claim for claim in claims.load_claims()}
    nats = {
        name: math.log(claims.printed_number(ledger[f"T2-{name}"].printed)[0]) for name in ("mha", "mla", "mla-rope")
    }
    measured = [r for r in measured_here("latent-cost") if r.settings["scale"] == "cpu"]
    runs = {data: latent_cost.seeds_of(measured, data) for data in ("builtin", "files")}

    def apart(data: str, ours: str, other: str) -> str:
        losses = [np.array([r.measures["nats_per_token"] for r in runs[data][name]]) for name in (ours, other)]
        mean, half = mean_interval((losses[0] - losses[1]).tolist())
        return f"{mean:+.3f} ± {half:.3f}"

    millions = max(r.measures["parameters"] for r in runs["builtin"]["mla"]) / 1e6
    return (
        f"- Does a latent cost anything? Table 2 has {nats['mla'] - nats['mha']:+.3f} nats for `mla` against MHA, "
        f"{nats['mla-rope'] - nats['mha']:+.3f} for `mla-rope`, and no MHA with rotary\n"
        f"  positions. Here, at {millions:.1f} M parameters on built-in stories, {len(runs['builtin']['mla'])} seeds, "
        "each at its own best rate, paired differences in nats and\n"
        f"  95 %: `mla` - `mha` {apart('builtin', 'mla', 'mha')}, `mla-rope` - `mha-rope` "
        f"{apart('builtin', 'mla-rope', 'mha-rope')}. On real stories, {len(runs['files']['mla-rope'])} seeds, "
        f"{apart('files', 'mla-rope', 'mha-rope')}.\n"
        "  Chapter 5 shows how short sweeps and a single seed mislead here."
    )


def machines() -> str:
    """What the files of `results/` were measured on, and the largest model trained."""
    found = measured_here()
    gpus = sorted({gpu for r in found for gpu in r.provenance["machine"]["gpus"] or ()})
    cores = max(r.provenance["machine"]["threads"] for r in found if not r.provenance["machine"]["gpus"])
    trained = [r.measures["parameters"] for r in found if "parameters" in r.measures]
    minutes = [r.measures["seconds"] / 60 for r in found if "seconds" in r.measures]
    there = {r.experiment for r in found if r.provenance["machine"]["gpus"]} - {"bench"}
    what = " and ".join(["benches also", *(f"`{name}` alone" for name in sorted(there))])
    on = f"on up to {cores} CPU cores, " + (f"{what} on an {', '.join(gpus)}" if gpus else "without a GPU")
    return (
        f"The {len(found)} results shown were measured {on}: trained models have up to {max(trained) / 1e6:.1f} "
        f"million parameters and {max(minutes):.0f} minutes behind them."
    )


KERNELS = {  # of a bench of kernels: what stands in the table
    "rope forward+backward n=65536": ("RoPE, forward and backward", "plain"),
    "router forward+backward n=65536": ("router, forward and backward", "plain"),
    "experts forward n=65536": ("routed experts, forward", "masked"),
    "experts forward+backward n=65536": ("routed experts, forward and backward", "masked"),
    "latent decode length=8192": ("decode, the paper's latents", "plain"),
    "joint decode length=8192": ("decode, joint latent", "plain"),
}


BEFORE_PIECES = ("faa15a5",)  # commits at which decode cut longer caches than the table's into one piece too many


def gpu() -> str:
    """What a GPU says of the kernels: each beside the plain function and its limit."""
    wanted = {"tags.what": "kernels", "tags.size": "M", "tags.dtype": "bf16", "tags.matched": "parameters"}
    found = [r for r in measured_here("bench") if r.settings["scale"] == "cuda" and r.holds(wanted)]
    if not found:
        return (
            "**No result here was measured on a GPU**, so nothing is said of their speed, and they are off until asked "
            "for."
        )
    (result,) = found
    commit = result.provenance["git"]["commit"][:7]
    since = "; longer caches are cut otherwise since" if commit in BEFORE_PIECES else ""
    times = {(row["case"], row["program"]): row for row in result.measures["rows"]}
    out = [
        f"Measured on an {', '.join(result.provenance['machine']['gpus'])}, bfloat16, widths of size M, replayed as "
        f"CUDA graphs (`moemla bench kernels`, at {commit}{since}),",
        "65,536 tokens; decode for 16 rows that hold 8,192 tokens each. Limit: the longer of bytes over bandwidth and",
        "products over peak.",
        "",
        "| ms | plain | kernel | limit |",
        "|---|---:|---:|---:|",
    ]
    for case, (said, plain) in KERNELS.items():
        row = times[case, "kernel"]
        numbers = (times[case, plain]["seconds"], row["seconds"], row["limit"])
        out.append(f"| {said} | {' | '.join(f'{1e3 * number:.3f}' for number in numbers)} |")
    out += [
        "",
        "(Plain experts are `masked`, the fastest of the others here.) They are off until asked for: a decode step",
        "from Python is bound by launches, and kernels make it no faster.",
    ]
    return "\n".join(out)


ANSWERS = {  # of a registered experiment: its question, and the comparisons that answer it
    "balancing": ("What does balancing cost in loss?", "sign - none", "switch - none"),
    "shared-experts": (
        "Do shared experts help, and experts at all, at equal active size?",
        "shared-2 - shared-0",
        "shared-2 - dense",
    ),
    "synergy": (
        "Do experts and latents help each other, at equal total?",
        "experts x latents, rotary, equal total",
        "experts x latents, learned, equal total",
        "moe-mla-rope - mha-rope",
    ),
    "synergy-adamw": ("And with AdamW?", "experts x latents, rotary, equal total"),
    "synergy-long": ("And after four times as many steps?", "experts x latents, rotary, equal total"),
    "synergy-rate": ("And at another rate?", "experts x latents, rotary, equal total"),
    "granularity": (
        "Are 64 experts better than 8, at equal total and at equal active size?",
        "total-64 - all-8",
        "active-64 - all-8",
    ),
    "real": ("And on real stories?", "experts x latents, rotary, equal total", "moe-mla-rope - mha-rope"),
    "compression": ("Do experts make up for a narrow latent?", "experts x narrow latent (1/8 against 1/2)"),
    "scaling": ("Does the gain grow with the model?", "total: gain at 256 over that at 64"),
    "flops": ("At equal forward FLOPs?", "moe-mla-rope - mha-rope"),
    "synergy-large": (
        "And in models of 21 million parameters, on a GPU?",
        "experts x latents, rotary, equal total",
        "moe-mla-rope - mha-rope",
    ),
}


def outcomes() -> str:
    """What each complete experiment answers: differences in nats, by Welch; dense and experts of the speedrun."""
    from moemla.experiments import find, home
    from moemla.experiments.runner import complete
    from moemla.statistics import difference

    lines = []
    for name, (question, *asked) in ANSWERS.items():
        runs = complete(name, home(name), RESULTS)
        seen = find(name).contrasts(runs) if runs else {}
        said = [f"`{one}` {plus_minus(seen[one].welch) if one in seen else 'not judged'}" for one in asked]
        lines += [f"- *{name}*: {question} {'; '.join(said)}."] if runs else []
    scores = {arm: [] for arm in ("moe-ten", "dense-ten")}
    for run in measured_here("speedrun"):
        scores.get(run.settings["tags"]["arm"], []).append(run.measures["bits_per_byte"])
    if len(scores["moe-ten"]) == len(scores["dense-ten"]) > 1:
        apart = difference(*scores.values()).welch
        said = f"Experts {plus_minus(apart, 4)} bits per byte above dense."
        lines.append(f"- *speedrun*: Which is better after ten minutes on two cores? {said}")
    return "\n".join(textwrap.fill(line, 120, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def plus_minus(one: Any, digits: int = 3, sign: str = "+", blank: str = " ") -> str:
    """A value with its interval."""
    return blank.join((f"{one.value:{sign}.{digits}f}", "±", f"{one.half_width:.{digits}f}"))


def speedrun() -> str:
    """The board."""
    from moemla import results
    from tools.speedrun import NAME, table

    kept = results.load(RESULTS, NAME, missing_ok=True)
    return "\n" + table(kept) + "\n" if kept else "\nNo run has been made under these rules yet.\n"


BLOCKS = {
    "gpu": gpu,
    "chapters": chapters,
    "ledger": ledger,
    "ten-minutes": ten_minutes,
    "benches": benches,
    "latent-cost": latent_cost,
    "machines": machines,
    "speedrun": speedrun,
    "outcomes": outcomes,
}
FILES = ("README.md", "book/preface.md", "book/speedrun.md")


def filled(text: str) -> str:
    """A page with every block written anew; KeyError for a block that does not exist."""
    return _BLOCK.sub(lambda m: f"{m[1]}{BLOCKS[m[2]]()}\n{m[3]}", text)


def blocks_of(text: str) -> list[str]:
    """Names of a page's blocks."""
    return [match[2] for match in _BLOCK.finditer(text)]


def clock_minutes(provenances: list[dict[str, Any]]) -> float:
    """Minutes in which at least one of the runs was at work; two side by side count once."""
    ends = [(datetime.fromisoformat(run["date"]).timestamp(), run["seconds"]) for run in provenances]
    total, until = 0.0, -float("inf")
    for begin, end in sorted((end - seconds, end) for end, seconds in ends):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total / 60
