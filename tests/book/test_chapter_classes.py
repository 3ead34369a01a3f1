"""The classes that a reader builds in the chapters go through the same checks as the library's."""

import threading
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
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
from moemla.balancing import RULES as BALANCING, Balancer, noise_floor, quantile_rule
from moemla.checks import (
    CheckFailed,
    attention,
    balancing,
    decode,
    equals_oracle,
    experts,
    model,
    rope,
    tokens,
    training,
)
from moemla.checks.chapters import ATTENTION, CHAPTERS, HYBRID, ROTATION, ROUTE, RULE, STEPS, lines_of, todo
from moemla.checks.finding import Reader
from moemla.checks.subjects import Attention, Choice, Function, Rotation
from moemla.generation import filter_logits
from moemla.kernels import INTERPRETED
from moemla.losses import linear_cross_entropy
from moemla.ngrams import NGram
from moemla.optim import learning_rate, make_optimizers
from moemla.parallel import RankDispatcher
from moemla.precision import LossScaler
from moemla.routing import Router, margin_histogram, route
from moemla.stories import stories
from tools.book import plan
from tools.chapter_code import load_definitions

TEXTS = [story.text for story in stories(60, seed=5)]
BOTH = pytest.mark.parametrize("whose", ["library", "chapter"])
ABSORBED = ("", ", absorbed")


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


# ---- chapters with a table of checks: the chapter's own classes, found as `moemla check` finds a reader's

KERNELS = {10, 11, 12}  # chapters whose definitions need Triton's interpreter
WRITTEN = [n for n in CHAPTERS if plan()[n - 1].written and (n not in KERNELS or INTERPRETED)]
PARTS = {
    2: {"CausalAttention", "step"},
    3: {"LatentAttention", "step_rebuilt", "step_absorbed"},
    4: {
        "Rope",
        "RotaryLatentAttention",
        *(f"RotaryLatentAttention{hybrid} with a cache{how}" for hybrid in ("", ", hybrid,") for how in ABSORBED),
        "DecoupledAttention",
        *(f"DecoupledAttention with a cache{how}" for how in ABSORBED),
    },
    6: {"route", "one_by_one", "by_expert", "masked", "by_blocks", "MixtureOfExperts"},
    8: {
        *("sign_rule", "proportional_rule", "algorithm_1", "equation_4", "quantile_rule"),
        *("Balancer", "switch_loss", "route"),
    },
    7: {"MixtureOfExperts", "shared"},
    10: {"Rope", "route"},
    11: {"sort_slots", "routed"},
    12: {"joint_decode", "latent_decode", "online", "merge"},
    14: {"serve"},
}


@cache
def own_lines(number):
    return {line.label: line for line in todo(number, Reader(chapter(number)))}


OWN = [(number, label) for number in WRITTEN for label in own_lines(number) if "time" not in label]


@pytest.mark.parametrize(("number", "label"), OWN, ids=[f"{number}-{label}" for number, label in OWN])
def test_a_chapters_own_classes_hold(number, label):
    line = own_lines(number)[label]
    assert not line.missing, line.said
    if line.check is None:  # the steps of chapters 2 to 4 take no lengths; nothing else of theirs is left out
        assert number > 4 or (label.endswith("equal each alone") and line.said == "it takes no lengths")
        return
    figures = line.check()
    assert "by shape" not in str(figures), "a chapter's weights are called as the library's"
    if "refuses" in label:
        assert "room for" in figures["message"]


@pytest.mark.parametrize("number", WRITTEN)
def test_nothing_of_a_chapter_is_overlooked(number):
    """What was found, and what each of it goes through."""
    found = {}
    for label in own_lines(number):
        subject, _, line = label.partition(": ")
        found.setdefault(subject, []).append(line)
    assert set(found) == PARTS.get(number), "what a chapter builds stands in PARTS"
    for subject, lines in found.items():
        if subject.startswith("step") or "with a cache" in subject:
            assert ("a step copies no past" in lines) == ("absorbed" in subject and "Rotary" not in subject), subject


def test_the_layer_that_keeps_turned_keys_is_the_same_layer():
    (layer,) = HYBRID.layers(Reader(chapter(4)))
    assert layer.make().hybrid
    for line in lines_of(layer, ATTENTION):
        line.check()


