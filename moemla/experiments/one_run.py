"""One run of a comparison: trained from its last checkpoint on, scored, looked at. Built in chapter 15."""

import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moemla import complexity
from moemla.cells import BUILTIN, Cell
from moemla.checkpoint import checkpoints
from moemla.config import ModelConfig
from moemla.data import VALID_STORIES
from moemla.errors import Diverged
from moemla.evaluation import agreement_accuracy, evaluate, load_profile, shuffle_sentences
from moemla.experiments.runner import Text
from moemla.experiments.ten_minutes import repeats
from moemla.files import read_json
from moemla.generation import generate
from moemla.runs import read_metrics
from moemla.shards import TokenShard
from moemla.stories import stories
from moemla.text import read_stories
from moemla.tokenizer import Tokenizer
from moemla.training import train

PROMPTS = ("Once upon a time", "One day", "There was a little", "In the morning", "Mia and Tom")
CHECKPOINT_EVERY = 50  # steps: what a killed run repeats at most
SHUFFLED, MARKED, WINDOWS = 100, 100, 128  # stories in another order, stories with marked words, windows of the loads


@dataclass(frozen=True)
class Scale:
    """How large a comparison is."""

    steps: int = 600
    batch_size: int = 8
    seq_len: int = 256
    size: str = "tiny"
    max_seq_len: int = 512  # of a learned position table
    optimizer: str = "muon"
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2, 4e-2)  # peak learning rates tried
    seeds: int = 5  # besides seed 0
    first_seed: int = 11
    only: tuple[str, ...] | None = None  # of the arms; None: all
    precision: str = "float32"
    dropout: float = 0.0
    source: str = BUILTIN  # of the stories, where no files are named: or "hub"
    tokenizer: str = "bpe"  # or "gpt2"
    stories: int | None = None  # to train on; None: all there are
    scored: int | None = None  # validation stories; None: all
    samples: int = 4  # stories told of each prompt
    sample_tokens: int = 200


CPU = Scale()


def scales(cpu: Scale = CPU, pilot: tuple[str, ...] = (), **more: Scale) -> dict[str, Scale]:
    """The scales of an experiment: `cpu` as it says, the others by the same rule for all.

    smoke takes seconds and measures nothing; pilot (of the arms named, one rate, seeds from 100 on) measures the spread
    over seeds before a registration; gpu is S in 16 bits, an hour of one GPU for a few dozen runs; paper is M as the
    paper trains it.
    """
    smoke = dict(steps=6, rates=cpu.rates[:2], seeds=2, stories=300, scored=8, batch_size=2, seq_len=32, samples=1)
    made = {"smoke": replace(cpu, sample_tokens=8, **smoke), "cpu": cpu}
    if pilot:
        made["pilot"] = replace(cpu, rates=(1e-2,), seeds=6, first_seed=100, only=pilot)
    large = dict(precision="bf16", seq_len=512)
    made["gpu"] = replace(cpu, size="S", steps=4000, batch_size=32, stories=200_000, **large)
    paper = dict(size="M", steps=50_000, batch_size=128, optimizer="adamw", rates=(3e-4, 1e-3, 3e-3), dropout=0.1)
    made["paper"] = replace(cpu, source="hub", tokenizer="gpt2", **paper, **large)
    return made | more


def work(cell: Cell, size: Scale, text: Text, scratch: Path, progress=None) -> dict[str, Any]:
    """Trains and measures one cell: losses, loads, stories, and what it cost."""
    config, settings, shards, out = cell.model, cell.train, text.folder, scratch / "run"
    measures = sizes(config, settings.seq_len)
    before = max((int(path.name.removeprefix("step-")) for path in checkpoints(out)), default=0)
    begin = time.process_time()
    try:
        model = train(config, settings, shards, out, True, CHECKPOINT_EVERY, on_progress=progress)
    except Diverged:
        return measures | dict(diverged=True)
    each = settings.batch_size * settings.seq_len
    rate = (settings.steps - before) * each / (time.process_time() - begin)
    if before < settings.steps:
        measures |= dict(tokens_per_cpu_second=rate, cpu_seconds=settings.steps * each / rate)
    rows = read_metrics(out)
    curve = dict(tokens=[row.tokens for row in rows], loss=[round(row.loss, 4) for row in rows])
    if rows[-1].load_cv is not None:
        curve["load_cv"] = [round(row.load_cv, 4) for row in rows]
        measures["load_cv_window"] = rows[-1].load_window * each
    measures |= dict(seconds=rows[-1].seconds, tokens_seen=rows[-1].tokens, curve=curve)
    return measures | looked_at(model, Tokenizer.load(shards / "tokenizer.json"), size, shards, settings.seq_len)


def sizes(config: ModelConfig, seq_len: int) -> dict[str, int]:
    """What can be counted before a run."""
    counted = complexity.parameters(config)
    return dict(
        parameters=counted.total,
        active_parameters=counted.active,
        flops_per_token=complexity.flops_per_token(config, seq_len=seq_len),
        cache_bytes_per_token=complexity.cache_bytes_per_token(config, dtype_bytes=2),
    )


def looked_at(model, tokenizer: Tokenizer, size: Scale, shards: Path, context: int) -> dict[str, Any]:
    """All that is measured of a trained model: score, loads, agreement, order, stories."""
    texts = list(islice(read_stories(shards / "valid.txt"), size.scored))
    scores = evaluate(model, tokenizer, texts, context).to_dict()
    measures: dict[str, Any] = {name: value for name, value in scores.items() if value is not None}
    if model.config.ffn == "moe":
        windows = TokenShard(shards / "valid.bin").tokens[: WINDOWS * context].astype("int64")
        windows = torch.from_numpy(windows[: len(windows) // context * context]).view(-1, context)
        measures["loads"] = load_profile(model, windows, size.batch_size)
    facts = read_json(shards / "data.json")
    if facts["settings"]["source"] == BUILTIN:
        few = texts[:SHUFFLED]
        shuffled = [shuffle_sentences(story, seed) for seed, story in enumerate(few)]
        in_order = evaluate(model, tokenizer, few, context).bits_per_byte
        measures["shuffled_ratio"] = evaluate(model, tokenizer, shuffled, context).bits_per_byte / in_order
        start = facts["splits"]["train"]["stories"]
        marked = list(islice(stories(VALID_STORIES, start=start), size.scored or MARKED))
        measures["agreement_accuracy"] = agreement_accuracy(model, tokenizer, marked, context)
    told = tell(model, tokenizer, size.samples, size.sample_tokens)
    return measures | dict(samples_repeating_8_words=sum(map(repeats, told)), samples=told)


def tell(model, tokenizer: Tokenizer, count: int, tokens: int) -> list[str]:
    """`count` stories from each of PROMPTS, row b with seed b."""
    prompts = [torch.tensor([tokenizer.eot, *tokenizer.encode(prompt)]) for prompt in PROMPTS for _ in range(count)]
    told = generate(model, prompts, max_new_tokens=tokens, stop=tokenizer.eot)
    return [tokenizer.decode(story.tolist()) for story in told]
