"""The whole road on a laptop: stories to tokens to a `tiny` model, scored beside counted n-grams.

On the built-in stories three more figures say whether they teach more than counting can: what the model loses when the
sentences of a story are shuffled, how often it gets names, pronouns and objects right that were settled sentences
earlier, and how often an eight-word sequence comes back.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moemla.checkpoint import load
from moemla.config import ModelConfig, TrainConfig
from moemla.data import DEFAULT_STORIES, VALID_STORIES, prepare
from moemla.evaluation import agreement_accuracy, bits_per_byte, evaluate, shuffle_sentences
from moemla.files import read_json
from moemla.generation import generate
from moemla.ngrams import NGram
from moemla.results import WORK, Result, cell_key, folder_for, run_cells
from moemla.runs import read_metrics
from moemla.shards import TokenShard
from moemla.stories import stories
from moemla.text import read_stories
from moemla.tokenizer import Tokenizer
from moemla.training import train

EXPERIMENT = "ten-minutes"
DEFAULTS = TrainConfig()
SCALES = {
    "smoke": dict(steps=20, stories=300, warmup=2, batch_size=4, seq_len=64, scored=8),
    "cpu": dict(steps=DEFAULTS.steps, stories=None, warmup=DEFAULTS.warmup),
}
SAMPLES, SAMPLE_TOKENS = 20, 400
VOCAB_SIZE = 4096
PROMPT = "Once upon a time"


def run(
    scale: str = "cpu",
    folder: str | Path | None = None,
    train_text: str | Path | None = None,
    valid_text: str | Path | None = None,
    on_progress=None,
) -> list[Result]:
    """Trains `tiny` moe-mla-rope with the defaults and measures it; a result in `folder`. Built in chapter 5.

    On the built-in stories, or on two text files; each text has a result of its own. `folder` is results/ unless given,
    of smoke a new temporary one. Cut and called again it goes on from its last checkpoint. ValueError for a scale other
    than smoke and cpu.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: this experiment has {' and '.join(SCALES)}")
    size, folder = SCALES[scale], folder_for(scale, folder)
    data, facts = prepared(folder, size["stories"], train_text, valid_text)
    cell = dict(data=facts["settings"]["source"], size="tiny", variant="moe-mla-rope", vocab_size=VOCAB_SIZE, **size)
    cell |= dict(data_hash=facts["hash"], min_lr=DEFAULTS.min_lr)

    def work(settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
        out = scratch / "run"
        vocab_size = facts["tokenizer"]["vocab_size"]
        config = ModelConfig.preset(settings["size"], settings["variant"], vocab_size=vocab_size, max_seq_len=512)
        set_here = ("steps", "min_lr", "warmup", "batch_size", "seq_len")
        how = TrainConfig(**{name: settings[name] for name in set_here if name in settings})
        train(config, how, data, out, resume=True, on_progress=on_progress)
        return measure(out, data, settings.get("scored")) | {"data_hash": facts["hash"], "training": asdict(how)}

    return run_cells(EXPERIMENT, [cell], work, folder)


def prepared(
    folder: Path, stories: int | None, train_text: str | Path | None = None, valid_text: str | Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """An experiment's text as tokens: (the work folder that it has to itself, what `prepare` says of it).

    Another text has another folder, so that runs on both may go side by side. Built in chapter 15.
    """
    settings: dict[str, Any] = dict(source="files" if train_text else "builtin", stories=stories, vocab_size=VOCAB_SIZE)
    texts = dict(train=train_text, valid=valid_text)
    key = cell_key(settings | {split: _digest(path) for split, path in texts.items() if path})
    shards = folder / WORK / f"data-{settings['source']}-{key}"
    return shards, prepare(shards, **settings, **texts)


def _digest(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(run: str | Path, data: str | Path, scored: int | None = None) -> dict[str, Any]:
    """All figures of a finished run on prepared data, and twenty stories that it writes. Built in chapter 5.

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
    found: dict[str, Any] = {"seconds": last.seconds, "tokens_seen": last.tokens, "final_loss": last.loss}
    found |= scores.to_dict()
    found["counted_bits_per_byte"] = counted(data, facts["splits"]["valid"]["bytes"])
    if facts["settings"]["source"] == "builtin":
        shuffled = [shuffle_sentences(text, seed) for seed, text in enumerate(texts)]
        found["shuffled_bits_per_byte"] = evaluate(model, tokenizer, shuffled, context).bits_per_byte
        start = settings["splits"]["train"]["stories"]
        marked = list(islice(stories(VALID_STORIES, start=start), scored or 200))
        found["agreement_accuracy"] = agreement_accuracy(model, tokenizer, marked, context)
        found["most_common_8_words"] = most_common_sequence(
            story.text for story in stories(scored or DEFAULT_STORIES // 2)
        )
    told = tell(model, tokenizer) if scored is None else tell(model, tokenizer, 2, SAMPLE_TOKENS // 10)
    found["samples_repeating_8_words"] = sum(repeats(text) for text in told)
    found["samples"] = told
    return found


def counted(data: str | Path, n_bytes: int) -> dict[str, float]:
    """Bits per byte of counted bigram, trigram and 4-gram (Kneser-Ney) on the validation stories.

    Built in chapter 1.
    """
    train_shard, valid = TokenShard(Path(data) / "train.bin"), TokenShard(Path(data) / "valid.bin")
    found = {}
    for order in (2, 3, 4):
        model = NGram(order, train_shard.vocab_size).fit(train_shard.tokens, train_shard.documents)
        nats = float(model.nats(valid.tokens, valid.documents).sum())
        found[str(order)] = bits_per_byte(nats, n_bytes)
    return found


def most_common_sequence(texts: Iterable[str], words: int = 8) -> float:
    """The share of stories that hold the commonest sequence of so many words. Built in chapter 1."""
    holders, total = Counter(), 0
    for total, text in enumerate(texts, 1):  # noqa: B007 (the count is used below)
        holders.update(set(_sequences(text, words)))
    return holders.most_common(1)[0][1] / total


def repeats(text: str, words: int = 8) -> bool:
    """Whether a sequence of so many words stands in the text twice. Built in chapter 5."""
    found = _sequences(text, words)
    return len(set(found)) < len(found)


def _sequences(text: str, words: int) -> list[tuple[str, ...]]:
    pieces = text.split()
    return list(zip(*(pieces[start:] for start in range(words)), strict=False))


def tell(model, tokenizer: Tokenizer, count: int = SAMPLES, tokens: int = SAMPLE_TOKENS) -> list[str]:
    """`count` stories from the same prompt, with the seeds 0, 1, 2, ... Built in chapter 5."""
    prompt = torch.tensor([tokenizer.eot, *tokenizer.encode(PROMPT)])
    told = generate(model, [prompt] * count, max_new_tokens=tokens, stop=tokenizer.eot)
    return [tokenizer.decode(story.tolist()) for story in told]
