"""The command `moemla`: from text to a trained model and back to text.

Exit codes: 0 done, 1 the work failed (one line says why; `--debug` shows the traceback), 2 wrong usage, 130
interrupted. Built in chapter 13.
"""

import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields, is_dataclass
from typing import Any

import tyro

from moemla import __version__
from moemla.commands import COMMANDS
from moemla.commands.terminal import say
from moemla.config import TrainConfig
from moemla.errors import Elsewhere, MoemlaError

# What tyro calls a type, and what is said of it here.
KINDS = {"INT": "a whole number", "[INT": "whole numbers", "FLOAT": "a number", "{None}": "None"}

DESCRIPTION = (
    "Mixture of experts, latent attention and rotary positions for small language models. --version prints the "
    "number of this one; --debug, anywhere, shows the traceback of an error."
)


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(str(message))
        yield


@_warnings_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        print(f"moemla {__version__}")
        return 0
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = None
    try:
        command = _parsed(arguments)
        if hasattr(command, "debug"):  # one that runs another process, whose traceback is not in this one
            command.debug = debug
        code = command() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        say("", sys.stderr)  # ends the line that ^C stands on
        _say(str(error) or "interrupted")
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone; what is left to write, on leaving too, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Elsewhere:
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ValueError):
            text = _as_typed(str(error), type(command))
        elif isinstance(error, MoemlaError):
            text = str(error)
        elif isinstance(error, OSError):
            text = f"{error.filename or 'input/output'}: {error.strerror or error}"
        else:
            text = f"{type(error).__name__}: {error} (--debug shows where)"
        _say(text)
        return 2 if isinstance(error, ValueError) else 1


def _say(text: str) -> None:
    say(f"moemla: {' '.join(text.split())}", sys.stderr)


def _parsed(arguments: list[str]) -> Any:
    """The command that the arguments ask for. A wrong value is said in one line, and without tyro's names of it."""
    said = io.StringIO()
    commands = {name: getattr(kind, "chosen", lambda _, kind=kind: kind)(arguments) for name, kind in COMMANDS.items()}
    try:
        with redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                commands, prog="moemla", description=DESCRIPTION, args=arguments
            )
    except SystemExit:
        sys.stdout.flush()  # the help, for a reader who may have gone
        text = said.getvalue()
        flat = " ".join(re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]|-{4,}", " ", text).split())
        wrong = re.search(r"Error parsing (\S+): (.*?)(?: Argument helptext: \S+ (\S+).*)? For full helptext", flat)
        if wrong is None:
            sys.stderr.write(text)
            raise
        option, reason, kind = wrong.groups()
        if option.startswith("--") and kind:
            typed = re.findall(r"'([^']*)'", reason)
            wanted = " or ".join(KINDS.get(part, part) for part in reversed(kind.split("|")))
            reason = f"{option} {typed[0] if typed else ''}: must be {wanted}"
        raise ValueError(reason) from None


def _as_typed(text: str, command: type) -> str:
    """`field=value` of a message as --field value, where the field is an option; without -- where it has none."""
    kinds = [command] if is_dataclass(command) else [*COMMANDS.values()]
    typed = {field.name: field.type for kind in (*kinds, TrainConfig) for field in _spread(kind)}
    return re.sub(r"\b([a-z_]+)=", lambda match: _option(match[1], typed) if match[1] in typed else match[0], text)


def _spread(kind: type) -> Iterator[Any]:
    """The fields of a dataclass, with those of a dataclass that stands among its options in its place."""
    for field in fields(kind):
        inner = getattr(field.type, "__origin__", None)
        yield from _spread(inner) if is_dataclass(inner) else [field]


def _option(field: str, typed: dict[str, Any]) -> str:
    positional = tyro.conf.Positional in getattr(typed[field], "__metadata__", ())
    return f"{field} " if positional else f"--{field.replace('_', '-')} "


if __name__ == "__main__":
    sys.exit(main())
