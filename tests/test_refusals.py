"""What cannot work is refused where it is said, in one line that names the field and its value."""

import subprocess
import sys

import pytest
import torch

from moemla import cache
from moemla.attention import MultiHeadAttention
from moemla.experts import Experts, experts
from moemla.feedforward import FeedForward, activation_gradient, width_in
from moemla.latent_attention import DecoupledLatentAttention, MultiHeadLatentAttention
from moemla.moe import MixtureOfExperts
from moemla.rope import RotaryEmbedding, frequencies
from moemla.routing import Router
from tests.helpers import model_of, tokens_of

NAN, INF = float("nan"), float("inf")
ROPE = RotaryEmbedding(4, 8)
HEADS = dict(d_model=12, n_heads=3)
ROUTED = dict(d_model=6, n_experts=5, top_k=2)
CACHE = dict(batch_size=2, max_len=4)
COUNTS = (0, -2)
WRONG = [
    (MultiHeadAttention, HEADS, dict(d_model=COUNTS, n_heads=(*COUNTS, 5), n_kv_heads=(*COUNTS, 2, 6), d_head=COUNTS)),
    (MultiHeadAttention, HEADS, dict(dropout=(-0.1, 1.0, NAN))),
    (MultiHeadLatentAttention, HEADS | dict(latent_dim=5), dict(d_model=COUNTS, n_heads=(*COUNTS, 5), d_head=COUNTS)),
    (MultiHeadLatentAttention, HEADS | dict(latent_dim=5), dict(latent_dim=COUNTS, dropout=(-0.1, 1.0, NAN))),
    (
        DecoupledLatentAttention,
        HEADS | dict(latent_dim=5, d_nope=3, d_value=2, rope=ROPE),
        dict(d_model=COUNTS, n_heads=COUNTS, latent_dim=COUNTS, d_nope=COUNTS, d_value=COUNTS, dropout=(1.0, NAN)),
    ),
    (FeedForward, dict(d_model=6, d_ff=5), dict(d_model=COUNTS, d_ff=COUNTS, activation=("relu",))),
    (
        Experts,
        dict(d_model=6, n_experts=5, d_expert=3),
        dict(d_model=COUNTS, n_experts=COUNTS, d_expert=COUNTS, activation=("relu",), backend=("fast",)),
    ),
    (
        Router,
        ROUTED,
        dict(
            d_model=COUNTS, n_experts=COUNTS, top_k=(*COUNTS, 6), scores=("tanh",), routed_scale=(0.0, -1.0, NAN, INF)
        ),
    ),
    (
        MixtureOfExperts,
        ROUTED | dict(d_expert=3),
        dict(d_model=COUNTS, n_experts=COUNTS, top_k=(*COUNTS, 6), d_expert=COUNTS, n_shared=(-1,), scores=("tanh",))
        | dict(activation=("relu",), backend=("fast",), routed_scale=(0.0, NAN)),
    ),
    (
        RotaryEmbedding,
        dict(width=4, max_seq_len=8),
        dict(width=(*COUNTS, 3), max_seq_len=COUNTS, theta=(0.0, 1.0, 0.5, -10.0, NAN, INF), layout=("thirds",)),
    ),
    (
        RotaryEmbedding,
        dict(width=4, max_seq_len=8, learnable=True),
        dict(width=(*COUNTS, 3), max_seq_len=COUNTS, theta=(0.0, NAN, INF), layout=("thirds",)),
    ),
    (frequencies, dict(width=4), dict(width=(*COUNTS, 3), theta=(0.0, 1.0, -10.0, NAN, INF))),
    (width_in, dict(d_ff=4, activation="gelu"), dict(activation=("relu", ""))),
    (
        activation_gradient,
        dict(z=torch.zeros(2, 4), upstream=torch.zeros(2, 4), activation="gelu"),
        dict(activation=("relu",)),
    ),
    (cache.KVCache, CACHE | dict(n_kv_heads=2, d_head=3), dict(n_kv_heads=COUNTS, d_head=COUNTS, n_layers=COUNTS)),
    (cache.LatentCache, CACHE | dict(latent_dim=3), dict(latent_dim=COUNTS, batch_size=COUNTS, max_len=COUNTS)),
    (
        cache.HybridCache,
        CACHE | dict(n_heads=2, d_head=3, latent_dim=3),
        dict(n_heads=COUNTS, d_head=COUNTS, latent_dim=COUNTS),
    ),
    (cache.JointLatentCache, CACHE | dict(latent_dim=3, d_rope=2), dict(latent_dim=COUNTS, d_rope=COUNTS)),
]
CASES = [(make, right, name, value) for make, right, fields in WRONG for name in fields for value in fields[name]]