# ---- chapters 2 to 4: the library's layers and the chapters' other forms, in float64

WIDTH, WIDE = 32, torch.float64
SIZES = dict(d_model=WIDTH, n_heads=4, dtype=WIDE)
LATENT = SIZES | dict(latent_dim=12)


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
    two, three = chapter(2), chapter(3)

    def with_inputs(layer, x, cache):
        out, cache.past = three.step_from_inputs(layer, x, cache.past)
        return out

    def inputs(rows, max_len):
        return SimpleNamespace(past=torch.zeros(rows, 0, WIDTH, dtype=WIDE))

    def mha():
        return MultiHeadAttention(**SIZES)

    def mla():
        return MultiHeadLatentAttention(**LATENT)

    def paper():
        return MultiHeadLatentAttention(rope=RotaryEmbedding(8, 512, dtype=WIDE), bias=False, **LATENT)

    def decoupled():
        turn = RotaryEmbedding(4, 512, layout="interleaved", dtype=WIDE)
        return DecoupledLatentAttention(d_nope=6, d_value=10, rope=turn, bias=False, **LATENT)

    def form(name, make, start, numbers, absorbed=None):
        ragged = name.startswith("library")
        return Attention(name, make, start=start, numbers=numbers, absorbed=absorbed, ragged=ragged)

    hybrid = dict(n_heads=4, d_head=8, latent_dim=12)
    yield form("library-keys", mha, library(KVCache, n_kv_heads=4, d_head=8), 64)
    yield form("library-rebuilt", mla, library(LatentCache, absorb=False, latent_dim=12), 24)
    yield form("library-absorbed", mla, library(LatentCache, absorb=True, latent_dim=12), 24)
    yield form("library-paper", paper, library(LatentCache, latent_dim=12), 24)
    yield form("library-hybrid", paper, library(HybridCache, **hybrid), 44)
    yield form("library-decoupled", decoupled, library(JointLatentCache, latent_dim=12, d_rope=4), 16, absorbed=12)
    slices = book(three.step_fused, lambda rows, max_len: three.KeptSlices())
    yield form("inputs", lambda: two.CausalAttention(WIDTH, 4).double(), book(with_inputs, inputs), None)
    yield form("kept-slices", lambda: three.LatentAttention(WIDTH, 4, 12).double(), slices, None)


FORMS = {form.name: form for form in forms()}
ROTARY = {"library-paper", "library-hybrid", "library-decoupled"}
LINES = [line for form in FORMS.values() for line in lines_of(form, (*ATTENTION, *STEPS))]


@pytest.mark.parametrize("line", [pytest.param(line, id=line.label) for line in LINES if line.check])
def test_the_librarys_layers_and_other_forms_hold(line):
    figures = line.check()
    if line.label.endswith("bytes held by the cache"):
        assert figures == {"bytes": 2 * 8 * FORMS[line.label.partition(":")[0]].numbers * 8}


def test_each_form_goes_through_its_lines():
    for name in FORMS:
        mine = {line.label.partition(": ")[2] for line in LINES if line.label.startswith(f"{name}: ") and line.check}
        own = name.startswith("library")
        assert ("order and distance count" in mine) == ("the past is a set" not in mine) == (name in ROTARY)
        assert ("rows of unequal length equal each alone" in mine) == own
        assert ("bytes held by the cache" in mine) == ("a full cache refuses more" in mine) == own
        assert ("a step copies no past" in mine) == (name == "library-decoupled")
        assert {"no output sees a later input", "rows of a batch do not meet"} < mine
        assert "a prompt and steps equal one pass" in mine


# ---- chapters 6 to 8: the library's, until a chapter has its own


@pytest.mark.parametrize("scores", ["sigmoid", "softmax"])
def test_the_librarys_router_and_layer_hold(scores):
    def call(logits, bias, top_k):
        routing = route(logits, bias, top_k, scores=scores)
        return routing.index, routing.gate

    choice = Choice("route", call)
    assert choice.scores == scores
    for line in lines_of(choice, ROUTE):
        line.check()


@pytest.mark.parametrize("name", [name for name in BALANCING if name != "none"])
def test_the_librarys_rules_hold(name):
    for line in lines_of(Function(name, BALANCING[name], name), RULE):
        line.check()


