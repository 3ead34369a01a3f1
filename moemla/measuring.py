"""How long programs take, and how long they would have to take.

A limit is the largest of three times: the matrix products at the rate of one large product, the bytes at the rate of a
copy of that size, the operations at what starting one costs. Whichever is largest binds; what a program takes beyond
it could still be saved. Limits are the best that was seen; times are medians of interleaved rounds, so that a
neighbour who wakes up disturbs all alike, and are taken again where they scatter. Built in chapter 14.
"""

import math
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CALM, ATTEMPTS = 0.15, 3  # a case whose times scatter more is measured again; the calmest attempt counts
SAMPLE = 2e-3  # seconds that one sample lasts at least: shorter programs are repeated in it


@dataclass(frozen=True)
class Row:
    """One measured program.

    `seconds` is the median of one call and `spread` half the distance of the quartiles over it; `limit` the seconds
    that `binds` ("products", "bytes" or "operations") would take alone; `peak_bytes` the most that was allocated on a
    GPU meanwhile. `tokens_per_second` counts what `tokens` says.
    """

    case: str
    program: str
    tokens: int
    seconds: float
    spread: float
    rounds: int
    limit: float | None = None
    binds: str | None = None
    peak_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens over seconds."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Limits:
    """What this machine does when it does one thing only, in one number type.

    products: FLOP/s of a large matrix product; operation: seconds to start a small operation from Python.
    """

    device: str
    dtype: str
    products: float
    operation: float

    def bind(self, flops: float, moved: float, operations: float) -> tuple[float, str]:
        """(seconds, which) of the limit that takes longest for so much work."""
        times = {
            "products": flops / self.products,
            "bytes": moved / copy_rate(self.device, moved),
            "operations": operations * self.operation,
        }
        binds = max(times, key=times.__getitem__)
        return times[binds], binds


def limits(device: torch.device | str, dtype: torch.dtype) -> Limits:
    """Measures `Limits` here and now."""
    small = torch.zeros(8, device=device, dtype=dtype)
    with torch.inference_mode():
        (times,) = interleaved({"add": lambda: small.add(1)}, device, seconds=0.3).values()
    return Limits(str(device), str(dtype).removeprefix("torch."), matmul_rate(device, dtype), min(times))


@cache
def _copy_rate(device: str, power: int) -> float:
    source = torch.zeros(2**power // 4, device=device)
    target = torch.empty_like(source)
    (times,) = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.3).values()
    return 2 * source.nbytes / min(times)


def copy_rate(device: torch.device | str, moved: float) -> float:
    """Bytes read and written per second by a copy that moves about `moved` bytes.

    Measured once for each power of two from 64 KiB to 1 GiB: small sets live in a cache.
    """
    power = min(30, max(16, round(moved).bit_length() - 1))
    return _copy_rate(str(device), power - 1)


def interleaved(
    programs: dict[str, Callable[[], Any]], device: torch.device | str, seconds: float = 2.0, rounds: int = 5
) -> dict[str, list[float]]:
    """Seconds of one call of each program, in rounds of one sample each.

    At least `rounds`, and for about `seconds` a program. Two calls each come first and are not counted.
    """

    def sample(program: Callable, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            program()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, program in programs.items():
        sample(program, 1)
        repeats[name] = max(1, min(10_000, round(SAMPLE / max(1e-9, sample(program, 1)))))
    times: dict[str, list[float]] = {name: [] for name in programs}
    begin, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - begin < seconds * len(programs):
        for name, program in programs.items():
            times[name].append(sample(program, repeats[name]))
        done += 1
    return times


class Traffic(TorchDispatchMode):
    """Counts the `operations` that compute something, and the bytes that each reads and writes, `moved`.

    Views are free. Of what is broadcast the numbers that there are count; what is only made is written, not read.
    """

    def __init__(self):
        super().__init__()
        self.operations = self.moved = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "unsafe_view" not in function.name():  # that is one, and says it is not
            made = any(word in function.name() for word in ("new_", "_like", "empty"))
            self.operations += 1
            self.moved += 0 if "empty" in function.name() else sum(map(_numbers, tree_iter(result)))
            self.moved += 0 if made else sum(map(_numbers, tree_iter(args)))
        return result


def _numbers(value: Any) -> int:
    """Bytes of a tensor, each number once; 0 for anything else."""
    if not isinstance(value, Tensor):
        return 0
    axes = zip(value.shape, value.stride(), strict=True)
    return value.element_size() * math.prod(size for size, stride in axes if stride)


def traffic(program: Callable[[], Any]) -> tuple[int, int]:
    """(operations, bytes read and written) of one call."""
    with Traffic() as counted:
        program()
    return counted.operations, counted.moved


def operations(program: Callable[[], Any]) -> int:
    """How many operations one call starts."""
    return traffic(program)[0]


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside the block: `now`, and `peak`, the most that lived at once. Built in chapter 13.

    A storage counts from the operation that makes it until nobody holds it, a graph of autograd included; tensors from
    outside count nothing, and neither does what a kernel takes and gives back within one operation.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **kwargs)
        for storage in _storages(result):
            key = storage._cdata
            if key not in before and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += self._sizes[key]
                weakref.finalize(storage, self._gone, key).atexit = False
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def restart(self) -> None:
        """From here on `peak` is that of what follows."""
        self.peak = self.now


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Work:
    """The least a program has to do: floating-point operations, and bytes to read and write."""

    flops: float
    moved: float


def measure(
    case: str,
    programs: dict[str, Callable],
    work: Work | dict[str, Work],
    tokens: int,
    machine: Limits,
    seconds: float,
    replayed: dict[str, Callable] | None = None,
) -> list[Row]:
    """Times programs against each other and each against its limit.

    `work` is the same for all, or given by name; `tokens` is what one call handles. `replayed`: what is timed in the
    programs' place, by name; a replay of a graph starts no operations, and its peak is that of the program.
    """
    replayed = programs if replayed is None else replayed
    attempts = []
    for _ in range(ATTEMPTS):
        timed = interleaved(replayed, machine.device, seconds)
        spreads = {name: _spread(times) for name, times in timed.items()}
        attempts.append((max(spreads.values()), timed, spreads))
        if attempts[-1][0] < CALM:
            break
    _, timed, spreads = min(attempts, key=lambda attempt: attempt[0])
    rows = []
    for name, times in timed.items():
        need = work[name] if isinstance(work, dict) else work
        started = operations(programs[name]) if replayed[name] is programs[name] else 0
        limit, binds = machine.bind(need.flops, need.moved, started)
        peak = _peak(programs[name], machine.device)
        rows.append(Row(case, name, tokens, statistics.median(times), spreads[name], len(times), limit, binds, peak))
    return rows


def _peak(program: Callable[[], Any], device: str) -> int | None:
    """Bytes of a GPU that are allocated at most while a program runs; None on a CPU."""
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    program()
    return torch.cuda.max_memory_allocated(device)


def _spread(times: list[float]) -> float:
    low, median, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / median


def matmul_rate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, size: int | None = None
) -> float:
    """FLOP/s of a square matrix product on this machine, the best of several. Built in chapter 13."""
    size = size or (1024 if torch.device(device).type == "cpu" else 8192)
    random = torch.Generator(device).manual_seed(0)  # its own, so that measuring does not move dropout's
    a = torch.randn(size, size, device=device, dtype=dtype, generator=random)

    def seconds() -> float:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    return 2 * size**3 / min(seconds() for _ in range(8))
