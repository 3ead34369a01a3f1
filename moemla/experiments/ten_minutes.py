"""The whole road on a laptop: stories to tokens to a `tiny` model, scored beside counted n-grams.

On the built-in stories three more figures say whether they teach more than counting can: what the model loses when the
sentences of a story are shuffled, how often it gets names, pronouns and objects right that were settled sentences
earlier, and how often an eight-word sequence comes back. Built in chapter 5.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moemla.cells import BUILTIN, Cell, model_config, train_config
from moemla.checkpoint import load
from moemla.data import DEFAULT_STORIES, VALID_STORIES
from moemla.evaluation import agreement_accuracy, bits_per_byte, evaluate, shuffle_sentences
from moemla.experiments.runner import Text
from moemla.files import read_json
from moemla.generation import generate
from moemla.ngrams import NGram
from moemla.results import Result
from moemla.runs import read_metrics
from moemla.shards import TokenShard
from moemla.stories import stories
from moemla.text import read_stories
from moemla.tokenizer import Tokenizer
from moemla.training import train

NAME = "ten-minutes"
ALONE = True  # it shows what a laptop does with all its cores
SAMPLES, SAMPLE_TOKENS = 20, 400
PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Scale:
    """How large the run is: at full scale as `moemla train` does it by default."""

    steps: int = 1000
    warmup: int = 50
    batch_size: int = 16
    seq_len: int = 256
    stories: int | None = None  # to train on; None: all there are
    scored: int | None = None  # validation stories; None: all


SCALES = {"smoke": Scale(steps=20, warmup=2, batch_size=4, seq_len=64, stories=300, scored=8), "cpu": Scale()}


def cells(scale: str, text: Text) -> list[Cell]:
    """One run of `tiny` moe-mla-rope."""
    size, arm = SCALES[scale], "moe-mla-rope"
    return [
        Cell(
            experiment=NAME,
            scale=scale,
            data=text.data,
            tags=dict(arm=arm, variant=arm, text=text.source, scored=size.scored),
            model=model_config("tiny", arm, vocab_size=text.vocab_size, max_seq_len=512),
            train=train_config(
                steps=size.steps,
                batch_size=size.batch_size,
                seq_len=size.seq_len,
                optimizer="muon",
                lr=1e-2,
                min_lr=0.0,
                warmup=size.warmup,
                seed=0,
            ),
        )
    ]


def work(cell: Cell, text: Text, scratch: Path, progress=None) -> dict[str, Any]:
    """The run, trained from its last checkpoint on, and measured."""
    train(cell.model, cell.train, text.folder, scratch / "run", resume=True, on_progress=progress)
    return figures(scratch / "run", text.folder, cell.tags["scored"])


def table(results: Iterable[Result]) -> str:
    """What was measured, without the stories that were told, as JSON."""
    shown = [
        {
            "name": result.name,
            "settings": result.settings,
            "measures": {name: value for name, value in result.measures.items() if name != "samples"},
        }
        for result in results
    ]
    return "\n".join(json.dumps(one, indent=1, allow_nan=False) for one in shown)


def figures(run: str | Path, data: str | Path, scored: int | None = None) -> dict[str, Any]:
    """All figures of a finished run on prepared data, and twenty stories that it writes.

    `scored` stories stand for all, and a few words for a story, where only the road is tried.
    """
    run, data = Path(run), Path(data)
    model, tokenizer = load(run)
    last = read_metrics(run)[-1]
    settings = read_json(run / "train.json")
    context = settings["train"]["seq_len"]
    facts = read_json(data / "data.json")
    texts = list(islice(read_stories(data / "valid.txt"), scored))
    scores = evaluate(model, tokenizer, texts, context)
    measures: dict[str, Any] = {"seconds": last.seconds, "tokens_seen": last.tokens, "final_loss": last.loss}
    measures |= scores.to_dict()
    measures["counted_bits_per_byte"] = counted(data, facts["splits"]["valid"]["bytes"])
    if facts["settings"]["source"] == BUILTIN:
        shuffled = [shuffle_sentences(text, seed) for seed, text in enumerate(texts)]
        measures["shuffled_bits_per_byte"] = evaluate(model, tokenizer, shuffled, context).bits_per_byte
        start = settings["splits"]["train"]["stories"]
        marked = list(islice(stories(VALID_STORIES, start=start), scored or 200))
        measures["agreement_accuracy"] = agreement_accuracy(model, tokenizer, marked, context)
        measures["most_common_8_words"] = most_common_sequence(
            story.text for story in stories(scored or DEFAULT_STORIES // 2)
        )
    told = tell(model, tokenizer) if scored is None else tell(model, tokenizer, 2, SAMPLE_TOKENS // 10)
    measures["samples_repeating_8_words"] = sum(repeats(text) for text in told)
    measures["samples"] = told
    return measures


def counted(data: str | Path, n_bytes: int) -> dict[str, float]:
    """Bits per byte of counted bigram, trigram and 4-gram (Kneser-Ney) on the validation stories.

    Built in chapter 1.
    """
    train_shard, valid = TokenShard(Path(data) / "train.bin"), TokenShard(Path(data) / "valid.bin")
    bits = {}
    for order in (2, 3, 4):
        model = NGram(order, train_shard.vocab_size).fit(train_shard.tokens, train_shard.documents)
        nats = float(model.nats(valid.tokens, valid.documents).sum())
        bits[str(order)] = bits_per_byte(nats, n_bytes)
    return bits


def most_common_sequence(texts: Iterable[str], words: int = 8) -> float:
    """The share of stories that hold the commonest sequence of so many words. Built in chapter 1."""
    holders, total = Counter(), 0
    for total, text in enumerate(texts, 1):  # noqa: B007 (the count is used below)
        holders.update(set(_sequences(text, words)))
    return holders.most_common(1)[0][1] / total


def repeats(text: str, words: int = 8) -> bool:
    """Whether a sequence of so many words stands in the text twice."""
    sequences = _sequences(text, words)
    return len(set(sequences)) < len(sequences)


def _sequences(text: str, words: int) -> list[tuple[str, ...]]:
    pieces = text.split()
    return list(zip(*(pieces[start:] for start in range(words)), strict=False))


def tell(model, tokenizer: Tokenizer, count: int = SAMPLES, tokens: int = SAMPLE_TOKENS) -> list[str]:
    """`count` stories from the same prompt, with the seeds 0, 1, 2, ..."""
    prompt = torch.tensor([tokenizer.eot, *tokenizer.encode(PROMPT)])
    told = generate(model, [prompt] * count, max_new_tokens=tokens, stop=tokenizer.eot)
    return [tokenizer.decode(story.tolist()) for story in told]
