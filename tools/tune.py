"""Times the kernels with other tile sizes, warps and stages than those of moemla.kernels.tiling: on a GPU.

python -m tools.tune [--out FILE] [--only NAME ...] [--profile]

Each choice is compiled first, by several processes, into Triton's cache; then all are timed one after another as CUDA
graphs. The best of each kernel is printed beside what `tiling` says now; all go to FILE as JSON.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

WIDTHS = {"narrow": (512, 32), "wide": (1024, 1024)}  # D and F: size M matched, size XL as printed
TOKENS = {"narrow": 65536, "wide": 16384}
SLOTS = 8192  # of a decode
FACTORY = dict(device="cuda", dtype=torch.bfloat16)


def product_of(**options: tuple) -> list[dict]:
    """All combinations."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


STAGES = dict(num_warps=(4, 8), num_stages=(2, 3, 4))
WIDE = dict(num_warps=(4, 8), num_stages=(3, 4))
CHOICES = {  # case: (function of tiling, choices)
    "router: route": ("route", product_of(BLOCK_N=(4, 8, 16, 32), num_warps=(1, 2, 4))),
    "latent decode: latent_decode": (
        "latent_decode",
        product_of(BLOCK_S=(64, 128), num_warps=(4, 8), num_stages=(1, 2, 3), programs=(66, 132, 264)),
    ),
    "joint decode: joint_decode": (
        "joint_decode",
        product_of(BLOCK_S=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3), programs=(132, 264)),
    ),
    "forward narrow: narrow": ("narrow", product_of(BLOCK_D=(32, 64, 128), rows=(64, 128), **WIDE)),
    "forward narrow: sum_slots": ("sum_slots", product_of(BLOCK_N=(2, 4, 8), BLOCK_D=(256, 512), num_warps=(4, 8))),
    "backward narrow: hidden_backward": (
        "hidden_backward",
        product_of(BLOCK_D=(64, 128), rows=(64, 128), **WIDE),
    ),
    "backward narrow: product": ("product", product_of(BLOCK_O=(64, 128, 256), **STAGES)),
    "backward narrow: weight_gradient": (
        "weight_gradient",
        product_of(BLOCK_M=(64, 128), wider=(64, 128, 256), num_warps=(4, 8), num_stages=(3, 4)),
    ),
    "forward wide: product": ("product", product_of(BLOCK_I=(32, 64), BLOCK_O=(128, 256), **WIDE)),
    "backward wide: hidden_backward": ("hidden_backward", product_of(BLOCK_F=(64, 128), BLOCK_D=(32, 64), **WIDE)),
    "backward wide: weight_gradient": (
        "weight_gradient",
        product_of(BLOCK_M=(32, 64), BLOCK_A=(64, 128), BLOCK_B=(128, 256), num_warps=(4, 8), num_stages=(3, 4)),
    ),
}  # fmt: skip


