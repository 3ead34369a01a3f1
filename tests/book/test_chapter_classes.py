"""The classes that a reader builds in the chapters go through the same checks as the library's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
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
from moemla.balancing import RULES, Balancer, noise_floor, quantile_rule, switch_loss
from moemla.checks import attention, balancing, equals_oracle, experts, model, rope, tokens, training
from moemla.generation import filter_logits
from moemla.losses import linear_cross_entropy
from moemla.ngrams import NGram
from moemla.optim import learning_rate, make_optimizers
from moemla.routing import Router, Routing, margin_histogram, route
from moemla.stories import stories
from tools.book import plan
from tools.chapter_code import load_definitions

TEXTS = [story.text for story in stories(60, seed=5)]
BOTH = pytest.mark.parametrize("whose", ["library", "chapter"])


@cache
def chapter(number):
    return load_definitions(next(chapter.notebook for chapter in plan() if chapter.number == number))


# ---- chapter 1


@BOTH
def test_a_tokenizer(whose):
    tokenizer = Tokenizer.train(TEXTS, 400) if whose == "library" else chapter(1).BytePairs().train(TEXTS, 400)
    tokens.nothing_is_lost(tokenizer, TEXTS[:5])
    tokens.shortens(tokenizer, TEXTS)


@BOTH
@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_in_every_context(whose, order):
    tokenizer = Tokenizer.train(TEXTS, 400)
    documents = [np.array([0, *tokenizer.encode(text)]) for text in TEXTS]
    if whose == "library":
        ends = np.cumsum([0, *map(len, documents)])
        distribution = NGram(order, 400).fit(np.concatenate(documents), ends).distribution
    else:
        counted = chapter(1).Counted(order, 400).fit(documents)

        def distribution(context):
            return [counted.probability(context, token) for token in range(400)]

    tokens.sums_to_one(distribution, 400, ([], [0], documents[0][3:5].tolist(), [399, 398], [0, 399]))


def test_the_chapters_tokenizer_learns_anew_and_within_its_limits():
    code = chapter(1)
    again = code.BytePairs().train(TEXTS[:5], 300).train(TEXTS[:9], 320)
    once = code.BytePairs().train(TEXTS[:9], 320)
    assert again.pieces == once.pieces and again.merges == once.merges
    assert code.BytePairs().train(["ab ab"], 400).pieces[257:] == [b"ab", b" ab"]  # and then nothing is left to merge
    with pytest.raises(ValueError, match="vocab_size=256: must be 257 or more"):
        code.BytePairs().train(TEXTS[:5], 256)


def test_the_chapters_counts_take_any_iterable_and_no_strange_token():
    code = chapter(1)
    counts = [1] * 60 + [2] * 20 + [3] * 10 + [4] * 5
    assert code.discounts_for(iter(counts)) == code.discounts_for(counts) != [0, 0.5, 1, 1.5]
    for strange in ([0, 7, 3], [0, -1, 3]):
        with pytest.raises(ValueError, match="ids: must be 0 to 6"):
            code.Counted(2, 7).fit([[0, 1, 2], strange])


# ---- chapters 2 to 4: each layer with each cache, in float64

WIDTH, WIDE = 32, torch.float64
SIZES = dict(d_model=WIDTH, n_heads=4, dtype=WIDE)
LATENT = SIZES | dict(latent_dim=12)


@dataclass(frozen=True)
class Form:
    """A layer and the way it goes on from what it keeps: `start(layer)` is what the checks call `start`.

    numbers: kept of a token; None where storage is not made once. absorbed: numbers that a step may not copy.
    """

    name: str
    make: Callable
    start: Callable
    numbers: int | None
    absorbed: int | None = None

    @property
    def rotary(self):
        return getattr(self.make(), "rope", None) is not None


def library(kind, absorb=None, **sizes):
    """Steps of a library's layer with a library's cache."""
    how = {} if absorb is None else dict(absorb=absorb)

    def start(layer, rows, max_len):
        held = kind(batch_size=rows, max_len=max_len, dtype=WIDE, **sizes)

        def step(x, lengths=None):
            out = layer(x, held[0], **how)
            held.advance(x.shape[1] if lengths is None else list(lengths))
            return out

        return step, held

    return lambda layer: partial(start, layer)


def book(step, new):
    """Steps of a chapter's layer: step(layer, x, cache), with the cache that new(rows, max_len) makes."""

    def start(layer, rows, max_len):
        held = new(rows, max_len)
        return lambda x: step(layer, x, held), held

    return lambda layer: partial(start, layer)


