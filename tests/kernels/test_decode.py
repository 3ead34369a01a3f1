"""Decode kernels: alone against plain attention in float64, and inside the layers against the plain path."""

import pytest
import torch

from moemla import kernels
from moemla.attention import attend_shared, split_heads
from moemla.kernels import INTERPRETED
from moemla.rope import RotaryEmbedding
from tests.helpers import FORMS, close, model_of, tokens_of
from tests.kernels.ways import GPU, each_way, exact, near

if INTERPRETED or GPU:
    from moemla.kernels.decode import joint_decode, latent_decode

# B, S, H, K, R: more than one piece and a ragged last tile; more heads than a tile has rows of its own, or a program
SIZES = {
    "pieces": (2, 300, 4, 20, 24),
    "wide latent": (3, 70, 3, 16, 72),
    "one slot": (1, 1, 2, 32, 16),
    "many heads": (1, 150, 20, 8, 40),
    "heads of two programs": (2, 40, 70, 4, 16),
}


def lengths_of(kind, batch, slots):
    return None if kind == "equal" else torch.tensor([slots, 1, (slots + 1) // 2][:batch], dtype=torch.int32)


def seen(lengths, slots):
    return None if lengths is None else (torch.arange(slots) < lengths[:, None])[:, None, None]


@each_way
@pytest.mark.parametrize("rows", ["equal", "unequal"])
@pytest.mark.parametrize("turn", ["halves", "interleaved", None])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_papers_cache(way, size, biased, turn, rows):
    batch, slots, heads, width, rank = size
    with torch.no_grad():
        q, k_latent = way.normal(batch, heads, width, seed=1), way.normal(batch, slots, rank, seed=2)
        v_latent, weight = (
            way.normal(batch, slots, rank, seed=3),
            way.normal(heads * width, rank, seed=4, scale=rank**-0.5),
        )
        bias, lengths = way.normal(heads * width, seed=5) if biased else None, lengths_of(rows, batch, slots)

        def plain(q, k_latent, v_latent, weight, bias, dtype):
            keys = split_heads(k_latent @ weight.mT + (0 if bias is None else bias), heads)
            if turn:
                keys = RotaryEmbedding(width, slots + 3, layout=turn, dtype=dtype)(keys)
            return attend_shared(q[:, :, None], keys, v_latent, seen(lengths, slots))[:, :, 0]

        leaves = (q, k_latent, v_latent, weight, bias)
        wanted = plain(*(None if leaf is None else exact(leaf) for leaf in leaves), torch.float64)
        if way.kernel:
            table = RotaryEmbedding(width, slots + 3, layout=turn or "halves", device=way.device)
            angles = (table.cos, table.sin) if turn else (None, None)
            held = None if lengths is None else lengths.to(way.device)
            out = latent_decode(*leaves, *angles, held, turn == "interleaved", width**-0.5)
        else:
            out = plain(*leaves, torch.float32)
        assert out.dtype == way.dtype
        near(out, wanted, way.tolerance)


@each_way
@pytest.mark.parametrize("rows", ["equal", "unequal"])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_joint_cache(way, size, rows):
    batch, slots, heads, rope, rank = size
    with torch.no_grad():
        q, joint = way.normal(batch, heads, rank + rope, seed=1), way.normal(batch, slots, rank + rope, seed=2)
        lengths = lengths_of(rows, batch, slots)

        def plain(q, joint):
            out = attend_shared(q[:, :, None], joint[:, None], joint, seen(lengths, slots), 0.2)
            return out[:, :, 0, :rank]

        wanted = plain(exact(q), exact(joint))
        if way.kernel:
            out = joint_decode(q, joint, None if lengths is None else lengths.to(way.device), rank, 0.2)
        else:
            out = plain(q, joint)
        near(out, wanted, way.tolerance)


@each_way
def test_large_scores_do_not_overflow(way):
    """exp of 200 is no float32: the running maximum has to be taken off in each piece, and again where they meet."""
    with torch.no_grad():
        q, joint = way.normal(1, 2, 24, seed=1, scale=10), way.normal(1, 300, 24, seed=2, scale=10)
        wanted = attend_shared(exact(q)[:, :, None], exact(joint)[:, None], exact(joint), None, 0.5)[:, :, 0, :16]
        if way.kernel:
            near(joint_decode(q, joint, None, 16, 0.5), wanted, way.tolerance)
        else:
            near(attend_shared(q[:, :, None], joint[:, None], joint, None, 0.5)[:, :, 0, :16], wanted, way.tolerance)


@each_way
@pytest.mark.parametrize("form", [form for form in FORMS if form.startswith(("mla", "decoupled"))])
def test_inside_the_model(way, form, monkeypatch):
    """Prefill, then single tokens with rows of different length: the logits of the plain path without a cache."""
    if way.dtype != torch.float32:
        pytest.skip("the whole model in float32")
    model = model_of(form, torch.float32, ffn="dense").to(way.device)
    text, lengths = tokens_of(2, 9).to(way.device), torch.tensor([4, 6])
    used = []
    if way.kernel:
        import moemla.kernels.decode as decode

        for name in ("latent_decode", "joint_decode"):
            kernel = getattr(decode, name)
            monkeypatch.setattr(decode, name, lambda *a, kernel=kernel, name=name: used.append(name) or kernel(*a))
    monkeypatch.setattr(kernels, "_enabled", way.kernel)
    with torch.no_grad():
        cache = model.new_cache(2, 12)
        model(text[:, :6], cache=cache, lengths=lengths)
        steps = [model(text[:, 6 + i : 7 + i], cache=cache)[:, 0] for i in range(3)]
        monkeypatch.setattr(kernels, "_enabled", False)
        for row, length in enumerate(lengths.tolist()):
            alone = torch.cat((text[row, :length], text[row, 6:]))[None]
            close(torch.stack(steps, 1)[row], model(alone)[0, length:], 1e-4)
    takes_tables = form not in ("mla-rope-learnable", "mla-hybrid", "mla-hybrid-learned")
    assert bool(used) == (way.kernel and takes_tables)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here")
@pytest.mark.parametrize("form", ["mla-rope", "decoupled"])
def test_latents_too_wide_for_the_chip(form, monkeypatch):
    """A GPU with less shared memory than a tile takes: the layer computes, and says once why without a kernel."""
    from moemla.kernels import tiling

    model, text = model_of(form, torch.float32, ffn="dense"), tokens_of(2, 7)
    joint = torch.zeros(2, 3, 24), torch.zeros(2, 5, 24)
    q, latent = torch.zeros(2, 3, 8), torch.zeros(2, 5, 16)
    monkeypatch.setattr(tiling, "room", lambda tensor: 1500)
    monkeypatch.setattr(kernels, "_enabled", True)
    kernels._warn.cache_clear()
    with torch.no_grad():
        cache = model.new_cache(2, 9)
        model(text[:, :6], cache=cache)
        with pytest.warns(UserWarning, match="do not fit into the shared memory.* The plain functions run instead"):
            step = model(text[:, 6:], cache=cache)[:, 0]
        monkeypatch.setattr(kernels, "_enabled", False)
        close(step, model(text)[:, -1], 1e-4)
    with pytest.raises(ValueError, match=r"rank=16: .*shared memory"):
        joint_decode(*joint, None, 16, 0.3)
    with pytest.raises(ValueError, match=r"rank=16: .*shared memory"):
        latent_decode(q, latent, latent, torch.zeros(24, 16), None, None, None, None, False, 0.3)


@each_way
def test_biases_and_lengths_with_gaps(way):
    if not way.kernel:
        pytest.skip("about the kernels")
    with torch.no_grad():
        q, latent, weight = way.normal(2, 3, 8, seed=1), way.normal(2, 9, 6, seed=2), way.normal(24, 6, seed=3)
        bias = way.normal(24, 5, seed=4)[:, 0]
        lengths = torch.tensor([[4, 0], [9, 0]], device=way.device)[:, 0]
        table = RotaryEmbedding(8, 12, device=way.device)
        angles = (table.cos, table.sin)
        odd = latent_decode(q, latent, latent, weight, bias, *angles, lengths, False, 0.3)
        dense = latent_decode(q, latent, latent, weight, bias.clone(), *angles, lengths.clone(), False, 0.3)
        assert torch.equal(odd, dense)
        joint = way.normal(2, 9, 8, seed=5)
        assert torch.equal(joint_decode(q, joint, lengths, 6, 0.3), joint_decode(q, joint, lengths.clone(), 6, 0.3))
        assert joint_decode(q[:0], joint[:0], None, 6, 0.3).shape == (0, 3, 6)


def test_what_does_not_fit_is_said():
    if not INTERPRETED:
        pytest.skip("kernels are compiled here")
    q, joint = torch.ones(2, 3, 8), torch.ones(2, 5, 8)
    with pytest.raises(ValueError, match=r"joint\.shape=\(2, 5, 7\)"):
        joint_decode(q, joint[:, :, :7], None, 4, 1.0)
    with pytest.raises(ValueError, match="rank=8"):
        joint_decode(q, joint, None, 8, 1.0)
    with pytest.raises(ValueError, match=r"lengths\.shape=\(3,\)"):
        joint_decode(q, joint, torch.ones(3, dtype=torch.int32), 4, 1.0)
    with pytest.raises(ValueError, match="whole numbers"):
        joint_decode(q, joint, torch.ones(2), 4, 1.0)
    with pytest.raises(ValueError, match="empty"):
        joint_decode(q, joint[:, :0], None, 4, 1.0)
    latent, weight = torch.ones(2, 5, 4), torch.ones(24, 4)
    with pytest.raises(ValueError, match=r"v_latent\.shape=\(2, 4, 4\)"):
        latent_decode(q, latent, latent[:, :4], weight, None, None, None, None, False, 1.0)
    with pytest.raises(ValueError, match="float16"):
        latent_decode(q, latent, latent, weight.half(), None, None, None, None, False, 1.0)
    with pytest.raises(ValueError, match="at least 5"):
        latent_decode(q, latent, latent, weight, None, torch.ones(4, 4), torch.ones(4, 4), None, False, 1.0)
