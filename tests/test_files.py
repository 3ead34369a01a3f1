"""Whole or not at all, and one writer at a time: other processes, kills and full disks included."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from moemla import files
from moemla.errors import DataError, MoemlaError
from moemla.files import LOCK, claimed, read_json, replacing, write_json


def process(code: str) -> subprocess.Popen:
    """Another process that runs `code`; its first line says that it has come as far as it should."""
    return subprocess.Popen(
        [sys.executable, "-c", "from moemla.files import *\n" + textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        text=True,
    )


def holding(folder: Path, what: str = "moemla train") -> subprocess.Popen:
    other = process(f"""
        import time
        with claimed({str(folder)!r}, {what!r}):
            print("in", flush=True)
            time.sleep(60)
    """)
    assert other.stdout.readline() == "in\n"
    return other


def end(other: subprocess.Popen) -> None:
    other.send_signal(signal.SIGKILL)
    other.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- files ----------------------------------------------------------------------------------------


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        assert len(names(tmp_path)) == 2
        raise RuntimeError
    assert read_json(path) == {"x": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_file_of_the_user_with_tmp_in_its_name_is_left_alone(tmp_path):
    others = ("a.txt.tmp", ".a.txt.tmp", ".a.txt.1.tmp", ".b.txt.1-00000000.tmp")
    for name in others:
        (tmp_path / name).write_text("mine")
    with replacing(tmp_path / "a.txt") as file:
        file.write(b"new")
    assert names(tmp_path) == sorted((*others, "a.txt"))
    assert all((tmp_path / name).read_text() == "mine" for name in others)


def test_two_writers_of_one_path_never_mix_and_the_last_one_stays(tmp_path):
    path = tmp_path / "a.txt"
    with replacing(path) as slow:
        slow.write(b"slow " * 1000)
        with replacing(path) as fast:
            fast.write(b"fast")
        assert path.read_bytes() == b"fast"
    assert path.read_bytes() == b"slow " * 1000
    assert names(tmp_path) == ["a.txt"]


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_writes_is_not(tmp_path):
    path = tmp_path / "a.txt"
    other = process(f"""
        import time
        with replacing({str(path)!r}) as file:
            file.write(b"half")
            print("in", flush=True)
            time.sleep(60)
    """)
    assert other.stdout.readline() == "in\n"
    try:
        with replacing(path) as file:
            file.write(b"whole")
        assert len(names(tmp_path)) == 2
    finally:
        end(other)
    assert len(names(tmp_path)) == 2
    with replacing(path) as file:
        file.write(b"again")
    assert names(tmp_path) == ["a.txt"]


def test_many_writers_at_once_all_succeed(tmp_path):
    """Each sweeps before it writes: a sweep between the making of a file and its lock must not lose it."""
    path, failed = tmp_path / "a.txt", []

    def write(word: bytes) -> None:
        try:
            for _ in range(60):
                with replacing(path) as file:
                    file.write(word * 1000)
        except DataError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(word,)) for word in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert path.read_bytes() in {word * 1000 for word in (b"a", b"b", b"c", b"d")}
    assert names(tmp_path) == ["a.txt"]


# --- folders --------------------------------------------------------------------------------------


def test_a_claim_makes_its_folder_and_leaves_no_file(tmp_path):
    folder = tmp_path / "deep" / "run"
    with claimed(folder, "moemla train"):
        assert names(folder) == [LOCK]
    assert names(folder) == []
    with pytest.raises(RuntimeError), claimed(folder, "moemla train"):
        raise RuntimeError
    assert names(folder) == []


def test_a_second_claim_names_the_process_and_what_it_does(tmp_path):
    other = holding(tmp_path)
    try:
        with pytest.raises(MoemlaError) as caught, claimed(tmp_path, "moemla prepare"):
            raise AssertionError("two at once")
        line = f"{tmp_path} is being written by process {other.pid} (moemla train): wait for it or name another folder"
        assert str(caught.value) == line
        with claimed(tmp_path / "another", "moemla prepare"):
            pass
    finally:
        end(other)


def test_a_killed_process_holds_nothing(tmp_path):
    end(holding(tmp_path))
    assert names(tmp_path) == [LOCK]
    with claimed(tmp_path, "moemla prepare"):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()} moemla prepare\n"
    assert names(tmp_path) == []


def test_one_process_cannot_claim_twice_either(tmp_path):
    with claimed(tmp_path, "first"):
        with pytest.raises(MoemlaError, match=rf"process {os.getpid()} \(first\)"), claimed(tmp_path, "second"):
            raise AssertionError("two at once")
        assert names(tmp_path) == [LOCK]  # the refused one took nothing away
        with pytest.raises(MoemlaError), claimed(tmp_path, "third"):
            raise AssertionError("two at once")


def test_never_two_at_once_though_claims_come_and_go(tmp_path):
    """The lock's file is removed each time: whoever opened it before must not hold a file without a name."""
    inside, most, done = [0], [0], [0]

    def work() -> None:
        while done[0] < 300:
            try:
                with claimed(tmp_path, "work"):
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    done[0] += 1
                    inside[0] -= 1
            except MoemlaError:
                pass

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert most == [1]
    assert names(tmp_path) == []


def test_without_locks_nothing_is_refused_and_nothing_swept(tmp_path, monkeypatch):
    left = tmp_path / ".a.txt.1-00000000.tmp"
    left.write_text("perhaps alive")
    for broken in (
        None,
        type("NoLocks", (), {"LOCK_EX": 2, "LOCK_NB": 4, "flock": lambda *a: os.listdir("/dev/null")}),
    ):
        monkeypatch.setattr(files, "fcntl", broken)
        with claimed(tmp_path, "first"), claimed(tmp_path, "second"), replacing(tmp_path / "a.txt") as file:
            file.write(b"whole")
        assert names(tmp_path) == [left.name, "a.txt"]


def test_a_folder_that_cannot_be_claimed_is_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = rf"cannot write into {folder}: (File exists|Not a directory)$"
        with pytest.raises(DataError, match=message), claimed(folder, "moemla train"):
            raise AssertionError("no folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_full_disk_does_not_keep_a_folder_from_being_claimed(tmp_path):
    other = process(f"""
        import resource, signal, time
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        with claimed({str(tmp_path)!r}, "moemla train"):
            print("in", flush=True)
            time.sleep(60)
    """)
    try:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(MoemlaError, match="is being written by another process: "), claimed(tmp_path, "mine"):
            raise AssertionError("two at once")
    finally:
        end(other)