def test_a_chapters_absorbed_step_writes_its_scores():
    """They are the largest that it makes: of all four heads, which torch's kernel never writes out."""
    past = 400
    for number, label in ((3, "step_absorbed"), (4, "DecoupledAttention with a cache, absorbed")):
        made = own_lines(number)[f"{label}: a step copies no past"].check()
        assert made["largest"] >= 2 * 4 * (past + 2), "the scores of four heads were not seen"


@BOTH
def test_keys_of_all_heads_lie_in_the_latents_directions(whose):
    own = whose == "chapter"
    layer = chapter(3).LatentAttention(WIDTH, 4, 12).double() if own else MultiHeadLatentAttention(**LATENT)
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


@BOTH
def test_a_rotation(whose):
    library, own = partial(RotaryEmbedding, 8, 512, dtype=WIDE), partial(chapter(4).Rope, 8)
    rotation = Rotation(whose, lambda layout: (library if whose == "library" else own)(layout=layout))
    lines = list(lines_of(rotation, ROTATION))
    assert len(lines) == len(ROTATION)
    for line in lines:
        line.check()
    rope.scores_by_distance(rotation.make("interleaved"))


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


# ---- chapter 6


def test_one_token_at_a_time_is_what_the_forms_equal():
    code = chapter(6)
    case = code.example()
    for form in ("by_expert", "masked", "by_blocks"):
        torch.testing.assert_close(getattr(code, form)(*case), code.one_by_one(*case), atol=1e-5, rtol=1e-5)


def test_backward_of_the_chapters_loop_writes_no_stack_for_each_expert():
    code = chapter(6)
    wide, narrow = (code.written(code.by_expert, e) for e in (64, 32))
    assert wide < 2 * narrow < 0.3 * code.written(code.by_expert, 64, take=code.picked)


def test_the_chapters_wrong_router_is_caught_by_whose_gate_it_is():
    wrong = chapter(6).tidy
    experts.chooses_the_largest(wrong)
    for check in (experts.gates_are_shares, experts.permuting_experts_permutes_the_routing):
        with pytest.raises(CheckFailed):
            check(wrong)


# ---- chapter 8


@BOTH
@pytest.mark.parametrize("name", ("sign", "proportional", "algorithm-1", "equation-4"))
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
    ours = chapter(8).quantile_of_scores(bias, scores, 3, 0.7)
    assert (ours - theirs).abs().max() < 2 * (bias.max() - bias.min() + 2) / 1000
    assert (ours - bias).abs().max() > 0.05


@BOTH
def test_a_choice_with_a_bias_that_weighs_nothing(whose):
    def library(logits, bias, top_k):
        routing = route(logits, bias, top_k)
        return routing.index, routing.gate

    def ours(logits, bias, top_k):
        return chapter(8).route(logits, bias, top_k)

    choose = library if whose == "library" else ours
    experts.chooses_the_largest(choose)
    experts.gates_are_shares(choose)
    experts.bias_only_chooses(choose)
    experts.permuting_experts_permutes_the_routing(choose)


def test_the_chapters_floor_is_the_librarys():
    for case in ((62, 6, 512), (16, 2, 64), (8, 8, 100)):
        assert chapter(8).noise_floor(*case) == pytest.approx(noise_floor(*case))


# ---- chapter 9


def whole_model(whose, **changes):
    torch.manual_seed(0)
    small = dict(n_layers=3, d_model=32, n_experts=7, n_shared=2, top_k=3, d_expert=8, routed_scale=2.0)
    config = ModelConfig.preset("tiny", vocab_size=VOCAB, max_seq_len=16, **small | changes)
    return moemla.LanguageModel(config) if whose == "library" else chapter(9).LanguageModel(config)


@BOTH
def test_the_whole_model_is_causal_and_writes_the_same_with_a_cache(whose):
    lm = whole_model(whose).double()

    def start(rows, max_len):
        held = lm.new_cache(rows, max_len)
        return partial(lm, cache=held), held

    model.tokens_causal(lm, VOCAB)
    model.tokens_in_steps(lm, start, VOCAB)
    config = lm.config
    assert lm.new_cache(1, 8).bytes_per_token() == complexity.cache_bytes_per_token(config, 8)
    assert chapter(9).cache_bytes(config, 8) == complexity.cache_bytes_per_token(config, 8)


