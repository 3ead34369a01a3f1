"""`moemla check`: the checks of a chapter on a file of the reader's own. Built in chapter 13."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from moemla.commands.terminal import Flag, print_json, say
from moemla.config import require
from moemla.errors import MoemlaError

START = 300  # seconds that importing torch may take; then it is the machine that is wrong, and not the file
GRACE = 10  # seconds that the child has to end by itself when its time is over
KEPT = 2**16  # bytes of what a file prints that are kept
CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from moemla.checks.child import main; main(*sys.argv[2:])"
MARKS = {"holds": "holds", "fails": "FAILS", "left out": "left out"}


@dataclass
class Check:
    """The checks of a chapter on your own file, which is run: only give it a file that you would run.

    A class is found by what it takes, keyword arguments as in the chapter or the library, and by its name where several
    fit. A line holds, FAILS with the smallest input that shows it, or is left out with a reason. Without a file: what
    is looked for.
    """

    chapter: tyro.conf.Positional[Annotated[int, tyro.conf.arg(metavar="N")]]
    """2, 3, 4, 6, 7, 8, 10, 11, 12 or 14."""
    file: tyro.conf.Positional[Annotated[Path | None, tyro.conf.arg(metavar="FILE")]] = None
    """Your file, mine.py. It is imported in a process of its own; what it prints is left out."""
    seconds: float = 60.0
    """After so long the file is taken to run for ever."""
    json: Flag[bool] = False
    """Print one JSON object."""

    debug = False  # no option of its own: `--debug` anywhere

    def __call__(self) -> int:
        require(0 < self.seconds < float("inf"), "seconds", self.seconds, "must be a number above 0")
        from moemla.checks.chapters import CHAPTERS, looked_for

        right = f"choose one of {', '.join(map(str, CHAPTERS))}"
        require(self.chapter in CHAPTERS, "chapter", self.chapter, right)
        if self.file is None:
            for shown, needed in looked_for(self.chapter).items():
                print(shown if needed else f"{shown}  # may be left out")
            return 0
        run, lines, error = Run(self.chapter, self.file, self.seconds), [], None
        if not self.json:
            dtype = "float32" if self.chapter in (11, 12) else "float64"  # kernels sum in it
            say(f"chapter {self.chapter}: {self.file} is run, in {dtype}, beside moemla's own")
        try:
            for line in run:
                lines.append(line)
                if not self.json:
                    say(_text(line))
        except MoemlaError as failed:
            error = failed
        if self.debug:
            print(run.printed, *(line["trace"] for line in lines if "trace" in line), sep="\n", file=sys.stderr)
        counts = {status: sum(line["status"] == status for line in lines) for status in MARKS}
        if self.json:
            kept = [{key: value for key, value in line.items() if key != "trace"} for line in lines]
            facts = dict(chapter=self.chapter, file=str(self.file), lines=kept, whole=run.whole)
            print_json(facts | counts | dict(error=None if error is None else str(error)))
        elif error is not None:
            raise error
        else:
            rest = "" if run.whole else "; the rest was not run"
            say(f"{counts['holds']} hold, {counts['fails']} fail, {counts['left out']} left out{rest}")
        return 0 if run.whole and counts["holds"] and not counts["fails"] else 1


class Run:
    """A process at work on a file; the lines that it reports, as they come.

    A file that cannot be checked is a `MoemlaError`. `whole` is True once all lines were run; `printed` is the end of
    what the file printed.
    """

    def __init__(self, chapter: int, file: Path, seconds: float):
        self.chapter, self.file, self.seconds = chapter, file, seconds
        self.whole, self.tail = False, b""

    @property
    def printed(self) -> str:
        """The end of what the file printed, and of what its warnings say."""
        return self.tail.decode("utf-8", "replace").strip()

    def __iter__(self) -> Iterator[dict]:
        if not self.file.is_file():
            raise MoemlaError(f"{self.file}: {'is no file' if self.file.exists() else 'no such file'}")
        if self.file.suffix == ".ipynb":
            raise MoemlaError(f"{self.file}: is a notebook; put its classes and functions into a .py file")
        root = Path(__file__).resolve().parents[2]
        with tempfile.TemporaryDirectory() as folder:
            told = [root, folder, self.chapter, self.file.resolve(), self.seconds]
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, *map(str, told)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # what the file starts ends with it
            )
            drain = threading.Thread(target=self._drain, args=(process,), daemon=True)
            drain.start()
            try:
                yield from self._lines(process, Path(folder))
            finally:
                _end(process)
                drain.join(1)

    def _drain(self, process: subprocess.Popen) -> None:
        """A file may print without end: its pipe is emptied, and the last of it kept."""
        while part := os.read(process.stdout.fileno(), KEPT):
            self.tail = (self.tail + part)[-KEPT:]

    def _lines(self, process: subprocess.Popen, folder: Path) -> Iterator[dict]:
        began, ready, doing, read, limit = time.monotonic(), False, None, 0, START
        while True:
            over = process.poll() is not None  # looked at before the report: what was written is read to the end
            report = folder / "report"
            text = report.read_bytes()[read:] if report.exists() else b""
            whole = text[: text.rfind(b"\n") + 1]
            read += len(whole)
            for line in map(json.loads, whole.splitlines()):
                if "ready" in line:
                    began, ready, limit = time.monotonic(), True, self.seconds + GRACE
                elif "error" in line:
                    self.tail += line["trace"].encode()
                    raise MoemlaError(line["error"])
                elif "done" in line:
                    self.whole = True
                    return
                elif "status" in line:
                    doing = None
                    yield line
                else:
                    doing = line["label"]
            if over or time.monotonic() > began + limit:
                break
            time.sleep(0.02)
        if not ready:
            raise MoemlaError(f"the process that would run {self.file} did not start (--debug shows what it said)")
        said = self._end_of(process, folder, over)
        if doing is None:
            raise MoemlaError(said)
        yield dict(label=doing, status="fails", said=said)

    def _end_of(self, process: subprocess.Popen, folder: Path, over: bool) -> str:
        """Why a process that was at work has come to no end, or to one before its time."""
        stack = (folder / "stack").read_text(encoding="utf-8", errors="replace") if (folder / "stack").exists() else ""
        if stack or not over:
            place = re.search(rf'File "{re.escape(str(self.file.resolve()))}", line (\d+)', stack)
            where = f", line {place[1]}" if place else ""
            return f"{self.file.name}{where}: still running after {self.seconds:g} s"
        code = process.returncode
        how_it_ends = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.file.name}: ends the process that runs it ({how_it_ends})"


def _end(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _text(line: dict) -> str:
    said = line.get("said") or ", ".join(_figure(name, value) for name, value in line.get("figures", {}).items())
    return f"{MARKS[line['status']]:8} {line['label']}{': ' if said else ''}{said}"


def _figure(name: str, value: float | str) -> str:
    if name == "time":
        return f"{value:.2f} times the library's"
    if name == "bytes":
        return f"{value:,} bytes"
    if name == "message":
        return f'it says "{value}"'
    if name == "largest":
        return f"no tensor made is larger than {value:,} numbers"
    return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