def forms():
    two, three, four = chapter(2), chapter(3), chapter(4)

    def with_inputs(layer, x, cache):
        out, cache.past = three.step_from_inputs(layer, x, cache.past)
        return out

    def inputs(rows, max_len):
        return SimpleNamespace(past=torch.zeros(rows, 0, WIDTH, dtype=WIDE))

    def keys(rows, max_len):
        return two.Cache(rows, 4, max_len=max_len, d_head=8, dtype=WIDE)

    def latents(rows, max_len):
        return three.Latents(rows, max_len=max_len, latent_dim=12, dtype=WIDE)

    def rotary(**how):
        return book(lambda layer, x, kept: layer(x, kept, **how), lambda rows, max_len: four.Kept(max_len))

    def mha():
        return MultiHeadAttention(**SIZES)

    def mla():
        return MultiHeadLatentAttention(**LATENT)

    def paper():
        return MultiHeadLatentAttention(rope=RotaryEmbedding(8, 512, dtype=WIDE), bias=False, **LATENT)

    def decoupled():
        turn = RotaryEmbedding(4, 512, layout="interleaved", dtype=WIDE)
        return DecoupledLatentAttention(d_nope=6, d_value=10, rope=turn, bias=False, **LATENT)

    def book_mha():
        return two.CausalAttention(WIDTH, 4).double()

    def book_mla():
        return three.LatentAttention(WIDTH, 4, 12).double()

    def book_paper(**keep):
        return four.RotaryLatentAttention(WIDTH, 4, 12, four.Rope(8), **keep).double()

    def book_decoupled():
        turn = four.Rope(4, layout="interleaved")
        return four.DecoupledAttention(WIDTH, 4, 12, d_nope=6, d_value=10, rope=turn).double()

    hybrid = dict(n_heads=4, d_head=8, latent_dim=12)
    yield Form("library-keys", mha, library(KVCache, n_kv_heads=4, d_head=8), 64)
    yield Form("library-rebuilt", mla, library(LatentCache, absorb=False, latent_dim=12), 24)
    yield Form("library-absorbed", mla, library(LatentCache, absorb=True, latent_dim=12), 24)
    yield Form("library-paper", paper, library(LatentCache, latent_dim=12), 24)
    yield Form("library-hybrid", paper, library(HybridCache, **hybrid), 44)
    yield Form("library-decoupled", decoupled, library(JointLatentCache, latent_dim=12, d_rope=4), 16, absorbed=12)
    yield Form("keys", book_mha, book(two.step, keys), 64)
    yield Form("inputs", book_mha, book(with_inputs, inputs), None)
    yield Form("rebuilt", book_mla, book(three.step_rebuilt, latents), 24)
    yield Form("absorbed", book_mla, book(three.step_absorbed, latents), 24, absorbed=12)
    yield Form("kept-slices", book_mla, book(three.step_fused, lambda rows, max_len: three.KeptSlices()), None)
    yield Form("paper", book_paper, rotary(), 24)
    yield Form("paper-absorbed", book_paper, rotary(absorb=True), 24)
    yield Form("hybrid", partial(book_paper, hybrid=True), rotary(), 44)
    yield Form("hybrid-absorbed", partial(book_paper, hybrid=True), rotary(absorb=True), 44)
    yield Form("decoupled", book_decoupled, rotary(), 16)
    yield Form("decoupled-absorbed", book_decoupled, rotary(absorb=True), 16, absorbed=12)


FORMS = {form.name: form for form in forms()}


def each(wanted):
    return pytest.mark.parametrize(
        "form", [pytest.param(form, id=name) for name, form in FORMS.items() if wanted(form)]
    )


@each(lambda form: True)
def test_attention_is_causal_and_its_rows_do_not_meet(form):
    layer = form.make()
    attention.causal(layer, WIDTH)
    attention.rows_apart(layer, WIDTH)


@each(lambda form: not form.rotary)
def test_without_positions_the_past_is_a_set(form):
    attention.past_is_a_set(form.make(), WIDTH)


@each(lambda form: form.rotary)
def test_rotary_attention_sees_order_and_distance_alone(form):
    rope.order_and_distance(form.make(), WIDTH)


@each(lambda form: True)
def test_a_prompt_and_steps_equal_one_pass(form):
    layer = form.make()
    attention.steps_equal_one_pass(layer, form.start(layer), WIDTH)


@each(lambda form: form.name.startswith("library"))
def test_rows_of_unequal_length_equal_each_alone(form):
    layer = form.make()
    attention.unequal_rows(layer, form.start(layer), WIDTH)


@each(lambda form: form.numbers)
def test_a_cache_refuses_what_does_not_fit(form):
    layer = form.make()
    full = attention.refuses_when_full(form.start(layer), WIDTH)
    rows = attention.refuses_other_rows(layer, form.start(layer), WIDTH)
    if not form.name.startswith("library"):
        assert "room for" in full["message"] and "room for" in rows["message"]


@each(lambda form: form.numbers)
def test_nothing_else_is_kept(form):
    layer = form.make()
    assert attention.bytes_held(form.start(layer), WIDTH, form.numbers) == {"bytes": 2 * 8 * form.numbers * 8}