@pytest.mark.parametrize("changes", [{}, dict(latent_dim=12, n_shared=0, top_k=1), dict(d_expert=24, n_heads=2)])
def test_the_chapters_whole_model_equals_the_librarys(changes):
    ours, theirs = (whole_model(whose, **changes).double() for whose in ("chapter", "library"))
    with torch.no_grad():
        for weight in theirs.parameters():  # fresh norms are all alike, and hide which of them is read
            weight += 0.1 * torch.randn_like(weight)
    equals_oracle(ours, theirs, 32, vocab_size=VOCAB)


@BOTH
def test_the_whole_model_begins_as_it_is_counted(whose):
    lm = whole_model(whose)
    counted = complexity.parameters(lm.config)
    assert sum(p.numel() for p in lm.parameters()) == counted.total
    loss = torch.nn.functional.cross_entropy(lm(torch.randint(VOCAB, (8, 13))).mT, torch.randint(VOCAB, (8, 13)))
    assert abs(loss.item() - np.log(VOCAB)) < 0.05
    small = 0.02 / (2 * 3) ** 0.5
    writers = [p for n, p in lm.named_parameters() if n.endswith(("out_proj.weight", "shared.down.weight", "w_out"))]
    assert len(writers) == 9 and all(abs(p.std().item() / small - 1) < 0.15 for p in writers)


@pytest.mark.parametrize("changes", [{}, dict(latent_dim=12, n_shared=0), dict(n_experts=9, top_k=9)])
def test_the_chapters_counts_are_the_librarys(changes):
    config = ModelConfig.preset("tiny", **changes)
    one, two = (complexity.parameters(ModelConfig.preset("tiny", n_layers=n, **changes)) for n in (1, 2))
    assert chapter(9).block_parameters(config) == two.total - one.total
    assert chapter(9).block_parameters(config, config.top_k) == two.active - one.active
    assert chapter(9).expert_width(config, complexity.parameters(config).total) == config.d_expert


# ---- chapter 10


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("block", [1, 3, 4, 64])
def test_a_router_over_tiles_of_any_size_and_in_any_order(block):
    code, logits, bias = chapter(10), torch.randn(21, 7), torch.randn(7)
    wanted = route(logits, bias, 3)
    for back in (False, True):
        index, gate, counts = code.by_tiles(logits, bias, 3, block, back)
        assert torch.equal(index, wanted.index) and torch.equal(counts, wanted.counts)
        torch.testing.assert_close(gate, wanted.gate)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("block", [1, 4, 64])
