"""How good a model can be after ten minutes on two cores: one run of a recipe, kept as a result.

python -m tools.speedrun --train F --valid F [--track ten] [--arm moe] [--seeds 0 1 2 3 4]
                                                     trains, scores, keeps the result in results/speedrun/
python -m tools.speedrun --table                     what is kept, and which differences count

The rules are book/speedrun.md. A recipe is two configs with its steps fixed; whether it kept its time is measured.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moemla import results
from moemla.cells import Cell, model_config, train_config
from moemla.data import prepare
from moemla.devices import keep_freed_memory
from moemla.evaluation import evaluate
from moemla.statistics import difference, estimate
from moemla.text import read_stories
from moemla.tokenizer import Tokenizer
from moemla.training import train
from tools.book import ROOT

NAME = "speedrun"
MINUTES = {"ten": 10, "twenty": 20, "gpu": 10}
SEEDS = {"ten": 5, "twenty": 2, "gpu": 5}  # at least, for a row that counts
CALM = 0.9  # of the cores' time at least is the run's own, or something else was running
LEVEL = 0.05


@dataclass(frozen=True)
class Recipe:
    """What is trained, and for how many steps on each track."""

    variant: str
    steps: dict[str, int]
    size: str = "tiny"
    batch_size: int = 8
    seq_len: int = 256
    lr: float = 7e-3
    warmup: int = 50
    vocab_size: int = 4096
    model: dict[str, Any] = field(default_factory=dict)  # what is not as the size and the variant say

    def cell(self, arm: str, track: str, seed: int, data: str) -> Cell:
        """The run as a value."""
        widths = dict(matched="parameters", vocab_size=self.vocab_size, max_seq_len=512) | self.model
        sizes = dict(steps=self.steps[track], batch_size=self.batch_size, seq_len=self.seq_len)
        rates = dict(optimizer="muon", lr=self.lr, min_lr=0.0, warmup=self.warmup, seed=seed)
        return Cell(
            experiment=NAME,
            scale="gpu" if track == "gpu" else "cpu",
            data=data,
            tags=dict(arm=f"{arm}-{track}", text="files", track=track),
            model=model_config(self.size, self.variant, **widths),
            train=train_config(**sizes, **rates, precision="bf16" if track == "gpu" else "float32"),
        )


# Of six attempts (LOG.md): experts four times as wide as equal parameters has them, for an eighth of the time. The
# dense arm was not searched. No GPU has been asked, so no recipe names one.
RECIPES = {
    "moe": Recipe("moe-mla-rope", dict(ten=2500, twenty=5000), model=dict(d_expert=32)),
    "dense": Recipe("mha-rope", dict(ten=3300)),
}


def run(cell: Cell, data: Path, track: str) -> results.Result:
    """Trains and scores one cell; the clock runs from the first call of `train` to its return."""
    cores = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch:
        begin, busy = time.perf_counter(), time.process_time()
        model = train(cell.model, cell.train, data, Path(scratch) / "run", checkpoint_every=None)
        seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    score = evaluate(model, tokenizer, read_stories(data / "valid.txt"), cell.train.seq_len).to_dict()
    measures = {name: value for name, value in score.items() if value is not None}
    in_time, calm = seconds <= 60 * MINUTES[track], busy >= CALM * cores * seconds or track == "gpu"
    measures |= dict(seconds=seconds, processor_seconds=busy, threads=cores, in_time=in_time, calm=calm)
    return results.of(cell, measures, results.provenance(seconds))


def table(kept: list[results.Result]) -> str:
    """A row for each arm, of one recipe; below, whether arms of one track that count differ."""
    arms: dict[str, list[results.Result]] = {}
    counting: dict[str, bool] = {}
    for result in kept:
        arms.setdefault(result.settings["tags"]["arm"], []).append(result)
    lines = [
        "| arm | seeds | bits per byte, 95 % | longest, s | of processors | counts |",
        "|---|---:|---|---:|---:|---|",
    ]
    for arm, runs in sorted(arms.items()):
        results.comparable(*runs, differ_in=["train.seed"])
        scores = [run.measures["bits_per_byte"] for run in runs]
        found = estimate(scores) if len(scores) > 1 else None
        score = f"{found.value:.4f} ± {found.half_width:.4f}" if found else f"{scores[0]:.4f}"
        seconds, busy = (max(run.measures[name] for run in runs) for name in ("seconds", "processor_seconds"))
        enough = len(runs) >= SEEDS[runs[0].settings["tags"]["track"]]
        counting[arm] = enough and all(run.measures["in_time"] and run.measures["calm"] for run in runs)
        said = "yes" if counting[arm] else "no"
        lines.append(f"| {arm} | {len(runs)} | {score} | {seconds:.0f} | {busy:.0f} | {said} |")
    scores_of = {
        arm: {run.settings["train"]["seed"]: run.measures["bits_per_byte"] for run in held}
        for arm, held in arms.items()
    }
    for one, two in pairs(sorted(arm for arm in arms if counting[arm])):
        a, b = scores_of[one], scores_of[two]
        shared = sorted(a.keys() & b.keys())
        if len(shared) >= 2:
            apart = difference([a[seed] for seed in shared], [b[seed] for seed in shared]).welch
            verdict = "differs" if apart.p < LEVEL else "is not told apart"
            p = f"p {apart.p:.3f}" if apart.p >= 0.001 else "p below 0.001"
            size = f"{apart.value:+.4f} ± {apart.half_width:.4f}, {p}"
            lines.append(f"\n`{one}` {verdict} from `{two}`: {size}")
    return "\n".join(lines)


def pairs(arms: list[str]) -> list[tuple[str, str]]:
    """Arms of one track, each with each later one."""
    tracks = [arm.rpartition("-")[2] for arm in arms]
    each = range(len(arms))
    return [(arms[i], arms[j]) for i in each for j in each if i < j and tracks[i] == tracks[j]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--valid", type=Path)
    parser.add_argument("--track", choices=MINUTES, default="ten")
    parser.add_argument("--arm", choices=RECIPES, default="moe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=ROOT / results.FOLDER)
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.table:
        print(table(results.load(chosen.folder, NAME, missing_ok=True)))
        return 0
    keep_freed_memory()
    recipe = RECIPES[chosen.arm]
    if chosen.track not in recipe.steps:
        parser.error(f"--arm {chosen.arm} has no recipe for --track {chosen.track}")
    if not (chosen.train and chosen.valid):
        parser.error("--train and --valid name the stories")
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "data"
        facts = prepare(data, source="files", train=chosen.train, valid=chosen.valid, vocab_size=recipe.vocab_size)
        for seed in chosen.seeds:
            cell = recipe.cell(chosen.arm, chosen.track, seed, facts["hash"])
            path = results.path_of(cell, chosen.folder)
            if path.exists():  # of another recipe or text: said before ten minutes are spent, not after
                results.same(results.read(path), cell.settings, path)
                print(f"seed {seed} is kept in {path}; delete it to run it again", flush=True)
                continue
            result = run(cell, data, chosen.track)
            results.write(result, chosen.folder)
            m = result.measures
            said = "in time" if m["in_time"] else f"too late for {MINUTES[chosen.track]} minutes"
            said += "" if m["calm"] else "; something else was running"
            print(
                f"seed {seed}: {m['bits_per_byte']:.4f} bits per byte after {m['seconds']:.0f} s "
                f"({m['processor_seconds']:.0f} processor seconds): {said}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
