"""Which weight is which: by name, by shape where one fits, piece by piece, and one line where it cannot be told."""

import re

import pytest
import torch
from torch import nn

from moemla import FeedForward, MixtureOfExperts, MultiHeadAttention
from moemla.checks.building import TIMED
from moemla.checks.compare import CheckFailed, copy_weights
from moemla.checks.weights import fit_weights, matched_by_shape

SIZES = dict(d_model=6, n_experts=3, top_k=2, d_expert=4)


def module(**parts):
    """A module with these layers and parameters."""
    made = nn.Module()
    for name, part in parts.items():
        setattr(made, name, nn.Parameter(torch.zeros(part)) if isinstance(part, tuple) else part)
    return made


def linear(narrow, wide):
    return nn.Linear(narrow, wide, bias=False)


def experts(count, d=6, f=4):
    return nn.ModuleList(module(up=linear(d, f), down=linear(f, d)) for _ in range(count))


def test_the_same_names_are_the_same_weights_and_buffers():
    ours, oracle = MixtureOfExperts(**SIZES), MixtureOfExperts(**SIZES)
    oracle.router.bias.normal_()
    weights = fit_weights(ours, oracle)
    assert set(weights) == set(oracle.state_dict()) and matched_by_shape(weights) == []
    copy_weights(ours, oracle, weights)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), oracle.state_dict().values(), strict=True))


def test_other_names_are_told_by_shape_and_said():
    oracle = MixtureOfExperts(**SIZES)
    ours = module(gate=(6, 3), first=(3, 6, 4), second=(3, 4, 6))
    ours.register_buffer("mask", torch.ones(2, 2))
    weights = fit_weights(ours, oracle)
    said = ["first = experts.w_in", "gate = router.weight", "second = experts.w_out"]
    assert sorted(matched_by_shape(weights)) == said
    copy_weights(ours, oracle, weights)
    assert torch.equal(ours.gate, oracle.router.weight.T) and torch.equal(ours.second, oracle.experts.w_out)
    assert torch.equal(ours.mask, torch.ones(2, 2))


def test_a_list_of_layers_is_a_weight_in_pieces():
    oracle = MixtureOfExperts(**SIZES, n_shared=2)
    ours = module(router=linear(6, 3), experts=experts(3), shared=experts(2))
    copy_weights(ours, oracle, weights := fit_weights(ours, oracle))
    assert "shared.*.down.weight = shared.down.weight" in matched_by_shape(weights)
    x = torch.randn(5, 6)
    for e, expert in enumerate(ours.experts):
        torch.testing.assert_close(expert.up(x), x @ oracle.experts.w_in[e])
        torch.testing.assert_close(expert.down(expert.up(x)), x @ oracle.experts.w_in[e] @ oracle.experts.w_out[e])
    act = nn.functional.gelu
    torch.testing.assert_close(sum(s.down(act(s.up(x))) for s in ours.shared), oracle.shared(x))


def test_one_wide_layer_may_be_two_weights_of_several():
    oracle = FeedForward(d_model=6, d_ff=8, bias=False)
    ours = module(w_in=(2, 6, 4), w_out=(2, 4, 6))
    copy_weights(ours, oracle, fit_weights(ours, oracle))
    x = torch.randn(5, 6)
    each = [nn.functional.gelu(x @ a) @ b for a, b in zip(ours.w_in, ours.w_out, strict=True)]
    torch.testing.assert_close(sum(each), oracle(x))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            dict(q=linear(8, 8), k=linear(8, 8), v=linear(8, 8), o=linear(8, 8)),
            "weights: q.weight (8, 8) may be q_proj.weight or k_proj.weight or v_proj.weight or out_proj.weight: "
            "name the weights as the library does",
        ),
        (
            dict(qkv=linear(8, 24), out_proj=linear(8, 8)),
            "weights: qkv.weight (24, 8) is none of the library's that are left: q_proj.weight (8, 8), "
            "k_proj.weight (8, 8), v_proj.weight (8, 8)",
        ),
        (
            dict(q_proj=linear(8, 8), k_proj=linear(8, 8), v_proj=linear(8, 8)),
            "weights: the layer has none for the library's out_proj.weight (8, 8)",
        ),
        (dict(q_proj=linear(8, 4)), "q_proj.weight (4, 8): the library's is (8, 8)"),
        (
            dict(
                q_proj=linear(8, 8), k_proj=linear(8, 8), v_proj=linear(8, 8), out_proj=linear(8, 8), more=linear(8, 8)
            ),
            "weights: more.weight (8, 8) is none of the library's that are left: none",
        ),
    ],
    ids=["alike", "fused", "missing", "shape", "more"],
)
def test_what_cannot_be_told_is_one_line(parts, said):
    oracle = MultiHeadAttention(d_model=8, n_heads=2, bias=False)
    with pytest.raises(CheckFailed, match=re.escape(said)):
        fit_weights(module(**parts), oracle)


@pytest.mark.parametrize("sizes", [TIMED, dict(d_model=16, n_experts=5, top_k=2, d_expert=3)], ids=["timed", "checked"])
def test_a_mixture_is_told_by_its_shapes(sizes):
    """No weight of the sizes that are checked could be another, but for the two of the shared layer."""
    shapes = [
        sorted(p.shape) for name, p in MixtureOfExperts(n_shared=2, **sizes).named_parameters() if "down" not in name
    ]
    assert len({tuple(shape) for shape in shapes if len(shape) == 2}) == sum(len(shape) == 2 for shape in shapes)
