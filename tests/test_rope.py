"""RoPE against complex numbers, and the property it is there for: a score depends on distance alone."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moemla.rope import RotaryEmbedding, apply_rope, frequencies
from tests.helpers import close

LAYOUTS = ("halves", "interleaved")


def by_complex_numbers(x, positions, theta, layout):
    """x (K,) at one position: each pair as a complex number times e^{i m theta^(-2j/K)} (eq. 10)."""
    width = len(x)
    out = x.clone()
    for j in range(width // 2):
        a, b = (j, j + width // 2) if layout == "halves" else (2 * j, 2 * j + 1)
        angle = positions * theta ** (-2 * j / width)
        turned = complex(x[a], x[b]) * complex(math.cos(angle), math.sin(angle))
        out[a], out[b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [2, 6, 8])
def test_equals_complex_multiplication(layout, width):
    x = torch.randn(2, 3, 5, width, dtype=torch.float64)
    rope = RotaryEmbedding(width, 40, theta=500.0, layout=layout, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [39, 7, 0, 20, 3]])
    for given_positions in (None, positions[:1] + 3, positions):
        out = rope(x, given_positions)
        assert out.shape == x.shape
        where = torch.arange(5).expand(2, 5) if given_positions is None else given_positions.expand(2, 5)
        for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
            close(out[b, h, t], by_complex_numbers(x[b, h, t], where[b, t].item(), 500.0, layout), 1e-13)


def test_position_zero_changes_nothing_and_the_first_pair_turns_one_radian_a_step():
    rope = RotaryEmbedding(4, 8, dtype=torch.float64)
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 1, 8, 4)
    out = rope(x)[0, 0]
    assert torch.equal(out[0], x[0, 0, 0])
    close(out[:, 0], torch.arange(8, dtype=torch.float64).cos(), 1e-14)
    close(out[:, 3], (torch.arange(8, dtype=torch.float64) / 100).sin(), 1e-14)  # 10000 ** (-2 / 4)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 400),
    st.integers(0, 400),
    st.integers(0, 100),
    st.sampled_from(LAYOUTS),
    st.sampled_from([2, 4, 10]),
    st.integers(0, 10**6),
)
def test_a_score_depends_on_the_distance_alone(m, n, shift, layout, width, seed):
    q, k = torch.randn(2, 1, 1, 1, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rope = RotaryEmbedding(width, 501, layout=layout, dtype=torch.float64)

    def score(i, j):
        return (rope(q, torch.tensor([[i]])) * rope(k, torch.tensor([[j]]))).sum()

    close(score(m, n), score(m + shift, n + shift), 1e-11)


def test_different_distances_differ():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    rope = RotaryEmbedding(8, 64, dtype=torch.float64)
    scores = [(rope(q) * rope(k, torch.tensor([[m]]))).sum().item() for m in range(64)]
    assert len({round(score, 9) for score in scores}) == 64


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_is_kept_and_the_gradient_turns_back(layout):
    rope = RotaryEmbedding(10, 30, layout=layout, dtype=torch.float64)
    x = torch.randn(2, 2, 30, 10, dtype=torch.float64, requires_grad=True)
    out = rope(x)
    close(out.norm(dim=-1), x.norm(dim=-1), 1e-13)
    (out * out.detach()).sum().backward()  # d/dx <R x, c> = R^T c, and R^T R x = x
    close(x.grad, x, 1e-13)


def test_layouts_differ_by_a_permutation():
    x = torch.randn(1, 2, 9, 8, dtype=torch.float64)
    halves, interleaved = (RotaryEmbedding(8, 9, layout=layout, dtype=torch.float64) for layout in LAYOUTS)
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # interleaved place -> halves place
    close(interleaved(x[..., order]), halves(x)[..., order], 1e-14)
    assert (interleaved(x) - halves(x)).abs().max() > 0.1


@pytest.mark.parametrize("move", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_tables_stay_float32_and_exact(move):
    rope = move(RotaryEmbedding(8, 2048))
    exact = torch.arange(2048, dtype=torch.float64).outer(frequencies(8))
    assert rope.cos.dtype == rope.sin.dtype == torch.float32
    close(rope.cos.double(), exact.cos(), 1e-7)
    close(rope.sin.double(), exact.sin(), 1e-7)
    assert not torch.equal(rope.cos[256], rope.cos[257])
    x = torch.randn(1, 1, 4, 8).bfloat16()
    assert rope(x).dtype == torch.bfloat16


def test_bfloat16_construction_and_double_afterwards():
    rope = RotaryEmbedding(8, 2048, dtype=torch.bfloat16)
    assert rope.cos.dtype == torch.float32
    rope.double()  # the tables are made again, not widened
    close(rope.cos, torch.arange(2048, dtype=torch.float64).outer(frequencies(8)).cos(), 1e-15)
    assert rope.state_dict() == {}


def test_meta_device_then_real():
    with torch.device("meta"):
        rope = RotaryEmbedding(8, 16)
    assert rope.cos.device.type == "meta"
    real = rope.to_empty(device="cpu")
    assert torch.equal(real.cos, RotaryEmbedding(8, 16).cos)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_learnable_frequencies_begin_as_the_fixed_ones_and_have_a_gradient(layout):
    fixed = RotaryEmbedding(6, 40, 500.0, layout, dtype=torch.float64)
    learnable = RotaryEmbedding(6, 40, 500.0, layout, learnable=True, dtype=torch.float64)
    x, places = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4], [39, 7, 0, 20, 3]])
    for positions in (None, places[:1], places):
        close(learnable(x, positions), fixed(x, positions), 1e-13)
    assert set(learnable.state_dict()) == {"inv_freq"}

    def turned(inv_freq):
        return torch.func.functional_call(learnable, {"inv_freq": inv_freq}, (x, places))

    assert torch.autograd.gradcheck(turned, learnable.inv_freq)
    with pytest.raises(ValueError, match="must be at most max_seq_len=40"):
        learnable(torch.randn(1, 1, 41, 6))


def test_learnable_frequencies_stay_float32():
    rope = RotaryEmbedding(8, 2048, learnable=True).bfloat16()
    assert rope.inv_freq.dtype == torch.float32
    assert rope(torch.randn(1, 1, 4, 8).bfloat16()).dtype == torch.bfloat16
    assert RotaryEmbedding(8, 16, learnable=True, dtype=torch.bfloat16).inv_freq.dtype == torch.float32


def test_past_the_table():
    rope = RotaryEmbedding(4, 6)
    x = torch.randn(1, 1, 7, 4)
    assert rope(x[:, :, :6]).shape == (1, 1, 6, 4)
    with pytest.raises(ValueError, match="length=7: must be at most max_seq_len=6"):
        rope(x)
    with pytest.raises(IndexError):
        rope(x[:, :, :1], torch.tensor([[6]]))


def test_a_range_of_positions_has_as_many_as_there_are_tokens():
    rope, x = RotaryEmbedding(4, 6), torch.randn(1, 1, 2, 4)
    assert torch.equal(rope(x, (3, 5)), rope(x, torch.tensor([[3, 4]])))
    for wrong in ((0, 3), (0, 1)):
        with pytest.raises(ValueError, match="2 of them are needed"):
            rope(x, wrong)


def test_wrong_arguments():
    for width in (0, 3, -2):
        with pytest.raises(ValueError, match=f"width={width}"):
            RotaryEmbedding(width, 6)
    cos = torch.ones(1, 2, 2)
    with pytest.raises(ValueError, match="layout='thirds'"):
        apply_rope(torch.randn(1, 1, 2, 4), cos, cos, "thirds")


def test_tables_are_as_exact_as_the_default_type():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert RotaryEmbedding(4, 3).cos.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)
    assert RotaryEmbedding(4, 3).cos.dtype == RotaryEmbedding(4, 3, dtype=torch.float16).cos.dtype == torch.float32


EXACT = """
import moemla.devices
import torch
torch.set_num_threads(2)
x = torch.rand(1000, 1000)
assert (x.sqrt() - x.double().sqrt().float()).abs().max() < 1e-6, "sqrt"
from moemla.rope import RotaryEmbedding, frequencies
angles = torch.arange(128, dtype=torch.float64)[:, None] * frequencies(64)
table = RotaryEmbedding(64, 128, dtype=torch.float64)
for name in ("cos", "sin"):
    assert (getattr(table, name) - getattr(torch, name)(angles)).abs().max() < 1e-12, name
"""


@pytest.mark.slow
def test_the_first_tables_of_a_process_are_exact():
    """One of five processes of two threads had a wrong half, on the processor where this was found."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    for _ in range(15):
        done = subprocess.run(
            [sys.executable, "-c", EXACT], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-500:]
