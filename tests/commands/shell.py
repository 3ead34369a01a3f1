"""The command as a shell starts it, and the one line that it says where it fails."""

import os
import signal
import subprocess
import sys
from functools import partial

from moemla.cli import main

SMALL = ["--batch-size", "2", "--seq-len", "16", "--log-every", "1", "--warmup", "1"]
PYTHON = [sys.executable, "-m", "moemla"]
SLOW_START = 120  # seconds that a child may take on a loaded machine


def child(*arguments, **how) -> subprocess.Popen:
    """A process with buffered output, as a shell starts it: it hears SIGINT, though these tests may run in a background
    job, which does not.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    pipes |= dict(preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler))
    return subprocess.Popen([*PYTHON, *map(str, arguments)], **pipes | how)


def failed(capsys, *arguments) -> str:
    """Runs a command that must fail with exit code 1 (2 for wrong values): the one line that it says."""
    code = main([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert code in (1, 2) and err.startswith("moemla: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert len(err) < 700 and "Traceback" not in err
    return f"{code} {err}"
