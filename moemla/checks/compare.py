"""How checks compare, and how they say what they found: in one line, with the input that shows it."""

import functools
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moemla.measuring import interleaved

TOLERANCE = 1e-11  # of the larger of 1 and the largest number wanted; all is float64
Weights = dict[str, tuple[str, Callable[[Tensor], Tensor]]]  # a layer's: the oracle's name, and the view of it
SIZES = ((1, 1), (1, 2), (2, 2), (2, 9))  # rows and tokens, the smallest first


class CheckFailed(AssertionError):
    """What is wrong with which input, in one line."""


def check(function: Callable) -> Callable:
    """Gives a check its `seed`: what it draws depends on nothing else, and torch's own generator stays as it was."""

    @functools.wraps(function)
    def seeded(*args, seed: int = 0, **sizes):
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            try:
                return function(*args, **sizes)
            except CheckFailed as failed:
                raise CheckFailed(f"{failed} (seed {seed})") from None

    seeded.is_check = True
    return seeded


def require(holds: bool | Tensor, message: str) -> None:
    """CheckFailed with the message unless it holds."""
    if not holds:
        raise CheckFailed(message)


def normal(*shape: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(shape, dtype=torch.float64)


@contextmanager
def in_float32() -> Iterator[None]:
    """Float32 is the type of what a function makes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def same(actual: Tensor, wanted: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """CheckFailed with shape, place and largest difference unless two tensors are equal; NaN equals nothing."""
    require(actual.shape == wanted.shape, f"{what}: shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}")
    if not wanted.numel():
        return
    apart = (actual.detach() - wanted.detach()).abs().nan_to_num(torch.inf)
    if not apart.max() <= tolerance * max(1.0, wanted.detach().abs().max().item()):
        place = tuple(int(i) for i in torch.unravel_index(apart.argmax(), apart.shape))
        ours, theirs = actual[place].item(), wanted[place].item()
        narrow = "" if actual.dtype == wanted.dtype else f", in {actual.dtype}".replace("torch.", "")
        where = f" at {list(place)}" if place else ""
        raise CheckFailed(
            f"{what}: {ours:.6g}{where}, wanted {theirs:.6g} (largest difference {apart.max():.2g}{narrow})"
        )


def gradients(out: Tensor, leaves: Iterable[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    """Gradients of out's sum, weighed by `upstream`; zeros where there is no way to a leaf."""
    leaves = list(leaves)
    if not out.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    upstream = torch.ones_like(out) if upstream is None else upstream
    slopes = torch.autograd.grad(out, leaves, upstream, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(slopes, leaves, strict=True)]


def same_with_gradients(actual: Tensor, wanted: Tensor, leaves: dict[str, Tensor], what: str) -> None:
    """`same` for two outputs, and for the gradients of the leaves that both come from, by name."""
    same(actual, wanted, what)
    upstream = torch.randn_like(wanted)
    pairs = gradients(actual, leaves.values(), upstream), gradients(wanted, leaves.values(), upstream)
    for name, mine, right in zip(leaves, *pairs, strict=True):
        same(mine, right, f"{what}, gradient of {name}")


def by_name(layer: nn.Module, oracle: nn.Module) -> Weights:
    """Each weight of a layer is the oracle's of the same name and shape; CheckFailed where one is missing or more."""
    ours, theirs = layer.state_dict(), oracle.state_dict()
    missing, more = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    require(not missing and not more, f"weights: missing {missing}, not the oracle's {more}")
    for name, weight in theirs.items():
        shape, right = tuple(ours[name].shape), tuple(weight.shape)
        require(shape == right, f"{name} {shape}: the oracle's is {right}")
    return {name: (name, lambda weight: weight) for name in ours}


@torch.no_grad()
def copy_weights(layer: nn.Module, oracle: nn.Module, weights: Weights) -> None:
    """Writes the oracle's weights into the layer."""
    ours, theirs = layer.state_dict(), oracle.state_dict()
    for name, (source, view) in weights.items():
        ours[name].copy_(view(theirs[source]))


@check
def equals_oracle(
    layer: nn.Module,
    oracle: nn.Module,
    width: int,
    vocab_size: int | None = None,
    weights: Weights | None = None,
    only: tuple[str, ...] = ("outputs", "gradients"),
) -> None:
    """The oracle's weights are copied into the layer: outputs and gradients are then equal, by parameters' names.

    Inputs are (B, T, width), or tokens (B, T) below vocab_size. The layer keeps the weights. `weights` says which
    weight of the layer is which of the oracle's, and seen in which way; without it they have the same names.
    """
    weights = by_name(layer, oracle) if weights is None else weights
    copy_weights(layer, oracle, weights)
    ours, theirs = dict(layer.named_parameters()), dict(oracle.named_parameters())
    for rows, tokens in SIZES:
        if vocab_size is None:
            x = normal(rows, tokens, width).requires_grad_()
            kind = f"output for x {tuple(x.shape)}"
        else:
            x = torch.randint(vocab_size, (rows, tokens))
            kind = f"output for tokens {x.tolist()}"
        actual, wanted = layer(x), oracle(x)
        require(actual.shape == wanted.shape, f"{kind}: shape {tuple(actual.shape)}, wanted {tuple(wanted.shape)}")
        if "outputs" in only:
            same(actual, wanted, kind)
        if "gradients" not in only:
            continue
        upstream = torch.randn_like(wanted)
        inputs = [x] if vocab_size is None else []
        sources = [theirs[weights[name][0]] for name in ours]
        mine = gradients(actual, [*ours.values(), *inputs], upstream)
        right = gradients(wanted, [*sources, *inputs], upstream)
        views = [*(weights[name][1] for name in ours), *(lambda slope: slope for _ in inputs)]
        for name, slope, view, other in zip([*ours, "the input"], mine, views, right, strict=False):
            same(slope, view(other), f"{kind}, gradient of {name}")


def time_ratio(ours: Callable, theirs: Callable, seconds: float = 0.1) -> dict[str, float]:
    """{"time": ours over theirs}: medians of interleaved rounds of calls without arguments, on the CPU."""
    times = interleaved({"ours": ours, "theirs": theirs}, "cpu", seconds)
    return {"time": statistics.median(times["ours"]) / statistics.median(times["theirs"])}
