"""What waits for a GPU: the tests of the kernels, compiled, and the benches of training, layers and kernels.

python -m tools.on_gpu           all of it, with this interpreter
python -m tools.on_gpu --list    only print the commands

Results go to results/. Each command is one process, so that one that fails leaves the others alone; the exit code
counts the failures.
"""

import subprocess
import sys

from tools.book import ROOT

TOKENS = ("1", "16", "256", "4096", "16384", "65536")
MICRO_BATCHES = ("16", "64", "128")  # sequences of 512 tokens: an eighth, half and all of the paper's batch
BACK_ENDS = ("auto", "masked", "grouped", "triton")
LENGTHS = ("512", "2048", "8192", "32768")


def commands() -> list[list[str]]:
    """Tests first; a training step of size M; then M and XL: both kinds of experts, attention, kernels."""
    python = [sys.executable, "-m"]
    found = [[*python, "pytest", "tests/kernels", "-q", "-p", "no:cacheprovider"]]
    found += [[*python, "pytest", "tests", "-q", "-p", "no:cacheprovider", "-k", "gpu"]]
    keep = ["--folder", "results", "--seconds", "0.3"]
    for variant, matched in (("mha-rope", "parameters"), ("moe-mla-rope", "parameters"), ("moe-mla-rope", "literal")):
        model = ["--size", "M", "--variant", variant, "--matched", matched, "--vocab-size", "50257", "--seq-len", "512"]
        experts = ["--backends", *BACK_ENDS] if variant.startswith("moe") else []
        for dtype in ("bf16", "fp16"):
            for rows in MICRO_BATCHES:
                how = [*model, "--dtype", dtype, "--batch-size", rows, "--compiled", "True", *experts]
                found.append([*python, "moemla.cli", "bench", "train", *how, *keep])
    for size in ("M", "XL"):
        for matched in ("parameters", "literal"):
            for dtype in ("bf16", "fp16"):
                how = ["--size", size, "--matched", matched, "--dtype", dtype, "--against", "transformers"]
                found.append([*python, "moemla.cli", "bench", "moe", *how, "--tokens", *TOKENS, *keep])
        how = ["--size", size, "--dtype", "bf16", "--batch-size", "16"]
        found.append([*python, "moemla.cli", "bench", "attention", *how, "--tokens", *LENGTHS, *keep])
        found.append([*python, "moemla.cli", "bench", "kernels", *how, "--variant", "moe-mla-rope", *keep])
    return found


def main() -> int:
    failed = 0
    for command in commands():
        print("$", " ".join(["python", *command[1:]]), flush=True)
        if "--list" not in sys.argv:
            failed += subprocess.run(command, cwd=ROOT).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
