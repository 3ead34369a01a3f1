"""Both latent forms against loops over eqs. 13-14 and DeepSeek's section 2.1; every cache; absorbed and rebuilt."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moemla.attention import MultiHeadAttention
from moemla.cache import HybridCache, JointLatentCache, LatentCache
from moemla.latent_attention import DecoupledLatentAttention, MultiHeadLatentAttention
from moemla.rope import RotaryEmbedding
from tests.helpers import TOLERANCE, assert_causal, close, shake

D, H = 12, 3
FORMS = ("mla", "mla-rope", "mla-rope-interleaved", "mla-no-bias", "mla-wide", "decoupled", "decoupled-no-bias")
CACHES = {form: ("latent", "hybrid") if form.startswith("mla") else ("joint",) for form in FORMS}
PAIRS = [(form, cache) for form in FORMS for cache in CACHES[form]]


def layer_of(form="mla-rope", dtype=torch.float64, dropout=0.0, max_len=32):
    layout = "interleaved" if "interleaved" in form else "halves"
    how = dict(d_model=D, n_heads=H, bias="no-bias" not in form, dropout=dropout, dtype=dtype)
    if form.startswith("decoupled"):
        rope = RotaryEmbedding(6, max_len, layout="interleaved", dtype=dtype)
        return shake(DecoupledLatentAttention(latent_dim=7, d_nope=3, d_value=5, rope=rope, **how))
    rope = RotaryEmbedding(4, max_len, layout=layout, dtype=dtype) if "rope" in form else None
    how |= dict(latent_dim=20, d_head=6) if "wide" in form else dict(latent_dim=5)
    return shake(MultiHeadLatentAttention(rope=rope, **how))


def cache_of(layer, kind, batch=2, max_len=16):
    how = dict(batch_size=batch, max_len=max_len, dtype=layer.q_proj.weight.dtype)
    if kind == "joint":
        return JointLatentCache(latent_dim=7, d_rope=6, **how)
    latent = layer.v_down.out_features
    if kind == "latent":
        return LatentCache(latent_dim=latent, **how)
    return HybridCache(n_heads=H, d_head=layer.k_up.out_features // H, latent_dim=latent, **how)


def linear(weight, bias, x):
    return weight @ x + (0 if bias is None else bias)


def turn(layer, vector, position):
    if layer.rope is None:
        return vector
    return layer.rope(vector.view(1, 1, 1, -1), torch.tensor([[position]])).flatten()


def weigh(scores, values):
    weights = [math.exp(score - max(scores)) for score in scores]
    return sum(weight / sum(weights) * value for weight, value in zip(weights, values, strict=True))


def by_loops(layer, x):
    """One row (T, D), one head and one query at a time."""
    decoupled = isinstance(layer, DecoupledLatentAttention)

    def of_head(module, h, vector):
        width = module.out_features // H
        mine = slice(h * width, (h + 1) * width)
        return linear(module.weight[mine], None if module.bias is None else module.bias[mine], vector)

    out = []
    for t in range(len(x)):
        heads = []
        for h in range(H):
            scores, values = [], []
            for s in range(t + 1):
                if decoupled:
                    down = layer.kv_down(x[s])
                    latent, shared = down[:7], down[7:]
                    latent = latent / torch.sqrt((latent**2).mean() + 1e-6) * layer.kv_norm.weight
                    q = of_head(layer.q_proj, h, x[t])
                    score = q[:3] @ of_head(layer.k_up, h, latent) + turn(layer, q[3:], t) @ turn(layer, shared, s)
                    scores.append(float(score) / math.sqrt(3 + 6))
                    values.append(of_head(layer.v_up, h, latent))
                else:
                    q = turn(layer, of_head(layer.q_proj, h, x[t]), t)
                    k = turn(layer, of_head(layer.k_up, h, layer.k_down(x[s])), s)
                    scores.append(float(q @ k) / math.sqrt(len(q)))
                    values.append(of_head(layer.v_up, h, layer.v_down(x[s])))
            heads.append(weigh(scores, values))
        out.append(layer.out_proj(torch.cat(heads)))
    return torch.stack(out)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_against_loops(form):
    layer, x = layer_of(form), torch.randn(2, 5, D, dtype=torch.float64)
    close(layer(x), torch.stack([by_loops(layer, row) for row in x]), 1e-13)


@pytest.mark.parametrize("rope", [False, True])
@torch.no_grad()
def test_is_multi_head_attention_of_the_multiplied_matrices(rope):
    """W^K = W^Kr W^Kc: a latent form is multi-head attention whose K and V matrices have rank r."""
    latent = layer_of("mla-rope" if rope else "mla")
    plain = MultiHeadAttention(d_model=D, n_heads=H, rope=latent.rope, dtype=torch.float64)
    for name in ("q", "out"):
        getattr(plain, f"{name}_proj").load_state_dict(getattr(latent, f"{name}_proj").state_dict())
    for name in ("k", "v"):
        down, up, into = getattr(latent, f"{name}_down"), getattr(latent, f"{name}_up"), getattr(plain, f"{name}_proj")
        into.weight.copy_(up.weight @ down.weight)
        into.bias.copy_(up.weight @ down.bias + up.bias)
    x = torch.randn(2, 6, D, dtype=torch.float64)
    close(latent(x), plain(x), 1e-13)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize(("form", "kind"), PAIRS)
@pytest.mark.parametrize("cuts", [[7], [1] * 7, [3, 4], [4, 1, 2]])
@torch.no_grad()
def test_cached_equals_uncached_absorbed_or_not(form, kind, absorb, cuts, dtype):
    layer, x = layer_of(form, dtype), torch.randn(2, 7, D, dtype=dtype)
    cache, parts = cache_of(layer, kind, max_len=7), []
    for part in x.split(cuts, dim=1):
        parts.append(layer(part, cache[0], absorb=absorb))
        cache.advance(part.shape[1])
    close(torch.cat(parts, dim=1), layer(x), TOLERANCE[dtype])


@pytest.mark.parametrize("absorb", [None, True, False])
@pytest.mark.parametrize(("form", "kind"), PAIRS)
@torch.no_grad()
def test_rows_of_different_length(form, kind, absorb):
    layer = layer_of(form)
    x, more = torch.randn(3, 6, D, dtype=torch.float64), torch.randn(3, 3, D, dtype=torch.float64)
    cache = cache_of(layer, kind, batch=3)
    layer(x, cache[0], absorb=absorb)
    lengths = [6, 1, 4]
    cache.advance(lengths)
    one = layer(more[:, :1], cache[0], absorb=absorb)
    cache.advance(1)
    two = layer(more[:, 1:], cache[0], absorb=absorb)
    for row, length in enumerate(lengths):
        alone = layer(torch.cat((x[row, :length], more[row]))[None])[0, length:]
        close(torch.cat((one[row], two[row])), alone, 1e-10)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_what_is_kept(form):
    """Latents before the heads are rebuilt; only the hybrid and the joint form keep something that is turned."""
    layer, x = layer_of(form), torch.randn(2, 5, D, dtype=torch.float64)
    for kind in CACHES[form]:
        cache = cache_of(layer, kind)
        layer(x, cache[0])
        kept = [buffer[0, :, :, :5] for buffer in cache.buffers]
        first, second = kept if len(kept) == 2 else kept[0].split((7, 6), dim=-1)
        if kind == "joint":
            latent, key = layer.kv_down(x).split((7, 6), dim=-1)
            latent = latent * (latent.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.kv_norm.weight
            close(first, latent[:, None], 1e-13)
            close(second, layer.rope(key[:, None]), 1e-14)
            continue
        close(second, layer.v_down(x)[:, None], 1e-14)
        if kind == "latent":
            close(first, layer.k_down(x)[:, None], 1e-14)
        else:
            k = layer.k_up(layer.k_down(x)).view(2, 5, H, -1).transpose(1, 2)
            close(first, k if layer.rope is None else layer.rope(k), 1e-14)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(FORMS), st.integers(2, 9), st.data(), st.integers(0, 10**6))
def test_causal(form, steps, data, seed):
    assert_causal(layer_of(form), D, steps, data.draw(st.integers(1, steps - 1)), seed)


@torch.no_grad()
def test_decoupled_keys_bias_is_invisible():
    """It adds q . b to all scores of a query alike: softmax does not see it, so absorbing may leave it out."""
    layer, x = layer_of("decoupled"), torch.randn(2, 6, D, dtype=torch.float64)
    out = layer(x)
    layer.k_up.bias += 3 * torch.randn_like(layer.k_up.bias)
    close(layer(x), out, 1e-12)
    paper = layer_of("mla-rope")  # after the turn it depends on the position and is seen
    out = paper(x)
    paper.k_up.bias += 3
    assert (paper(x) - out).abs().max() > 1e-3


@torch.no_grad()
def test_values_bias_passes_through_absorption():
    for form, kind in (("mla-rope", "latent"), ("decoupled", "joint")):
        layer, x = layer_of(form), torch.randn(2, 6, D, dtype=torch.float64)
        layer.v_up.bias += 10
        close(layer(x, cache_of(layer, kind)[0], absorb=True), layer(x), 1e-12)


@pytest.mark.parametrize(("form", "kind"), PAIRS)
@torch.no_grad()
def test_absorbing_is_refused_under_training_dropout(form, kind):
    layer, x = layer_of(form, dropout=0.5).train(), torch.randn(2, 1, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"absorb=True: dropout .* eval\(\) or dropout=0"):
        layer(x, cache_of(layer, kind)[0], absorb=True)
    layer(x, cache_of(layer, kind)[0])  # by itself it rebuilds
    layer.eval()(x, cache_of(layer, kind)[0], absorb=True)
    layer_of(form).train()(x, cache_of(layer, kind)[0], absorb=True)


@pytest.mark.parametrize(("form", "kind"), PAIRS)
def test_one_new_token_rebuilds_no_value_and_in_the_joint_form_no_key(form, kind):
    layer, x = layer_of(form).eval(), torch.randn(2, 6, D, dtype=torch.float64)
    used = []
    for name in ("k_up", "v_up"):
        getattr(layer, name).register_forward_hook(
            lambda module, args, out, name=name: used.append((name, args[0].shape[-2]))
        )
    cache = cache_of(layer, kind)
    with torch.no_grad():
        layer(x[:, :5], cache[0])
        cache.advance(5)
        used.clear()
        layer(x[:, 5:], cache[0])
    wanted = {"latent": [("k_up", 6)], "hybrid": [("k_up", 1)], "joint": []}[kind]
    assert used == wanted


@pytest.mark.parametrize("form", FORMS)
def test_dropout_in_training_only_and_unbiased(form):
    x = torch.randn(1, 4, D, dtype=torch.float64)
    layer, certain = layer_of(form, dropout=0.3), layer_of(form)
    close(layer.eval()(x), certain(x), 1e-14)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        close(layer(x.expand(20000, -1, -1)).mean(0), certain(x)[0], 0.03)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    x = torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer_of(form), (x,), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_but_the_invisible_one_gets_a_gradient(form):
    layer = layer_of(form)
    layer(torch.randn(2, 5, D, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        # without a turn, K's biases add one number to all scores of a query; the joint form's k_up is never turned
        unseen = name in ("k_up.bias", "k_down.bias") and layer_is_blind(layer)
        assert (parameter.grad.abs().max() > 1e-8) == (not unseen), name


def layer_is_blind(layer):
    return layer.rope is None or isinstance(layer, DecoupledLatentAttention)


def test_wrong_heads_and_positions_past_the_table():
    with pytest.raises(ValueError, match="n_heads=5: must divide d_model=12"):
        MultiHeadLatentAttention(d_model=12, n_heads=5, latent_dim=3)
    for form in ("mla-rope", "decoupled"):
        layer = layer_of(form, max_len=4)
        with pytest.raises(ValueError, match="max_seq_len=4"):
            layer(torch.randn(1, 5, D, dtype=torch.float64))


def test_device_and_dtype_arguments():
    how = dict(d_model=12, n_heads=3, latent_dim=4, device="meta", dtype=torch.bfloat16)
    rope = RotaryEmbedding(4, 8, device="meta")
    for layer in (MultiHeadLatentAttention(**how), DecoupledLatentAttention(d_nope=4, d_value=4, rope=rope, **how)):
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in layer.parameters())
