"""Execute the stale notebooks of the book and store their outputs: `make notebooks`.

One thread, fixed hash seed, no time stamps: the same code gives the same bytes. Seconds go to book/timings.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tools.book import BOOK, PACKAGE, ROOT, notebooks
from tools.freshness import fingerprint, is_fresh

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "SOURCE_DATE_EPOCH": "0",  # matplotlib would write today's date into an SVG
    "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, not one of the user's by the same name
    "NO_COLOR": "1",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
}
INSTALLED = re.compile(r"(?:/(?:[\w.+-]+/)*|\.venv/)lib/python3\.\d+/(?:site-packages/)?")  # where a library lies
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def execute(path: Path, package: Path = PACKAGE, timeout: int = 600) -> float:
    """Run a notebook in its own folder and write it back; returns the seconds it took.

    A cell that fails raises `CellExecutionError` and leaves the file as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata["kernelspec"] = KERNELSPEC
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=40"],  # it would warn of its local TCP port
        resources={"metadata": {"path": str(path.parent)}},
    )
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    try:
        client.execute()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    seconds = time.perf_counter() - start
    shorten(notebook)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.metadata.pop("widgets", None)
    notebook.metadata.setdefault("moemla", {})["fresh"] = fingerprint(notebook, package)
    written = path.with_suffix(".tmp")
    nbformat.write(notebook, written)
    written.replace(path)
    return seconds


def shorten(notebook) -> None:
    """Takes what is of this machine out of tracebacks: `torch/nn/modules/module.py` is the same everywhere."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                output.traceback = [INSTALLED.sub("", line).replace(f"{ROOT}/", "") for line in output.traceback]


def record(name: str, seconds: float, file: Path) -> None:
    """Keep a notebook's seconds beside those of the others; the timings page reads the file."""
    timings = json.loads(file.read_text()) if file.exists() else {}
    timings[name] = round(seconds, 1)
    file.write_text(json.dumps(dict(sorted(timings.items())), indent=2) + "\n")


def main(arguments: list[str] | None = None, book: Path = BOOK, package: Path = PACKAGE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="the fresh ones too")
    parser.add_argument("--timeout", type=int, default=600, help="seconds for one cell")
    parser.add_argument("notebooks", nargs="*", type=Path, help="all of book/ when left out")
    options = parser.parse_args(arguments)
    failed = []
    for path in options.notebooks or notebooks(book):
        if not options.force and is_fresh(nbformat.read(path, as_version=4), package):
            print(f"{path.name}: fresh")
            continue
        print(f"{path.name}: running", flush=True)
        try:
            seconds = execute(path.resolve(), package, options.timeout)
        except CellExecutionError as error:
            print(f"{path.name}: FAILED, left as it was\n{error}", file=sys.stderr)
            failed.append(path.name)
            continue
        record(path.stem, seconds, path.resolve().parent / "timings.json")
        print(f"{path.name}: {seconds:.1f} s, {path.stat().st_size / 1000:.0f} KB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