@pytest.mark.parametrize(
    ("make", "right", "name", "value"), CASES, ids=[f"{case[0].__name__}-{case[2]}={case[3]}" for case in CASES]
)
def test_refused_when_it_is_made(make, right, name, value):
    make(**right)
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: .+") as error:
        make(**right | {name: value})
    assert "\n" not in str(error.value)


def test_a_rope_that_does_not_fit_the_heads():
    for make, more in ((MultiHeadAttention, {}), (MultiHeadLatentAttention, dict(latent_dim=5))):
        make(d_model=12, n_heads=3, rope=ROPE, **more)
        with pytest.raises(ValueError, match=r"rope\.width=4: must equal the heads' width, 6"):
            make(d_model=12, n_heads=2, rope=ROPE, **more)


def test_an_unknown_back_end_of_the_function():
    x, w_in, w_out = torch.zeros(2, 3), torch.zeros(4, 3, 5), torch.zeros(4, 5, 3)
    with pytest.raises(ValueError, match="backend='fast': choose one of auto, masked"):
        experts(x, w_in, w_out, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), "fast")


@pytest.mark.parametrize("lengths", [[9, 3], [2, -1]])
def test_lengths_outside_the_row_without_a_cache(lengths):
    model, text = model_of(), tokens_of(2, 8)
    for targets in (None, text.roll(1, 1)):
        with pytest.raises(ValueError, match=r"lengths=.*between 0 and the 8 tokens"):
            model(text, targets, lengths=torch.tensor(lengths))


@pytest.mark.parametrize("token", [37, 100, -1])
def test_tokens_outside_the_vocabulary(token):
    model, text = model_of(), tokens_of(2, 8)
    text[1, 3] = token
    line = f"tokens={int(text.min())} to {int(text.max())}: must be between 0 and 36"
    with pytest.raises(ValueError, match=line):
        model(text)


def test_a_target_outside_the_vocabulary():
    model, text = model_of(), tokens_of(2, 8)
    targets = text.roll(1, 1)
    targets[0, 0] = 37
    with pytest.raises(ValueError, match="targets=37: must be below the vocabulary's size, 37"):
        model(text, targets)


def test_a_cache_does_not_count_backwards():
    held = cache.LatentCache(latent_dim=3, **CACHE)
    for steps in (-1, [2, -1]):
        with pytest.raises(ValueError, match="steps=-1: must be 0 or more"):
            held.advance(steps)
    assert held.lengths == [0, 0]


