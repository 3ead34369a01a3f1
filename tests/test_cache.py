"""Caches: what they hold is counted from storage; rows of different length; crop, select, reset."""

import inspect

import pytest
import torch

from moemla.cache import Cache, HybridCache, JointLatentCache, KVCache, LatentCache
from tests.helpers import FORMS, TOLERANCE, close, config_of, model_of, tokens_of

KINDS = {
    "kv": (lambda **how: KVCache(n_kv_heads=3, d_head=4, **how), [(3, 4), (3, 4)]),
    "latent": (lambda **how: LatentCache(latent_dim=5, **how), [(1, 5), (1, 5)]),
    "hybrid": (lambda **how: HybridCache(n_heads=3, d_head=4, latent_dim=5, **how), [(3, 4), (1, 5)]),
    "joint": (lambda **how: JointLatentCache(latent_dim=5, d_rope=6, **how), [(1, 11)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage(kind, dtype):
    make, shapes = KINDS[kind]
    cache = make(n_layers=2, batch_size=3, max_len=7, dtype=dtype)
    assert [tuple(buffer.shape) for buffer in cache.buffers] == [(2, 3, heads, 7, width) for heads, width in shapes]
    assert all(buffer.dtype == dtype for buffer in cache.buffers)
    stored = sum(buffer.untyped_storage().nbytes() for buffer in cache.buffers)
    numbers = sum(heads * width for heads, width in shapes)
    assert cache.nbytes == stored
    assert cache.bytes_per_token() == stored // (3 * 7) == 2 * numbers * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_latent_cache_holds_half_at_half_the_width(dtype):
    def stored(form, **changes):
        model = model_of(form, dtype=torch.float32, **changes)
        cache = model.new_cache(batch_size=2, max_len=20, dtype=dtype)
        return sum(buffer.untyped_storage().nbytes() for buffer in cache.buffers)

    full = stored("mha-rope")
    assert full == 2 * 2 * 20 * 2 * 16 * dtype.itemsize  # L B S x keys and values x d
    assert stored("mla-rope", latent_dim=8) * 2 == full
    assert stored("mla-hybrid", latent_dim=8) * 4 == full * 3
    assert stored("gqa-rope", n_kv_heads=1) * 4 == full
    assert stored("decoupled", latent_dim=8, d_rope=2) * 32 == full * 10


def fill(cache, steps, seed=0):
    """Appends random numbers to every layer as attention does; returns what each layer gave back."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for layer in range(cache.n_layers):
        new = [torch.randn(cache.batch_size, b.shape[2], steps, b.shape[4], generator=generator) for b in cache.buffers]
        seen.append((new, cache[layer].append(*new)))
    cache.advance(steps)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_append_gives_back_all_that_is_held(kind):
    cache = KINDS[kind][0](n_layers=2, batch_size=2, max_len=9)
    first, second = fill(cache, 3, 1), fill(cache, 2, 2)
    assert cache.length == 5
    for (new1, seen1), (new2, seen2) in zip(first, second, strict=True):
        for a, b, held1, held2 in zip(new1, new2, seen1, seen2, strict=True):
            assert torch.equal(held1, a)
            assert torch.equal(held2, torch.cat((a, b), dim=2))
            assert held2.untyped_storage().data_ptr() in {x.untyped_storage().data_ptr() for x in cache.buffers}


@pytest.mark.parametrize("rows", [[], torch.tensor([False, True])])
def test_rows_are_named_by_number(rows):
    cache = LatentCache(latent_dim=2, batch_size=2, max_len=4)
    with pytest.raises(ValueError, match="name at least one row, by its number"):
        inspect.unwrap(LatentCache.select)(cache, rows)  # as users have it, without the tests' type checks


def test_a_copy_has_a_storage_and_a_length_of_its_own():
    cache = LatentCache(latent_dim=2, batch_size=2, max_len=4, dtype=torch.bfloat16)
    new = torch.randn(2, 1, 3, 2).bfloat16()
    cache[0].append(new, -new)
    cache.advance([3, 1])
    twin = cache.copy(9)
    assert type(twin) is LatentCache and twin.lengths == [3, 1] and twin.max_len == 9
    assert [b.dtype for b in twin.buffers] == [torch.bfloat16] * 2
    assert torch.equal(twin.buffers[0][0, :, :, :3], new) and torch.equal(twin.buffers[1][0, :, :, :3], -new)
    twin[0].append(new, new)
    twin.advance(3)
    assert cache.lengths == [3, 1] and cache.buffers[0].shape[3] == 4
    assert torch.equal(cache.buffers[0][0, :, :, :3], new)
    with pytest.raises(ValueError, match="max_len=2"):
        cache.copy(2)


def test_rows_of_different_length():
    cache = LatentCache(latent_dim=1, batch_size=3, max_len=6)
    prompt = torch.arange(1.0, 5.0).view(1, 1, 4, 1).expand(3, 1, 4, 1)
    cache[0].append(prompt, prompt)
    cache.advance([4, 1, 3])
    assert (cache.length, cache.uniform) == (4, False)
    assert cache.positions(2).tolist() == [[4, 5], [1, 2], [3, 4]]
    mask = cache[0].mask(2)
    assert mask.shape == (3, 1, 2, 6)
    for row, length in enumerate([4, 1, 3]):
        for t in range(2):
            assert mask[row, 0, t].tolist() == [slot <= length + t for slot in range(6)]
    new = torch.tensor([[10.0, 11.0]] * 3).view(3, 1, 2, 1)
    held, _ = cache[0].append(new, new)
    cache.advance(2)
    wanted = [[1, 2, 3, 4, 10, 11], [1, 10, 11, 4, 0, 0], [1, 2, 3, 10, 11, 0]]
    assert held[:, 0, :, 0].tolist() == wanted
    assert cache.lengths == [6, 3, 5]


def test_masks_that_need_no_mask():
    cache = LatentCache(latent_dim=1, batch_size=2, max_len=6)
    assert cache[0].mask(3) is None
    cache.advance(3)
    assert cache[0].mask(1) is None
    assert cache[0].mask(2).tolist() == [[[[True] * 4 + [False], [True] * 5]]]


@pytest.mark.parametrize("kind", KINDS)
def test_no_room(kind):
    cache = KINDS[kind][0](batch_size=2, max_len=4)
    fill(cache, 3)
    with pytest.raises(ValueError, match="steps=2: with 3 tokens held they exceed max_len=4"):
        fill(cache, 2)
    fill(cache, 1)
    with pytest.raises(ValueError, match="max_len=4"):
        fill(cache, 1)
    cache.reset()
    assert cache.length == 0
    fill(cache, 4)


def test_a_cache_says_what_it_holds():
    cache = LatentCache(n_layers=3, latent_dim=4, batch_size=2, max_len=9)
    assert repr(cache) == "LatentCache(3 layers, 2 rows, 96 bytes a token, holds 0 of 9)"
    cache.advance([5, 2])
    cache.crop([4, 9])
    assert "holds [4, 2] of 9" in repr(cache)


def test_a_cache_made_for_inference_serves_outside_of_it():
    """Whatever was done to it there: made, selected, copied."""
    model, text = model_of(), tokens_of(2, 8)
    with torch.inference_mode():
        cache = model.new_cache(batch_size=2, max_len=12)
        model(text[:, :5], cache=cache)
        cache.select([1, 0])
        twin = cache.copy(10)
    with torch.no_grad():
        for held in (cache, twin):
            close(model(text[[1, 0], 5:], cache=held), model(text[[1, 0]])[:, 5:], 1e-10)


def test_wrong_arguments():
    for name in ("n_layers", "batch_size", "max_len"):
        with pytest.raises(ValueError, match=f"{name}=0"):
            Cache(**dict(n_layers=1, batch_size=1, max_len=1, widths=((1, 1),)) | {name: 0})
    cache = LatentCache(latent_dim=2, batch_size=2, max_len=4)
    with pytest.raises(ValueError, match="length=-1"):
        cache.crop(-1)
    with pytest.raises(ValueError, match=r"steps=.*: one number, or one for each of the 2 rows"):
        cache.advance([1, 1, 1])
    with pytest.raises(IndexError, match="layer=1"):
        cache[1]
    with pytest.raises(ValueError, match="rows=3: this cache has 2"):
        cache[0].append(*[torch.zeros(3, 1, 1, 2)] * 2)
    with pytest.raises(RuntimeError, match="no_grad"):
        cache[0].append(*[torch.zeros(2, 1, 1, 2, requires_grad=True)] * 2)


@pytest.mark.parametrize("max_len", [0, -3])
def test_a_model_makes_no_cache_without_room(max_len):
    with pytest.raises(ValueError, match=f"max_len={max_len}"):
        model_of().new_cache(1, max_len)
    assert model_of().new_cache().max_len == config_of().max_seq_len


# On a whole model: what is cut off or chosen must behave as if nothing else had ever been there.


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_crop_forgets(form):
    model, text = model_of(form), tokens_of(2, 12)
    cache = model.new_cache(2, 16)
    model(text[:, :9], cache=cache)
    cache.crop(20)
    assert cache.length == 9
    cache.crop(4)
    assert cache.lengths == [4, 4]
    other = torch.cat((text[:, :4], text[:, 9:]), dim=1)
    close(model(other[:, 4:], cache=cache), model(other)[:, 4:], TOLERANCE[torch.float64])


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_crop_of_unequal_rows(form):
    model, text = model_of(form), tokens_of(2, 9)
    cache = model.new_cache(2, 16)
    model(text[:, :6], cache=cache, lengths=torch.tensor([6, 2]))
    cache.crop(3)
    assert cache.lengths == [3, 2]
    out = model(text[:, 6:], cache=cache)
    for row, kept in enumerate([3, 2]):
        alone = torch.cat((text[row, :kept], text[row, 6:]))[None]
        close(out[row], model(alone)[0, kept:], 1e-10)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_select_repeats_and_reorders_rows(form):
    model, text = model_of(form), tokens_of(3, 8)
    cache = model.new_cache(3, 16)
    lengths = torch.tensor([5, 2, 4])
    model(text[:, :5], cache=cache, lengths=lengths)
    cache.select([2, 0, 2, 1])
    assert (cache.lengths, cache.batch_size) == ([4, 5, 4, 2], 4)
    new = tokens_of(4, 2, seed=9)
    out = model(new, cache=cache)
    for row, source in enumerate([2, 0, 2, 1]):
        alone = torch.cat((text[source, : lengths[source]], new[row]))[None]
        close(out[row], model(alone)[0, -2:], 1e-10)
    cache.select(torch.tensor([3]))
    assert cache.lengths == [4]
    before = cache.buffers
    for rows in ([1], [-1], [0, -2], torch.tensor([5])):
        with pytest.raises(IndexError, match=r"this cache has rows 0 \.\. 0"):
            cache.select(rows)
    assert cache.buffers is before and cache.lengths == [4]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_reset_is_new(form):
    model, text = model_of(form), tokens_of(2, 8)
    cache = model.new_cache(2, 8)
    storage = [buffer.data_ptr() for buffer in cache.buffers]
    model(tokens_of(2, 8, seed=5), cache=cache)
    cache.reset()
    close(model(text, cache=cache), model(text), 1e-10)
    assert storage == [buffer.data_ptr() for buffer in cache.buffers]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_bfloat16_cache_serves_a_float32_model(form):
    model, text = model_of(form, dtype=torch.float32, ffn="dense"), tokens_of(2, 8)
    cache = model.new_cache(2, 8, dtype=torch.bfloat16)
    assert all(buffer.dtype == torch.bfloat16 for buffer in cache.buffers)
    out = torch.cat([model(text[:, :5], cache=cache), model(text[:, 5:6], cache=cache)], dim=1)
    assert out.dtype == torch.float32
    close(out, model(text)[:, :6], 0.05)
