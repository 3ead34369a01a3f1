"""Multi-head and grouped-query attention: against a loop, against torch's own layer, causal, cached."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from moemla.attention import MultiHeadAttention, attend, attend_shared
from moemla.cache import KVCache
from moemla.checks.attention import Made
from moemla.rope import RotaryEmbedding
from tests.helpers import TOLERANCE, assert_causal, close, shake

D, H = 12, 4
FORMS = {
    "mha": {},
    "gqa": dict(n_kv_heads=2),
    "mqa": dict(n_kv_heads=1),
    "wide head": dict(d_head=6),
    "no bias": dict(bias=False),
    "rope": dict(rope="halves", d_head=4),
    "gqa rope": dict(rope="interleaved", d_head=6, n_kv_heads=2),
}


def layer_of(form="mha", dtype=torch.float64, dropout=0.0, max_len=32):
    how = dict(FORMS[form])
    if "rope" in how:
        how["rope"] = RotaryEmbedding(how["d_head"], max_len, layout=how["rope"], dtype=dtype)
    return shake(MultiHeadAttention(d_model=D, n_heads=H, dropout=dropout, dtype=dtype, **how))


def cache_of(layer, batch=2, max_len=16):
    width = layer.k_proj.out_features // layer.n_kv_heads
    return KVCache(
        batch_size=batch, max_len=max_len, n_kv_heads=layer.n_kv_heads, d_head=width, dtype=layer.q_proj.weight.dtype
    )


def softmax_loop(q, k, v, scale=None):
    """q (H, T, K), k and v (G, T, .): each head and query by itself; query t sees keys 0 .. t."""
    heads, steps, width = q.shape
    out = q.new_zeros(heads, steps, v.shape[-1])
    for h in range(heads):
        g = h // (heads // k.shape[0])  # neighbouring query heads share a key head
        for t in range(steps):
            scores = [float(q[h, t] @ k[g, s]) * (scale or 1 / math.sqrt(width)) for s in range(t + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for s, weight in enumerate(weights):
                out[h, t] += weight / sum(weights) * v[g, s]
    return out


def by_loops(layer, x):
    def heads(projected, n):
        return projected.view(x.shape[1], n, -1).transpose(0, 1)

    rows = []
    for row in x:
        q, k = heads(layer.q_proj(row), H), heads(layer.k_proj(row), layer.n_kv_heads)
        v = heads(layer.v_proj(row), layer.n_kv_heads)
        if layer.rope is not None:
            q, k = layer.rope(q[None])[0], layer.rope(k[None])[0]
        rows.append(layer.out_proj(softmax_loop(q, k, v).transpose(0, 1).flatten(1)))
    return torch.stack(rows)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_against_a_softmax_loop(form):
    layer, x = layer_of(form), torch.randn(2, 5, D, dtype=torch.float64)
    close(layer(x), by_loops(layer, x), 1e-13)


@torch.no_grad()
def test_attend_with_another_scale_and_another_width_of_values():
    q, k, v = torch.randn(1, 4, 3, 6), torch.randn(1, 2, 3, 6), torch.randn(1, 2, 3, 5)
    q, k, v = q.double(), k.double(), v.double()
    close(attend(q, k, v, scale=0.2)[0], softmax_loop(q[0], k[0], v[0], 0.2), 1e-13)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    close(attend(q, k, v, mask), attend(q, k, v), 1e-14)
    last = attend(q[:, :, -1:], k, v)  # a single query sees every key
    close(last, attend(q, k, v)[:, :, -1:], 1e-14)


@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch_with_copied_weights(bias):
    ours = shake(MultiHeadAttention(d_model=D, n_heads=H, bias=bias, dtype=torch.float64))
    theirs = nn.MultiheadAttention(D, H, bias=bias, batch_first=True, dtype=torch.float64)
    ins = (ours.q_proj, ours.k_proj, ours.v_proj)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in ins]))
        theirs.out_proj.weight.copy_(ours.out_proj.weight)
        if bias:
            theirs.in_proj_bias.copy_(torch.cat([p.bias for p in ins]))
            theirs.out_proj.bias.copy_(ours.out_proj.bias)
    x = torch.randn(3, 7, D, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(7, 7, dtype=torch.bool).triu(1)
    out, wanted = ours(x), theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    close(out, wanted, 1e-13)
    upstream = torch.randn_like(out)
    mine = torch.autograd.grad(out, [x, *[p.weight for p in ins], ours.out_proj.weight], upstream)
    dx, d_in, d_out = torch.autograd.grad(wanted, [x, theirs.in_proj_weight, theirs.out_proj.weight], upstream)
    for a, b in zip(mine, [dx, *d_in.chunk(3), d_out], strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("form", ["gqa", "mqa"])
@torch.no_grad()
def test_grouped_query_is_multi_head_with_repeated_keys(form):
    grouped, full = layer_of(form), layer_of("mha")
    full.load_state_dict(grouped.state_dict() | {
        f"{name}.{kind}": getattr(getattr(grouped, name), kind)
        .view(grouped.n_kv_heads, D // H, -1).repeat_interleave(H // grouped.n_kv_heads, 0)
        .reshape(getattr(getattr(full, name), kind).shape)
        for name in ("k_proj", "v_proj") for kind in ("weight", "bias")
    })  # fmt: skip
    x = torch.randn(2, 6, D, dtype=torch.float64)
    close(grouped(x), full(x), 1e-13)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(FORMS)), st.integers(2, 9), st.data(), st.integers(0, 10**6))
def test_causal(form, steps, data, seed):
    assert_causal(layer_of(form), D, steps, data.draw(st.integers(1, steps - 1)), seed)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 4], [4, 1, 2], [1, 6]])
@torch.no_grad()
def test_cached_equals_uncached(form, cuts, dtype):
    layer, x = layer_of(form, dtype), torch.randn(2, 7, D, dtype=dtype)
    cache = cache_of(layer, max_len=7)
    parts = []
    for part in x.split(cuts, dim=1):
        parts.append(layer(part, cache[0]))
        cache.advance(part.shape[1])
    close(torch.cat(parts, dim=1), layer(x), TOLERANCE[dtype])


@torch.no_grad()
def test_cached_keys_are_already_turned():
    layer, x = layer_of("rope"), torch.randn(2, 5, D, dtype=torch.float64)
    cache = cache_of(layer)
    layer(x, cache[0])
    k = layer.k_proj(x).view(2, 5, H, 4).transpose(1, 2)
    close(cache.buffers[0][0, :, :, :5], layer.rope(k), 1e-14)


@torch.no_grad()
def test_rope_layer_sees_distance_only():
    """The same tokens further right, with nothing before them: the same output."""
    layer, x = layer_of("rope"), torch.randn(1, 5, D, dtype=torch.float64)
    q, k = (p(x).view(1, 5, H, 4).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    v = layer.v_proj(x).view(1, 5, H, 4).transpose(1, 2)
    at = [torch.arange(5)[None] + shift for shift in (0, 20)]
    here, there = (attend(layer.rope(q, where), layer.rope(k, where), v) for where in at)
    close(here, there, 1e-12)
    assert (layer_of("mha")(x) - layer_of("mha")(x.flip(1)).flip(1)).abs().max() > 0.01


def test_positions_past_the_table():
    layer = layer_of("rope", max_len=6)
    with pytest.raises(ValueError, match="max_seq_len=6"):
        layer(torch.randn(1, 7, D, dtype=torch.float64))
    cache = cache_of(layer, batch=1)
    with torch.no_grad(), pytest.raises((ValueError, IndexError)):
        for _ in range(7):
            layer(torch.randn(1, 1, D, dtype=torch.float64), cache[0])
            cache.advance(1)


def test_dropout_in_training_only_and_unbiased():
    x = torch.randn(1, 6, D, dtype=torch.float64)
    layer, certain = layer_of(dropout=0.3), layer_of()
    close(layer.eval()(x), certain(x), 1e-14)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        mean = layer(x.expand(20000, -1, -1)).mean(0)
    close(mean, certain(x)[0], 0.03)
    # it falls on the weights: the first token has one weight, kept and scaled or dropped whole
    with torch.no_grad():
        first = layer(x.expand(300, -1, -1))[:, 0]
    value = layer.v_proj(x[0, 0]).view(H, 3)
    seen = {tuple(v.round(decimals=9).tolist()) for v in first}
    possible = set()
    for bits in range(2**H):
        kept = torch.tensor([(bits >> h) & 1 for h in range(H)], dtype=torch.float64)[:, None]
        possible.add(tuple(layer.out_proj((kept * value / 0.7).flatten()).round(decimals=9).tolist()))
    assert len(seen) > 8
    assert seen <= possible


def test_wrong_heads():
    with pytest.raises(ValueError, match="n_kv_heads=3: must divide n_heads=4"):
        MultiHeadAttention(d_model=12, n_heads=4, n_kv_heads=3)
    with pytest.raises(ValueError, match="n_heads=5: must divide d_model=12"):
        MultiHeadAttention(d_model=12, n_heads=5)


def test_gradcheck():
    layer = layer_of("gqa rope")
    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), rtol=1e-6)


def test_device_and_dtype_arguments():
    layer = MultiHeadAttention(d_model=12, n_heads=4, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_shared_values_are_copied_for_no_head(steps, key_heads):
    q, k, v = torch.randn(2, 4, steps, 16), torch.randn(2, key_heads, 50, 16), torch.randn(2, 50, 64)
    with Made() as made:
        attend_shared(q, k, v)
    assert 0 < made.largest < v.numel()
