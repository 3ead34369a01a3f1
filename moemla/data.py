"""Stories on their way to the model: text -> tokenizer and token shards (`prepare`) -> batches (`Batches`).

A shard is one file: a header with checksums, all tokens as 16-bit ids, and where each story starts. Every story
is EOT followed by its tokens, so that EOT is the token from which a story is started. Shards are
memory-mapped: a file larger than the memory trains as well. Whatever is written appears whole or not at all.
"""

import hashlib
import json
import os
import struct
import warnings
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from moemla.config import require, require_count
from moemla.errors import DataError, optional
from moemla.files import claimed, replacing, why
from moemla.tokenizer import EOT, MIN_VOCAB, Tokenizer, check_vocab_size, in_groups

SEPARATOR = f"\n{EOT}\n"  # after every story of a text file
SOURCES = ("builtin", "hub", "files")
TOKENIZERS = ("bpe", "gpt2")
DEFAULT_STORIES = 20_000
DEFAULT_VOCAB = 4096
VALID_STORIES = 600
HUB_NAME = "roneneldan/TinyStories"
HUB_SECONDS = 5  # to answer at all
HUB_RETRIES = 3  # of a read that broke off; what has come is kept, so giving up early costs nothing
CHUNK = 512  # stories between two reports of progress

_MADE = ("tokenizer.json", "train.bin", "valid.bin", "valid.txt", "data.json")
OUTPUTS = {"builtin": ("train.txt", *_MADE), "hub": _MADE, "files": _MADE}  # what `prepare` may overwrite

Progress = Callable[[str, int, int | None], None]  # label, done, total (None: not known yet)


# --- text -----------------------------------------------------------------------------------------


def read_stories(path: str | os.PathLike[str], rows: int | None = None) -> Iterator[str]:
    """The stories of a UTF-8 text file with `<|endoftext|>` lines between them, one at a time.

    Outer whitespace is stripped and empty stories are left out; `rows` stops after that many, empty ones
    counted. `DataError` when there is no such file, no story in it, or a byte that is not UTF-8 (gives its
    offset). The mark inside a line is text and separates nothing: a warning says so, and a file that has it there
    alone is a `DataError`. Built in chapter 1.
    """
    found = False
    for story in islice(_rows(path), rows):
        if story:
            found = True
            yield story
    if not found:
        raise DataError(f"{path} is empty: it needs stories with a line {EOT} between them")