SHAPES = """
import numpy
import torch
from moemla.attention import MultiHeadAttention
from moemla.cache import KVCache, LatentCache
from moemla.generation import generate
from moemla.latent_attention import MultiHeadLatentAttention
from moemla.model import LanguageModel
from moemla.moe import MixtureOfExperts
from moemla.serving import Server
from tests.helpers import config_of, tokens_of
model, text = LanguageModel(config_of()), tokens_of(2, 8)
x, valid = torch.randn(2, 8, 12), torch.ones(2, 8, dtype=torch.bool)
experts = MixtureOfExperts(d_model=12, n_experts=5, top_k=2, d_expert=3)
layers = MultiHeadAttention(d_model=12, n_heads=3), MultiHeadLatentAttention(d_model=12, n_heads=3, latent_dim=4)
whole, rows = LatentCache(latent_dim=4, batch_size=2, max_len=9), dict(batch_size=2, max_len=9)
mask, given = "True at what is no padding", "give one layer's view of it, cache[i]"
for steps in (numpy.int64(3), torch.tensor([3, 3]), [numpy.int64(3), 3], (3, 3)):  # as good as numbers
    whole.advance(steps)
    assert whole.lengths == [3, 3] and type(whole.length) is int
    whole.crop(numpy.int64(0))
assert experts(x[0], valid[0]).shape == (8, 12) and experts(x[:, None], valid[:, None]).shape == (2, 1, 8, 12)
for call, line in (
    (lambda: experts(x, valid.T), f"valid='torch.bool (8, 2)': must be bool, of x's (2, 8): {mask}"),
    (lambda: experts(x, valid.float()), f"valid='torch.float32 (2, 8)': must be bool, of x's (2, 8): {mask}"),
    (lambda: experts(x, valid.long()), f"valid='torch.int64 (2, 8)': must be bool, of x's (2, 8): {mask}"),
    (lambda: LatentCache(latent_dim=4, **rows, dtype=torch.int8), "dtype=torch.int8: must be a floating type"),
    (lambda: layers[0](x, KVCache(n_kv_heads=3, d_head=4, **rows)), f"cache: is a KVCache of all layers; {given}"),
    (lambda: layers[1](x, whole), f"cache: is a LatentCache of all layers; {given}"),
    (lambda: model(text, cache=whole[0]), "cache: is a LayerCache; give the whole cache, of `new_cache`"),
    (lambda: model(text, lengths=[8.0, 2]), "lengths: are torch.float32; give whole numbers"),
    (lambda: whole.advance([2.0, 1.0]), "steps=[2.0, 1.0]: give whole numbers"),
    (lambda: whole.advance(1.5), "steps=1.5: give whole numbers"),
    (lambda: whole.advance([9, 10]), "steps=[9, 10]: with [0, 0] tokens held they exceed max_len=9"),
    (lambda: whole.select([0.0]), "rows=[0.0]: name at least one row, by its number"),
    (lambda: whole.crop([1]), "length=[1]: one number, or one for each of the 2 rows"),
    (lambda: generate(model, [1, 2]), "tokens: 1 is no prompt; give a list of prompts, each a list of ids"),
    (lambda: generate(model, "once"), "tokens: 'o' is no prompt; give a list of prompts, each a list of ids"),
    (lambda: generate(model, [[1.5]]), "tokens: [1.5] is no prompt; give a list of prompts, each a list of ids"),
    (lambda: generate(model, [text]), "tokens: a prompt of torch.int64 (2, 8); give 1-D ids"),
    (lambda: Server(model, 1).submit([[1, 2]]), "prompt=[[1, 2]]: give ids, one list of them"),
    (lambda: Server(model, 1).submit(1), "prompt=1: give ids, one list of them"),
    (lambda: Server(model, 1).submit(torch.tensor([1.0])), "prompt=tensor([1.]): give ids, one list of them"),
    (lambda: Server(model, 1).submit(text), f"prompt={text!r}: give ids, one list of them"),
    (lambda: Server(model, 1).submit([1], seed=1.5), "seed=[1.5]: must be a whole number"),
    (lambda: Server(model, 1).submit([1], top_k=2.5), "top_k=2.5: must be a whole number of at least 1"),
    (lambda: generate(model, [[1]], stop=[1, 2]), "stop=[1, 2]: one token, between 0 and 36"),
    (lambda: generate(model, [[1]], stop=37), "stop=37: one token, between 0 and 36"),
    (lambda: model(text[0]), "tokens.shape=(8,): give (B, T)"),
    (lambda: model(text, text.T.contiguous()), "targets.shape=(8, 2): must be the tokens', (2, 8)"),
    (lambda: model(text, text.flatten()), "targets.shape=(16,): must be the tokens', (2, 8)"),
    (lambda: model(text, lengths=torch.tensor([8])), "lengths.shape=(1,): must have one for each of 2 rows"),
    (lambda: model(text, lengths=torch.tensor([[8]])), "lengths.shape=(1, 1): must have one for each of 2 rows"),
):
    try:
        call()
    except (ValueError, TypeError) as error:
        assert str(error) == line, error
    else:
        raise AssertionError(line)
"""


def test_shapes_that_do_not_fit():
    """In a process of its own, without the tests' own check of shapes: as users have it."""
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("learnable", [False, True])
def test_positions_before_the_first(learnable):
    rope, x = RotaryEmbedding(4, 8, learnable=learnable), torch.randn(1, 1, 1, 4)
    with pytest.raises(ValueError, match=r"positions=\(-1, 0\)"):
        rope(x, (-1, 0))
    if not learnable:
        with pytest.raises(IndexError, match="positions=-1: must be 0 or more"):
            rope(x, torch.tensor([[-1]]))


@torch.no_grad()
def test_the_cache_of_another_layer():
    """Also where the widths agree, and one head would be copied to all."""
    x = torch.randn(2, 1, 12)
    layer = MultiHeadLatentAttention(d_model=12, n_heads=3, latent_dim=4)
    for other in (
        cache.KVCache(n_kv_heads=3, d_head=4, **CACHE),
        cache.LatentCache(latent_dim=5, **CACHE),
        cache.JointLatentCache(latent_dim=4, d_rope=4, **CACHE),
    ):
        with pytest.raises(ValueError, match=rf"cache={type(other).__name__}: keeps \(heads, width\) .* layer has"):
            layer(x, other[0])
    heads = MultiHeadAttention(d_model=12, n_heads=3)
    with pytest.raises(ValueError, match=r"keeps .*\(1, 4\).* this layer has .*\(3, 4\)"):
        heads(x, cache.LatentCache(latent_dim=4, **CACHE)[0])
