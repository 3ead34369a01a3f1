"""The classes that a reader builds in the chapters go through the same property tests as the library's."""

from functools import cache
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import moemla
from moemla import (
    DecoupledLatentAttention,
    HybridCache,
    JointLatentCache,
    KVCache,
    LatentCache,
    ModelConfig,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    RotaryEmbedding,
    Tokenizer,
    complexity,
)
from moemla.generation import filter_logits
from moemla.losses import linear_cross_entropy
from moemla.ngrams import NGram
from moemla.optim import learning_rate, make_optimizers
from moemla.stories import stories
from tests.helpers import Made
from tools.browser import ROOT
from tools.chapter_code import load_definitions

TEXTS = [story.text for story in stories(60, seed=5)]
STRANGE = ["", "naïve café", "😊 漢字", "tabs\tand\n\nlines  ", "<|endoftext|>", "\x00\x7f", "Don't! 12 34?"]


@cache
def chapter(name):
    return load_definitions(ROOT / "book" / f"{name}.ipynb")


def tokenizers():
    yield "library", lambda: Tokenizer.train(TEXTS, 400)
    yield "chapter", lambda: chapter("01-stories-and-tokens").BytePairs().train(TEXTS, 400)


def counted():
    def library(order, documents):
        return NGram(order, 400).fit(np.concatenate(documents), np.cumsum([0, *map(len, documents)])).distribution

    def by_hand(order, documents):
        model = chapter("01-stories-and-tokens").Counted(order, 400).fit(documents)
        return lambda context: np.array([model.probability(context, token) for token in range(400)])

    yield "library", library
    yield "chapter", by_hand


def attentions():
    yield "library", lambda: MultiHeadAttention(d_model=32, n_heads=4)
    yield "chapter", lambda: chapter("02-multi-head-attention").CausalAttention(32, 4)


def latents():
    yield "library", lambda: MultiHeadLatentAttention(d_model=32, n_heads=4, latent_dim=12)
    yield "chapter", lambda: chapter("03-latent-attention").LatentAttention(32, 4, 12)


def every_attention():
    for kind, pairs in (("ordinary", attentions()), ("latent", latents())):
        yield from ((f"{kind}-{name}", make) for name, make in pairs)


def each(pairs):
    return pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in pairs])


# ---- chapter 1


@each(tokenizers())
def test_nothing_is_lost_and_no_text_ends_a_story(make):
    tokenizer = make()
    for text in [*STRANGE, *TEXTS[:5]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 not in ids


@each(tokenizers())
def test_merging_shortens(make):
    tokenizer = make()
    assert sum(len(tokenizer.encode(text)) for text in TEXTS) < 0.6 * sum(len(text.encode()) for text in TEXTS)


@each(counted())
@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_in_every_context(make, order):
    tokenizer = Tokenizer.train(TEXTS, 400)
    documents = [np.array([0, *tokenizer.encode(text)]) for text in TEXTS]
    distribution = make(order, documents)
    for context in ([], [0], documents[0][3:5].tolist(), [399, 398], [0, 399]):
        p = distribution(context)
        assert p.shape == (400,) and (p >= 0).all()
        assert abs(p.sum() - 1) < 1e-9


def test_the_chapters_tokenizer_learns_anew_and_within_its_limits():
    code = chapter("01-stories-and-tokens")
    again = code.BytePairs().train(TEXTS[:5], 300).train(TEXTS[:9], 320)
    once = code.BytePairs().train(TEXTS[:9], 320)
    assert again.pieces == once.pieces and again.merges == once.merges
    assert code.BytePairs().train(["ab ab"], 400).pieces[257:] == [b"ab", b" ab"]  # and then nothing is left to merge
    with pytest.raises(ValueError, match="vocab_size=256: must be 257 or more"):
        code.BytePairs().train(TEXTS[:5], 256)


def test_the_chapters_counts_take_any_iterable_and_no_strange_token():
    code = chapter("01-stories-and-tokens")
    counts = [1] * 60 + [2] * 20 + [3] * 10 + [4] * 5
    assert code.discounts_for(iter(counts)) == code.discounts_for(counts) != [0, 0.5, 1, 1.5]
    for strange in ([0, 7, 3], [0, -1, 3]):
        with pytest.raises(ValueError, match="ids: must be 0 to 6"):
            code.Counted(2, 7).fit([[0, 1, 2], strange])


# ---- chapters 2 and 3


@each(every_attention())
def test_no_output_depends_on_a_later_input(make):
    x = torch.randn(1, 6, 32, requires_grad=True)
    out = make()(x)
    for i in range(6):
        (slope,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        assert (slope[0, i + 1 :] == 0).all() and slope[0, i].abs().max() > 0


@each(every_attention())
def test_the_past_is_a_set(make):
    layer, x = make(), torch.randn(2, 8, 32)
    order = torch.cat((torch.randperm(7), torch.tensor([7])))
    torch.testing.assert_close(layer(x)[:, -1], layer(x[:, order])[:, -1], atol=1e-5, rtol=1e-5)


@each(every_attention())
def test_rows_of_a_batch_do_not_meet(make):
    layer, x = make(), torch.randn(3, 5, 32)
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, atol=1e-5, rtol=1e-5)


def _library_steps(layer, x):
    held, out = KVCache(batch_size=2, max_len=8, n_kv_heads=4, d_head=8), []
    for t in range(x.shape[1]):
        out.append(layer(x[:, t : t + 1], held[0]))
        held.advance(1)
    return torch.cat(out, dim=1)


def _chapter_steps(layer, x):
    code = chapter("02-multi-head-attention")
    held = code.Cache(2, 4, max_len=8, d_head=8)
    return torch.cat([code.step(layer, x[:, t : t + 1], held) for t in range(x.shape[1])], dim=1)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(dict(attentions())["library"], _library_steps, id="library"),
        pytest.param(dict(attentions())["chapter"], _chapter_steps, id="chapter"),
    ],
)
def test_token_by_token_equals_all_at_once(make, steps):
    layer, x = make(), torch.randn(2, 8, 32)
    with torch.no_grad():
        torch.testing.assert_close(steps(layer, x), layer(x), atol=1e-5, rtol=1e-5)


