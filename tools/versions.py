"""Other versions of Python and torch, tried once for the log; no part of CI.

    python -m tools.versions python3.12=2.14.1 python3.13=2.14.1          what a person does first, from the wheel
    python -m tools.versions python3.11=2.14.1 --tests tests/test_rope.py tests/test_moe.py          and these tests

Each combination (an interpreter, a version of torch) gets a virtual environment and an empty folder, deleted before the
next, and prints one line. The other packages are the newest that pyproject.toml allows. A build of torch with CUDA is
3 GB to fetch and 7 GB on the disk.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from tools.book import ROOT
from tools.wheel import COMMANDS, build, try_commands

# What passed, as (Python, torch); the range in pyproject.toml ends behind the highest. LOG.md says what was run.
TRIED = (("3.11", "2.13.0"), ("3.11", "2.14.1"), ("3.12", "2.14.1"), ("3.13", "2.14.1"))

# Neither the path of the caller nor what pip was told before reaches the new environment.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_TARGET"))}
ENVIRONMENT |= dict(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", PYTHONNOUSERSITE="1")


def packages(torch: str, tests: bool) -> list[str]:
    """What pip is given: the requirements of pyproject.toml, with this torch in place of the range that was tried."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = list(project["dependencies"])
    if tests:
        lines += [line for name in ("hub", "plots", "stats", "judge", "test") for line in extras[name]]
    named = [line for line in lines if re.match(r"[\w-]+", line)[0] not in ("torch", "moemla", "triton")]
    return [f"torch=={torch}", *named]


def attempt(python: str, torch: str, wheel: Path, tests: list[str]) -> tuple[bool, str]:
    """One combination: (whether all passed, its line)."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="moemla-versions-") as folder:
        venv, empty = Path(folder, "venv"), Path(folder, "empty")
        empty.mkdir()
        own = str(venv / "bin" / "python")
        pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps = {
            "venv": [python, "-m", "venv", str(venv)],
            "packages": [*pip, *packages(torch, bool(tests))],
            "wheel": [*pip, "--no-deps", str(wheel)],
            "versions": [own, "-c", "import sys, torch; print(sys.version.split()[0], torch.__version__)"],
        }
        found = f"{python}, torch {torch}"
        for name, command in steps.items():
            done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
            if done.returncode:
                return False, f"{found}: no {name}: {' '.join(done.stderr.split())[-300:]}"
        found = "Python {}, torch {}".format(*done.stdout.split())
        done = try_commands([own], empty, ENVIRONMENT)
        if done.returncode:
            return False, f"{found}: {' '.join((done.stdout + done.stderr).split())[-300:]}"
        said = f"the wheel's {len(COMMANDS)} commands passed"
        if tests:
            command = [own, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
            done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT)
            print(done.stdout[-6000:], file=sys.stderr)
            said += f"; tests: {(done.stdout.strip().splitlines() or ['nothing was run'])[-1]}"
        return done.returncode == 0, f"{found}: {said} ({time.monotonic() - begin:.0f} s with the installation)"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("combinations", nargs="+", metavar="PYTHON=TORCH", help="an interpreter and a version of torch")
    parser.add_argument("--tests", nargs="+", default=[], metavar="FILE", help="tests of this checkout, run there too")
    options = parser.parse_args(arguments)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        wheel = build(sys.executable, Path(folder))
        for combination in options.combinations:
            python, _, torch = combination.partition("=")
            passed, line = attempt(python, torch, wheel, options.tests)
            print(line, flush=True)
            failed |= not passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
