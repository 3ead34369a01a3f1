"""Stories as text: files with a mark between stories, and the TinyStories corpus on its hub.

Notable: stories come one at a time, however long the file; what came from the hub is kept, and a second call goes on
behind it. Built in chapter 1.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from moemla.errors import DataError, optional
from moemla.files import claimed, why
from moemla.tokenizer import EOT

SEPARATOR = f"\n{EOT}\n"  # after every story of a text file
HUB_NAME = "roneneldan/TinyStories"
HUB_SECONDS = 5  # to answer at all
HUB_RETRIES = 3  # of a read that broke off; what has come is kept, so giving up early costs nothing
CHUNK = 512  # stories between two reports of progress

Report = Callable[[str, int, int | None], None]  # label, done, total (None: not known yet)


def read_stories(path: str | os.PathLike[str], rows: int | None = None) -> Iterator[str]:
    """The stories of a UTF-8 text file with `<|endoftext|>` lines between them, one at a time.

    Outer whitespace is stripped and empty stories are left out; `rows` stops after that many, empty ones
    counted. `DataError` when there is no such file, no story in it, or a byte that is not UTF-8 (gives its
    offset). The mark inside a line is text and separates nothing: a warning says so, and a file that has it there
    alone is a `DataError`.
    """
    empty = True
    for story in islice(_rows(path), rows):
        if story:
            empty = False
            yield story
    if empty:
        raise DataError(f"{path} is empty: it needs stories with a line {EOT} between them")


def _rows(path: str | os.PathLike[str]) -> Iterator[str]:
    """What stands between the separator lines, stripped; empty rows too, because resuming counts them."""
    offset = rows = 0
    inside: list[int] = []  # numbers of lines that hold the mark beside other text
    lines: list[str] = []
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = raw.decode()
                except UnicodeDecodeError as error:
                    place = offset + error.start
                    raise DataError(
                        f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {place}; convert it"
                    ) from None
                if offset == 0:
                    line = line.removeprefix("\ufeff")  # byte order mark
                offset += len(raw)
                if line.strip() == EOT:
                    yield "".join(lines).strip()
                    lines.clear()
                    rows += 1
                    continue
                if EOT in line:
                    inside.append(number)
                lines.append(line.replace("\r\n", "\n"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {why(error)}") from error
    if inside:
        said = f"{path} has {EOT} inside {len(inside)} of its lines (the first is line {inside[0]})"
        if not rows:
            raise DataError(f"{said} and on none of its own, where it would separate stories: put it on its own line")
        warnings.warn(f"{said}: it is taken for text there and separates nothing", stacklevel=3)
    if last := "".join(lines).strip():
        yield last


def hub_stories(split: str, limit: int, skip: int = 0) -> Iterator[str]:
    """Rows `skip` to `limit` of a split ("train" or "validation") of TinyStories, streamed.

    Whatever goes wrong on the way is one `DataError` that names the other sources; without a network it comes
    within seconds.
    """
    datasets = optional("datasets", "hub")
    try:
        _knock_at_the_hub()
        datasets.config.STREAMING_READ_MAX_RETRIES = HUB_RETRIES
        datasets.config.STREAMING_OPEN_MAX_RETRIES = HUB_RETRIES
        rows = datasets.load_dataset(HUB_NAME, split=split, streaming=True)
        for row in islice(rows.skip(skip), max(limit - skip, 0)):
            yield row["text"]
    except Exception as error:  # httpx, huggingface_hub, datasets and fsspec each have their own kinds
        reason = (str(error).splitlines() or [""])[0][:120]
        raise DataError(
            f"cannot reach {HUB_NAME} on the Hugging Face hub ({type(error).__name__}: {reason}). With a "
            "network, the same command goes on where it stopped; without one, use --source builtin, or "
            "--source files --train F --valid F"
        ) from error


def _knock_at_the_hub() -> None:
    """One request with a short limit: without a network `load_dataset` retries for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)


def fetch_hub(out: str | os.PathLike[str], split: str, limit: int, progress: Report | None = None) -> Path:
    """`OUT/hub-SPLIT.txt` with at least `limit` rows of the hub (fewer if it has no more).

    Text goes to `hub-SPLIT.txt.part`; whole rows in it are counted and kept, so that a second call goes on
    behind them, as does one that wants more than a finished file has. `MoemlaError` while another process writes
    into `out`; a file of that name that does not end in a separator is not touched.
    """
    with claimed(out, "fetch_hub"):
        return fetch_claimed(Path(out), split, limit, progress)


def fetch_claimed(out: Path, split: str, limit: int, progress: Report | None) -> Path:
    """`fetch_hub` for who has claimed `out` already. Built in chapter 13."""
    path = out / f"hub-{split}.txt"
    part = path.with_name(path.name + ".part")
    try:
        if path.exists():
            rows, end = _whole_rows(path)
            if end != path.stat().st_size:
                raise DataError(f"{path} is there already and not from the hub: move it away or name another folder")
            if rows >= limit:
                return path
            os.replace(path, part)
        done, end = _whole_rows(part) if part.exists() else (0, 0)
        with open(part, "ab") as file:
            file.truncate(end)  # a row that was cut
            fresh = hub_stories(split, limit, skip=done)
            for text in watched(fresh, f"hub {split}", limit, progress, start=done):
                file.write((text.replace(EOT, " ").strip() + SEPARATOR).encode())
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"cannot write {part}: {why(error)}; what came is kept") from error
    return path


def _whole_rows(path: Path) -> tuple[int, int]:
    """Number of rows that are followed by their separator, and where the last of them ends."""
    rows = end = position = 0
    with open(path, "rb") as file:
        for line in file:
            position += len(line)
            if line == f"{EOT}\n".encode():
                rows, end = rows + 1, position
    return rows, end


def watched(
    items: Iterable[str], label: str, total: int | None, progress: Report | None, start: int = 0
) -> Iterator[str]:
    """`items`, reported at their beginning, after each CHUNK of them, and at their end. Built in chapter 13."""
    done = start
    if progress:
        progress(label, done, total)
    for done, item in enumerate(items, start + 1):
        yield item
        if progress and done % CHUNK == 0:
            progress(label, done, total)
    if progress:
        progress(label, done, done)


def then(items: Iterable[str], label: str, progress: Report | None) -> Iterator[str]:
    """`items`, and a report that what follows them has begun. Built in chapter 13."""
    yield from items
    if progress:
        progress(label, 0, None)
