"""Stories as token ids on disk (`TokenShard`), and as batches for training (`Batches`).

A shard is one file: a header with checksums, all tokens as 16-bit ids, and where each story starts. Every story
is EOT followed by its tokens, so that EOT is the token from which a story is started. Shards are
memory-mapped: a file larger than the memory trains as well. Whatever is written appears whole or not at all.
Built in chapter 1.
"""

import os
import struct
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from moemla.config import require, require_count
from moemla.distributed import ALONE, World
from moemla.errors import DataError
from moemla.files import replacing, why
from moemla.tokenizer import Tokenizer


class TokenShard:
    """A file of tokens, memory-mapped.

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
            actual = 0
            for start in range(0, tokens, 2**20):
                part = self.tokens[start : start + 2**20]
                self.check_ids(part)
                actual = zlib.crc32(part, actual)
            if of_tokens not in (None, actual):
                raise self._damaged("its tokens do not have their checksum")

    def _damaged(self, what: str) -> DataError:
        return DataError(f"{self.path} is damaged: {what}; run `moemla prepare` again")

    def check_ids(self, tokens: np.ndarray) -> None:
        """`DataError` if one of `tokens`, any shape, is not below `vocab_size`."""
        if tokens.size and (largest := tokens.max()) >= self.vocab_size:
            raise self._damaged(f"token {largest} in a vocabulary of {self.vocab_size}")

    def __len__(self) -> int:
        """Number of stories."""
        return len(self.documents) - 1

    def document(self, i: int) -> np.ndarray:
        """Tokens of story i, (n,) uint16: EOT first."""
        if not 0 <= i < len(self):
            raise IndexError(f"document={i}: {self.path} has {len(self)}, counted from 0")
        return self.tokens[self.documents[i] : self.documents[i + 1]]


def write_shard(path: str | os.PathLike[str], tokenizer: Tokenizer, documents: Iterable[Sequence[int]]) -> None:
    """Writes stories, each a list of ids without EOT, as they come; the file appears when all are written.

    A full disk is a one-line `DataError`; after any failure nothing is left, and an older file stays.
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
    """`DataError`, naming both hashes, unless `shard` was written with `tokenizer`."""
    if shard.tokenizer_hash == tokenizer.hash and shard.vocab_size != tokenizer.vocab_size:
        raise shard._damaged(f"a vocabulary of {shard.vocab_size}, its tokenizer has {tokenizer.vocab_size}")
    if shard.tokenizer_hash != tokenizer.hash:
        raise DataError(
            f"{shard.path} was made with tokenizer {shard.tokenizer_hash[:12]}, not {tokenizer.hash[:12]}; "
            "use the tokenizer.json beside it, or run `moemla prepare` again"
        )


class Batches:
    """Windows of a shard, in an order that (shard, batch_size, seq_len, seed) fix.

    The tokens are taken as a ring. Each epoch turns it by an offset of its own and cuts it into `windows`
    pieces of `seq_len` inputs, each with the token after it as its target; a permutation orders them; both are
    drawn from (seed, epoch). Every window comes once an epoch. Epochs follow without a gap: a batch may hold
    the end of one and the start of the next. `batch_size` is that of all ranks together: of a `world`, each rank
    gets its own batch_size / size rows of the same batch.
    """

    def __init__(
        self,
        shard: TokenShard,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        world: World = ALONE,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
            require_count(name, value)
        require(seed >= 0, "seed", seed, "must be 0 or more")
        require(batch_size % world.size == 0, "batch_size", batch_size, f"must be a multiple of the {world.size} ranks")
        size = len(shard.tokens)
        if size < seq_len + 1:
            raise DataError(
                f"{shard.path} has {size} tokens; one window of seq_len={seq_len} needs {seq_len + 1}: "
                "take more stories or a shorter seq_len"
            )
        self.shard, self.batch_size, self.seq_len, self.seed = shard, batch_size, seq_len, seed
        self.windows = size // seq_len
        self.steps_per_epoch = -(-self.windows // batch_size)  # rounded up
        rows = batch_size // world.size
        self._rows = np.arange(world.rank * rows, (world.rank + 1) * rows)
        self._starts = lru_cache(maxsize=2)(self._epoch_starts)  # a batch may stand in two epochs

    def epoch(self, step: int) -> int:
        """How many epochs are complete before batch `step`."""
        return step * self.batch_size // self.windows

    def batch(self, step: int) -> tuple[Int64[Tensor, "b t"], Int64[Tensor, "b t"]]:
        """Tokens and targets (one to the right) of batch `step`, at once for any step."""
        if step < 0:
            raise IndexError(f"step={step}: batches are counted from 0")
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
