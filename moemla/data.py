"""`prepare`: from text to a tokenizer and token shards, with a record of what was made from what.

Notable: `data.json` is written last and says what the folder holds and claims, so that the same call again returns at
once and what was not made here is not overwritten. Built in chapter 1.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moemla.config import require, require_count
from moemla.errors import DataError
from moemla.files import claimed, replacing, sha256, why
from moemla.shards import TokenShard, check_tokenizer, write_shard
from moemla.text import SEPARATOR, Report, fetch_claimed, read_stories, then, watched
from moemla.tokenizer import MIN_VOCAB, Tokenizer, check_vocab_size, in_groups

SOURCES = ("builtin", "hub", "files")
TOKENIZERS = ("bpe", "gpt2")
DEFAULT_STORIES = 20_000
DEFAULT_VOCAB = 4096
VALID_STORIES = 600

_MADE = ("tokenizer.json", "train.bin", "valid.bin", "valid.txt", "data.json")
OUTPUTS = {"builtin": ("train.txt", *_MADE), "hub": _MADE, "files": _MADE}  # what `prepare` may overwrite


def prepare(
    out: str | os.PathLike[str],
    source: str = "builtin",
    train: str | os.PathLike[str] | None = None,
    valid: str | os.PathLike[str] | None = None,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    stories: int | None = None,
    seed: int = 0,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Text to `tokenizer.json`, `train.bin`, `valid.bin`, `valid.txt` and `data.json` in `out`.

    Returns what `data.json` holds: settings, tokenizer, splits (stories, tokens, bytes, sha256), hash and
    versions. source: "builtin" (the story generator; also writes `train.txt`), "hub" (TinyStories, streamed)
    or "files" (`train` and `valid`). stories: how many to train on, by default 20,000, of files all; the 600
    validation stories of "builtin" come after them. tokenizer: "bpe", trained on the training text to `vocab_size`
    tokens (4,096), or "gpt2" (whose vocabulary is fixed). `data.json` is written last: while it names the same
    settings and input (by sha256), a second call returns at once; otherwise all is made anew but text from the hub.
    What it does not claim is not overwritten: a file of one of these names that `prepare` did not make, or a text that
    was changed since, is a `DataError` before anything is written. What an interrupted call left it claims.
    `MoemlaError` while another process writes into `out`. progress(label, done, total) is called on the way.
    """
    require(source in SOURCES, "source", source, f"must be one of {', '.join(SOURCES)}")
    require(tokenizer in TOKENIZERS, "tokenizer", tokenizer, f"must be one of {', '.join(TOKENIZERS)}")
    if (source == "files") != (train is not None) or (source == "files") != (valid is not None):
        raise ValueError(f"train={train}, valid={valid}: source 'files' needs both, the others neither")
    if stories is not None:
        require_count("stories", stories)
    require(seed >= 0, "seed", seed, "must be 0 or more")
    require(seed == 0 or source == "builtin", "seed", seed, "only the built-in stories have one")
    right = "gpt2 has 50,257 tokens, the size of a bpe vocabulary is for you to choose"
    require(tokenizer == "bpe" or vocab_size in (None, 50_257), "vocab_size", vocab_size, right)
    vocab_size = DEFAULT_VOCAB if vocab_size is None else vocab_size
    check_vocab_size(vocab_size)
    if stories is None and source != "files":
        stories = DEFAULT_STORIES
    out = Path(out)
    inputs = {"train": Path(train), "valid": Path(valid)} if source == "files" else {}
    for option, path in inputs.items():
        for name in OUTPUTS[source]:
            same = path.exists() and (out / name).exists() and path.samefile(out / name)
            require(not same, option, os.fspath(path), f"is {out / name}, which is to be written; name another folder")

    settings: dict[str, Any] = {"source": source, "stories": stories, "tokenizer": tokenizer}
    if tokenizer == "bpe":
        settings["vocab_size"] = vocab_size
    if source == "builtin":
        from moemla.stories import stories as generate

        # its first stories stand for the generator: when they change, the data is made anew
        settings |= {"seed": seed, "generator": _sha256("".join(s.text for s in generate(8, seed=seed)))}
    settings |= {option: _file_facts(path) for option, path in inputs.items()}

    if known := _prepared(out, settings):
        return known
    with claimed(out, "moemla prepare"):
        ours = _claims(out)
        for name in OUTPUTS[source]:
            if os.path.lexists(out / name) and name not in ours:
                raise DataError(
                    f"{out / name} is there already and not from `moemla prepare`, or changed since: move it away or "
                    "name another folder"
                )
        # from here on the folder is not what it said; all of it may be overwritten, by the next call too
        _write_record(out, {"unfinished": sorted({*ours, *OUTPUTS[source]})})
        try:
            return _make(out, settings, inputs, progress)
        except BaseException:
            if not any(os.path.lexists(out / name) for name in {*ours, *OUTPUTS[source]} - {"data.json"}):
                (out / "data.json").unlink(missing_ok=True)
            raise