@each(lambda form: form.absorbed)
def test_an_absorbed_step_copies_no_latents(form):
    layer, past = form.make(), 400
    made = attention.copies_no_past(form.start(layer), WIDTH, form.absorbed, past=past)
    if not form.name.startswith("library"):  # there torch's kernel never writes the scores out
        assert made["largest"] >= 2 * 4 * (past + 2), "the scores of four heads were not seen"


ORACLES = {
    "keys": "library-keys",
    "rebuilt": "library-rebuilt",
    "paper": "library-paper",
    "decoupled": "library-decoupled",
}


@pytest.mark.parametrize("name", ORACLES)
def test_a_chapters_attention_equals_the_librarys(name):
    equals_oracle(FORMS[name].make(), FORMS[ORACLES[name]].make(), WIDTH)


@pytest.mark.parametrize("name", ["library-rebuilt", "rebuilt"])
def test_keys_of_all_heads_lie_in_the_latents_directions(name):
    layer = FORMS[name].make()
    attention.keys_lie_in_the_latent(lambda x: layer.k_up(layer.k_down(x)), WIDTH, 12)


@torch.no_grad()
def test_absorbed_values_take_the_operations_that_chapter_4_counts():
    code = chapter(4)
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


def rotation(whose, layout):
    if whose == "library":
        return RotaryEmbedding(8, 512, layout=layout, dtype=WIDE)
    return chapter(4).Rope(8, layout=layout)


@BOTH
@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_a_rotation(whose, layout):
    rope.turns_the_pairs(rotation(whose, layout), layout=layout)
    rope.scores_by_distance(rotation(whose, layout))


@BOTH
def test_layouts_differ_by_a_permutation(whose):
    rope.layouts_differ_by_a_permutation(rotation(whose, "halves"), rotation(whose, "interleaved"))


def test_the_chapters_rotation_refuses_what_torch_would_broadcast():
    code = chapter(4)
    for width in (1, 7):
        with pytest.raises(ValueError, match=f"width={width}"):
            code.Rope(width)
    with pytest.raises(ValueError, match="layout='half'"):
        code.Rope(8, layout="half")
    turn = code.Rope(2)
    for x, positions in (
        (torch.randn(1, 3, 5, 8), torch.arange(5)),  # one speed for four pairs
        (torch.randn(1, 3, 5, 2), torch.tensor([3])),  # one position for five tokens
        (torch.randn(3, 3, 5, 2), torch.arange(15).view(3, 5)),  # rows' positions would meet the heads
    ):
        with pytest.raises(ValueError, match="must end in"):
            turn(x, positions)


# ---- chapter 5

EACH_VARIANT = pytest.mark.parametrize("variant", ["mha", "mha-rope", "mla", "mla-rope"])
VOCAB = 50


def language_model(whose, variant, **changes):
    torch.manual_seed(0)
    config = ModelConfig.preset("tiny", variant, n_layers=3, d_model=32, vocab_size=VOCAB, max_seq_len=16, **changes)
    return moemla.LanguageModel(config) if whose == "library" else chapter(5).LanguageModel(config)


def feed_forward(whose):
    return (moemla.FeedForward if whose == "library" else chapter(5).FeedForward)(d_model=16, d_ff=64).double()


@BOTH
@EACH_VARIANT
def test_a_language_model_is_causal_and_its_rows_do_not_meet(whose, variant):
    model.tokens_causal(language_model(whose, variant).double(), VOCAB)


@BOTH
@EACH_VARIANT
def test_a_language_model_writes_the_same_with_a_cache(whose, variant):
    lm = language_model(whose, variant).double()

    def start(rows, max_len):
        held = lm.new_cache(rows, max_len) if whose == "library" else chapter(5).cache_for(lm, rows, max_len)
        return partial(lm, cache=held), held

    model.tokens_in_steps(lm, start, VOCAB)


@EACH_VARIANT
def test_the_chapters_language_model_equals_the_librarys(variant):
    ours, theirs = (language_model(whose, variant).double() for whose in ("chapter", "library"))
    equals_oracle(ours, theirs, 32, vocab_size=VOCAB)


@BOTH
@EACH_VARIANT
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_begins_knowing_nothing_with_the_parameters_that_are_counted(whose, variant, tied):
    lm = language_model(whose, variant, tie_embeddings=tied)
    model.begins_knowing_nothing(lm, VOCAB, 3, complexity.parameters(lm.config).total)


@BOTH
def test_a_feed_forward_layer_sees_each_token_alone_and_bends(whose):
    model.tokens_apart(feed_forward(whose), 16)
    model.bends(feed_forward(whose), 16)


def test_the_chapters_feed_forward_equals_the_librarys():
    equals_oracle(feed_forward("chapter"), feed_forward("library"), 16)


