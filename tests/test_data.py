"""From text to batches: every story arrives, bad input is one clear line, and any step can be had at once."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moemla import data, text as text_module
from moemla.data import prepare
from moemla.distributed import World
from moemla.errors import DataError, MoemlaError
from moemla.shards import Batches, TokenShard, check_tokenizer, write_shard
from moemla.text import fetch_hub, read_stories
from moemla.tokenizer import EOT, Tokenizer

STORIES = [
    "Once there was a cat.\nThe cat had a hat.",
    "Tim saw a 😀 balloon. “Wow!” he said.",
    "The dog ran to the big tree and back.",
    "A bird sang. A fox listened. They were friends.",
]


def text_of(stories: list[str]) -> bytes:
    return "".join(f"{story}\n{EOT}\n" for story in stories).encode()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES * 4, vocab_size=300)


@pytest.fixture(scope="module")
def ring(tokenizer, tmp_path_factory) -> TokenShard:
    """One document of 101 tokens, all different: a window names its place."""
    path = tmp_path_factory.mktemp("ring") / "ring.bin"
    write_shard(path, tokenizer, [list(range(100, 200))])
    return TokenShard(path)


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    train, valid = tmp_path / "in-train.txt", tmp_path / "in-valid.txt"
    train.write_bytes(text_of(STORIES * 5))
    valid.write_bytes(text_of(STORIES[:2]))
    return {"train": train, "valid": valid}


# --- text -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        text_of(STORIES),
        text_of(STORIES)[: -len(EOT) - 2],  # nothing after the last story
        text_of(["", *STORIES, " \n ", ""]),
        text_of(STORIES).replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + text_of(STORIES),
        text_of([f"\n\n  {story}\t\n" for story in STORIES]),
    ],
    ids=["plain", "no last separator", "empty stories", "CRLF", "byte order mark", "outer whitespace"],
)
def test_stories_are_read_whatever_stands_around_them(tmp_path, content):
    path = tmp_path / "stories.txt"
    path.write_bytes(content)
    assert list(read_stories(path)) == STORIES


def test_an_eot_inside_a_line_belongs_to_the_story(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes(text_of([f"They wrote {EOT} on the wall.", "End."]))
    said = r"stories\.txt has <\|endoftext\|> inside 1 of its lines \(the first is line 1\): it is taken for text"
    with pytest.warns(UserWarning, match=said):
        assert list(read_stories(path)) == [f"They wrote {EOT} on the wall.", "End."]


@pytest.mark.parametrize("content", [f"One.{EOT}Two.{EOT}", f"One.{EOT}\nTwo.{EOT}\n", f"\n{EOT} One.\n{EOT} Two."])
def test_a_file_whose_separators_stand_inside_lines_alone_is_refused(tmp_path, content):
    path = tmp_path / "stories.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"stories\.txt has .* inside [12] of its lines .*: put it on its own line$"):
        list(read_stories(path))


def test_reading_streams_and_stops_where_it_is_told(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes(text_of(STORIES) + b"\xff")
    assert list(read_stories(path, rows=2)) == STORIES[:2]  # the bad byte behind them is not reached


@pytest.mark.parametrize("content", [b"", b" \n\n", text_of(["", " "])])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "stories.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"stories\.txt is empty: it needs stories"):
        list(read_stories(path))


def test_bytes_that_are_not_utf8_are_named_with_their_offset(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_bytes("é one\ntwo ".encode() + b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"stories\.txt is not UTF-8: byte 0xe9 at offset 11;"):
        list(read_stories(path))
    path.write_bytes("A story.".encode("utf-16"))
    with pytest.raises(DataError, match="byte 0xff at offset 0"):
        list(read_stories(path))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere\.txt: No such file or directory"):
        list(read_stories(tmp_path / "nowhere.txt"))
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        list(read_stories(tmp_path))


# --- hub ------------------------------------------------------------------------------------------


class Hub:
    """Stands for what `datasets.load_dataset` returns: rows that break off after `alive` of one connection."""

    def __init__(self, rows: list[str], alive: int | None = None) -> None:
        self.rows, self.alive, self.calls = rows, alive, []

    def load_dataset(self, name, split, streaming):
        assert name == "roneneldan/TinyStories" and streaming
        self.calls.append(split)
        return self

    def skip(self, n):
        def rows():
            for i, text in enumerate(self.rows[n:]):
                if i == self.alive:
                    raise ConnectionError("the line is dead\nand more")
                yield {"text": text}

        return rows()


@pytest.fixture
def hub(monkeypatch):
    import datasets

    def install(rows, alive=None):
        hub = Hub(rows, alive)
        monkeypatch.setattr(text_module, "_knock_at_the_hub", lambda: None)
        monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
        return hub

    return install


def test_hub_text_is_fetched_row_by_row(tmp_path, hub):
    hub([STORIES[0], "", f"  {STORIES[1]}\n", f"odd {EOT} row", *STORIES])
    seen = []
    path = fetch_hub(tmp_path, "train", 4, progress=lambda *report: seen.append(report))
    assert path == tmp_path / "hub-train.txt"
    assert path.read_bytes() == text_of([STORIES[0], "", STORIES[1], "odd   row"])
    assert seen[-1] == ("hub train", 4, 4)
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_fetch_goes_on_where_it_stopped(tmp_path, hub):
    rows = [f"Story {i}." for i in range(10)]
    hub(rows, alive=4)
    with pytest.raises(DataError, match="the line is dead"):
        fetch_hub(tmp_path, "train", 10)
    part = tmp_path / "hub-train.txt.part"
    assert part.read_bytes() == text_of(rows[:4])
    with open(part, "ab") as file:  # killed in the middle of a row
        file.write(b"Story 4.\n<|endof")
    with pytest.raises(DataError):
        fetch_hub(tmp_path, "train", 10)
    assert part.read_bytes() == text_of(rows[:8])
    path = fetch_hub(tmp_path, "train", 10)
    assert path.read_bytes() == text_of(rows)
    assert not part.exists()


def test_a_finished_fetch_is_kept_and_can_grow(tmp_path, hub):
    rows = [f"Story {i}." for i in range(10)]
    online = hub(rows)
    fetch_hub(tmp_path, "train", 5)
    path = fetch_hub(tmp_path, "train", 3)
    assert path.read_bytes() == text_of(rows[:5])
    assert online.calls == ["train"]
    assert fetch_hub(tmp_path, "train", 8).read_bytes() == text_of(rows[:8])
    assert fetch_hub(tmp_path, "train", 99).read_bytes() == text_of(rows)  # all there is


def test_a_file_of_the_users_is_not_taken_for_text_of_the_hub(tmp_path, hub):
    hub(STORIES)
    mine = tmp_path / "hub-train.txt"
    mine.write_text("My own notes.")
    with pytest.raises(DataError, match=r"hub-train\.txt is there already and not from the hub"):
        fetch_hub(tmp_path, "train", 4)
    assert mine.read_text() == "My own notes."
    assert list(tmp_path.iterdir()) == [mine]


def test_prepare_from_the_hub(tmp_path, hub):
    online = hub([*STORIES, "", "The end."] * 3)
    record = prepare(tmp_path, source="hub", stories=6, vocab_size=300)
    assert online.calls == ["train", "validation"]
    assert record["splits"]["train"]["stories"] == 5
    assert record["splits"]["valid"]["stories"] == 15
    assert (tmp_path / "valid.txt").read_bytes() == text_of([*STORIES, "The end."] * 3)
    online.calls.clear()
    assert prepare(tmp_path, source="hub", stories=6, vocab_size=300) == record
    assert prepare(tmp_path, source="hub", stories=4, vocab_size=300)["splits"]["train"]["stories"] == 4
    assert online.calls == ["validation"]  # which has fewer than asked for, so it may have grown


def test_without_a_network_one_line_names_the_other_sources(tmp_path):
    code = f"""
        from moemla.data import prepare
        from moemla.errors import DataError
        try:
            prepare({str(tmp_path / "out")!r}, source="hub", stories=5)
        except DataError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert line.startswith("cannot reach roneneldan/TinyStories on the Hugging Face hub (OfflineModeIsEnabled")
    assert "--source builtin" in line
    assert "--source files --train F --valid F" in line
    assert not list((tmp_path / "out").glob("*.bin"))


