"""Routed experts: one function, several ways to compute it, all equal.

y_n = sum over the chosen experts e of  gate[n, e] * W_out[e]^T act(W_in[e]^T x_n)          (eq. 2)

loop      each expert in turn, on the tokens that chose it: the one to read, and the oracle
masked    every expert on every token in two dense products, the hidden activations weighed by gates that are mostly
          zero: no sorting, no waiting for counts, compiles whole. E/A times the needed work, and still the fastest
          where experts are narrow (F = d/16 costs what the dense layer costs)
grouped   tokens sorted by expert, one product for each expert's block of rows, a backward written by hand
gather    each token with the weights it needs and no others: for a few tokens in decode
triton    `grouped` as kernels for a GPU, tokens gathered while they are multiplied
auto      the fastest of these by `choose`, a rule that was measured

Built in chapter 6.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla import kernels
from moemla.config import CHOICES, require, require_count
from moemla.feedforward import activate, activation_gradient, width_in


def experts(
    x: Float[Tensor, "n d"],
    w_in: Float[Tensor, "e d f_in"],
    w_out: Float[Tensor, "e f d"],
    index: Int[Tensor, "n a"],
    gate: Float[Tensor, "n a"],
    backend: str = "auto",
    activation: str = "gelu",
    dispatcher: Callable[[Tensor], "LocalDispatcher"] | None = None,
) -> Float[Tensor, "n d"]:
    """Gate-weighted sum of each token's experts (eq. 2).

    x (N, D), w_in (E, D, F; 2F for swiglu), w_out (E, F, D), index (N, A) with no expert twice in a row, gate (N, A) ->
    (N, D). backend: "auto", "masked", "loop", "grouped", "gather" or "triton"; torch.export gets "masked" whatever is
    asked. dispatcher: sends rows to where their experts are, through "grouped"; see `LocalDispatcher`, the default.
    ValueError for another name.
    """
    require(backend in ("auto", *BACKENDS), "backend", backend, f"choose one of auto, {', '.join(BACKENDS)}")
    if dispatcher is not None:
        require(backend in ("auto", "grouped"), "backend", backend, "a dispatcher needs 'grouped' (or 'auto')")
        return grouped(x, w_in, w_out, index, gate.to(x.dtype), activation, dispatcher)
    if torch.compiler.is_exporting():  # one graph for any number of tokens and any choice
        backend = "masked"
    if backend == "auto":
        backend = choose(x, w_out, index.shape[1])
    return BACKENDS[backend](x, w_in, w_out, index, gate.to(x.dtype), activation)


def loop(x, w_in, w_out, index, gate, activation):
    """Each expert in turn, on the tokens that chose it: (N, D) -> (N, D)."""
    x, w_in, w_out, gate = _as_autocast(x, w_in, w_out, gate)
    n_experts, top_k = w_in.shape[0], index.shape[1]
    chosen = index.flatten()
    order = chosen.argsort(stable=True)  # slots grouped by expert
    counts = torch.bincount(chosen, minlength=n_experts).tolist()
    tokens, gates = (order // top_k).split(counts), gate.flatten()[order].split(counts)
    out = torch.zeros_like(x)
    # unbind, never w_in[e]: the backward of an index makes a zero tensor the size of all experts, for each expert
    for rows, weight, first, second in zip(tokens, gates, w_in.unbind(), w_out.unbind(), strict=True):
        hidden = activate(x[rows] @ first, activation)  # (n_e, F)
        out = out.index_add(0, rows, (hidden @ second) * weight[:, None])
    return out


def masked(x, w_in, w_out, index, gate, activation):
    """Every expert on every token, weighed by gates that are zero for all but A of them: (N, D) -> (N, D)."""
    n_experts, width = w_in.shape[0], w_out.shape[1]
    spread = gate.new_zeros(x.shape[0], n_experts).scatter(1, index, gate)  # (N, E)
    z = x @ rearrange(w_in, "e d f -> d (e f)")  # one product for all experts
    hidden = activate(rearrange(z, "n (e f) -> n e f", e=n_experts), activation) * spread[..., None]
    return rearrange(hidden, "n e f -> n (e f)") @ w_out.reshape(n_experts * width, -1)


def gather(x, w_in, w_out, index, gate, activation):
    """Copies the weights of each token's experts and multiplies by them: (N, D) -> (N, D).

    Reads N A experts instead of E: for decode. A single token on a CPU needs no copy either, and no gradient is kept.
    """
    rows, top_k = index.shape
    alone = rows == 1 and x.device.type == "cpu" and not torch.is_grad_enabled()
    if alone and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        chosen = index[0].tolist()
        hidden = activate(torch.cat([x @ w_in[e] for e in chosen]), activation) * gate.T  # (A, F)
        out = hidden[:1] @ w_out[chosen[0]]
        for j in range(1, top_k):
            out.addmm_(hidden[j : j + 1], w_out[chosen[j]])
        return out
    if torch.compiler.is_compiling():  # a compiler reads the weights where they are, if products are written as sums
        z = (x[:, None, :, None] * w_in[index]).sum(2)  # (N, A, F)
        hidden = activate(z, activation) * gate[..., None]
        return (hidden[..., None] * w_out[index]).sum((1, 2))
    first, second = w_in[index.flatten()], w_out[index.flatten()]
    z = torch.bmm(x.repeat_interleave(top_k, dim=0).unsqueeze(1), first)  # (N A, 1, F)
    hidden = activate(z, activation) * gate.reshape(-1, 1, 1)
    hidden = hidden.view(rows, 1, top_k * w_out.shape[1])
    return torch.bmm(hidden, second.reshape(rows, hidden.shape[2], x.shape[1])).squeeze(1)


def grouped(x, w_in, w_out, index, gate, activation, dispatcher=None):
    """Slots sorted by expert, then one product for each expert's rows: (N, D) -> (N, D)."""
    if dispatcher is None:
        if x.shape[0] == 0 or x.is_meta:
            return masked(x, w_in, w_out, index, gate, activation)
        dispatcher = partial(LocalDispatcher, n_experts=w_in.shape[0])
    x, w_in, w_out, gate = _as_autocast(x, w_in, w_out, gate)
    return _Grouped.apply(x, w_in, w_out, index, gate, activation, dispatcher)


