"""What the checks of a chapter are run on, whoever wrote it: attention, a rotation, a router, experts, rules.

A subject holds callables of one form, so that the same checks serve the library's layer, the chapter's and a reader's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from moemla.checks.compare import CheckFailed, Weights, copy_weights, equals_oracle, normal, time_ratio
from moemla.checks.experts import gates_are_shares, padding_changes_nothing
from moemla.checks.weights import fit_weights, matched_by_shape

LOUD = 0.2  # standard deviation of weights: as the library draws experts, a wrong one would hardly show
BIAS = "router.bias"  # the buffer that balances; what else is a buffer is not drawn


@dataclass
class Layer:
    """A layer, and the library's that it has to equal: make(**sizes) gives one, and so does each of the oracles.

    `sizes` are those of every check but the time's, which are `timed`.
    """

    name: str
    make: Callable[..., nn.Module]
    oracles: tuple[Callable[..., nn.Module], ...] = ()
    width: int = 32
    sizes: dict = field(default_factory=dict)
    timed: dict = field(default_factory=dict)

    @cached_property
    def oracle(self) -> Callable[..., nn.Module]:
        """The first of the oracles whose weights fit and whose outputs are equal; else whose weights fit; else first.

        With biases or without, with sigmoid scores or softmax: each is right.
        """
        fitting = [oracle for oracle in self.oracles if _holds(self.pair, oracle)]
        equal = (oracle for oracle in fitting if _holds(self.equals, "outputs", oracle))
        return next(equal, (*fitting, *self.oracles)[0])

    def pair(self, oracle: Callable | None = None, **changes) -> tuple[nn.Module, nn.Module, Weights]:
        """A new layer, a new oracle, and which weight is which."""
        sizes = self.sizes | changes
        ours, theirs = self.make(**sizes), _loud((oracle or self.oracle)(**sizes))
        weights = fit_weights(ours, theirs)
        for name, buffer in theirs.named_buffers():
            if name == BIAS and name not in weights:
                buffer.zero_()  # the layer has none
        return ours, theirs, weights

    def equals(self, only: str, oracle: Callable | None = None, **changes) -> dict[str, str]:
        """Outputs, or gradients, are the oracle's, with its weights; returns which of them were told by shape."""
        ours, theirs, weights = self.pair(oracle, **changes)
        by_shape = ", ".join(matched_by_shape(weights))
        try:
            equals_oracle(ours, theirs, self.width, weights=weights, only=(only,))
        except CheckFailed as failed:
            raise CheckFailed(f"{failed}; weights by shape: {by_shape}" if by_shape else str(failed)) from None
        return {"weights by shape": by_shape} if by_shape and only == "outputs" else {}

    def filled(self, **changes) -> nn.Module:
        """A layer with the oracle's weights; with its own where there is none, or they do not fit."""
        try:
            layer, theirs, weights = self.pair(**changes)
        except (CheckFailed, IndexError):  # the lines of outputs and gradients say why
            return self.make(**self.sizes | changes)
        copy_weights(layer, theirs, weights)
        return layer

    def time(self) -> dict[str, float]:
        """A pass and its gradients, beside the oracle's."""
        layers = self.pair(**self.timed)[:2]
        with torch.random.fork_rng(devices=()):
            x = normal(2, 128, self.timed.get("d_model", self.width))
        return time_ratio(*(partial(there_and_back, layer, x) for layer in layers))


@dataclass
class Attention(Layer):
    """A layer of chapters 2 to 4 and one way to go on from what it keeps: start(layer) is what the checks call start.

    numbers: kept of a token; None where storage is not made once. absorbed: numbers that a step may not copy. ragged:
    whether a step can be told the lengths of rows.
    """

    start: Callable | None = None
    numbers: int | None = None
    absorbed: int | None = None
    ragged: bool = False

    @cached_property
    def rotary(self) -> bool:
        """Whether the layer keeps a rotation."""
        return getattr(self.make(**self.sizes), "rope", None) is not None

    def going(self) -> tuple[nn.Module, Callable]:
        """(layer, start), as the checks of steps take them."""
        layer = self.filled()
        return layer, self.start(layer)


@dataclass
class Mixture(Layer):
    """A layer of chapters 6 and 7. padded: whether it takes `valid`; shared: whether it has shared experts."""

    padded: bool = False
    shared: bool = False

    def padding(self) -> None:
        """Padding changes nothing; without shared experts, which answer to it, its output is zero too."""
        padding_changes_nothing(self.filled(), self.width, shared=self.shared)
        if self.shared:
            padding_changes_nothing(self.filled(n_shared=0), self.width)


@dataclass
class Rotation:
    """make(layout) gives rope(x, positions)."""

    name: str
    make: Callable[[str], Callable]
    layouts: tuple[str, ...] = ("halves", "interleaved")


@dataclass
class Choice:
    """A router: call(logits, bias, top_k) gives (index, gate). biased: whether it takes a bias at all."""

    name: str
    call: Callable
    biased: bool = True

    @cached_property
    def scores(self) -> str:
        """ "softmax" where the gates are right with it, and not with the sigmoid."""
        right = (scores for scores in ("sigmoid", "softmax") if _holds(gates_are_shares, self.call, scores, False))
        return next(right, "sigmoid")


@dataclass
class Function:
    """A function, called as its check says; `key` is the library's name of a rule."""

    name: str
    call: Callable
    key: str = ""


@dataclass
class Balancing:
    """A balancer: call(bias, parts, top_k, rate) gives the bias after a step; make(router) one for the sign rule."""

    name: str
    call: Callable
    make: Callable


def _loud(oracle: nn.Module) -> nn.Module:
    """Weights, and a balancing bias, that show."""
    tensors = dict(oracle.named_parameters()) | dict(oracle.named_buffers())
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.default_generator.manual_seed(1)
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter) or name == BIAS:
                tensor.copy_(LOUD * torch.randn(tensor.shape, dtype=tensor.dtype))
    return oracle


def there_and_back(call: Callable, *tensors: Tensor) -> None:
    """A pass and its gradients."""
    call(*tensors).sum().backward()


def _holds(check: Callable, *subjects) -> bool:
    try:
        check(*subjects)
    except Exception:
        return False
    return True
