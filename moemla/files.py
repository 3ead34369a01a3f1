"""Files that are whole or absent, and folders that one process writes at a time.

A file is written under a name of its own, flushed to the disk, then renamed. Who writes holds a lock of the kernel's
(flock), which ends with the process however it ends: what is locked is alive, what is not was left by a kill.
Built in chapter 13.
"""

import errno
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from moemla.errors import DataError, MoemlaError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".moemla.lock"  # in a folder that is being written; says who does


def why(error: OSError) -> str:
    """The reason of a failed read or write in a few words."""
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return "no space left"
    return error.strerror or str(error)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write `path` whole or not at all: a temporary file beside it, synced, then renamed over it.

    Any failure removes the temporary file and leaves an older `path` as it was; a failure of the disk
    (no space, no permission) becomes a one-line `DataError`. Several may write one path at a time: each has a
    temporary file of its own, and the last to finish stays. What killed processes left is removed first.
    """
    path, temporary = Path(path), None
    try:
        _sweep(path)
        with _temporary(path) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # Windows renames no open file
            os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError(f"cannot write {path}: {why(error)}; nothing was left half-written") from error
        raise


def _temporary(path: Path) -> IO[bytes]:
    """A new file beside `path`, open and locked."""
    while True:
        name = f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        file = open(path.with_name(name), "xb")  # noqa: SIM115  (closed by who asked for it)
        if _lock(file) is not False and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # somebody swept between its making and its lock


def _sweep(path: Path) -> None:
    """Removes temporary files of `path` that nobody holds: their processes were killed."""
    left = re.compile(re.escape(f".{path.name}.") + r"\d+-[0-9a-f]{8}\.tmp")
    for name in filter(left.fullmatch, os.listdir(path.parent)):
        with suppress(OSError), open(path.with_name(name), "r+b") as file:
            if _lock(file):
                os.unlink(path.with_name(name))


def _lock(file: IO) -> bool | None:
    """Takes an open file's lock. False: another holds it; None: this system or file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
    return True


@contextmanager
def claimed(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Keep others from writing into `folder` (made where it is missing) while `what`, say "moemla train", does.

    A second claim, by another process or by this one, is a `MoemlaError` that names the process and what it does.
    Readers are not kept out, nor is a writer that claims nothing. The lock is the kernel's and ends with the process,
    killed or not; its file, `.moemla.lock`, is removed at the end, and one that a killed process left is in nobody's
    way. Where there are no locks (Windows, some network file systems) nothing is refused. A folder that cannot be
    written is a `DataError`.
    """
    folder = Path(folder)
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(path, "a+b", buffering=0)  # noqa: SIM115  (closed below)
            free = _lock(file)
            if free is not True or os.fstat(file.fileno()).st_nlink:
                break
            file.close()  # its holder has removed it since: again, with the one that has the name now
    except OSError as error:
        raise DataError(f"cannot write into {folder}: {why(error)}") from error
    with file:
        if free is False:
            file.seek(0)
            process, _, doing = file.read().decode(errors="replace").strip().partition(" ")
            holder = f"process {process} ({doing})" if doing else "another process"
            raise MoemlaError(f"{folder} is being written by {holder}: wait for it or name another folder")
        with suppress(OSError):  # a full disk: the lock holds without its text
            file.truncate(0)
            file.write(f"{os.getpid()} {what}\n".encode())
        try:
            yield
        finally:
            if fcntl is None:
                file.close()  # Windows removes no open file
            with suppress(OSError):
                path.unlink()  # while it is locked, or another's might be removed


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict:
    """The object in a JSON file; MoemlaError where it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoemlaError(f"cannot read {path}: {why(error)}") from error
    except ValueError as error:
        raise MoemlaError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise MoemlaError(f"{path} is damaged: it holds no object")
    return value
