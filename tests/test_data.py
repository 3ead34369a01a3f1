"""From text to tokens: what was made is remembered, nothing of the user's is overwritten, nothing is left half-done."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from moemla import data
from moemla.data import prepare
from moemla.errors import DataError, MoemlaError
from moemla.shards import TokenShard, check_tokenizer
from moemla.text import read_stories
from moemla.tokenizer import Tokenizer
from tests.texts import STORIES, text_of


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    train, valid = tmp_path / "in-train.txt", tmp_path / "in-valid.txt"
    train.write_bytes(text_of(STORIES * 5))
    valid.write_bytes(text_of(STORIES[:2]))
    return {"train": train, "valid": valid}


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