def _make(out: Path, settings: dict[str, Any], inputs: dict[str, Path], progress: Report | None) -> dict[str, Any]:
    """Everything that `prepare` writes, in a folder that may be written; returns the record."""
    source, stories = settings["source"], settings["stories"]
    texts = inputs or {split: out / f"{split}.txt" for split in ("train", "valid")}
    if source == "builtin":
        from moemla.stories import stories as generate

        for split, count, start in (("train", stories, 0), ("valid", VALID_STORIES, stories)):
            fresh = (s.text for s in generate(count, seed=settings["seed"], start=start))
            _write_text(texts[split], watched(fresh, f"{split} stories", count, progress))
    if source == "hub":
        texts["train"] = fetch_claimed(out, "train", stories, progress)
        texts["valid"] = fetch_claimed(out, "validation", VALID_STORIES, progress)

    rows = {"train": stories, "valid": VALID_STORIES if source == "hub" else None}

    def read(split: str) -> Iterator[str]:
        return read_stories(texts[split], rows[split])

    if settings["tokenizer"] == "bpe":
        learnt = watched(read("train"), "tokenizer", stories, progress)
        tokens = Tokenizer.train(then(learnt, "merges", progress), settings["vocab_size"])
        if progress:
            progress("merges", tokens.vocab_size - MIN_VOCAB, tokens.vocab_size - MIN_VOCAB)
    else:
        tokens = Tokenizer.gpt2()
    splits = {
        split: _encode(out / f"{split}.bin", tokens, watched(read(split), split, rows[split], progress))
        for split in texts
    }
    if source != "builtin":
        _write_text(out / "valid.txt", read("valid"))
    tokens.save(out / "tokenizer.json")
    record = {
        "settings": settings,
        "tokenizer": {"kind": settings["tokenizer"], "vocab_size": tokens.vocab_size, "hash": tokens.hash},
        "splits": splits,
        "hash": _sha256(tokens.hash + "".join(facts["sha256"] for facts in splits.values())),
        "versions": {name: _version(name) for name in ("moemla", "tokenizers", "numpy")},
    }
    _write_record(out, record)
    return record


def _write_record(out: Path, record: dict[str, Any]) -> None:
    with replacing(out / "data.json") as file:
        file.write((json.dumps(record, indent=2, allow_nan=False) + "\n").encode())


def _claims(out: Path) -> set[str]:
    """The names in `out` that its `data.json` claims: what was made, or was to be made by a call that was cut short.

    A text that was changed since is the user's own.
    """
    try:
        record = json.loads((out / "data.json").read_text(encoding="utf-8"))
        if "unfinished" in record:
            return {"data.json", *record["unfinished"]}
        source, splits = record["settings"]["source"], record["splits"]
        made = set(OUTPUTS[source])
        for split in splits:
            text = out / f"{split}.txt"
            if text.name in made and text.exists() and _file_facts(text)["sha256"] != splits[split]["sha256"]:
                made.remove(text.name)
        return made
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        return set()  # missing, cut or foreign


def _write_text(path: Path, stories: Iterable[str]) -> None:
    with replacing(path) as file:
        for story in stories:
            file.write((story + SEPARATOR).encode())


def _encode(path: Path, tokenizer: Tokenizer, stories: Iterator[str]) -> dict[str, Any]:
    """Writes one shard; returns stories, tokens (with EOT), bytes (without separators), the text's sha256."""
    facts, digest = {"stories": 0, "tokens": 0, "bytes": 0}, hashlib.sha256()

    def documents() -> Iterator[list[int]]:
        for chunk in in_groups(stories):
            for story, ids in zip(chunk, tokenizer.encode_batch(chunk), strict=True):
                digest.update((story + SEPARATOR).encode())
                facts["stories"] += 1
                facts["tokens"] += 1 + len(ids)
                facts["bytes"] += len(story.encode())
                yield ids

    write_shard(path, tokenizer, documents())
    return {**facts, "sha256": digest.hexdigest()}


def _prepared(out: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What `data.json` holds, if it was made with these settings and the files beside it are its own."""
    try:
        record = json.loads((out / "data.json").read_text())
        tokenizer = Tokenizer.load(out / "tokenizer.json")
        for split, facts in record["splits"].items():
            shard = TokenShard(out / f"{split}.bin", check=True)
            check_tokenizer(shard, tokenizer)
            if (len(shard), len(shard.tokens)) != (facts["stories"], facts["tokens"]):
                return None
        whole = (out / "valid.txt").exists() and tokenizer.hash == record["tokenizer"]["hash"]
        return record if whole and record["settings"] == settings else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DataError):
        return None  # missing, cut or foreign: to be made anew


def _file_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Name, bytes and sha256 of an input file; its folder stays out of `data.json`."""
    try:
        return {"name": Path(path).name, "bytes": Path(path).stat().st_size, "sha256": sha256(path)}
    except OSError as error:
        raise DataError(f"cannot read {path}: {why(error)}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