# --- shards ---------------------------------------------------------------------------------------


def test_a_shard_keeps_every_story_behind_its_eot(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    ids = tokenizer.encode_batch([*STORIES, ""])
    write_shard(path, tokenizer, iter(ids))
    shard = TokenShard(path)
    assert len(shard) == 5
    assert (shard.vocab_size, shard.tokenizer_hash) == (tokenizer.vocab_size, tokenizer.hash)
    assert shard.tokens.dtype == np.uint16
    assert shard.documents.dtype == np.int64
    assert shard.documents.tolist() == np.cumsum([0] + [1 + len(i) for i in ids]).tolist()
    for i, expected in enumerate(ids):
        assert shard.document(i).tolist() == [tokenizer.eot, *expected]
    assert [tokenizer.decode(shard.document(i)) for i in range(4)] == STORIES
    assert list(tmp_path.iterdir()) == [path]
    for i in (-1, 5):
        with pytest.raises(IndexError, match=f"document {i}: .* has 5"):
            shard.document(i)


def test_ids_up_to_65535_fit(tmp_path):
    path = tmp_path / "wide.bin"
    tokenizer = Tokenizer.__new__(Tokenizer)  # the widest there can be, without training one
    tokenizer.__dict__.update(vocab_size=65_536, eot=0, hash="ab" * 32)
    write_shard(path, tokenizer, [[65_535, 1]])
    assert TokenShard(path).tokens.tolist() == [0, 65_535, 1]
    with pytest.raises(ValueError, match="ids=0 to 65536: must be 0 to 65535"):
        write_shard(path, tokenizer, [[65_536, 0]])
    assert TokenShard(path).tokens.tolist() == [0, 65_535, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_shards_that_are_not_right_are_named(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES))
    whole = path.read_bytes()
    header = TokenShard.HEADER.size + TokenShard.SUMS.size
    cases = {
        "is not a token shard of moemla": [b"", b"PK\3\4" + whole[4:], bytes(64) + whole[64:]],
        "is cut short inside its header": [whole[:63], whole[:8]],
        "has version 3, not 2": [whole[:8] + b"\3" + whole[9:]],
        rf"is damaged: {len(whole) - 1} bytes, its header says {len(whole)}": [whole[:-1]],
        rf"is damaged: {len(whole) + 2} bytes, its header says {len(whole)}": [whole + b"\0\0"],
        rf"is damaged: {header} bytes": [whole[:header]],
        "is damaged: stories out of order": [whole[:-40] + whole[-8:] * 5],
    }
    for message, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(DataError, match=rf"some\.bin {message}") as caught:
                TokenShard(path)
            assert "moemla prepare" in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cannot read .*none\.bin: No such file"):
        TokenShard(tmp_path / "none.bin")


def version_1(shard: Path) -> bytes:
    """The bytes of the same shard as it was written before there were checksums."""
    whole = shard.read_bytes()
    return whole[:8] + b"\1" + whole[9:64] + whole[72:]


def test_every_bit_of_a_shard_is_checked(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES[:2]))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"some\.bin (is|has) .*`moemla prepare"):
            TokenShard(path)
    path.write_bytes(whole)
    TokenShard(path, check=True)