def _library_latent_steps(absorb):
    def steps(layer, x):
        held, out = LatentCache(batch_size=2, max_len=8, latent_dim=12), []
        for t in range(x.shape[1]):
            out.append(layer(x[:, t : t + 1], held[0], absorb=absorb))
            held.advance(1)
        return torch.cat(out, dim=1), held.nbytes

    return steps


def _chapter_latent_steps(name):
    def steps(layer, x):
        code = chapter("03-latent-attention")
        held = code.Latents(2, max_len=8, latent_dim=12)
        return code.one_by_one(getattr(code, name), layer, x, held), code.bytes_held(held)

    return steps


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(dict(latents())[whose], steps, id=f"{whose}-{how}")
        for whose, how, steps in (
            ("library", "rebuilt", _library_latent_steps(False)),
            ("library", "absorbed", _library_latent_steps(True)),
            ("chapter", "rebuilt", _chapter_latent_steps("step_rebuilt")),
            ("chapter", "absorbed", _chapter_latent_steps("step_absorbed")),
        )
    ],
)
def test_latents_are_enough_and_nothing_else_is_kept(make, steps):
    layer, x = make(), torch.randn(2, 8, 32)
    with torch.no_grad():
        out, held = steps(layer, x)
        torch.testing.assert_close(out, layer(x), atol=1e-5, rtol=1e-5)
    assert held == 2 * 2 * 8 * 12 * 4  # two latents, rows, tokens, numbers, bytes


def several_at_once():
    """(name, layer, step, cache): float64 layers of width 32, what takes new tokens, and the cache for `rows` rows."""
    two, three = chapter("02-multi-head-attention"), chapter("03-latent-attention")
    four, wide = chapter("04-rotary-positions"), torch.float64

    def with_inputs(layer, new, cache):
        out, cache.past = three.step_from_inputs(layer, new, cache.past)
        return out

    def keys(rows=2):
        return two.Cache(rows, 4, max_len=9, d_head=8, dtype=wide)

    def latent(rows=2):
        return three.Latents(rows, max_len=9, latent_dim=12, dtype=wide)

    def rotary(**how):
        return lambda layer, new, cache: layer(new, cache, **how)

    def ordinary():
        return two.CausalAttention(32, 4).double()

    def narrow():
        return three.LatentAttention(32, 4, 12).double()

    def turned():
        return four.RotaryLatentAttention(32, 4, 12, four.Rope(8)).double()

    def decoupled():
        return four.DecoupledAttention(32, 4, 12, d_nope=6, d_value=10, rope=four.Rope(4)).double()

    yield "keys", ordinary, two.step, keys
    yield "inputs", ordinary, with_inputs, lambda rows=2: SimpleNamespace(past=torch.zeros(rows, 0, 32, dtype=wide))
    yield "rebuilt", narrow, three.step_rebuilt, latent
    yield "absorbed", narrow, three.step_absorbed, latent
    yield "kept-slices", narrow, three.step_fused, lambda rows=2: three.KeptSlices()
    yield "paper-absorbed", turned, rotary(absorb=True), lambda rows=2: four.Kept(9)
    yield "decoupled", decoupled, rotary(), lambda rows=2: four.Kept(9)
    yield "decoupled-absorbed", decoupled, rotary(absorb=True), lambda rows=2: four.Kept(9)