def _as_autocast(*tensors):
    """In the dtype of an autocast that is on: it does not look into a function with its own backward."""
    first, kind = tensors[0], tensors[0].device.type
    if kind == "meta" or first.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def triton(x, w_in, w_out, index, gate, activation):
    """The kernels of `moemla.kernels.experts`: (N, D) -> (N, D). Where they cannot run, what "auto" would take.

    Built in chapter 11.
    """
    x, w_in, w_out, gate = _as_autocast(x, w_in, w_out, gate)
    if x.shape[0] == 0 or x.is_meta or not kernels.usable(x, w_in, w_out, index, gate):
        name = choose(x, w_out, index.shape[1])
        return BACKENDS["grouped" if name == "triton" else name](x, w_in, w_out, index, gate, activation)
    from moemla.kernels.experts import routed_experts

    return routed_experts(x, w_in, w_out, index, gate, activation)[0]


# The measured rule of `choose`.
FEW_TOKENS = 4  # copying their weights costs less than sorting them
MASKED_WORK = 1.4e8  # multiply-adds of `masked`'s first product, above which sorting pays
WEIGHTS_AS_TOKENS = 256  # reordering all weights costs `masked` as much as this many tokens
MASKED_WORK_GPU = 2e10  # the same on a GPU (an H200, bfloat16), where experts are wider than
NARROW = 64  # to which width `masked` wins there with any number of tokens
FULL_TILE = 16  # rows of an expert that the kernels multiply at least: with fewer, most of a tile is padding

BACKENDS = {"masked": masked, "loop": loop, "grouped": grouped, "gather": gather, "triton": triton}


