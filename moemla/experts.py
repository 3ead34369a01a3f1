"""Routed experts: one function, several ways to compute it, all equal.

    y_n = sum over the chosen experts e of  gate[n, e] * W_out[e]^T act(W_in[e]^T x_n)          (eq. 2)

`loop` is the one to read and the oracle: it gathers each expert's tokens. `masked` computes every expert for every
token in two dense products and weighs the hidden activations with gates that are mostly zero: exact, no sorting, no
waiting for counts. It does E/A times the needed products and still wins where experts are small (F = d/16: it costs
what the dense layer costs).
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla.feedforward import activate, width_in


def experts(
    x: Float[Tensor, "n d"],
    w_in: Float[Tensor, "e d f_in"],
    w_out: Float[Tensor, "e f d"],
    index: Int[Tensor, "n a"],
    gate: Float[Tensor, "n a"],
    backend: str = "masked",
    activation: str = "gelu",
) -> Float[Tensor, "n d"]:
    """Gate-weighted sum of each token's experts (eq. 2). Built in chapter 6.

    x (N, D), w_in (E, D, F; 2F for swiglu), w_out (E, F, D), index (N, A) with no expert twice in a row, gate (N, A) ->
    (N, D). backend: "masked" or "loop". ValueError for another name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: choose one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](x, w_in, w_out, index, gate.to(x.dtype), activation)


def loop(x, w_in, w_out, index, gate, activation):
    """Each expert in turn, on the tokens that chose it: (N, D) -> (N, D). Built in chapter 6."""
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
    """Every expert on every token, weighed by gates that are zero for all but A of them: (N, D) -> (N, D).

    Built in chapter 6.
    """
    n_experts, width = w_in.shape[0], w_out.shape[1]
    spread = gate.new_zeros(x.shape[0], n_experts).scatter(1, index, gate)  # (N, E)
    z = x @ rearrange(w_in, "e d f -> d (e f)")  # one product for all experts
    hidden = activate(rearrange(z, "n (e f) -> n e f", e=n_experts), activation) * spread[..., None]
    return rearrange(hidden, "n e f -> n (e f)") @ w_out.reshape(n_experts * width, -1)


BACKENDS = {"masked": masked, "loop": loop}


class Experts(nn.Module):
    """The weights of E routed experts and the back end that applies them. Built in chapter 6."""

    def __init__(
        self,
        *,
        d_model: int,
        n_experts: int,
        d_expert: int,
        activation: str = "gelu",
        backend: str = "masked",
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.activation, self.backend = activation, backend
        like = dict(device=device, dtype=dtype)
        self.w_in = nn.Parameter(torch.empty(n_experts, d_model, width_in(d_expert, activation), **like))
        self.w_out = nn.Parameter(torch.empty(n_experts, d_expert, d_model, **like))
        nn.init.normal_(self.w_in, std=0.02)
        nn.init.normal_(self.w_out, std=0.02)

    def forward(
        self, x: Float[Tensor, "n d"], index: Int[Tensor, "n a"], gate: Float[Tensor, "n a"]
    ) -> Float[Tensor, "n d"]:
        return experts(x, self.w_in, self.w_out, index, gate, self.backend, self.activation)
