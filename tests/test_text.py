"""Text from files and from the hub: every story arrives, and bad input is one clear line."""

import os
import subprocess
import sys
import textwrap

import pytest

from moemla import text as text_module
from moemla.data import prepare
from moemla.errors import DataError
from moemla.text import fetch_hub, read_stories
from moemla.tokenizer import EOT
from tests.texts import STORIES, text_of

# --- files ----------------------------------------------------------------------------------------


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
