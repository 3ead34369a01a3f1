"""What waits for a GPU: the tests of the kernels, compiled, and the benches of training, experts, attention, kernels.

python -m tools.on_gpu                                  all of it, with this interpreter
python -m tools.on_gpu --only tests train --minutes 9   these parts, as far as the time goes
python -m tools.on_gpu --list                           only prints the commands

Results go to results/. Each command is one process, so that one that fails leaves the others alone; the exit code
counts the failures.
"""

import argparse
import subprocess
import sys
import time

from tools.book import ROOT

TOKENS = ("1", "16", "256", "4096", "65536")
MICRO_BATCHES = ("64", "16", "128")  # sequences of 512 tokens: half, an eighth and all of the paper's batch
LENGTHS = ("512", "2048", "8192", "32768")
KEEP = ["--folder", "results", "--seconds", "0.1"]
MODELS = (("mha-rope", "parameters"), ("moe-mla-rope", "parameters"), ("moe-mla-rope", "literal"))


def parts() -> dict[str, list[list[str]]]:
    """The commands of each part, the most telling ones first."""
    test = ["pytest", "-q", "-p", "no:cacheprovider"]
    return {
        "tests": [
            [*test, "tests/kernels", "tests/test_kernel_bench.py", "-n", "8"],
            [*test, "tests/test_training.py", "tests/test_model.py", "-k", "gpu"],
        ],
        "train": [_train(*model, "bf16", MICRO_BATCHES[0], compiled=True) for model in MODELS],
        "train-more": [_train(*model, "bf16", rows) for rows in MICRO_BATCHES[1:] for model in MODELS]
        + [_train(*model, "fp16", rows) for rows in MICRO_BATCHES for model in MODELS],
        "kernels": [_bench("kernels", size, "parameters", "bf16", "--tokens", *TOKENS[2:]) for size in ("M", "XL")],
        "experts": [_experts(size, matched, "bf16") for matched in ("parameters", "literal") for size in ("M", "XL")],
        "attention": [_attention(size) for size in ("M", "XL")],
        "serving": [_serving(rows) for rows in ("1", "16", "128")],
        "experts-more": [_experts(size, how, "fp16") for how in ("parameters", "literal") for size in ("M", "XL")],
    }


def _bench(what: str, size: str, matched: str, dtype: str, *more: str) -> list[str]:
    variant = ["--variant", "moe-mla-rope"] if what == "kernels" else []
    return ["moemla.cli", "bench", what, "--size", size, "--matched", matched, "--dtype", dtype, *variant, *more, *KEEP]


def _experts(size: str, matched: str, dtype: str) -> list[str]:
    """Without a peer, whose experts take minutes where they are narrow."""
    return _bench("moe", size, matched, dtype, "--tokens", *TOKENS)


def _attention(size: str) -> list[str]:
    return _bench("attention", size, "parameters", "bf16", "--batch-size", "16", "--tokens", *LENGTHS)


def _serving(rows: str) -> list[str]:
    """Size M with experts, at most 0.3 million tokens held."""
    lengths = [length for length in LENGTHS if int(length) * int(rows) <= 300_000]
    return _bench("serving", "M", "parameters", "bf16", "--batch-size", rows, "--tokens", *lengths)


def _train(variant: str, matched: str, dtype: str, rows: str, compiled: bool = False) -> list[str]:
    """A step of size M. Every expert on every token would need more memory than there is where experts are wide."""
    model = ["--size", "M", "--variant", variant, "--matched", matched, "--vocab-size", "50257", "--seq-len", "512"]
    how = ["--dtype", dtype, "--batch-size", rows, "--compiled", str(compiled)]
    if variant.startswith("moe"):
        how += ["--backends", "auto", *(["masked"] if matched == "parameters" else []), "grouped", "triton"]
    return ["moemla.cli", "bench", "train", *model, *how, *KEEP]


def commands() -> list[list[str]]:
    """All of them."""
    return [command for part in parts().values() for command in part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts(), default=list(parts()), metavar="PART")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after these, and end all")
    parser.add_argument("--each", type=float, help="seconds that a command may take at most")
    parser.add_argument("--list", action="store_true")
    chosen = parser.parse_args()
    failed, end = 0, time.monotonic() + 60 * chosen.minutes
    for command in (command for part in chosen.only for command in parts()[part]):
        print("$", " ".join(["python", "-m", *command]), flush=True)
        left = end - time.monotonic()
        if chosen.list:
            continue
        if left <= 0:
            print("left out: no time", flush=True)
            continue
        begin = time.monotonic()
        limit = min(left, chosen.each or left)
        try:
            run = subprocess.run(
                [sys.executable, "-m", *command], cwd=ROOT, timeout=None if limit == float("inf") else limit
            )
            failed += run.returncode != 0
        except subprocess.TimeoutExpired:
            failed += 1
            print("ended: no time", flush=True)
        print(f"  {time.monotonic() - begin:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