def program(case: str) -> Callable[[], object]:
    """One call of the operator of a case, in FACTORY's type, on random numbers."""
    from moemla.kernels import decode, experts, routing

    torch.manual_seed(0)
    factory, device = FACTORY, FACTORY["device"]
    kind = case.partition(":")[0]
    if kind.endswith("decode"):
        batch, heads, width, rank, slots = 16, 8, 64, 256, SLOTS
        if kind == "joint decode":
            q, joint = torch.randn(batch, heads, rank + width, **factory), torch.randn(batch, slots, 320, **factory)
            return lambda: decode.joint_decode(q, joint, None, rank, 0.1)
        q, weight = torch.randn(batch, heads, width, **factory), torch.randn(heads * width, rank, **factory) / 16
        k, v = (torch.randn(batch, slots, rank, **factory) for _ in range(2))
        angle = torch.randn(slots, width // 2, device=device)
        return lambda: decode.latent_decode(q, k, v, weight, None, angle.cos(), angle.sin(), None, False, 0.1)
    if kind == "router":
        logits, bias = torch.randn(TOKENS["narrow"], 62, device=device), torch.zeros(62, device=device)
        return lambda: routing.route(logits, bias, None, 6, False, False, True, 1.0)
    way, size = kind.split()
    (d, f), n = WIDTHS[size], TOKENS[size]
    x, index = torch.randn(n, d, **factory), torch.rand(n, 62, device=device).topk(6).indices
    w_in, w_out = torch.randn(62, d, f, **factory) / d**0.5, torch.randn(62, f, d, **factory) / f**0.5
    gate, grad = torch.rand(n, 6, **factory), torch.randn(n, d, **factory)
    if way == "forward":
        return lambda: experts.routed_experts(x, w_in, w_out, index, gate, "gelu")
    _, z, *where = experts.routed_experts(x, w_in, w_out, index, gate, "gelu")
    return lambda: experts._grad(grad, x, w_in, w_out, gate, z, where, "gelu", [True] * 3)


@contextmanager
def changed(name: str, choice: dict) -> Iterator[None]:
    """With this choice in place of what `tiling` says; `rows`, `wider` and `programs` stand for what is not a tile."""
    from moemla.kernels import tiling

    kept = {key: getattr(tiling, key) for key in (name, "rows", "PROGRAMS")}
    tile = {key: value for key, value in choice.items() if key not in ("rows", "wider", "programs")}

    def chosen(*arguments):
        made = kept[name](*arguments) | tile
        if "wider" in choice:  # the side of the model's width, whichever it is
            _, n_a, n_b = arguments
            made["BLOCK_A" if n_a > n_b else "BLOCK_B"] = choice["wider"]
        return made

    try:
        setattr(tiling, name, chosen)
        if "rows" in choice:
            tiling.rows = lambda *arguments: choice["rows"]
        tiling.PROGRAMS = choice.get("programs", tiling.PROGRAMS)
        yield
    finally:
        for key, value in kept.items():
            setattr(tiling, key, value)


def compiled(work: tuple[str, str, dict]) -> str | None:
    """Compiles one choice by running it; what went wrong, or None. For a process of its own."""
    case, name, choice = work
    try:
        with changed(name, choice):
            program(case)()
            torch.cuda.synchronize()
    except Exception as error:  # no room, too many registers: other choices go on
        return repr(error)[:200]
    return None


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a replay of the call as a CUDA graph."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def tuned(only: list[str], workers: int) -> Iterator[list[dict]]:
    """The rows of one case after another: case, choice, milliseconds or what went wrong; {} is what `tiling` says."""
    cases = {case: CHOICES[case] for case in CHOICES if not only or any(part in case for part in only)}
    work = {case: [(case, name, choice) for choice in ({}, *choices)] for case, (name, choices) in cases.items()}
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        wrong = iter(pool.map(compiled, [one for each in work.values() for one in each], chunksize=1))
    for each in work.values():
        rows = []
        for case, name, choice in each:
            row = dict(case=case, choice=choice, problem=next(wrong))
            if row["problem"] is None:
                with changed(name, choice):
                    row["ms"] = milliseconds(program(case))
            rows.append(row)
        yield rows


def profile() -> str:
    """Where the time of each operator goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    said = []
    for kind in dict.fromkeys(case.partition(":")[0] for case in CHOICES):
        call = program(kind)
        call()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            for _ in range(5):
                call()
            torch.cuda.synchronize()
        said.append(f"{kind}, five calls")
        events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
        said += [f"  {e.self_device_time_total / 5:9.1f} us  {e.key[:90]}" for e in events if e.self_device_time_total]
    return "\n".join(said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no GPU here", file=sys.stderr)
        return 1
    if chosen.profile:
        print(profile(), flush=True)
        return 0
    rows = []
    for own in tuned(chosen.only, chosen.workers):
        rows += own
        if chosen.out:
            chosen.out.write_text(json.dumps(rows))
        timed = sorted((row for row in own if "ms" in row), key=lambda row: row["ms"])
        now = next((row["ms"] for row in timed if not row["choice"]), float("nan"))
        print(f"{own[0]['case']}: now {now:.4f} ms, {len(own) - len(timed)} of {len(own)} failed", flush=True)
        for row in timed[:4]:
            print(f"  {row['ms']:.4f}  {row['choice']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
