"""The whole road on a laptop: stories to tokens to a `tiny` model, scored beside counted n-grams.

On the built-in stories three more figures say whether they teach more than counting can: what the model loses when the
sentences of a story are shuffled, how often it gets names, pronouns and objects right that were settled sentences
earlier, and how often an eight-word sequence comes back.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moemla.checkpoint import load
from moemla.config import ModelConfig
from moemla.data import DEFAULT_STORIES, VALID_STORIES, TokenShard, prepare, read_stories
from moemla.evaluation import agreement_accuracy, bits_per_byte, evaluate, shuffle_sentences
from moemla.experiments.results import Result, run_cells
from moemla.files import read_json
from moemla.generation import generate
from moemla.ngrams import NGram
from moemla.stories import stories
from moemla.tokenizer import Tokenizer
from moemla.training import TrainConfig, read_metrics, train

EXPERIMENT = "ten-minutes"
SCALES = {"smoke": dict(steps=20, stories=300), "cpu": dict(steps=TrainConfig.steps, stories=None)}
SAMPLES = 20
PROMPT = "Once upon a time"


def run(
    scale: str = "cpu",
    folder: str | Path = "results",
    train_text: str | Path | None = None,
    valid_text: str | Path | None = None,
    on_progress=None,
) -> list[Result]:
    """Trains `tiny` moe-mla-rope with the defaults and measures it; a result in `folder`. Built in chapter 5.

    On the built-in stories, or on two text files. Cut and called again it goes on from its last checkpoint. ValueError
    for a scale other than smoke and cpu.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: this experiment has {' and '.join(SCALES)}")
    size = SCALES[scale]
    cell = dict(data="files" if train_text else "builtin", size="tiny", variant="moe-mla-rope", vocab_size=4096, **size)

    def work(settings: dict[str, Any], scratch: Path) -> dict[str, Any]:
        data, out = scratch / "data", scratch / "run"
        source = dict(source=settings["data"], train=train_text, valid=valid_text)
        facts = prepare(data, stories=settings["stories"], vocab_size=settings["vocab_size"], **source)
        vocab_size = facts["tokenizer"]["vocab_size"]
        config = ModelConfig.preset(settings["size"], settings["variant"], vocab_size=vocab_size, max_seq_len=512)
        how = TrainConfig(steps=settings["steps"])
        train(config, how, data, out, resume=True, on_progress=on_progress)
        return measure(out, data) | {"data_hash": facts["hash"], "training": asdict(how)}

    return run_cells(EXPERIMENT, [cell], work, folder)


def measure(run: str | Path, data: str | Path) -> dict[str, Any]:
    """All figures of a finished run on prepared data, and twenty stories that it writes. Built in chapter 5."""
    run, data = Path(run), Path(data)
    model, tokenizer = load(run)
    last = read_metrics(run)[-1]
    settings = read_json(run / "train.json")
    context = settings["train"]["seq_len"]
    texts = list(read_stories(data / "valid.txt"))
    scored = evaluate(model, tokenizer, texts, context)
    found: dict[str, Any] = {"seconds": last.seconds, "tokens_seen": last.tokens, "final_loss": last.loss}
    found |= scored.to_dict() | {"counted_bits_per_byte": counted(data, scored.bytes)}
    if read_json(data / "data.json")["settings"]["source"] == "builtin":
        shuffled = [shuffle_sentences(text, seed) for seed, text in enumerate(texts)]
        found["shuffled_bits_per_byte"] = evaluate(model, tokenizer, shuffled, context).bits_per_byte
        marked = list(stories(VALID_STORIES, start=settings["splits"]["train"]["stories"]))[:200]
        found["agreement_accuracy"] = agreement_accuracy(model, tokenizer, marked, context)
        found["most_common_8_words"] = most_common_sequence(story.text for story in stories(DEFAULT_STORIES // 2))
    told = tell(model, tokenizer)
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


def tell(model, tokenizer: Tokenizer, count: int = SAMPLES) -> list[str]:
    """`count` stories from the same prompt, with the seeds 0, 1, 2, ... Built in chapter 5."""
    prompt = torch.tensor([tokenizer.eot, *tokenizer.encode(PROMPT)])
    told = generate(model, [prompt] * count, max_new_tokens=400, stop=tokenizer.eot)
    return [tokenizer.decode(story.tolist()) for story in told]
