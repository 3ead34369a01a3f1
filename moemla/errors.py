"""Errors that are meant for the person at the keyboard: the command prints them as one line and exits with 1.

Built in chapter 13.
"""

from importlib import import_module
from types import ModuleType


class MoemlaError(Exception):
    """Something outside the program is wrong (a file, a run, the network); the message says what to do."""


class DataError(MoemlaError):
    """Text, token shards or a tokenizer that cannot be used as they are."""


class Diverged(MoemlaError):
    """A training run whose loss or gradient is no longer a number. Built in chapter 5."""


def optional(package: str, extra: str) -> ModuleType:
    """A package that comes with an extra of moemla; without it a `MoemlaError` names the extra."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MoemlaError(f"{package} is not installed: pip install 'moemla[{extra}]'") from error


class Elsewhere(MoemlaError):
    """Another rank cannot do its part, and says why; this one ends with it."""
