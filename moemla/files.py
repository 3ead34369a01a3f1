"""Files that are whole or absent: written under another name, flushed to the disk, then renamed."""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from moemla.errors import DataError, MoemlaError


def why(error: OSError) -> str:
    """The reason of a failed read or write in a few words. Built in chapter 13."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return "no space left"
    return error.strerror or str(error)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write `path` whole or not at all: a temporary file beside it, synced, then renamed over it.

    Any failure removes the temporary file and leaves an older `path` as it was; a failure of the disk
    (no space, no permission) becomes a one-line `DataError`. Built in chapter 13.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"cannot write {path}: {why(error)}; nothing was left half-written") from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all. Built in chapter 13."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """The object in a JSON file; MoemlaError where it is missing or damaged. Built in chapter 13."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoemlaError(f"cannot read {path}: {why(error)}") from error
    except ValueError as error:
        raise MoemlaError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise MoemlaError(f"{path} is damaged: it holds no object")
    return value
