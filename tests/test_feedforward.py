"""The dense layer against numbers written out."""

import math

import pytest
import torch

from moemla.feedforward import FeedForward, activate, width_in
from tests.helpers import close, shake


def gelu(z: float) -> float:
    return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))


def silu(z: float) -> float:
    return z / (1 + math.exp(-z))


def test_gelu_is_the_exact_one():
    z = torch.linspace(-6, 6, 101, dtype=torch.float64)
    close(activate(z), torch.tensor([gelu(v) for v in z.tolist()], dtype=torch.float64), 1e-14)


def test_swiglu_gates_with_the_first_half():
    z = torch.randn(5, 6, dtype=torch.float64)
    wanted = [[silu(row[j]) * row[3 + j] for j in range(3)] for row in z.tolist()]
    close(activate(z, "swiglu"), torch.tensor(wanted, dtype=torch.float64), 1e-14)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_against_loops(activation, bias):
    layer = shake(FeedForward(d_model=3, d_ff=5, activation=activation, bias=bias, dtype=torch.float64))
    assert layer.up.weight.shape == (width_in(5, activation), 3)
    assert (layer.up.bias is not None) == (layer.down.bias is not None) == bias
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    out = layer(x)
    for b in range(2):
        for t in range(4):
            z = [
                sum(layer.up.weight[f, d] * x[b, t, d] for d in range(3)) + (layer.up.bias[f] if bias else 0)
                for f in range(width_in(5, activation))
            ]
            z = [float(v) for v in z]
            hidden = [gelu(v) for v in z] if activation == "gelu" else [silu(z[f]) * z[5 + f] for f in range(5)]
            for d in range(3):
                y = sum(float(layer.down.weight[d, f]) * hidden[f] for f in range(5))
                y += float(layer.down.bias[d]) if bias else 0
                assert abs(float(out[b, t, d]) - y) < 1e-13


def test_any_leading_shape_and_device_arguments():
    layer = FeedForward(d_model=4, d_ff=6, dtype=torch.bfloat16)
    for shape in [(4,), (0, 4), (2, 3, 4), (2, 3, 5, 4)]:
        assert layer(torch.zeros(shape, dtype=torch.bfloat16)).shape == shape
    assert FeedForward(d_model=4, d_ff=6, device="meta").up.weight.device.type == "meta"


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation='relu'"):
        activate(torch.zeros(2, 2), "relu")
