"""The router: a score for each expert, the chosen k, their gates, and how many tokens each expert got.

Two scores decide two things. The *biased* score picks the experts; the *plain* score weighs them. Algorithm 1 of the
paper uses the biased one for both (`bias_in_gate=True`); Wang et al. (arXiv 2408.15664), from whom the bias comes, keep
it out of the gate. Built in chapter 6.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moemla import kernels
from moemla.config import CHOICES, require, require_count
from moemla.devices import at_least_float32


@dataclass
class Routing:
    """What the router decided for N tokens.

    index (N, A): the chosen experts; gate (N, A): their weights, 0 for padding; probabilities (N, E): the plain scores,
    for auxiliary losses and for looking at; logits (N, E); valid (N,): False for padding, or None; counted: the counts,
    where they are known already; detached: True for one that is for looking at, without gradients.
    """

    index: Int[Tensor, "n a"]
    gate: Float[Tensor, "n a"]
    probabilities: Float[Tensor, "n e"]
    logits: Float[Tensor, "n e"]
    valid: Bool[Tensor, "n"] | None = None
    counted: Int[Tensor, "e"] | None = None
    detached: bool = False

    @property
    def counts(self) -> Int[Tensor, "e"]:
        """Tokens for each expert (E,), padding left out."""
        if self.counted is not None:
            return self.counted
        one = torch.ones_like(self.index)
        if self.valid is not None:
            one = one * self.valid[:, None]
        counts = torch.zeros(self.logits.shape[-1], dtype=torch.int64, device=self.index.device)
        return counts.scatter_add(0, self.index.flatten(), one.flatten())

    def detach(self) -> "Routing":
        """The same numbers without the pass that made them: for looking at."""
        gate, probabilities, logits = self.gate.detach(), self.probabilities.detach(), self.logits.detach()
        return Routing(self.index, gate, probabilities, logits, self.valid, self.counted, detached=True)


def route(
    logits: Float[Tensor, "n e"],
    bias: Float[Tensor, "e"],
    top_k: int,
    *,
    scores: str = "sigmoid",
    bias_in_gate: bool = False,
    renormalise: bool = True,
    routed_scale: float = 1.0,
    valid: Bool[Tensor, "n"] | None = None,
) -> Routing:
    """Top-k routing with a balancing bias (eqs. 1-2, Algorithm 1 lines 3-4). Built in chapter 6; the bias in chapter 8.

    With sigmoid scores the bias is added to the score, as in arXiv 2408.15664; with softmax to the logit, as in
    Algorithm 1. Rows where `valid` (N,) is False are padding: gate 0, not counted. ValueError if top_k is larger than
    E.
    """
    n_experts = logits.shape[-1]
    if not 1 <= top_k <= n_experts:
        raise ValueError(f"top_k={top_k}: must be between 1 and the number of experts, {n_experts}")
    if scores not in ("sigmoid", "softmax"):
        raise ValueError(f"scores={scores!r}: choose 'sigmoid' or 'softmax'")
    known = logits.dtype == bias.dtype == torch.float32 and not bias.requires_grad
    if known and kernels.enabled(logits, bias):
        from moemla.kernels.routing import route as in_one_pass

        gating = (scores == "softmax", bias_in_gate, renormalise, float(routed_scale))
        gate, index, plain, counts = in_one_pass(logits, bias, valid, top_k, *gating)
        return Routing(index, gate, plain, logits, valid, counts)
    if bias_in_gate:
        plain = _score(logits + bias, scores)
        biased = plain
    else:
        plain = _score(logits, scores)
        biased = plain + bias if scores == "sigmoid" else logits + bias
    index = biased.detach().topk(top_k, dim=-1).indices  # the choice itself has no gradient
    gate = plain.gather(-1, index)
    if renormalise:
        gate = gate / gate.sum(-1, keepdim=True).clamp(min=torch.finfo(gate.dtype).tiny)
    if routed_scale != 1:
        gate = gate * routed_scale
    if valid is not None:
        gate = gate * valid[:, None]
    return Routing(index, gate, plain, logits, valid)


def margin_histogram(
    scores: Float[Tensor, "n e"],
    bias: Float[Tensor, "e"],
    top_k: int,
    bins: int = 1000,
    valid: Bool[Tensor, "n"] | None = None,
) -> Int[Tensor, "e bins"]:
    """For each expert, how many tokens would have needed which bias to choose it: what the quantile rule asks.

    A token chooses e where score + bias is above its (k+1)-th largest. With scores in (0, 1) the bias it asks for lies
    in [min b - 1, max b + 1], which is cut into `bins`. Histograms of micro-batches and ranks add up. Zeros if k = E:
    then nothing is chosen. Built in chapter 8.
    """
    n_experts = len(bias)
    histogram = torch.zeros(n_experts * bins, dtype=torch.int64, device=scores.device)
    if top_k < n_experts:
        cutoff = (scores + bias).topk(top_k + 1, dim=-1).values[:, -1:]
        low, spread = bias.min() - 1, bias.max() - bias.min() + 2
        place = ((cutoff - scores - low) * (bins / spread)).long().clamp(0, bins - 1)
        place = place + bins * torch.arange(n_experts, device=scores.device)
        one = torch.ones_like(place) if valid is None else valid[:, None].expand_as(place).long()
        histogram = histogram.scatter_add(0, place.flatten(), one.flatten())
    return histogram.view(n_experts, bins)


def _score(logits: Tensor, scores: str) -> Tensor:
    return logits.sigmoid() if scores == "sigmoid" else logits.softmax(-1)


class Router(nn.Module):
    """W_g and the balancing bias b: (N, D) -> Routing.

    Both are float32 whatever the rest of the model is (float64 in a float64 model), and so is all that is computed from
    them: near 4 a 16-bit float has steps of 0.004 to 0.03, and a bias update of 0.001 would vanish. `bias` is a buffer:
    no gradient, but part of every checkpoint.

    `load` sums the counts of training passes until a balancer takes them, and `margins` the histograms, where it asked
    for them. Each process has its own, and they are no buffers: DDP overwrites buffers by those of rank 0. `last` is
    the routing of the last pass, detached; for losses see `record_routing`.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_experts: int,
        top_k: int,
        scores: str = "sigmoid",
        bias_in_gate: bool = False,
        renormalise: bool = True,
        routed_scale: float = 1.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dtype = torch.promote_types(torch.get_default_dtype() if dtype is None else dtype, torch.float32)
        self.top_k = top_k
        self.gating = dict(scores=scores, bias_in_gate=bias_in_gate, renormalise=renormalise, routed_scale=routed_scale)
        for name, value in (("d_model", d_model), ("n_experts", n_experts), ("top_k", top_k)):
            require_count(name, value)
        require(top_k <= n_experts, "top_k", top_k, f"must be at most n_experts={n_experts}")
        require(scores in CHOICES["scores"], "scores", scores, "choose 'sigmoid' or 'softmax'")
        require(0 < routed_scale < torch.inf, "routed_scale", routed_scale, "must be a finite number above 0")
        self.weight = nn.Parameter(torch.empty(n_experts, d_model, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("bias", torch.zeros(n_experts, device=device, dtype=dtype))
        self.load = torch.zeros(n_experts, device=device, dtype=torch.int64)
        self.margins: Tensor | None = None
        self.last: Routing | None = None
        self.recorded: list[Routing] | None = None  # the list of a `record_routing` that is open
        self.recorded_with_gradients = False

    def extra_repr(self) -> str:
        """Sizes and gating, for `print(model)`."""
        n_experts, d_model = self.weight.shape
        return ", ".join([f"{d_model} -> {self.top_k} of {n_experts}", *(f"{k}={v}" for k, v in self.gating.items())])

    def watch_margins(self, on: bool = True, bins: int = 1000) -> None:
        """Whether training passes also sum up `margin_histogram`.

        ValueError unless scores are sigmoid and the bias is for selection only: other scores have no fixed range.
        """
        scores, bias_in_gate = self.gating["scores"], self.gating["bias_in_gate"]
        right = "the quantile rule needs sigmoid scores and a bias for selection only"
        if on and (scores != "sigmoid" or bias_in_gate):
            raise ValueError(f"scores={scores!r}, bias_in_gate={bias_in_gate}: {right}")
        self.margins = self.load.new_zeros(len(self.bias), bins) if on else None

    def reset_parameters(self) -> None:
        """Weight, bias and counts as the constructor gives them."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)
        self.forget()

    def forget(self) -> None:
        """Sets the sums of the step back to zero."""
        self.load.zero_()
        if self.margins is not None:
            self.margins.zero_()

    def _follow(self, device: torch.device) -> None:
        """Brings the sums to the router's device. Nothing was counted on the meta device."""
        for name in ("load", "margins"):
            held = getattr(self, name)
            if held is not None and held.device != device:
                setattr(self, name, torch.zeros_like(held, device=device) if held.is_meta else held.to(device))

    def _apply(self, fn, recurse=True):
        super()._apply(at_least_float32(fn), recurse)
        self._follow(self.bias.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in (f"{prefix}weight", f"{prefix}bias"):  # assigned, a narrow one would take the wide one's place
            held = state_dict.get(name)
            if isinstance(held, Tensor) and held.is_floating_point() and held.element_size() < 4:
                state_dict[name] = held.float()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __getstate__(self):  # a copy or a pickle of the model leaves its passes, and their graphs, behind
        return self.__dict__ | {"last": None, "recorded": None}

    def forward(self, x: Float[Tensor, "*n d"], valid: Bool[Tensor, "*n"] | None = None) -> Routing:
        """x (..., D) -> Routing of its N rows. valid (...) is bool, False at padding, which takes no expert.

        ValueError for a `valid` of another shape or type.
        """
        flat = rearrange(x, "... d -> (...) d")
        if valid is not None:
            right = f"must be bool, of x's {tuple(x.shape[:-1])}: True at what is no padding"
            fits = valid.dtype == torch.bool and valid.shape == x.shape[:-1]
            require(fits, "valid", f"{valid.dtype} {tuple(valid.shape)}", right)
            valid = valid.flatten()
        # Wide even where someone has narrowed the weight behind the module's back, as FSDP's mixed precision does.
        wide = torch.promote_types(torch.promote_types(self.weight.dtype, self.bias.dtype), torch.float32)
        if self.weight.dtype.itemsize < 4 and not torch.compiler.is_compiling():
            warnings.warn(
                f"router.weight comes as {self.weight.dtype}: its products are {wide}, but the weight is rounded. "
                "With FSDP2 call fully_shard on each Router first, without a param_dtype",
                stacklevel=2,
            )
        kind = "cpu" if x.is_meta else x.device.type  # there is no autocast for meta tensors
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            logits = flat.to(wide) @ self.weight.to(wide).T
            routing = route(logits, self.bias.to(wide), self.top_k, valid=valid, **self.gating)
        if torch.compiler.is_exporting():  # a program has no sums, and what it shows are no numbers
            return routing
        # A pass that activation checkpointing repeats inside backward has been counted and shown already.
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.last = routing.detach()
            self._record(routing)
            if self.training and not logits.is_meta:
                self._count(self.last)
        return routing

    def _count(self, routing: Routing) -> None:
        if getattr(self, "_is_replica", False):  # nn.DataParallel's, which is thrown away with what it counted
            raise RuntimeError("nn.DataParallel loses the loads of its replicas; use DistributedDataParallel")
        if self.load.device != routing.index.device:  # moved by FSDP, which does not ask the module
            self._follow(routing.index.device)
        self.load += routing.counts
        if self.margins is not None:
            bins = self.margins.shape[1]
            self.margins += margin_histogram(routing.probabilities, self.bias, self.top_k, bins, routing.valid)

    def _record(self, routing: Routing) -> None:
        if self.recorded is None:
            return
        if self.recorded_with_gradients and not torch.is_grad_enabled():
            raise RuntimeError(
                "record_routing: a layer ran without gradients, so its auxiliary loss would have none; "
                "under activation checkpointing pass use_reentrant=False"
            )
        self.recorded.append(routing)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[list[Routing]]:
    """Collects the Routing of every pass of every router inside the block, with gradients: for auxiliary losses.

    In the order they ran; a pass that activation checkpointing repeats is there once. The graphs live as long as the
    list. A compiled model wants a block for each pass, or it is compiled again. RuntimeError for a block within a
    block, and where a layer runs without gradients though the block began with them (reentrant checkpointing): a loss
    on it would train nothing. Built in chapter 8.
    """
    routings: list[Routing] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if any(router.recorded is not None for router in routers):
        raise RuntimeError("record_routing: a block around this one records these routers already; take its list")
    for router in routers:
        router.recorded, router.recorded_with_gradients = routings, torch.is_grad_enabled()
    try:
        yield routings
    finally:
        for router in routers:
            router.recorded = None