def test_a_shard_of_the_version_before_is_read_and_its_ids_looked_at(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES))
    tokens, documents = TokenShard(path).tokens.tolist(), TokenShard(path).documents.tolist()
    old = version_1(path)
    path.write_bytes(old)
    shard = TokenShard(path)
    assert shard.tokens.tolist() == tokens
    assert shard.documents.tolist() == documents
    check_tokenizer(shard, tokenizer)
    size = tokenizer.vocab_size
    path.write_bytes(old[:64] + size.to_bytes(2, "little") + old[66:])
    with pytest.raises(DataError, match=rf"some\.bin is damaged: token {size} in a vocabulary of {size}; run `moemla"):
        TokenShard(path)
    path.write_bytes(old[:12] + (size + 1).to_bytes(4, "little") + old[16:])
    with pytest.raises(DataError, match=rf"is damaged: a vocabulary of {size + 1}, its tokenizer has {size}"):
        check_tokenizer(TokenShard(path), tokenizer)


def test_a_large_shard_is_read_at_opening_only_when_asked(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES * 9))
    whole = path.read_bytes()
    monkeypatch.setattr(TokenShard, "CHECKED", 100)
    path.write_bytes(whole[:72] + b"\1\0" + whole[74:])
    TokenShard(path)
    with pytest.raises(DataError, match="its tokens do not have their checksum"):
        TokenShard(path, check=True)
    path.write_bytes(whole[:72] + b"\xff\xff" + whole[74:])
    batches = Batches(TokenShard(path), 1, 8)  # whose batches are looked at all the same
    with pytest.raises(DataError, match=f"is damaged: token 65535 in a vocabulary of {tokenizer.vocab_size}"):
        for step in range(batches.steps_per_epoch):
            batches.batch(step)
    path.write_bytes(whole[:64] + whole[64:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(DataError, match="is damaged"):  # as are header and documents
        TokenShard(path, check=False)


def test_a_shard_of_another_tokenizer_is_refused(ring, tokenizer):
    check_tokenizer(ring, tokenizer)
    other = Tokenizer.train(STORIES[:2] * 4, vocab_size=280)
    with pytest.raises(DataError, match=f"tokenizer {tokenizer.hash[:12]}, not {other.hash[:12]}"):
        check_tokenizer(ring, other)


@pytest.mark.parametrize(("limit", "full"), [(0, "data.json"), (1000, "train.bin"), (40_000, "train.bin")])
def test_no_space_left_is_one_line_and_leaves_nothing(tmp_path, files, limit, full):
    files["train"].write_bytes(text_of(STORIES * 500))
    out = tmp_path / "out"
    code = f"""
        import resource, signal
        from moemla.data import prepare
        from moemla.errors import DataError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            prepare({str(out)!r}, "files", {str(files["train"])!r}, {str(files["valid"])!r}, vocab_size=300)
        except DataError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-B", "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stderr == ""
    (line,) = result.stdout.splitlines()
    assert line == f"cannot write {out}/{full}: no space left; nothing was left half-written"
    assert list(out.iterdir()) == []


# --- prepare --------------------------------------------------------------------------------------


def test_prepare_from_files(tmp_path, files):
    out = tmp_path / "deep" / "out"
    seen = []
    record = prepare(out, source="files", **files, vocab_size=300, progress=lambda *r: seen.append(r))
    assert sorted(p.name for p in out.iterdir()) == [
        "data.json",
        "tokenizer.json",
        "train.bin",
        "valid.bin",
        "valid.txt",
    ]
    assert json.loads((out / "data.json").read_text()) == record
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    assert tokenizer.hash == Tokenizer.train(STORIES * 5, vocab_size=300).hash == record["tokenizer"]["hash"]
    for split, stories in (("train", STORIES * 5), ("valid", STORIES[:2])):
        shard = TokenShard(out / f"{split}.bin")
        check_tokenizer(shard, tokenizer)
        assert [tokenizer.decode(shard.document(i)) for i in range(len(shard))] == stories
        facts = record["splits"][split]
        assert facts["stories"] == len(stories)
        assert facts["tokens"] == len(shard.tokens)
        assert facts["bytes"] == sum(len(story.encode()) for story in stories)
        assert facts["sha256"] == hashlib.sha256(text_of(stories)).hexdigest()
    assert list(read_stories(out / "valid.txt")) == STORIES[:2]
    assert [report for report in seen if report[1] == report[2]] == [
        ("tokenizer", 20, 20),
        ("merges", 43, 43),
        ("train", 20, 20),
        ("valid", 2, 2),
    ]
    assert str(tmp_path) not in (out / "data.json").read_text()


def test_prepare_remembers_what_it_has_done(tmp_path, files):
    out = tmp_path / "out"
    ask = {"source": "files", "vocab_size": 300, **files}

    def made() -> bool:
        """Did this call write anything?"""
        before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
        prepare(out, **ask)
        return before != {p.name: p.stat().st_mtime_ns for p in out.iterdir()}

    first = prepare(out, **ask)
    assert not made()
    moved = files["train"].rename(tmp_path / "elsewhere.txt").rename(files["train"])
    os.utime(moved)  # touched, but the same text
    assert not made()
    assert prepare(out, **ask) == first
    # another setting, another text, and whatever is missing or damaged: all made anew
    ask["vocab_size"] = 280
    assert made()
    files["train"].write_bytes(text_of(STORIES * 4))
    assert made()
    ask["stories"] = 6
    assert made()
    assert len(TokenShard(out / "train.bin")) == 6
    ask |= {"tokenizer": "gpt2", "vocab_size": None}
    assert made()
    assert TokenShard(out / "train.bin").vocab_size == 50_257
    ask |= {"tokenizer": "bpe", "vocab_size": 280}
    assert made()
    for name in ("tokenizer.json", "train.bin", "valid.bin", "valid.txt"):
        (out / name).unlink()
        assert made()
    for name in ("tokenizer.json", "train.bin"):
        (out / name).write_bytes((out / name).read_bytes()[:-100])
        assert made()
    assert not made()


def test_an_interrupted_prepare_is_not_taken_for_done(tmp_path, files, monkeypatch):
    out = tmp_path / "out"
    ask = {"source": "files", **files}
    first = prepare(out, **ask, vocab_size=300)

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "_encode", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, **ask, vocab_size=280)
    assert set(json.loads((out / "data.json").read_text())) == {"unfinished"}
    assert prepare(out, **ask, vocab_size=300) == first


def test_the_data_hash_names_text_and_tokenizer(tmp_path, files):
    ask = {"source": "files", **files}
    one = prepare(tmp_path / "one", **ask, vocab_size=300)["hash"]
    assert prepare(tmp_path / "two", **ask, vocab_size=300)["hash"] == one
    assert prepare(tmp_path / "two", **ask, vocab_size=290)["hash"] != one
    files["valid"].write_bytes(text_of(STORIES[1:]))
    assert prepare(tmp_path / "two", **ask, vocab_size=300)["hash"] != one


def test_prepare_from_the_built_in_stories(tmp_path):
    from moemla.stories import stories

    record = prepare(tmp_path / "a", stories=40, seed=3, vocab_size=400)
    train = list(read_stories(tmp_path / "a" / "train.txt"))
    valid = list(read_stories(tmp_path / "a" / "valid.txt"))
    assert train == [s.text.strip() for s in stories(40, seed=3)]
    assert valid == [s.text.strip() for s in stories(600, seed=3, start=40)]
    assert not set(train) & set(valid)
    assert record["splits"]["train"]["stories"] == 40
    assert record["splits"]["valid"]["stories"] == 600
    again = prepare(tmp_path / "b", stories=40, seed=3, vocab_size=400)
    assert again == record
    for name in ("train.bin", "valid.bin", "tokenizer.json", "data.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert prepare(tmp_path / "b", stories=40, seed=4, vocab_size=400)["hash"] != record["hash"]


def test_a_changed_generator_makes_the_built_in_data_anew(tmp_path, monkeypatch):
    from moemla import stories as module

    def tell(word):
        return lambda count, seed=0, start=0: (
            SimpleNamespace(text=f"A {word} called {seed} {i}.") for i in range(start, start + count)
        )

    monkeypatch.setattr(module, "stories", tell("cat"))
    first = prepare(tmp_path, stories=9, vocab_size=300)
    assert list(read_stories(tmp_path / "train.txt"))[-1] == "A cat called 0 8."
    assert next(read_stories(tmp_path / "valid.txt")) == "A cat called 0 9."
    monkeypatch.setattr(module, "stories", tell("dog"))
    assert prepare(tmp_path, stories=9, vocab_size=300)["hash"] != first["hash"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source": "web"}, "source='web': must be one of builtin, hub, files"),
        ({"tokenizer": "words"}, "tokenizer='words': must be one of bpe, gpt2"),
        ({"source": "files", "train": "a"}, "train=a, valid=None: source 'files' needs both"),
        ({"train": "a", "valid": "b"}, "train=a, valid=b: source 'files' needs both, the others neither"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"source": "hub", "seed": 3}, "seed=3: only the built-in stories have one"),
        ({"tokenizer": "gpt2", "vocab_size": 300}, "vocab_size=300: gpt2 has 50,257 tokens"),
        ({"vocab_size": 256}, "vocab_size=256: must be 257 "),
        ({"stories": 0}, "stories=0: must be a whole number of at least 1"),
    ],
)
def test_wrong_arguments_are_named_before_anything_is_made(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_a_data_error_and_leaves_no_output(tmp_path, files):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="vocab_size=70000"):
        prepare(out, source="files", **files, vocab_size=70_000)
    with pytest.raises(DataError, match=r"cannot read .*none\.txt"):
        prepare(out, source="files", train=tmp_path / "none.txt", valid=files["valid"])
    sizes = {"bpe": 300, "gpt2": None}
    for split in ("train", "valid"):
        for content, message in ((b"", "is empty"), (text_of(STORIES * 300) + b"\xff", "is not UTF-8")):
            good = files[split].read_bytes()
            files[split].write_bytes(content)
            for kind, size in sizes.items():
                with pytest.raises(DataError, match=message):
                    prepare(out, source="files", **files, vocab_size=size, tokenizer=kind)
                assert set(out.iterdir()) <= {out / "data.json", out / "train.bin"}
            files[split].write_bytes(good)
    occupied = tmp_path / "occupied"
    occupied.write_text("a file")
    with pytest.raises(DataError, match=r"cannot write into .*occupied"):
        prepare(occupied, source="files", **files)


# --- what is the user's own -----------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch):
    """Few validation stories, so that it is quick."""
    monkeypatch.setattr(data, "VALID_STORIES", 9)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("source", ["builtin", "files"])
def test_prepare_overwrites_nothing_that_it_did_not_make(tmp_path, files, few, source):
    given = files if source == "files" else {"stories": 9}
    for name in data.OUTPUTS[source]:
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text('{"mine": 1}')
        (out / "notes.md").write_text("mine too")
        before = contents(out)
        with pytest.raises(DataError, match=rf"/{name} is there already and not from `moemla prepare`") as caught:
            prepare(out, source=source, vocab_size=300, **given)
        assert "\n" not in str(caught.value)
        assert contents(out) == before
    (out / name).unlink()
    prepare(out, source=source, vocab_size=300, **given)
    assert (out / "notes.md").read_text() == "mine too"


def test_a_text_that_was_changed_since_is_the_users(tmp_path, few):
    prepare(tmp_path, stories=9, vocab_size=300)
    prepare(tmp_path, stories=9, vocab_size=300, seed=1)  # what it made itself it may overwrite
    for name in ("train.txt", "valid.txt"):
        made = (tmp_path / name).read_text()
        (tmp_path / name).write_text(made + "My own line.")
        before = contents(tmp_path)
        with pytest.raises(
            DataError, match=rf"{name} is there already and not from `moemla prepare`, or changed since"
        ):
            prepare(tmp_path, stories=9, vocab_size=300, seed=2)
        assert contents(tmp_path) == before
        (tmp_path / name).write_text(made)


def test_files_of_the_user_beside_data_of_another_source_are_not_claimed(tmp_path, files):
    prepare(tmp_path / "out", source="files", **files, vocab_size=300)
    (tmp_path / "out" / "train.txt").write_text("mine")
    with pytest.raises(DataError, match=r"train\.txt is there already"):
        prepare(tmp_path / "out", stories=9, vocab_size=300)
    assert (tmp_path / "out" / "train.txt").read_text() == "mine"


@pytest.mark.parametrize("way", ["itself", "relative", "symlink", "hard link", "link in the folder", "linked folder"])
def test_an_input_that_is_an_output_is_refused(tmp_path, files, way, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    valid = files["valid"].rename(own / "valid.txt")
    files["valid"], out = valid, own
    if way == "relative":
        monkeypatch.chdir(own)
        files["valid"], out = Path("valid.txt"), Path("../own")
    elif way == "symlink":
        files["valid"] = tmp_path / "link.txt"
        files["valid"].symlink_to(valid)
    elif way == "hard link":
        files["valid"] = tmp_path / "link.txt"
        os.link(valid, files["valid"])
    elif way == "link in the folder":
        files["valid"] = valid.rename(tmp_path / "elsewhere.txt")
        valid.symlink_to(files["valid"])
    elif way == "linked folder":
        out = tmp_path / "linked"
        out.symlink_to(own)
    for claimed in (False, True):
        if claimed:  # as after an earlier call
            (own / "data.json").write_text(json.dumps({"unfinished": ["valid.txt"]}))
        before = contents(own)
        with pytest.raises(ValueError, match=r"^valid='.*': is .*valid\.txt, which is to be written; name another "):
            prepare(out, source="files", **files, vocab_size=300)
        assert contents(own) == before


def test_an_input_may_lie_in_the_folder_under_another_name(tmp_path, files):
    own = tmp_path / "train.txt"  # only the built-in stories are written to a file of this name
    own.write_bytes(files["train"].read_bytes())
    prepare(tmp_path, source="files", train=own, valid=files["valid"], vocab_size=300)
    assert own.read_bytes() == files["train"].read_bytes()


PREPARING = """
    import sys
    from moemla import data

    data.VALID_STORIES = 9

    def wait(*report):
        if report[0] == "train":
            print("in", flush=True)
            sys.stdin.readline()

    data.prepare(sys.argv[1], stories=30, vocab_size=300, progress=wait)
"""


def preparing(out: Path) -> subprocess.Popen:
    """Another process in the middle of `prepare`; it goes on with a line of input."""
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PREPARING), out],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert other.stdout.readline() == "in\n"
    return other


@pytest.mark.parametrize("seed", [0, 1])
def test_two_at_once_never_mix(tmp_path, few, seed):
    out = tmp_path / "out"
    other = preparing(out)
    with pytest.raises(MoemlaError) as caught:
        prepare(out, stories=30, vocab_size=300, seed=seed)
    doing = f"process {other.pid} (moemla prepare)"
    assert str(caught.value) == f"{out} is being written by {doing}: wait for it or name another folder"
    other.communicate("go on\n" * 9)
    assert other.returncode == 0
    prepare(tmp_path / "alone", stories=30, vocab_size=300)
    assert contents(out) == contents(tmp_path / "alone")


def test_what_a_killed_prepare_left_is_made_anew(tmp_path, few):
    out = tmp_path / "out"
    other = preparing(out)
    other.kill()
    other.communicate()
    assert (out / "train.txt").exists()
    record = prepare(out, stories=30, vocab_size=300)
    assert record == prepare(tmp_path / "alone", stories=30, vocab_size=300)
    assert contents(out) == contents(tmp_path / "alone")  # no lock, no half-written file


def test_data_keep_their_hash(tmp_path):
    """Results name the data by it: whoever changes it makes them incomparable."""
    record = prepare(tmp_path, stories=50)
    assert record["tokenizer"]["hash"] == "8fbfa1fbaf602b511a8db1819f116eba5f7a15b79cb5a058012a390cefe62c5a"
    assert record["hash"] == "2a55d6ddb0482f4541d46b4c07af099fb4c7c1bc84602b9383635f368ca71c8b"


def test_a_flipped_bit_in_prepared_data_is_found_and_mended(tmp_path, files):
    ask = {"source": "files", "vocab_size": 300, **files}
    record = prepare(tmp_path / "out", **ask)
    shard = tmp_path / "out" / "train.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:90] + bytes([whole[90] ^ 4]) + whole[91:])
    assert prepare(tmp_path / "out", **ask) == record
    assert shard.read_bytes() == whole


# --- batches --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seq_len=st.integers(1, 100),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_each_epoch_visits_every_window_once(ring, seq_len, batch_size, seed, epoch):
    batches = Batches(ring, batch_size, seq_len, seed)
    assert batches.windows == 101 // seq_len
    first = epoch * batches.windows  # of the stream of windows
    rows = []
    for step in range(first // batch_size, (first + batches.windows) // batch_size + 1):
        tokens, targets = batches.batch(step)
        assert tokens.shape == targets.shape == (batch_size, seq_len)
        assert tokens.dtype == targets.dtype == torch.int64
        rows += [(step * batch_size + b, tokens[b], targets[b]) for b in range(batch_size)]
    predicted = []
    for index, tokens, targets in rows:
        assert torch.equal(tokens[1:], targets[:-1])
        start = ring.tokens.tolist().index(int(tokens[0]))  # all tokens differ
        window = [int(ring.tokens[(start + i) % 101]) for i in range(seq_len + 1)]
        assert [*tokens.tolist(), int(targets[-1])] == window
        if first <= index < first + batches.windows:
            predicted += targets.tolist()
    assert len(predicted) == len(set(predicted)) == batches.windows * seq_len


def test_batches_are_a_function_of_the_step(ring):
    batches = Batches(ring, 4, 7, seed=5)
    straight = [batch for batch, _ in zip(batches, range(40), strict=False)]
    resumed = Batches(ring, 4, 7, seed=5)
    for step in (39, 0, 17, 17, 3, 38):
        for ours, theirs in zip(resumed.batch(step), straight[step], strict=True):
            assert torch.equal(ours, theirs)


def test_epochs_and_seeds_have_orders_of_their_own(ring):
    batches = Batches(ring, 10, 10)
    assert batches.windows == 10
    assert batches.steps_per_epoch == 1
    assert [batches.epoch(step) for step in range(3)] == [0, 1, 2]
    orders = [batches.batch(0)[0], batches.batch(1)[0], Batches(ring, 10, 10, seed=1).batch(0)[0]]
    for i in range(3):
        for j in range(i):
            assert not torch.equal(orders[i], orders[j])
            # the cuts move too, not only their order
            assert set(orders[i][:, 0].tolist()) != set(orders[j][:, 0].tolist())


def test_steps_of_an_epoch_are_rounded_up(ring):
    batches = Batches(ring, 4, 10)
    assert batches.steps_per_epoch == 3
    assert [batches.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_the_rows_of_one_batch(ring, ranks):
    whole = Batches(ring, 12, 9, seed=2)
    parts = [Batches(ring, 12, 9, seed=2, world=World(rank, ranks)) for rank in range(ranks)]
    for step in range(5):
        for side in range(2):
            together = torch.cat([part.batch(step)[side] for part in parts])
            assert torch.equal(together, whole.batch(step)[side])
        assert {part.epoch(step) for part in parts} == {whole.epoch(step)}


def test_a_shard_smaller_than_a_window_says_how_many_tokens_are_needed(ring):
    assert Batches(ring, 3, 100).batch(0)[0].shape == (3, 100)
    with pytest.raises(DataError, match=r"has 101 tokens; one window of seq_len=101 needs 102"):
        Batches(ring, 3, 101)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
        ({"seq_len": 0}, "seq_len=0: must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"world": World(0, 3)}, "batch_size=4: must be a multiple of the 3 ranks"),
    ],
)
def test_wrong_settings_of_batches_are_named(ring, wrong, message):
    with pytest.raises(ValueError, match=message):
        Batches(ring, **({"batch_size": 4, "seq_len": 8} | wrong))
    with pytest.raises(IndexError, match="step -1"):
        Batches(ring, 4, 8).batch(-1)


def test_batches_can_be_trained_on(ring):
    """They are tensors of their own: writing into one changes neither the shard nor the next batch."""
    tokens, targets = Batches(ring, 2, 5).batch(0)
    before = targets.clone()
    tokens.fill_(0)
    assert torch.equal(targets, before)
    assert torch.equal(Batches(ring, 2, 5).batch(0)[1], before)
