"""`nn.Linear`, which a compiler may read in one pass where a single row is multiplied. Built in chapter 14."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LARGE = 2**16  # numbers of a matrix; below it the cores take longer to meet than to multiply


class Linear(nn.Linear):
    """x W^T + b, (..., I) -> (..., O): `nn.Linear` by another name, with the same weights.

    Under torch.compile on a CPU a single float32 row meets a large matrix as a sum, which the compiler spreads over all
    cores: as a product it is left to a BLAS that may use one.
    """

    def forward(self, x: Float[Tensor, "*n i"]) -> Float[Tensor, "*n o"]:
        single = torch.compiler.is_compiling() and not torch.is_grad_enabled() and x.numel() == self.in_features
        if (
            single
            and self.weight.numel() >= LARGE
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
        ):
            out = (self.weight * x.reshape(1, -1)).sum(-1).view(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.weight, self.bias)
