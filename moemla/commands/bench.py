"""`moemla bench`: measures this machine. Built in chapter 14."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from moemla.commands.terminal import Flag, print_json
from moemla.config import MATCHES, SIZES, VARIANTS, require


@dataclass
class Bench:
    """Measures this machine: training, decoding, serving, experts, attention or kernels, beside a peer and a limit.

    Each row has the limit that binds: matrix products, bytes, or the number of operations.
    """

    what: tyro.conf.Positional[Literal["train", "decode", "serving", "moe", "attention", "kernels"]]
    size: Literal[tuple(SIZES)] = "tiny"
    variant: Literal[VARIANTS] = "moe-mla-decoupled"
    matched: Literal[MATCHES] = "parameters"
    d_expert: int | None = None
    """Width of an expert; default: as --matched says."""
    vocab_size: int = 4096
    against: Literal["transformers"] | None = None
    """Measure DeepseekV3 of transformers with the same weights too; takes SwiGLU, RMSNorm and no biases for both."""
    device: str | None = None
    """cpu, cuda; default: the GPU if there is one."""
    dtype: Literal["float32", "bf16", "fp16"] = "float32"
    batch_size: int | None = None
    """Sequences; default 8 in training, 16 for kernels, else 1."""
    seq_len: int = 256
    """Tokens of a sequence (train), or held in the cache before the first new one (decode)."""
    tokens: tuple[int, ...] = ()
    """moe, kernels: tokens at once (default 1 16 256 4096, and 1 256 4096 65536); attention, serving: cache lengths
    (default 128 512 2048, and 128 1024 4096)."""
    lengths: tuple[int, ...] = ()
    """kernels: cache lengths of a decode (default 512 8192 32768)."""
    backends: tuple[Literal["auto", "masked", "loop", "grouped", "gather", "triton"], ...] = ("auto",)
    """train: back ends of the experts, each measured."""
    compiled: bool | None = None
    """train, decode: a row under torch.compile too. Default: in decode, which it makes several times faster."""
    seconds: float = 2.0
    """For each program measured."""
    json: Flag[bool] = False
    """Print the result as one JSON object."""
    folder: Path | None = None
    """Keep the result in this folder, one JSON file with where it comes from, and the table of all that are there."""

    def __call__(self) -> None:
        from moemla import bench

        require(
            0 <= self.seconds < math.inf, "seconds", self.seconds, "must be a number, 0 (the fewest passes) or more"
        )
        if self.what == "train":
            from moemla.devices import keep_freed_memory

            keep_freed_memory()  # as `moemla train` does; both sides of the bench have it
        result = bench.run(**{name: value for name, value in vars(self).items() if name not in ("json", "folder")})
        if self.folder is not None:
            from moemla import results

            print(f"kept in {results.write(result, self.folder)}", file=sys.stderr)
            results.write_table(results.load(self.folder, result.experiment, result.settings["scale"]), self.folder)
        if self.json:
            print_json({"settings": result.settings, "measures": result.measures})
            return
        table(result.measures["rows"])


def table(rows: list[dict]) -> None:
    """Prints the rows of a bench, a block for each case; * marks its fastest program."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["case"]] = min(best.get(row["case"], math.inf), row["seconds"])
    shown = None
    for row in rows:
        seconds, limit = row["seconds"], row["limit"]
        if row["case"] != shown:
            shown = row["case"]
            print(f"{shown:32}        ms  spread    tokens/s  limit, ms  binds")
        mark = "*" if seconds == best[shown] else " "
        print(
            f"  {mark} {row['program']:28} {1e3 * seconds:9.3f}  {row['spread']:6.0%}  {row['tokens'] / seconds:10,.0f}"
            f"  {1e3 * limit:9.3f}  {row['binds']}"
        )
