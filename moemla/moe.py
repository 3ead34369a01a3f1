"""Mixture of experts: a router, E routed experts of which each token takes A, and S shared ones (eqs. 1-2).

Every token passes the shared ones.
"""

from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from moemla.config import require
from moemla.devices import Layer
from moemla.experts import Experts
from moemla.feedforward import FeedForward
from moemla.routing import Router


class MixtureOfExperts(Layer):
    """(..., D) -> (..., D): routed plus shared experts. Built in chapters 6 and 7; the whole in chapter 9.

    `n_shared` experts of width F are one feed-forward of width n_shared F. No bias terms but the balancing bias.
    `router.last` shows the last routing.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_experts: int,
        top_k: int,
        d_expert: int,
        n_shared: int = 0,
        scores: str = "sigmoid",
        bias_in_gate: bool = False,
        renormalise: bool = True,
        routed_scale: float = 1.0,
        activation: str = "gelu",
        backend: str = "auto",
        device=None,
        dtype=None,
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        gating = dict(scores=scores, bias_in_gate=bias_in_gate, renormalise=renormalise, routed_scale=routed_scale)
        self.router = Router(d_model=d_model, n_experts=n_experts, top_k=top_k, **gating, **factory)
        self.experts = Experts(
            d_model=d_model, n_experts=n_experts, d_expert=d_expert, activation=activation, backend=backend, **factory
        )
        whole = isinstance(n_shared, int) and not isinstance(n_shared, bool)
        require(whole and n_shared >= 0, "n_shared", n_shared, "must be a whole number of 0 or more")
        self.shared = None
        if n_shared:
            self.shared = FeedForward(
                d_model=d_model, d_ff=n_shared * d_expert, activation=activation, bias=False, **factory
            )

    def forward(self, x: Float[Tensor, "*n d"], valid: Bool[Tensor, "*n"] | None = None) -> Float[Tensor, "*n d"]:
        """x (..., D), (B, T, D) say -> the same shape.

        valid (...) is bool and False at padding, which takes no routed expert and is not counted; shared experts it
        passes. ValueError for a `valid` of another shape or type.
        """
        routing = self.router(x, valid)
        routed = self.experts(rearrange(x, "... d -> (...) d"), routing.index, routing.gate)
        out = routed.reshape(x.shape)
        return out if self.shared is None else out + self.shared(x)
