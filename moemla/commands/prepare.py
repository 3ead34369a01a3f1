"""`moemla prepare`: text to token shards. Built in chapter 1."""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moemla.commands.terminal import say


@dataclass
class Prepare:
    """Text to token shards.

    Remembers what it has done: the same call again returns at once.
    """

    out: Path
    """Folder for tokenizer.json, train.bin, valid.bin, valid.txt and data.json."""
    source: Literal["builtin", "hub", "files"] = "builtin"
    """builtin: generated stories; hub: roneneldan/TinyStories; files: --train and --valid."""
    train: Path | None = None
    """Text with a line <|endoftext|> between stories (source files)."""
    valid: Path | None = None
    """The same, for validation (source files)."""
    tokenizer: Literal["bpe", "gpt2"] = "bpe"
    """bpe: byte-level, trained on the training text; gpt2: GPT-2's 50,257 tokens."""
    vocab_size: int | None = None
    """Tokens of a bpe vocabulary, 257 to 65,536. Default 4,096."""
    stories: int | None = None
    """Stories to train on. Default 20,000; of files all."""
    seed: int = 0
    """Of the built-in stories."""

    def __call__(self) -> None:
        from rich import progress

        from moemla.data import prepare

        columns = (progress.TextColumn("{task.description:>16}"), progress.BarColumn())
        columns += (progress.MofNCompleteColumn(), progress.TimeElapsedColumn())
        with progress.Progress(*columns) as bars, warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            tasks: dict[str, int] = {}

            def show(label: str, done: int, total: int | None) -> None:
                if label not in tasks:
                    tasks[label] = bars.add_task(label, total=total)
                bars.update(tasks[label], completed=done, total=total)

            chosen = {
                name: getattr(self, name)
                for name in ("source", "train", "valid", "tokenizer", "vocab_size", "stories", "seed")
            }
            record = prepare(self.out, progress=show, **chosen)
        for text in dict.fromkeys(str(note.message) for note in noted):  # once, though a file is read thrice
            say(f"moemla: warning: {text}", sys.stderr)
        for split, facts in record["splits"].items():
            counts = (f"{facts[unit]:,} {unit}" for unit in ("stories", "tokens", "bytes"))
            print(f"{split}: {', '.join(counts)} ({facts['bytes'] / facts['tokens']:.2f} bytes a token)")
        print(f"data {record['hash'][:12]} in {self.out}")
