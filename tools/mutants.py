"""Tries the wrong versions of tests/museum.py: each is a patch that still runs, and at least one test must fail on it.

python -m tools.mutants            try every mutant on a copy, print the table, exit with 1 if one survives
python -m tools.mutants NAME ...   only these
python -m tools.mutants --write    try all and keep the table as book/mutants.md

Each has a process of its own, forked from one that has imported torch and pytest. The tree is copied once for each that
runs at the same time.
"""

import multiprocessing
import os
import queue
import shlex
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tests.museum import MUSEUM
from tools.book import BOOK, ROOT

WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2  # mutants at a time, one thread each
CARRIED = ("moemla", "tests", "tools", "pyproject.toml")
PRELOADED = ["torch", "pytest", "hypothesis", "beartype", "jaxtyping", "tokenizers"]  # not moemla: it is patched
FORKED = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Mutant:
    """What goes wrong (`story`), in which file `old` becomes `new`, and the tests that should notice."""

    name: str
    story: str
    module: str  # moemla/routing.py
    old: str
    new: str
    tests: str  # what pytest is given


def mutants(museum: str = MUSEUM) -> list[Mutant]:
    """The entries of the museum, read as tests/museum.py says."""
    found, module = [], ""
    for paragraph in museum.strip().split("\n\n"):
        name, *lines = paragraph.splitlines()
        if not lines:
            module = name
            continue
        story, *patch, tests = lines
        old = "\n".join(line[2:] for line in patch if line[0] in " -")
        new = "\n".join(line[2:] for line in patch if line[0] in " +")
        found.append(Mutant(name, story, module, old, new, tests))
    return found


class FirstFailure:
    """A plugin of pytest: the first test that failed, and whether it failed by itself rather than in a fixture."""

    test, itself = "", False

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self.test:
            self.test, self.itself = report.nodeid, report.when == "call"


def run_tests(copy: Path, tests: str, answer: Connection) -> None:
    """In a process of its own: runs the tests of a copy, answers (caught, the first that failed or what happened)."""
    import pytest

    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)  # of the processes that a test starts
    sys.path.insert(0, str(copy))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "tools")]:
        del sys.modules[name]  # those of the copy are meant
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    first = FirstFailure()
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--tb=no", *shlex.split(tests)], plugins=[first])
    caught = code == pytest.ExitCode.TESTS_FAILED and first.itself
    answer.send((caught, first.test or f"no test failed (pytest ended with {int(code)})"))


def attempt(mutant: Mutant, copies: queue.Queue[Path]) -> tuple[bool, str]:
    """Applies the patch to a copy, runs the tests, takes the patch back: (caught, the first test that failed)."""
    copy = copies.get()
    path = copy / mutant.module
    text, stamp = path.read_text(encoding="utf-8"), path.stat().st_mtime_ns
    try:
        if text.count(mutant.old) != 1:
            return False, f"the patch does not fit: its text stands {text.count(mutant.old)} times in {mutant.module}"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        question, answer = FORKED.Pipe(duplex=False)
        process = FORKED.Process(target=run_tests, args=(copy, mutant.tests, answer))
        process.start()
        answer.close()  # what remains is the process's own end: a process that dies is noticed
        try:
            return question.recv()
        except EOFError:
            return False, "the process of the tests died"
        finally:
            process.join()
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(stamp, stamp))  # or a compiled mutant of the same second and size would pass for it
        copies.put(copy)


def copy_of_the_tree(folder: Path) -> Path:
    """What the tests need of the project: no notebooks, no results."""
    for name in CARRIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def page(rows: list[tuple[Mutant, bool, str]]) -> str:
    """The table as a page of the book."""
    out = [
        "# A museum of wrong versions",
        "",
        "Each row is a patch of a line or two to the library. The patched library imports, runs and trains; at least"
        " one test fails on it. `make mutants` tries them all again.",
        "",
        "| what goes wrong | module | noticed by |",
        "|---|---|---|",
    ]
    for mutant, _, test in rows:
        module = mutant.module.removeprefix("moemla/").removesuffix(".py")
        seen_by = test.split("[")[0].removeprefix("tests/").replace("::", " ")
        out.append(f"| {mutant.story} | `{module}` | `{seen_by}` |")
    return "\n".join(out) + "\n"


def main(arguments: list[str]) -> int:
    wanted = [name for name in arguments if not name.startswith("--")]
    museum = mutants()
    unknown = set(wanted) - {mutant.name for mutant in museum}
    if unknown:
        print(f"no mutant is called {', '.join(sorted(unknown))}")
        return 2
    chosen = [mutant for mutant in museum if not wanted or mutant.name in wanted]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"  # a process with threads cannot be forked
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed; to import them takes longer than most tests
    FORKED.set_forkserver_preload(PRELOADED)
    rows, copies = [], queue.Queue()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        for worker in range(min(WORKERS, len(chosen))):
            copies.put(copy_of_the_tree(Path(folder) / str(worker)))
        for mutant, (caught, test) in zip(chosen, pool.map(lambda m: attempt(m, copies), chosen), strict=True):
            rows.append((mutant, caught, test))
            print(f"{'caught  ' if caught else 'SURVIVED'} {mutant.name:36} {test.removeprefix('tests/')}", flush=True)
    survivors = sum(not caught for _, caught, _ in rows)
    print(f"{len(rows) - survivors} of {len(rows)} mutants caught")
    if "--write" in arguments and not survivors and not wanted:
        (BOOK / "mutants.md").write_text(page(rows), encoding="utf-8")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