@BOTH
def test_adamw_steps_by_the_rate_and_pulls_matrices_alone(whose):
    def of(lm):
        if whose == "library":
            return make_optimizers(lm, "adamw", weight_decay=0.1)[0]
        return chapter(5).AdamW(chapter(5).groups_of(lm, 0.1))

    training.adamw_steps(of, language_model(whose, "mla-rope").double())


@BOTH
def test_the_loss_does_not_depend_on_the_pieces(whose):
    def library(x, weight, targets, chunk):
        loss = linear_cross_entropy(x, weight, targets, chunk)
        return loss, *torch.autograd.grad(loss, (x, weight))

    training.loss_in_pieces(library if whose == "library" else torch.no_grad()(chapter(5).loss_in_chunks))


@BOTH
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.7), (9, 0.5)])
def test_what_is_drawn_from_is_a_distribution_of_the_likeliest(whose, temperature, top_k, top_p):
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p)

    def probabilities(logits):
        return filter_logits(logits, **how).exp() if whose == "library" else chapter(5).probabilities(logits, **how)

    training.draws_from_the_likeliest(probabilities, **how)


@BOTH
def test_the_rate_climbs_then_falls_to_its_end(whose):
    training.rate_climbs_and_falls(learning_rate if whose == "library" else chapter(5).rate_at)


# ---- chapter 8

BY_COUNTS = {
    "sign": "sign_rule",
    "proportional": "proportional_rule",
    "algorithm-1": "algorithm_1",
    "equation-4": "equation_4",
}
EACH_RULE = pytest.mark.parametrize("name", BY_COUNTS)


def rule_of(whose, name):
    return RULES[name] if whose == "library" else getattr(chapter(8), BY_COUNTS[name])


@EACH_RULE
def test_the_chapters_rules_equal_the_librarys(name):
    balancing.equals_rule(rule_of("chapter", name), name)


@BOTH
@EACH_RULE
def test_a_rule_lifts_the_less_loaded_and_knows_no_order(whose, name):
    rule = rule_of(whose, name)
    balancing.lifts_the_less_loaded(rule)
    balancing.shift_stays_a_shift(rule)
    balancing.permuting_experts_permutes_the_bias(rule)


@BOTH
@pytest.mark.parametrize(("name", "rate"), [("sign", 0.005), ("proportional", 0.02), ("algorithm-1", 0.1)])
def test_a_rule_that_sums_its_steps_balances(whose, name, rate):
    balancing.balances(rule_of(whose, name), rate)


@BOTH
@EACH_RULE
def test_a_balancer_takes_the_passes_of_a_step_as_one(whose, name):
    kind = Balancer if whose == "library" else chapter(8).Balancer

    def step(bias, parts, top_k, rate):
        router = Router(d_model=4, n_experts=len(bias), top_k=top_k, dtype=WIDE)
        balancer = kind(router, rule=name, rate=rate)
        router.bias.copy_(bias)
        for counts in parts:
            router.load += counts
        held = router.bias  # what a checkpoint holds on to
        balancer.step()
        assert router.bias is held and router.load.sum() == 0
        balancer.step()  # nothing was counted since: nothing moves
        return router.bias

    balancing.parts_count_as_one(step, name)


def test_the_chapters_quantile_is_the_librarys_within_its_bins():
    scores, bias = torch.rand(4000, 7, dtype=WIDE), torch.rand(7, dtype=WIDE) / 4
    theirs = quantile_rule(bias, margin_histogram(scores, bias, 3), 3, 0.7)
    ours = chapter(8).quantile_rule(bias, scores, 3, 0.7)
    assert (ours - theirs).abs().max() < 2 * (bias.max() - bias.min() + 2) / 1000
    assert (ours - bias).abs().max() > 0.05


@BOTH
def test_a_switch_loss(whose):
    def library(probabilities, index):
        return switch_loss(Routing(index, probabilities.gather(1, index), probabilities, probabilities))

    balancing.equals_switch_loss(library if whose == "library" else chapter(8).switch_loss)


@BOTH
def test_a_choice_with_a_bias_that_weighs_nothing(whose):
    def library(logits, bias, top_k):
        routing = route(logits, bias, top_k)
        return routing.index, routing.gate

    def ours(logits, bias, top_k):
        return chapter(8).choose(logits.sigmoid(), bias, top_k)

    choose = library if whose == "library" else ours
    experts.chooses_the_largest(choose)
    experts.gates_are_shares(choose)
    experts.bias_only_chooses(choose)
    experts.permuting_experts_permutes_the_routing(choose)


def test_the_chapters_floor_is_the_librarys():
    for case in ((62, 6, 512), (16, 2, 64), (8, 8, 100)):
        assert chapter(8).noise_floor(*case) == pytest.approx(noise_floor(*case))
