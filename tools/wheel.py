"""The wheel, and what a person does first with it: prepare, train, evaluate, generate, export, smoke, claims."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tools.book import ROOT

COMMANDS = (
    "prepare --out data --stories 60 --vocab-size 300",
    "train --data data --out run --steps 20 --batch-size 2 --seq-len 32 --warmup 2",
    "evaluate --run run",
    "generate --run run --max-new-tokens 8",
    "generate --run pretrained/tiny-moe-mla-rope --max-new-tokens 8",
    "export --run run --out exported",
    "experiment ten-minutes --scale smoke --folder kept",
    "claims",
)
EXTRAS = ("datasets", "matplotlib", "scipy", "transformers", "openai")  # not needed for any of these
CODE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(","), None))
from moemla.cli import main
for command in sys.argv[2:]:
    print("moemla", command, flush=True)
    code = main(command.split())
    if code:
        sys.exit(f"moemla {command}: exit code {code}")
import moemla
print(*moemla.__path__)
"""


def build(python: str, folder: Path) -> Path:
    """The wheel of this checkout, made with the hatchling that is installed beside `python`; needs no network."""
    command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"no wheel (is hatchling installed?): {(done.stdout + done.stderr)[-2000:]}")
    (wheel,) = folder.glob("moemla-*.whl")
    return wheel


def try_commands(python: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs `COMMANDS` in `folder`, in one process to which the extras are hidden; it prints where moemla lies, last."""
    command = [*python, "-c", CODE, ",".join(EXTRAS), *COMMANDS]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
