"""Chapters 2 and 3: what attention may see, what its cache must not change, and what it keeps and copies.

`layer(x)` is (B, T, D) -> (B, T, D). `start(rows, max_len)` gives `(step, cache)`: `step(x)` takes the next tokens
(B, T, D) and remembers them, `cache` is the object that holds them. `step(x, lengths)` says how many of each row's
tokens are real, where a layer can be told.
"""

from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moemla.checks.compare import CheckFailed, check, gradients, normal, require, same

SPLITS = ((1,), (1, 1), (2, 1), (1, 2), (1,) * 9, (3, 1, 4, 1), (7, 1, 3, 1))  # prompts and steps, the smallest first


def no_later_slope(out: Tensor, x: Tensor) -> None:
    """No out[:, i] has a slope to an x[:, j] with j > i, not even a small one, and each has one to its own."""
    require(out.shape[:2] == x.shape[:2], f"output {tuple(out.shape)} for x {tuple(x.shape)}")
    for i in range(x.shape[1]):
        (slope,) = gradients(out[:, i], [x])
        size = slope.abs().amax((0, 2))  # (T,)
        if size[i + 1 :].any():
            later = i + 1 + int(size[i + 1 :].argmax())
            raise CheckFailed(
                f"output {i} sees input {later}, which comes later: slope {size[later]:.2g} with x {tuple(x.shape)}"
            )
        require(size[i] > 0, f"output {i} does not see its own input: no slope with x {tuple(x.shape)}")


@check
def causal(layer: Callable, width: int, rows: int = 2, tokens: int = 9) -> None:
    """No output depends on a later input, and each depends on its own."""
    for steps in range(1, tokens + 1):
        x = normal(rows, steps, width).requires_grad_()
        no_later_slope(layer(x), x)


@check
def past_is_a_set(layer: Callable, width: int, rows: int = 2, tokens: int = 8) -> None:
    """Without positions the last output is the same in whatever order the earlier tokens come."""
    for steps in range(3, tokens + 1):
        x, past = normal(rows, steps, width), steps - 1
        for order in (torch.arange(past).flip(0), torch.randperm(past)):
            moved = layer(x[:, [*order.tolist(), past]])[:, -1]
            same(moved, layer(x)[:, -1], f"last output with the past of x {tuple(x.shape)} in order {order.tolist()}")


@check
def rows_apart(layer: Callable, width: int, rows: int = 3, tokens: int = 5) -> None:
    """The rows of a batch do not meet: each gives what it gives alone."""
    for count, steps in ((2, 1), (2, 2), (rows, tokens)):
        x = normal(count, steps, width)
        alone = torch.cat([layer(row[None]) for row in x])
        same(layer(x), alone, f"x {tuple(x.shape)} against its rows one by one")


@check
@torch.no_grad()
def steps_equal_one_pass(layer: Callable, start: Callable, width: int, rows: int = 2) -> None:
    """A prompt and then steps, of one token and of several, give what one pass without a cache gives."""
    for split in SPLITS:
        x, (step, _) = normal(rows, sum(split), width), start(rows, 12)
        out, seen = layer(x), 0
        for part in x.split(split, dim=1):
            new, steps = step(part), part.shape[1]
            what = f"{steps} token{'s' * (steps > 1)} after {seen} cached (steps {list(split)})"
            same(new, out[:, seen : seen + steps], what)
            seen += steps


@check
@torch.no_grad()
def unequal_rows(layer: Callable, start: Callable, width: int) -> None:
    """Prompts of different lengths, padded on the right, then steps: each row gives what it gives alone."""
    for lengths in ((2, 1), (1, 4, 2)):
        longest, more = max(lengths), 3
        step, _ = start(len(lengths), longest + more)
        prompt, new = normal(len(lengths), longest, width), normal(len(lengths), more, width)
        out = [step(prompt, lengths), *(step(part) for part in new.split(1, dim=1))]
        for row, length in enumerate(lengths):
            actual = torch.cat((out[0][row, :length], *(part[row] for part in out[1:])))
            wanted = layer(torch.cat((prompt[row, :length], new[row]))[None])[0]
            same(actual, wanted, f"row {row} of prompts of {list(lengths)} tokens and {more} steps")


