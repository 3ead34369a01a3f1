"""Runs a reader's file and a chapter's checks on it, in a process of its own: what `moemla check` starts.

It runs the code of the file. What it finds goes into a report, a JSON object a line, so that nothing that the file
prints, and no end that it comes to, is taken for a result: {"ready": true} before the file is read, {"label": ...}
before each check, and behind it {"label", "status", "said", "figures", "trace"}; {"error", "trace"} where the file
itself fails; {"done": true} at the end.
"""

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType

import torch

from moemla.checks.chapters import Todo, todo
from moemla.checks.compare import CheckFailed
from moemla.checks.finding import Reader

NAME = "reader_file"  # of the module: a file called torch.py must not take torch's place
LONGEST = 300  # characters of an exception's message
HINTS = {
    "No module named 'triton'": "Triton is for Linux; loops over tiles go through the same checks",
    "0 active drivers": "without a GPU, os.environ['TRITON_INTERPRET'] = '1' has to stand before Triton is imported",
}


class Report:
    """Lines for the process that started this one. Other processes that the file starts write nothing here."""

    def __init__(self, path: Path):
        self.file, self.owner = path.open("a", encoding="utf-8"), os.getpid()

    def write(self, **line) -> None:
        """One line, at once; in a copy of this process (the file called fork) the end of it."""
        if os.getpid() != self.owner:
            os._exit(0)
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()


def load(path: Path) -> ModuleType:
    """Runs the file as a module, beside its own folder and without leaving bytecode there."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(path.parent))
    module = ModuleType(NAME)
    module.__file__ = str(path)
    sys.modules[NAME] = module
    exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    return module


def settings() -> None:
    """What checks are made under, whatever the file has set: a layer in float64 makes its constants in float64 too."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.manual_seed(0)


def explain(error: BaseException, path: Path) -> str:
    """An exception in a line, with the last line of the file that it went through."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path.name}, line {error.lineno}: {error.msg}"
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    place = f"{path.name}, line {places[-1].lineno}: " if places else ""
    if isinstance(error, SystemExit):
        return f"{place}sys.exit({'' if error.code is None else repr(error.code)}) is called"
    text = " ".join(str(error).split())
    text = text if len(text) <= LONGEST else text[:LONGEST] + " ..."
    text += "".join(f" ({hint})" for sign, hint in HINTS.items() if sign in text)
    return f"{place}{type(error).__name__}{': ' if text else ''}{text}"


def outcome(line: Todo, path: Path) -> dict:
    """Runs a line."""
    if line.check is None:
        return dict(status="fails" if line.missing else "left out", said=line.said)
    try:
        torch.manual_seed(0)
        return dict(status="holds", figures=line.check() or {})
    except CheckFailed as failed:
        return dict(status="fails", said=str(failed))
    except BaseException as error:  # sys.exit too
        return dict(status="fails", said=explain(error, path), trace=traceback.format_exc())


def main(folder: str, number: str, file: str, seconds: str) -> None:
    """Writes `report` into a folder, then leaves at once: threads of the file are not waited for.

    After so many seconds the process ends, wherever it is, and `stack` says where.
    """
    report, path = Report(Path(folder, "report")), Path(file)
    settings()
    report.write(ready=True)
    stack = os.open(Path(folder, "stack"), os.O_WRONLY | os.O_CREAT)
    faulthandler.dump_traceback_later(float(seconds), exit=True, file=stack)
    try:
        module = load(path)
    except BaseException as error:
        report.write(error=explain(error, path), trace=traceback.format_exc())
    else:
        settings()
        for line in todo(int(number), Reader(module)):
            report.write(label=line.label)
            report.write(label=line.label, **outcome(line, path))
        report.write(done=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
