"""How checks compare, and how they say what they found: in one line, with the input that shows it."""

import functools
import statistics
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from moemla.measuring import interleaved

TOLERANCE = 1e-11  # of the larger of 1 and the largest number wanted; all is float64
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


def same_with_gradients(
    actual: Tensor, wanted: Tensor, ours: dict[str, Tensor], what: str, theirs: dict[str, Tensor] | None = None
) -> None:
    """`same` for two outputs and for the gradient of each leaf by name; `theirs` where the oracle has its own."""
    same(actual, wanted, what)
    theirs = ours if theirs is None else theirs
    upstream = torch.randn_like(wanted)
    pairs = gradients(actual, ours.values(), upstream), gradients(wanted, [theirs[name] for name in ours], upstream)
    for name, mine, right in zip(ours, *pairs, strict=True):
        same(mine, right, f"{what}, gradient of {name}")


@check
def equals_oracle(layer: nn.Module, oracle: nn.Module, width: int, vocab_size: int | None = None) -> None:
    """The oracle's weights are copied into the layer: outputs and gradients are then equal, by parameters' names.

    Inputs are (B, T, width), or tokens (B, T) below vocab_size. The layer keeps the weights.
    """
    names, wanted = set(layer.state_dict()), set(oracle.state_dict())
    require(
        names == wanted,
        f"weights: missing {sorted(wanted - names)}, not the oracle's {sorted(names - wanted)}",
    )
    for name, weight in oracle.state_dict().items():
        shape, right = tuple(layer.state_dict()[name].shape), tuple(weight.shape)
        require(shape == right, f"{name} {shape}: the oracle's is {right}")
    layer.load_state_dict(oracle.state_dict())
    for rows, tokens in SIZES:
        if vocab_size is None:
            x = normal(rows, tokens, width).requires_grad_()
            inputs, kind = {"the input": x}, f"x {tuple(x.shape)}"
        else:
            x = torch.randint(vocab_size, (rows, tokens))
            inputs, kind = {}, f"tokens {x.tolist()}"
        ours, theirs = dict(layer.named_parameters()) | inputs, dict(oracle.named_parameters()) | inputs
        same_with_gradients(layer(x), oracle(x), ours, f"output for {kind}", theirs)


def time_ratio(ours: Callable, theirs: Callable, seconds: float = 0.1) -> dict[str, float]:
    """{"time": ours over theirs}: medians of interleaved rounds of calls without arguments, on the CPU."""
    times = interleaved({"ours": ours, "theirs": theirs}, "cpu", seconds)
    return {"time": statistics.median(times["ours"]) / statistics.median(times["theirs"])}