@check
@torch.no_grad()
def refuses_when_full(start: Callable, width: int, rows: int = 2, max_len: int = 9) -> dict[str, str]:
    """A token more than a cache has room for is a ValueError, and the cache holds what it held."""
    step, cache = start(rows, max_len)
    step(normal(rows, max_len, width))
    message = _refused(step, normal(rows, 1, width), f"a cache of {max_len} tokens took token {max_len + 1}")
    length = getattr(cache, "length", max_len)
    require(length == max_len, f"a full cache of {max_len} tokens says {length} after it refused one")
    return {"message": message}


@check
@torch.no_grad()
def refuses_other_rows(layer: Callable, start: Callable, width: int) -> dict[str, str]:
    """One row for a cache of two is a ValueError, not a broadcast, and the cache can go on."""
    x, (step, _) = normal(2, 5, width), start(2, 9)
    step(x[:, :4])
    message = _refused(step, x[:1, 4:], "a cache of 2 rows took a batch of 1")
    same(step(x[:, 4:]), layer(x)[:, 4:], "the step after a refused batch")
    return {"message": message}


def _refused(step: Callable, x: Tensor, otherwise: str) -> str:
    try:
        step(x)
    except ValueError as error:
        return str(error)
    raise CheckFailed(f"{otherwise}: x {tuple(x.shape)} without a ValueError")


def bytes_of(cache: object) -> int:
    """Bytes of all floating-point tensors that an object holds at any depth, without parameters; a view is its storage.

    Tensors of whole numbers say which tokens these are, and are left out.
    """
    todo, done, storages = [cache], {}, {}
    while todo:
        thing = todo.pop()
        if id(thing) in done or isinstance(thing, (type, FunctionType, MethodType, ModuleType, nn.Parameter)):
            continue
        done[id(thing)] = thing
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes() if thing.is_floating_point() else 0
        elif isinstance(thing, dict):
            todo += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            todo += thing
        else:
            todo += getattr(thing, "__dict__", {}).values()
    return sum(storages.values())


@check
@torch.no_grad()
def bytes_held(start: Callable, width: int, numbers: int, rows: int = 2, max_len: int = 8) -> dict[str, int]:
    """A full cache holds `numbers` floating-point numbers a token, no more; returns {"bytes": all of it}."""
    step, cache = start(rows, max_len)
    x = normal(rows, max_len, width)
    for part in x.split(1, dim=1):
        step(part)
    held, wanted = bytes_of(cache), rows * max_len * numbers * x.element_size()
    require(
        held == wanted,
        f"{held} bytes held for {rows} rows of {max_len} tokens in float64: {held / (8 * rows * max_len):g} numbers a "
        f"token, not {numbers}",
    )
    return {"bytes": held}


class Made(TorchDispatchMode):
    """The largest tensor that is made: no view, and nothing that is written in place."""

    def __init__(self):
        super().__init__()
        self.largest, self.shape = 0, ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in old and t.numel() > self.largest:
                self.largest, self.shape = t.numel(), tuple(t.shape)
        return out


@check
@torch.no_grad()
def copies_no_past(start: Callable, width: int, numbers: int, rows: int = 2, past: int = 400) -> dict[str, int]:
    """A step makes no tensor as large as `numbers` numbers for each token held: nothing is rebuilt or broadcast.

    `past` must be so long that this is more than the scores and the weights of a layer. Returns {"largest": numbers}.
    """
    step, _ = start(rows, past + 2)
    x = normal(rows, past + 2, width)
    for part in x[:, :-1].split([past, 1], dim=1):
        step(part)
    with Made() as made:
        step(x[:, -1:])
    copy = rows * numbers * past
    require(
        made.largest < copy,
        f"a step with {past + 1} tokens cached made a tensor {made.shape}: {made.largest / copy:.2g} times the "
        f"{rows} x {past} x {numbers} numbers held",
    )
    return {"largest": made.largest}


@check
@torch.no_grad()
def keys_lie_in_the_latent(keys: Callable, width: int, latent_dim: int) -> None:
    """keys (N, D) -> (N, H K) of all heads lie in latent_dim directions, all of them used."""
    made = keys(normal(5 * latent_dim, width))
    rank = int(torch.linalg.matrix_rank(made - made.mean(0)))
    require(rank == latent_dim, f"keys of {len(made)} tokens lie in {rank} directions, not in {latent_dim}")