def _rows(path: str | os.PathLike[str]) -> Iterator[str]:
    """What stands between the separator lines, stripped; empty rows too, because resuming counts them."""
    offset = rows = 0
    inside: list[int] = []  # numbers of lines that hold the mark beside other text
    lines: list[str] = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    place = offset + error.start
                    raise DataError(
                        f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {place}; convert it"
                    ) from None
                if offset == 0:
                    line = line.removeprefix("\ufeff")  # byte order mark
                offset += len(raw)
                if line.strip() == EOT:
                    yield "".join(lines).strip()
                    lines.clear()
                    rows += 1
                    continue
                if EOT in line:
                    inside.append(number)
                lines.append(line.replace("\r\n", "\n"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {why(error)}") from error
    if inside:
        said = f"{path} has {EOT} inside {len(inside)} of its lines (the first is line {inside[0]})"
        if not rows:
            raise DataError(f"{said} and on none of its own, where it would separate stories: put it on its own line")
        warnings.warn(f"{said}: it is taken for text there and separates nothing", stacklevel=3)
    if last := "".join(lines).strip():
        yield last


def hub_stories(split: str, limit: int, skip: int = 0) -> Iterator[str]:
    """Rows `skip` to `limit` of a split ("train" or "validation") of TinyStories, streamed.

    Whatever goes wrong on the way is one `DataError` that names the other sources; without a network it comes
    within seconds. Built in chapter 1.
    """
    datasets = optional("datasets", "hub")
    try:
        _knock_at_the_hub()
        datasets.config.STREAMING_READ_MAX_RETRIES = HUB_RETRIES
        datasets.config.STREAMING_OPEN_MAX_RETRIES = HUB_RETRIES
        rows = datasets.load_dataset(HUB_NAME, split=split, streaming=True)
        for row in islice(rows.skip(skip), max(limit - skip, 0)):
            yield row["text"]
    except Exception as error:  # httpx, huggingface_hub, datasets and fsspec each have their own kinds
        reason = (str(error).splitlines() or [""])[0][:120]
        raise DataError(
            f"cannot reach {HUB_NAME} on the Hugging Face hub ({type(error).__name__}: {reason}). With a "
            "network, the same command goes on where it stopped; without one, use --source builtin, or "
            "--source files --train F --valid F"
        ) from error


def _knock_at_the_hub() -> None:
    """One request with a short limit: without a network `load_dataset` retries for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)


def fetch_hub(out: str | os.PathLike[str], split: str, limit: int, progress: Progress | None = None) -> Path:
    """`OUT/hub-SPLIT.txt` with at least `limit` rows of the hub (fewer if it has no more).

    Text goes to `hub-SPLIT.txt.part`; whole rows in it are counted and kept, so that a second call goes on
    behind them, as does one that wants more than a finished file has. `MoemlaError` while another process writes
    into `out`; a file of that name that does not end in a separator is not touched. Built in chapter 1.
    """
    with claimed(out, "fetch_hub"):
        return _fetch(Path(out), split, limit, progress)


def _fetch(out: Path, split: str, limit: int, progress: Progress | None) -> Path:
    path = out / f"hub-{split}.txt"
    part = path.with_name(path.name + ".part")
    try:
        if path.exists():
            rows, end = _whole_rows(path)
            if end != path.stat().st_size:
                raise DataError(f"{path} is there already and not from the hub: move it away or name another folder")
            if rows >= limit:
                return path
            os.replace(path, part)
        done, end = _whole_rows(part) if part.exists() else (0, 0)
        with open(part, "ab") as file:
            file.truncate(end)  # a row that was cut
            fresh = hub_stories(split, limit, skip=done)
            for text in _watched(fresh, f"hub {split}", limit, progress, start=done):
                file.write((text.replace(EOT, " ").strip() + SEPARATOR).encode())
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"cannot write {part}: {why(error)}; what came is kept") from error
    return path


def _whole_rows(path: Path) -> tuple[int, int]:
    """Number of rows that are followed by their separator, and where the last of them ends."""
    rows = end = position = 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            if line == f"{EOT}\n".encode():
                rows, end = rows + 1, position
    return rows, end


def _watched(
    items: Iterable[str], label: str, total: int | None, progress: Progress | None, start: int = 0
) -> Iterator[str]:
    done = start
    if progress:
        progress(label, done, total)
    for done, item in enumerate(items, start + 1):
        yield item
        if progress and done % CHUNK == 0:
            progress(label, done, total)
    if progress:
        progress(label, done, done)


def _then(items: Iterable[str], label: str, progress: Progress | None) -> Iterator[str]:
    """`items`, and a report that what follows them has begun."""
    yield from items
    if progress:
        progress(label, 0, None)


# --- shards ---------------------------------------------------------------------------------------


class TokenShard:
    """A file of tokens, memory-mapped. Built in chapter 1.

    `tokens` (N,) uint16; `documents` (D + 1,) int64, where each story starts and at last N; `vocab_size`;
    `tokenizer_hash` in hex. A file that is missing, foreign, of another version or damaged is a `DataError`: header
    and documents are compared with their checksum each time. `check`: the tokens too, and that each is below
    `vocab_size`, for which the file is read once (a second for a gigabyte); by default up to 256 MB.
    """

    MAGIC = b"MOEMLA\0\0"
    VERSION = 2
    # little endian: magic, version, vocabulary size, tokens, documents, hash of the tokenizer: 64 bytes
    HEADER = struct.Struct("<8sIIQQ32s")
    SUMS = struct.Struct("<II")  # behind it, unless the version is 1: CRC-32 of the tokens; of header and documents
    CHECKED = 2**28  # bytes that are read at opening without being asked: a quarter of a second

    def __init__(self, path: str | os.PathLike[str], check: bool | None = None) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                header = file.read(self.HEADER.size)
                sums = file.read(self.SUMS.size)
        except OSError as error:
            raise DataError(f"cannot read {path}: {why(error)}; `moemla prepare` makes it") from error
        if header[:8] != self.MAGIC:
            raise DataError(f"{path} is not a token shard of moemla; `moemla prepare` makes one from text")
        if len(header) < self.HEADER.size:
            raise DataError(f"{path} is cut short inside its header; run `moemla prepare` again")
        _, shard_version, self.vocab_size, tokens, documents, digest = self.HEADER.unpack(header)
        if shard_version not in (1, self.VERSION):
            raise DataError(f"{path} has version {shard_version}, not {self.VERSION}; run `moemla prepare` again")
        begin = self.HEADER.size + (self.SUMS.size if shard_version > 1 else 0)
        expected = begin + 2 * tokens + 8 * (documents + 1)
        if size != expected:
            raise self._damaged(f"{size} bytes, its header says {expected}")
        self.tokenizer_hash: str = digest.hex()
        self.tokens = np.memmap(self.path, dtype="<u2", mode="r", offset=begin, shape=(tokens,))
        self.documents = np.fromfile(self.path, dtype="<i8", offset=begin + 2 * tokens)
        if self.documents[0] != 0 or self.documents[-1] != tokens or (np.diff(self.documents) < 1).any():
            raise self._damaged("stories out of order")
        of_tokens, of_rest = self.SUMS.unpack(sums) if shard_version > 1 else (None, None)
        if of_rest is not None and of_rest != zlib.crc32(self.documents, zlib.crc32(header)):
            raise self._damaged("header or stories do not have their checksum")
        if check or (check is None and size <= self.CHECKED):
            found = 0
            for start in range(0, tokens, 2**20):
                part = self.tokens[start : start + 2**20]
                self.check_ids(part)
                found = zlib.crc32(part, found)
            if of_tokens not in (None, found):
                raise self._damaged("its tokens do not have their checksum")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.path} is damaged: {what}; run `moemla prepare` again")

    def check_ids(self, tokens: np.ndarray) -> None:
        """`DataError` if one of `tokens`, any shape, is not below `vocab_size`. Built in chapter 1."""
        if tokens.size and (largest := tokens.max()) >= self.vocab_size:
            raise self._damaged(f"token {largest} in a vocabulary of {self.vocab_size}")

    def __len__(self) -> int:
        """Number of stories. Built in chapter 1."""
        return len(self.documents) - 1

    def document(self, i: int) -> np.ndarray:
        """Tokens of story i, (n,) uint16: EOT first. Built in chapter 1."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i}: {self.path} has {len(self)}, counted from 0")
        return self.tokens[self.documents[i] : self.documents[i + 1]]


def write_shard(path: str | os.PathLike[str], tokenizer: Tokenizer, documents: Iterable[Sequence[int]]) -> None:
    """Writes stories, each a list of ids without EOT, as they come; the file appears when all are written.

    A full disk is a one-line `DataError`; after any failure nothing is left, and an older file stays.
    Built in chapter 1.
    """
    starts, sum_ = array("q", [0]), 0
    with replacing(path) as file:
        file.write(bytes(TokenShard.HEADER.size + TokenShard.SUMS.size))
        for ids in documents:
            if len(ids) and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
                raise ValueError(f"ids={min(ids)} to {max(ids)}: must be 0 to {tokenizer.vocab_size - 1}")
            tokens = np.array([tokenizer.eot, *ids], dtype="<u2").tobytes()
            sum_ = zlib.crc32(tokens, sum_)
            file.write(tokens)
            starts.append(starts[-1] + 1 + len(ids))
        ends = np.array(starts, dtype="<i8").tobytes()
        file.write(ends)
        file.seek(0)
        sizes = (tokenizer.vocab_size, starts[-1], len(starts) - 1)
        magic = (TokenShard.MAGIC, TokenShard.VERSION)
        header = TokenShard.HEADER.pack(*magic, *sizes, bytes.fromhex(tokenizer.hash))
        file.write(header + TokenShard.SUMS.pack(sum_, zlib.crc32(ends, zlib.crc32(header))))


def check_tokenizer(shard: TokenShard, tokenizer: Tokenizer) -> None:
    """`DataError`, naming both hashes, unless `shard` was written with `tokenizer`. Built in chapter 1."""
    if shard.tokenizer_hash == tokenizer.hash and shard.vocab_size != tokenizer.vocab_size:
        raise shard._damaged(f"a vocabulary of {shard.vocab_size}, its tokenizer has {tokenizer.vocab_size}")
    if shard.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"{shard.path} was made with tokenizer {shard.tokenizer_hash[:12]}, not {tokenizer.hash[:12]}; "
            "use the tokenizer.json beside it, or run `moemla prepare` again"
        )