def test_rows_are_turned_alike_by_a_kernel_and_by_a_loop(block):
    code, x, table = chapter(10), torch.randn(21, 10), RotaryEmbedding(10, 7)
    rows, memory = x.view(1, 3, 7, 10), torch.full((220,), 7.0)
    sizes = 21, 7, 10, 1, 5, block
    code.launch(
        code.turn_tile, -(-21 // block), x.flatten(), memory, table.cos.flatten(), table.sin.flatten(), 1, *sizes
    )
    assert (memory[210:] == 7).all()
    for turned in (memory[:210].view(21, 10), code.turned(x, table.cos, table.sin, block=-(-block // 4) * 4)):
        torch.testing.assert_close(turned.view_as(rows), table(rows))


# ---- chapter 12


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("cut", [(1, 1), (7, 3), (16, 16), (64, 16)])
def test_loops_over_pieces_of_any_size_and_in_any_order(cut, back):
    code, table, lengths = chapter(12), RotaryEmbedding(6, 30), torch.tensor([21, 8])
    q, weight, (k, v) = torch.randn(2, 3, 6), torch.randn(18, 5), torch.randn(2, 2, 21, 5)
    wanted = code.plain(q, k, v, weight, table, lengths, 0.3)
    k[1, 8:] = v[1, 8:] = torch.nan
    inputs = lengths, q, k, v, weight, table.cos, table.sin, 0.3
    ours = code.in_pieces(code.latent_piece, (2, 3, 5), 21, cut, *inputs, back=back)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    q, joint = torch.randn(2, 3, 9), torch.randn(2, 21, 9)
    joint[1, 8:] = torch.nan
    ours = code.in_pieces(code.joint_piece, (2, 3, 5), 21, cut, lengths, q, joint, 5, 0.3, back=back)
    torch.testing.assert_close(ours, code.joint_decode(q, joint, lengths, 5, 0.3), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled here, not interpreted")
def test_the_chapters_wrong_softmax_is_caught_by_scores_that_rise():
    code = chapter(12)
    decode.online_softmax(code.online)
    with pytest.raises(CheckFailed):
        decode.online_softmax(partial(code.online, step=code.careless))
    scores, values = torch.randn(3, 40).sort(1, descending=True).values, torch.randn(40, 5)
    right = code.online(scores, values, 8, code.careless)
    torch.testing.assert_close(right, scores.softmax(1) @ values)


# ---- chapter 13


@BOTH
def test_a_loss_scale_finds_itself(whose):
    scaler = LossScaler() if whose == "library" else chapter(13).Scaler()
    fits = 2.0**13
    steps = [scaler.update(scaler.scale <= fits) for _ in range(6010)]
    assert [step for step, made in enumerate(steps) if not made] == [0, 1, 2, 2003, 4004, 6005]
    assert scaler.scale == fits
    (gradient,) = gradients = [torch.tensor([fits, -3.0])]
    scaler.unscale(gradients)
    assert torch.equal(gradient, torch.tensor([1.0, -3.0 / fits]))


@pytest.fixture
def ranks_as_threads(monkeypatch):
    """`run(work, size)`: `work(rank, group)` of each, in threads that exchange as processes would."""

    def run(work, size):
        box, gate, answers = {}, threading.Barrier(size, timeout=30), [None] * size

        def exchange(out, given, come=None, leave=None, group=None):
            even = [len(given) // size] * size
            box[group.rank()] = given.split(leave or even)
            gate.wait()
            out.copy_(torch.cat([box[rank][group.rank()] for rank in range(size)]))
            assert [len(box[rank][group.rank()]) for rank in range(size)] == (come or even)
            gate.wait()

        def start(rank):
            try:
                answers[rank] = work(rank, dist.ProcessGroup(rank, size))
            except BaseException as error:
                answers[rank] = error
                gate.abort()

        monkeypatch.setattr(dist, "all_to_all_single", exchange)
        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, threading.BrokenBarrierError):
                raise answer
        return answers

    return run


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3])
def test_rows_go_to_the_rank_of_their_expert_and_come_home(whose, size, ranks_as_threads):
    kind = RankDispatcher if whose == "library" else chapter(13).Dispatcher
    draw = torch.Generator().manual_seed(size)
    experts = [torch.randint(5, (n,), generator=draw).sort().values for n in (9, 0, 4)][:size]  # the last gets no row
    share = 6 // size

    def work(rank, group):
        expert = experts[rank]
        way = kind(expert, n_experts=6, group=group)
        rows = torch.stack([expert, torch.full_like(expert, rank), torch.arange(len(expert))], 1).double()
        came = way.dispatch(rows)
        home = way.combine(came)
        return way.counts, came, torch.equal(home, rows), way.share

    sent = torch.cat(experts)
    for rank, (counts, came, home, factor) in enumerate(ranks_as_threads(work, size)):
        here = range(rank * share, (rank + 1) * share)
        assert counts.tolist() == [(sent == e).sum().item() for e in here]
        assert came[:, 0].tolist() == sorted(e for e in sent.tolist() if e in here)
        assert came.tolist() == sorted(came.tolist()) and home and factor == 1.0


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_the_chapters_ring_sums_and_sends_no_more_than_it_says(size):
    table = torch.randint(9, (size, size)).tolist()
    sums = [sum(column) for column in zip(*table, strict=True)]
    assert chapter(13).ring(table) == 2 * (size - 1)
    assert table == [sums] * size


def test_the_chapters_gradients_are_means_over_ranks():
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad = torch.tensor([[4.0, 6.0]])  # the bias has none
    world = SimpleNamespace(size=4, sum=lambda tensor: tensor.mul_(2))
    chapter(13).mean_gradients(layer, world)
    assert torch.equal(layer.weight.grad, torch.tensor([[2.0, 3.0]])) and layer.bias.grad is None
