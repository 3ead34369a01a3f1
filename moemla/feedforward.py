"""The dense feed-forward layer.

The shared experts are one of these too: S experts that always run are one that is S times as wide. Built in chapter 5.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moemla.config import CHOICES, require, require_count
from moemla.devices import Layer
from moemla.linear import Linear


def activate(z: Float[Tensor, "*n f_in"], activation: str = "gelu") -> Float[Tensor, "*n f"]:
    """GELU (the exact one) of z, or SwiGLU: silu(first half) * second half of a z that is 2F wide."""
    if activation == "gelu":
        return F.gelu(z)
    if activation == "swiglu":
        gate, value = z.chunk(2, dim=-1)
        return F.silu(gate) * value
    raise ValueError(f"activation={activation!r}: choose 'gelu' or 'swiglu'")


def activation_gradient(
    z: Float[Tensor, "*n f_in"], upstream: Float[Tensor, "*n f"], activation: str
) -> Float[Tensor, "*n f_in"]:
    """The gradient of `activate` at z, times the upstream one; for backwards written by hand. Built in chapter 6."""
    require(activation in CHOICES["activation"], "activation", activation, "choose 'gelu' or 'swiglu'")
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(upstream, z)
    gate, value = z.chunk(2, dim=-1)
    out = torch.empty_like(z)
    first, second = out.chunk(2, dim=-1)
    torch.mul(upstream, F.silu(gate), out=second)
    torch.ops.aten.silu_backward.grad_input(upstream * value, gate, grad_input=first)
    return out


def width_in(d_ff: int, activation: str) -> int:
    """Columns of the first matrix: F for GELU, 2F for SwiGLU; ValueError for another name."""
    require(activation in CHOICES["activation"], "activation", activation, "choose 'gelu' or 'swiglu'")
    return 2 * d_ff if activation == "swiglu" else d_ff


class FeedForward(Layer):
    """down(activate(up(x))): (..., D) -> (..., F) -> (..., D). Built in chapter 5; as shared experts in chapter 7.

    ValueError for a width below 1 or an unknown activation.
    """

    def __init__(
        self, *, d_model: int, d_ff: int, activation: str = "gelu", bias: bool = True, device=None, dtype=None
    ):
        super().__init__()
        require_count("d_model", d_model)
        require_count("d_ff", d_ff)
        self.activation = activation
        self.up = Linear(d_model, width_in(d_ff, activation), bias=bias, device=device, dtype=dtype)
        self.down = Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return self.down(activate(self.up(x), self.activation))