# --- prepare --------------------------------------------------------------------------------------


def prepare(
    out: str | os.PathLike[str],
    source: str = "builtin",
    train: str | os.PathLike[str] | None = None,
    valid: str | os.PathLike[str] | None = None,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    stories: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
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
    Built in chapter 1.
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


def _make(out: Path, settings: dict[str, Any], inputs: dict[str, Path], progress: Progress | None) -> dict[str, Any]:
    """Everything that `prepare` writes, in a folder that may be written; returns the record."""
    source, stories = settings["source"], settings["stories"]
    texts = inputs or {split: out / f"{split}.txt" for split in ("train", "valid")}
    if source == "builtin":
        from moemla.stories import stories as generate

        for split, count, start in (("train", stories, 0), ("valid", VALID_STORIES, stories)):
            fresh = (s.text for s in generate(count, seed=settings["seed"], start=start))
            _write_text(texts[split], _watched(fresh, f"{split} stories", count, progress))
    if source == "hub":
        texts["train"] = _fetch(out, "train", stories, progress)
        texts["valid"] = _fetch(out, "validation", VALID_STORIES, progress)

    rows = {"train": stories, "valid": VALID_STORIES if source == "hub" else None}

    def read(split: str) -> Iterator[str]:
        return read_stories(texts[split], rows[split])

    if settings["tokenizer"] == "bpe":
        learnt = _watched(read("train"), "tokenizer", stories, progress)
        tokens = Tokenizer.train(_then(learnt, "merges", progress), settings["vocab_size"])
        if progress:
            progress("merges", tokens.vocab_size - MIN_VOCAB, tokens.vocab_size - MIN_VOCAB)
    else:
        tokens = Tokenizer.gpt2()
    splits = {
        split: _encode(out / f"{split}.bin", tokens, _watched(read(split), split, rows[split], progress))
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
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"name": Path(path).name, "bytes": file.tell(), "sha256": digest}
    except OSError as error:
        raise DataError(f"cannot read {path}: {why(error)}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


# --- batches --------------------------------------------------------------------------------------


class Batches:
    """Windows of a shard, in an order that (shard, batch_size, seq_len, seed) fix. Built in chapter 1.

    The tokens are taken as a ring. Each epoch turns it by an offset of its own and cuts it into `windows`
    pieces of `seq_len` inputs, each with the token after it as its target; a permutation orders them; both are
    drawn from (seed, epoch). Every window comes once an epoch. Epochs follow without a gap: a batch may hold
    the end of one and the start of the next. Of `world_size` processes, each gets its own
    batch_size / world_size rows.
    """

    def __init__(
        self,
        shard: TokenShard,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("world_size", world_size)):
            require_count(name, value)
        require(seed >= 0, "seed", seed, "must be 0 or more")
        require(0 <= rank < world_size, "rank", rank, f"must be 0 to world_size - 1 = {world_size - 1}")
        right = f"must be a multiple of world_size={world_size}"
        require(batch_size % world_size == 0, "batch_size", batch_size, right)
        size = len(shard.tokens)
        if size < seq_len + 1:
            raise DataError(
                f"{shard.path} has {size} tokens; one window of seq_len={seq_len} needs {seq_len + 1}: "
                "take more stories or a shorter seq_len"
            )
        self.shard, self.batch_size, self.seq_len, self.seed = shard, batch_size, seq_len, seed
        self.windows = size // seq_len
        self.steps_per_epoch = -(-self.windows // batch_size)  # rounded up
        rows = batch_size // world_size
        self._rows = np.arange(rank * rows, (rank + 1) * rows)
        self._starts = lru_cache(maxsize=2)(self._epoch_starts)  # a batch may stand in two epochs

    def epoch(self, step: int) -> int:
        """How many epochs are complete before batch `step`. Built in chapter 1."""
        return step * self.batch_size // self.windows

    def batch(self, step: int) -> tuple[Int64[Tensor, "b t"], Int64[Tensor, "b t"]]:
        """Tokens and targets (one to the right) of batch `step`, at once for any step. Built in chapter 1."""
        if step < 0:
            raise IndexError(f"step {step}: batches are counted from 0")
        epochs, places = np.divmod(step * self.batch_size + self._rows, self.windows)
        starts = np.array([self._starts(int(e))[p] for e, p in zip(epochs, places, strict=True)])
        span = (starts[:, None] + np.arange(self.seq_len + 1)) % len(self.shard.tokens)
        taken = self.shard.tokens[span]
        self.shard.check_ids(taken)  # a large shard was not read when it was opened
        window = torch.from_numpy(taken.astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def _epoch_starts(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        offset = random.integers(len(self.shard.tokens))
        return offset + self.seq_len * random.permutation(self.windows)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from step 0 on, without end."""
        step = 0
        while True:
            yield self.batch(step)
            step += 1