class _Grouped(torch.autograd.Function):
    """Rows to their experts (`_Slots`, a dispatcher), two products (`_Blocks`), and back: each token's weighed sum.

    Backward goes the same way, transposed: what was dispatched is combined, what was combined is dispatched.

    Keeps x, the hidden layer before and after its activation, and the order of the slots; neither the gathered rows
    of x nor the experts' outputs. M = N A slots; M' of them are computed here; M' = M without other ranks.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, index, gate, activation, dispatcher):
        slots = _Slots(index)
        exchange = dispatcher(slots.expert)
        blocks = _Blocks(exchange.counts, fused=_fused(x, w_in, w_out))
        rows = exchange.dispatch(slots.gather(x))  # (M', D)
        z = blocks.product(rows, w_in)
        hidden = activate(z, activation)  # (M', F)
        y = exchange.combine(blocks.product(hidden, w_out))  # (M, D)
        ctx.save_for_backward(x, w_in, w_out, gate, z, hidden)
        ctx.steps, ctx.activation = (slots, exchange, blocks), activation
        return slots.combine(y, gate)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("backend='grouped' has no second derivatives; use 'masked' or 'loop' for them")
        x, w_in, w_out, gate, z, hidden = ctx.saved_tensors
        slots, exchange, blocks = ctx.steps
        dy = exchange.dispatch(slots.gather(grad.contiguous()))  # (M', D), not yet weighed
        dhidden = blocks.product(dy, w_out.mT)  # (M', F)
        dgate = None
        if ctx.needs_input_grad[4]:  # <grad, y> = <grad W_out^T, hidden>: y itself is not needed
            each = exchange.combine(torch.linalg.vecdot(dhidden, hidden)[:, None])  # (M, 1)
            dgate = each.index_select(0, slots.place).view_as(gate)
        weight = exchange.dispatch(gate.flatten().index_select(0, slots.order)[:, None])  # (M', 1)
        dz = activation_gradient(z, dhidden.mul_(weight), ctx.activation)
        dw_out = blocks.product_of_blocks(hidden * weight, dy) if ctx.needs_input_grad[2] else None
        dw_in = blocks.product_of_blocks(exchange.dispatch(slots.gather(x)), dz) if ctx.needs_input_grad[1] else None
        if exchange.share != 1:
            dw_in, dw_out = (None if grad is None else grad.mul_(exchange.share) for grad in (dw_in, dw_out))
        dx = slots.combine(exchange.combine(blocks.product(dz, w_in.mT))) if ctx.needs_input_grad[0] else None
        return dx, dw_in, dw_out, None, dgate, None, None


class _Slots:
    """The N A slots (token, choice), sorted by expert."""

    def __init__(self, index: Int[Tensor, "n a"]):
        self.shape = index.shape
        self.expert, self.order = index.flatten().long().sort(stable=True)  # order: sorted place -> slot
        self.place = torch.empty_like(self.order)  # slot -> sorted place
        self.place[self.order] = torch.arange(len(self.order), device=index.device)
        self.token = self.order // index.shape[1]

    def gather(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
        """The row of x for each slot."""
        return x.index_select(0, self.token)

    def combine(self, y: Float[Tensor, "m d"], gate: Float[Tensor, "n a"] | None = None) -> Float[Tensor, "n d"]:
        """Each token's rows, weighed and summed: no atomics, so the same sum each time.

        `embedding_bag` is this very sum; written as an index and a sum it is ten times slower on a CPU.
        """
        return F.embedding_bag(self.place.view(self.shape), y, per_sample_weights=gate, mode="sum")


class LocalDispatcher:
    """Every expert is here: rows stay where they are. Built in chapter 13.

    A dispatcher that sends them to other ranks is put in its place from outside. `dispatcher(expert)` is called once a
    pass with the expert of each row, (M,) sorted, and gives an exchange: `counts` (E',), the rows that come to each of
    the experts that are here, whose weights w_in and w_out hold; `dispatch` and `combine`, each the transpose, and so
    the backward, of the other; `share`, a factor for the weights' gradients. How many experts there are on all ranks is
    its own to know.
    """

    share = 1.0

    def __init__(self, expert: Int[Tensor, "m"], n_experts: int):
        counts = torch.zeros(n_experts, dtype=torch.int64, device=expert.device)
        self.counts = counts.scatter_add(0, expert, torch.ones_like(expert))  # bincount waits for a GPU

    def dispatch(self, rows: Float[Tensor, "m w"]) -> Float[Tensor, "m w"]:
        """Rows (M, W), any W, sorted by expert -> (M', W), those of the experts here, sorted by expert."""
        return rows

    def combine(self, rows: Float[Tensor, "m w"]) -> Float[Tensor, "m w"]:
        """Rows (M', W) back to where they came from: (M, W)."""
        return rows


class _Blocks:
    """Products over each expert's block of rows. counts (E,): the rows of each."""

    def __init__(self, counts: Int[Tensor, "e"], fused: bool):
        # On the device for the fused product; on the host, which waits for them, for the loop.
        self.offsets = counts.cumsum(0).to(torch.int32) if fused else None
        self.counts = None if fused else counts.tolist()

    def product(self, rows: Float[Tensor, "m i"], weights: Float[Tensor, "e i o"]) -> Float[Tensor, "m o"]:
        """Each block of rows times its expert's matrix."""
        if self.offsets is not None:
            return F.grouped_mm(rows, weights, offs=self.offsets)
        out = rows.new_empty(len(rows), weights.shape[2])
        blocks = zip(rows.split(self.counts), weights.unbind(), out.split(self.counts), strict=True)
        for block, weight, target in blocks:
            if len(block):
                torch.mm(block, weight, out=target)
        return out

    def product_of_blocks(self, left: Float[Tensor, "m i"], right: Float[Tensor, "m o"]) -> Float[Tensor, "e i o"]:
        """left_e^T right_e for each expert: the gradient of its matrix, zero where it has no rows."""
        if self.offsets is not None:
            return F.grouped_mm(left.mT, right, offs=self.offsets)
        out = left.new_empty(len(self.counts), left.shape[1], right.shape[1])
        for a, b, target in zip(left.split(self.counts), right.split(self.counts), out, strict=True):
            torch.mm(a.mT, b, out=target)  # zeros for a block without rows
        return out


def _fused(x, w_in, w_out) -> bool:
    """Whether torch's grouped product is fast here: bfloat16, compute capability 9 or 10, rows of 16 bytes.

    Elsewhere it is a loop itself, and waits for the counts.
    """
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return False
    aligned = all(width * x.element_size() % 16 == 0 for width in (x.shape[1], w_in.shape[2], w_out.shape[1]))
    return aligned and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def choose(x: Float[Tensor, "n d"], w_out: Float[Tensor, "e f d"], top_k: int) -> str:
    """The fastest back end for these shapes: "masked", "grouped", "gather" or "triton".

    The rule was fitted to results/bench/cpu/moe-*.json and, for a GPU, to results/bench/cuda/moe-*.json (bfloat16,
    started from Python). There `masked` does E/A times the products, and `grouped` takes a third of a millisecond at
    least. Kernels, where they are enabled, need FULL_TILE rows for each expert on average, or `masked` wins.
    """
    (n_experts, width, d_model), n_tokens = w_out.shape, x.shape[0]
    if n_tokens <= FEW_TOKENS and not torch.is_grad_enabled() and top_k * n_tokens < n_experts:
        return "gather"
    if x.device.type != "cpu" and n_tokens * top_k >= FULL_TILE * n_experts and kernels.enabled(x, w_out):
        return "triton"
    if torch.compiler.is_compiling():
        return "masked"
    if x.device.type != "cpu":
        light = n_experts * width * d_model * n_tokens <= MASKED_WORK_GPU
        return "masked" if light or width <= NARROW else "grouped"
    work = n_experts * width * d_model * (n_tokens + WEIGHTS_AS_TOKENS)
    return "masked" if work <= MASKED_WORK else "grouped"


class Experts(nn.Module):
    """The weights of E routed experts and the back end that applies them.

    `dispatcher`, at first None, may be set from outside (see `LocalDispatcher`); the weights are then those of the
    experts that are here. ValueError for a count below 1, or an unknown activation or back end.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_experts: int,
        d_expert: int,
        activation: str = "gelu",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (("d_model", d_model), ("n_experts", n_experts), ("d_expert", d_expert)):
            require_count(name, value)
        allowed = CHOICES["backend"]
        require(backend in allowed, "backend", backend, f"choose one of {', '.join(allowed)}")
        self.activation, self.backend, self.dispatcher = activation, backend, None
        factory = dict(device=device, dtype=dtype)
        self.w_in = nn.Parameter(torch.empty(n_experts, d_model, width_in(d_expert, activation), **factory))
        self.w_out = nn.Parameter(torch.empty(n_experts, d_expert, d_model, **factory))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Sizes and back end, for `print(model)`."""
        n_experts, d_expert, d_model = self.w_out.shape
        return f"{n_experts} x ({d_model} -> {d_expert} -> {d_model}), {self.activation}, backend={self.backend}"

    def reset_parameters(self) -> None:
        """Normal, std 0.02: what the constructor draws."""
        nn.init.normal_(self.w_in, std=0.02)
        nn.init.normal_(self.w_out, std=0.02)

    def forward(
        self, x: Float[Tensor, "n d"], index: Int[Tensor, "n a"], gate: Float[Tensor, "n a"]
    ) -> Float[Tensor, "n d"]:
        return experts(x, self.w_in, self.w_out, index, gate, self.backend, self.activation, self.dispatcher)