SEVERAL = [pytest.param(*rest, id=name) for name, *rest in several_at_once()]
STORED = [case for case in SEVERAL if case.id not in ("inputs", "kept-slices")]


@pytest.mark.parametrize(("make", "step", "cache"), SEVERAL)
@torch.no_grad()
def test_several_new_tokens_do_not_see_each_others_future(make, step, cache):
    layer, x, held = make(), torch.randn(2, 9, 32, dtype=torch.float64), cache()
    steps = [step(layer, part, held) for part in x.split([3, 1, 4, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("make", "step", "cache"), STORED)
@torch.no_grad()
def test_a_full_cache_refuses(make, step, cache):
    layer, x, held = make(), torch.randn(2, 10, 32, dtype=torch.float64), cache()
    step(layer, x[:, :9], held)
    with pytest.raises(ValueError, match="room for"):
        step(layer, x[:, 9:], held)
    assert held.length == 9


@pytest.mark.parametrize(("make", "step", "cache"), STORED)
@torch.no_grad()
def test_a_cache_of_two_rows_refuses_one(make, step, cache):
    layer, x, held = make(), torch.randn(2, 4, 32, dtype=torch.float64), cache()
    step(layer, x, held)
    with pytest.raises(ValueError, match="room for"):
        step(layer, x[:1], held)


PAST = 400  # tokens held: more than the weights of a layer count


@torch.no_grad()
def largest_made(layer, step, cache):
    """Numbers of the largest tensor made in one step with PAST tokens behind it."""
    x = torch.randn(2, PAST + 2, 32, dtype=torch.float64)
    for part in x[:, :-1].split([PAST, 1], dim=1):
        step(layer, part, cache)
    with Made() as made:
        step(layer, x[:, -1:], cache)
    return made.largest


def absorbing():
    """(name, layer, step, cache) of the two forms in which nothing of the past is rebuilt."""
    three, four = chapter("03-latent-attention"), chapter("04-rotary-positions")

    def decoupled():
        return four.DecoupledAttention(32, 4, 12, d_nope=6, d_value=10, rope=four.Rope(4)).double()

    latents = three.Latents(2, max_len=PAST + 2, latent_dim=12, dtype=torch.float64)
    yield "chapter-3", three.LatentAttention(32, 4, 12).double(), three.step_absorbed, latents
    yield "chapter-4", decoupled(), lambda layer, x, kept: layer(x, kept, absorb=True), four.Kept(PAST + 2)


def test_an_absorbed_step_copies_no_latents(monkeypatch):
    scores, latents = 2 * 4 * (PAST + 2), 2 * 12 * PAST
    for name, layer, step, held in absorbing():
        # the scores of four heads, or the weights of a layer: less than one copy of the latents, let alone H
        assert scores <= largest_made(layer, step, held) < latents, name

    # the same measure sees latents that are broadcast to all heads, and a cache that grows
    _, layer, step, held = list(absorbing())[1]
    monkeypatch.setitem(type(layer).forward.__globals__, "product", torch.matmul)
    assert largest_made(layer, step, held) >= 4 * latents

    class Grows:
        held = None

        def __len__(self):
            return 0 if self.held is None else self.held.shape[-2]

        def append(self, new):
            self.held = new if self.held is None else torch.cat((self.held, new), dim=-2)
            return [self.held]

    monkeypatch.undo()
    assert largest_made(layer, step, Grows()) >= latents


@torch.no_grad()
def test_absorbed_values_take_the_operations_that_chapter_4_counts():
    code = chapter("04-rotary-positions")
    counts = code.forms(d=32, h=4, r=12, d_rope=4)
    paper, hybrid = (code.RotaryLatentAttention(32, 4, 12, code.Rope(8), hybrid=h) for h in (False, True))
    decoupled = code.DecoupledAttention(32, 4, 12, d_nope=6, d_value=10, rope=code.Rope(4))
    x = torch.randn(1, 22, 32)
    for name, layer in (("paper, K rebuilt", paper), ("hybrid", hybrid), ("decoupled, absorbed", decoupled)):
        kept, macs = code.Kept(22), []
        layer(x[:, :20], kept)
        for t in (20, 21):
            with FlopCounterMode(display=False) as counter:
                layer(x[:, t : t + 1], kept, absorb=True)
            macs.append(counter.get_total_flops() // 2)
        assert (sum(held.numel() for held in kept.storage) // 22, macs[1] - macs[0]) == counts[name]


@each(latents())
def test_keys_of_all_heads_lie_in_the_latents_directions(make):
    layer = make().double()
    with torch.no_grad():
        keys = layer.k_up(layer.k_down(torch.randn(60, 32, dtype=torch.float64)))
    assert torch.linalg.matrix_rank(keys - keys.mean(0)) == 12


# ---- chapter 4


def rotations():
    """(name, make): a rotation of width 8 in the layout asked for, called with x (B, H, T, 8) and positions (1, T)."""
    yield "library", lambda layout: RotaryEmbedding(8, 512, layout=layout, dtype=torch.float64)
    yield "chapter", lambda layout: chapter("04-rotary-positions").Rope(8, layout=layout)


def rotary_attentions():
    """(name, make, cached): float64 layers of width 32, and their output token by token with a cache."""
    code = chapter("04-rotary-positions")
    how = dict(d_model=32, n_heads=4, latent_dim=12, bias=False, dtype=torch.float64)
    room = dict(batch_size=2, max_len=16, dtype=torch.float64)

    def library_steps(cache):
        def steps(layer, x):
            held, out = cache(), []
            for t in range(x.shape[1]):
                out.append(layer(x[:, t : t + 1], held[0]))
                held.advance(1)
            return torch.cat(out, dim=1)

        return steps

    def chapter_steps(**how):
        def steps(layer, x):
            kept = code.Kept(16)
            return torch.cat([layer(x[:, t : t + 1], kept, **how) for t in range(x.shape[1])], dim=1)

        return steps

    def paper():
        return MultiHeadLatentAttention(rope=RotaryEmbedding(8, 512, dtype=torch.float64), **how)

    def decoupled():
        rope = RotaryEmbedding(4, 512, layout="interleaved", dtype=torch.float64)
        return DecoupledLatentAttention(d_nope=6, d_value=10, rope=rope, **how)

    def chapter_paper(**keep):
        return code.RotaryLatentAttention(32, 4, 12, code.Rope(8), **keep).double()

    def chapter_decoupled():
        rope = code.Rope(4, layout="interleaved")
        return code.DecoupledAttention(32, 4, 12, d_nope=6, d_value=10, rope=rope).double()

    yield "library-paper", paper, library_steps(lambda: LatentCache(latent_dim=12, **room))
    yield "library-hybrid", paper, library_steps(lambda: HybridCache(n_heads=4, d_head=8, latent_dim=12, **room))
    yield "library-decoupled", decoupled, library_steps(lambda: JointLatentCache(latent_dim=12, d_rope=4, **room))
    yield "chapter-paper", chapter_paper, chapter_steps()
    yield "chapter-paper-absorbed", chapter_paper, chapter_steps(absorb=True)
    yield "chapter-hybrid", lambda: chapter_paper(hybrid=True), chapter_steps()
    yield "chapter-hybrid-absorbed", lambda: chapter_paper(hybrid=True), chapter_steps(absorb=True)
    yield "chapter-decoupled", chapter_decoupled, chapter_steps()
    yield "chapter-absorbed", chapter_decoupled, chapter_steps(absorb=True)


ROTARY = [pytest.param(make, cached, id=name) for name, make, cached in rotary_attentions()]


class Moved(torch.nn.Module):
    """A rotation that believes every token to be `by` positions further on."""

    def __init__(self, rope, by):
        super().__init__()
        self.rope, self.by = rope, by

    def forward(self, x, positions=None):
        positions = torch.arange(x.shape[2])[None] if positions is None else positions
        return self.rope(x, positions + self.by)


@each(rotations())
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_a_rotation_keeps_lengths_and_makes_scores_of_distance(make, layout):
    rope, (q, k) = make(layout), torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)

    def score(m, n):
        return (rope(q, torch.tensor([[m]])) * rope(k, torch.tensor([[n]]))).sum()

    for m, n, by in ((0, 0, 400), (7, 2, 90), (2, 7, 1), (300, 11, 200)):
        torch.testing.assert_close(score(m, n), score(m + by, n + by), atol=1e-11, rtol=0)
    assert len({round(score(0, n).item(), 9) for n in range(64)}) == 64
    turned = rope(q, torch.tensor([[5]]))
    torch.testing.assert_close(turned.norm(), q.norm())
    assert (turned - q).abs().max() > 0.01 and torch.equal(rope(q, torch.tensor([[0]])), q)


def test_the_chapters_rotation_refuses_what_torch_would_broadcast():
    code = chapter("04-rotary-positions")
    for width in (1, 7):
        with pytest.raises(ValueError, match=f"width={width}"):
            code.Rope(width)
    with pytest.raises(ValueError, match="layout='half'"):
        code.Rope(8, layout="half")
    rope = code.Rope(2)
    for x, positions in (
        (torch.randn(1, 3, 5, 8), torch.arange(5)),  # one speed for four pairs
        (torch.randn(1, 3, 5, 2), torch.tensor([3])),  # one position for five tokens
        (torch.randn(3, 3, 5, 2), torch.arange(15).view(3, 5)),  # rows' positions would meet the heads
    ):
        with pytest.raises(ValueError, match="must end in"):
            rope(x, positions)


@each(rotations())
def test_layouts_differ_by_a_permutation(make):
    x, here = torch.randn(1, 2, 9, 8, dtype=torch.float64), torch.arange(9)[None]
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # interleaved place -> halves place
    halves, interleaved = make("halves"), make("interleaved")
    torch.testing.assert_close(interleaved(x[..., order], here), halves(x, here)[..., order], atol=1e-14, rtol=0)
    assert (interleaved(x, here) - halves(x, here)).abs().max() > 0.1


@pytest.mark.parametrize(("make", "cached"), ROTARY)
def test_rotary_attention_is_causal_and_cached_equals_uncached(make, cached):
    layer, x = make(), torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    for i in range(9):
        (slope,) = torch.autograd.grad(out[:, i].sum(), x, retain_graph=True)
        assert (slope[:, i + 1 :] == 0).all() and slope[:, i].abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(cached(layer, x), out, atol=1e-11, rtol=0)
        alone = torch.cat([layer(row[None]) for row in x])
        torch.testing.assert_close(alone, out, atol=1e-11, rtol=0)


@pytest.mark.parametrize(("make", "cached"), ROTARY)
@torch.no_grad()
def test_rotary_attention_sees_order_and_distance_alone(make, cached):
    layer, x = make(), torch.randn(2, 9, 32, dtype=torch.float64)
    out = layer(x)
    swapped = x[:, [1, 0, *range(2, 9)]]
    assert (layer(swapped)[:, -1] - out[:, -1]).abs().max() > 1e-4, "the order of the past is invisible"
    layer.rope = Moved(layer.rope, 100)
    torch.testing.assert_close(layer(x), out, atol=1e-10, rtol=0)


# ---- chapter 5

FIVE = "05-small-language-model"
BOTH = pytest.mark.parametrize("whose", ["library", "chapter"])
EACH_VARIANT = pytest.mark.parametrize("variant", ["mha", "mha-rope", "mla", "mla-rope"])


def language_model(whose, variant, **changes):
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny", variant, n_layers=3, d_model=32, vocab_size=50, max_seq_len=16, **changes)
    return moemla.LanguageModel(config) if whose == "library" else chapter(FIVE).LanguageModel(config)


def adamw(whose, model):
    if whose == "library":
        return make_optimizers(model, "adamw", weight_decay=0.1)[0]
    return chapter(FIVE).AdamW(chapter(FIVE).groups_of(model, 0.1))


@BOTH
@EACH_VARIANT
def test_a_language_model_is_causal_and_its_rows_do_not_meet(whose, variant):
    model, tokens = language_model(whose, variant).double(), torch.randint(50, (3, 9))
    vectors = []
    model.embedding.register_forward_hook(lambda module, args, out: vectors.append(out))
    logits = model(tokens)
    for i in range(9):
        (slope,) = torch.autograd.grad(logits[:, i].sum(), vectors[0], retain_graph=True)
        assert (slope[:, i + 1 :] == 0).all() and slope[:, i].abs().max() > 0
    torch.testing.assert_close(torch.cat([model(row[None]) for row in tokens]), logits, atol=1e-12, rtol=0)


@BOTH
@EACH_VARIANT
@torch.no_grad()
def test_a_language_model_writes_the_same_with_a_cache(whose, variant):
    model, tokens = language_model(whose, variant).double(), torch.randint(50, (2, 12))
    cache = model.new_cache(2, 12) if whose == "library" else chapter(FIVE).cache_for(model, 2, 12)
    steps = [model(part, cache=cache) for part in tokens.split([7, 1, 3, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(tokens), atol=1e-12, rtol=0)
    assert cache.length == 12


@BOTH
@EACH_VARIANT
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_begins_knowing_nothing_with_the_parameters_that_are_counted(whose, variant, tied):
    model = language_model(whose, variant, tie_embeddings=tied)
    tokens = torch.randint(50, (8, 13))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:])
    assert abs(loss.item() - np.log(50)) < 0.05
    assert sum(p.numel() for p in model.parameters()) == complexity.parameters(model.config).total
    writers = [
        p.std().item() for n, p in model.named_parameters() if n.endswith(("out_proj.weight", "ward.down.weight"))
    ]
    assert len(writers) == 6 and all(abs(std / (0.02 / 6**0.5) - 1) < 0.15 for std in writers)


@BOTH
def test_a_feed_forward_layer_sees_each_token_alone(whose):
    make = moemla.FeedForward if whose == "library" else chapter(FIVE).FeedForward
    layer, x = make(d_model=16, d_ff=64).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    alone = torch.stack([torch.stack([layer(token) for token in row]) for row in x])
    torch.testing.assert_close(layer(x), alone, atol=1e-12, rtol=0)
    bent = layer(2 * x) - 2 * layer(x) + layer(0 * x)
    assert bent.abs().max() > 1e-3, "without a bend two matrices are one"


@BOTH
def test_adamw_steps_by_the_rate_and_pulls_matrices_alone(whose):
    model, lr = language_model(whose, "mla-rope").double(), 1e-3
    optimizer = adamw(whose, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 10.0**-number) if number % 2 else torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for number, (name, p) in enumerate(model.named_parameters()):
        pulled = before[name] * (1 - lr * 0.1) if p.dim() > 1 else before[name]
        wanted = pulled - lr * 10.0**-number / (10.0**-number + 1e-8) if number % 2 else pulled
        torch.testing.assert_close(p.detach(), wanted, atol=1e-12, rtol=0, msg=name)


@BOTH
@pytest.mark.parametrize("chunk", [1, 7, 40, 1000])
def test_the_loss_does_not_depend_on_the_pieces(whose, chunk):
    x, weight = torch.randn(40, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    targets = torch.randint(30, (40,))
    x.requires_grad_(), weight.requires_grad_()
    wanted = torch.nn.functional.cross_entropy(x @ weight.T, targets)
    slopes = torch.autograd.grad(wanted, (x, weight))
    if whose == "library":
        loss = linear_cross_entropy(x, weight, targets, chunk)
        found = torch.autograd.grad(loss, (x, weight))
    else:
        with torch.no_grad():
            loss, *found = chapter(FIVE).loss_in_chunks(x, weight, targets, chunk)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(tuple(found), slopes)


@BOTH
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.7), (9, 0.5)])
def test_what_is_drawn_from_is_a_distribution_of_the_likeliest(whose, temperature, top_k, top_p):
    logits, how = 2 * torch.randn(6, 40), dict(temperature=temperature, top_k=top_k, top_p=top_p)
    p = filter_logits(logits, **how).exp() if whose == "library" else chapter(FIVE).probabilities(logits, **how)
    likeliest = (logits.double() / temperature).masked_fill(
        logits < logits.topk(top_k or 40).values[:, -1:], -torch.inf
    )
    for row, plain in zip(p, likeliest.softmax(-1), strict=True):
        allowed = row > 0
        kept = plain[allowed].sum()
        torch.testing.assert_close(row, plain.where(allowed, 0.0) / kept)
        assert plain[allowed].min() > plain.masked_fill(allowed, -1).max(), "a likelier one was ruled out"
        if top_p:
            assert kept >= top_p > kept - plain[allowed].min()
        else:
            assert allowed.sum() == (top_k or 40)


@BOTH
def test_the_rate_climbs_then_falls_to_its_end(whose):
    rate_at = learning_rate if whose == "library" else chapter(FIVE).rate_at
    rates = [rate_at(step, lr=2.0, min_lr=0.5, warmup=10, steps=60) for step in range(61)]
    assert rates[:11] == pytest.approx([0.2 * n for n in range(1, 11)] + [2.0])
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[60] == pytest.approx(0.5) and rates[35] == pytest.approx(1.25)
