"""Every check passes the library's own and fails on wrong versions that still run, in one line that names the input."""

import importlib
import pkgutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moemla.checks
from moemla import (
    DecoupledLatentAttention,
    FeedForward,
    JointLatentCache,
    KVCache,
    LanguageModel,
    LatentCache,
    MixtureOfExperts,
    ModelConfig,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    RotaryEmbedding,
    latent_attention,
)
from moemla.attention import attend, merge_heads, split_heads
from moemla.balancing import (
    RULES,
    Balancer,
    algorithm_1,
    equation_4,
    proportional_rule,
    quantile_rule,
    sign_rule,
    switch_loss,
)
from moemla.checks import (
    CheckFailed,
    attention,
    balancing,
    compare,
    decode,
    experts as routed,
    grouped,
    model,
    rope,
    serving,
    tiles,
    time_ratio,
    tokens,
    training,
)
from moemla.experts import BACKENDS, experts as apply_experts
from moemla.generation import filter_logits, generate
from moemla.losses import linear_cross_entropy
from moemla.optim import learning_rate, make_optimizers
from moemla.routing import Router, Routing, route
from moemla.serving import Server

WIDTH, VOCAB, WIDE = 16, 23, torch.float64
HOW = dict(d_model=WIDTH, n_heads=2, dtype=WIDE)


def mha(**changes):
    return MultiHeadAttention(**HOW | changes)


def mla(kind=MultiHeadLatentAttention, **changes):
    return kind(latent_dim=6, **HOW | changes)


def turning(width=8, layout="halves"):
    return RotaryEmbedding(width, 512, layout=layout, dtype=WIDE)


def decoupled():
    return mla(DecoupledLatentAttention, d_nope=6, d_value=10, rope=turning(4))


def starting(layer, kind=KVCache, times=1, ragged=True, sizes=None, **how):
    """Steps with a library's cache, advanced `times` as far as it should be, or blind to lengths."""
    sizes = dict(n_kv_heads=2, d_head=8) if sizes is None else sizes

    def start(rows, max_len):
        held = kind(batch_size=rows, max_len=times * max_len, dtype=WIDE, **sizes)

        def step(x, lengths=None):
            out = layer(x, held[0], **how)
            held.advance(times * x.shape[1] if lengths is None or not ragged else list(lengths))
            return out

        return step, held

    return start


R, JOINT = dict(latent_dim=6), dict(latent_dim=6, d_rope=4)


# ---- wrong versions


class Peeking(MultiHeadAttention):
    """The mask is off by one."""

    def forward(self, x, cache=None):
        q, k, v = (split_heads(p(x), 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).tril(1)
        return self.out_proj(merge_heads(attend(q, k, v, mask)))


class Detached(MultiHeadAttention):
    """No gradient comes back through the values."""

    def forward(self, x, cache=None):
        q, k, v = (split_heads(p(x), 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(merge_heads(attend(q, k, v.detach())))


class TurnedLatent(MultiHeadLatentAttention):
    """The latent is turned, not the heads that are made from it."""

    def forward(self, x, cache=None):
        q = self.rope(split_heads(self.q_proj(x), 2))
        k = self.k_up(turning(6)(self.k_down(x)[:, None])[:, 0])
        v = self.v_up(self.v_down(x))
        return self.out_proj(merge_heads(attend(q, split_heads(k, 2), split_heads(v, 2))))


class Still(RotaryEmbedding):
    """A rotation that does not turn."""

    def forward(self, x, positions=None):
        return x


def alike():
    """All pairs turn at one speed, once round in sixteen tokens."""
    clock = RotaryEmbedding(8, 512, learnable=True, dtype=WIDE)
    nn.init.constant_(clock.inv_freq, torch.pi / 8)
    return clock


class Late(KVCache):
    """The first token after a prompt gets the position of the prompt's last."""

    def where(self, steps, device=None):
        first, behind = super().where(steps, device)
        return (first - 1, behind - 1) if first else (first, behind)


class Inputs:
    """Inputs kept in slices of a storage: torch broadcasts whatever does not fit."""

    def __init__(self, layer, rows, max_len):
        self.layer, self.storage, self.length = layer, torch.zeros(rows, max_len, WIDTH, dtype=WIDE), 0

    def step(self, x):
        self.storage[:, self.length : self.length + x.shape[1]] = x
        self.length += x.shape[1]
        return self.layer(self.storage[:, : self.length])[:, -x.shape[1] :]


def careless(layer):
    def start(rows, max_len):
        held = Inputs(layer, rows, max_len)
        return held.step, held

    return start


def growing(layer):
    """Inputs put together anew at each step."""

    def start(rows, max_len):
        held = [torch.zeros(rows, 0, WIDTH, dtype=WIDE)]

        def step(x):
            held[0] = torch.cat((held[0], x), dim=1)
            return layer(held[0])[:, -x.shape[1] :]

        return step, held

    return start


def broadcast_shared(q, k, v, mask=None, scale=None):
    """Shared keys and values are written out for each head."""
    return ((q * scale) @ k.mT).softmax(-1) @ v[:, None]


def copies_with_broadcast(start):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_attention, "attend_shared", broadcast_shared)
        attention.copies_no_past(start, WIDTH, 6)


class Drops:
    """A tokenizer of bytes that loses what is not ASCII."""

    def encode(self, text):
        return [byte + 1 for byte in text.encode("ascii", "ignore")]

    def decode(self, ids):
        return bytes(i - 1 for i in ids).decode("utf-8", "replace")


class Bytes(Drops):
    def encode(self, text):
        return [byte + 1 for byte in text.encode()]


class Ends(Bytes):
    """What ends a story can be written in a text."""

    def encode(self, text):
        return [0] if text == "<|endoftext|>" else super().encode(text)

    def decode(self, ids):
        return "<|endoftext|>" if ids == [0] else super().decode(ids)


class Pairs(Bytes):
    """Two letters a token, as a stand-in for merges."""

    def encode(self, text):
        return [1 + int.from_bytes(text.encode()[i : i + 2], "big") for i in range(0, len(text.encode()), 2)]


def language_model(**changes):
    config = ModelConfig.preset("tiny", "mha-rope", n_layers=2, d_model=WIDTH, vocab_size=VOCAB, max_seq_len=16)
    return LanguageModel(config, **changes)


def held(lm):
    return sum(p.numel() for p in lm.parameters())


@torch.no_grad()
def shaken(lm, std):
    """Every matrix begins alike."""
    for p in lm.parameters():
        if p.dim() == 2:
            p.normal_(std=std)
    return lm


def peeking_model():
    lm = language_model().double()
    for block in lm.blocks:
        block.attention.__class__ = Peeking
    return lm


def model_in_steps(times=1):
    lm = language_model().double()

    def start(rows, max_len):
        held = lm.new_cache(rows, times * max_len)

        def step(x):
            out = lm(x, cache=held)
            held.advance((times - 1) * x.shape[1])
            return out

        return step, held

    return lm, start


def torch_adamw(lm):
    return torch.optim.AdamW(lm.parameters(), weight_decay=0.1)  # norms and biases are pulled too


def chunked(x, weight, targets, chunk, times=1.0):
    loss = times * linear_cross_entropy(x, weight, targets, chunk)
    return loss, *torch.autograd.grad(loss, (x, weight))


def mean_of_means(x, weight, targets, chunk):
    """The last piece weighs as much as the others, however short."""
    pieces = zip(x.split(chunk), targets.split(chunk), strict=True)
    loss = torch.stack([F.cross_entropy(a @ weight.T, b) for a, b in pieces]).mean()
    return loss, *torch.autograd.grad(loss, (x, weight))


def drawn(logits, **how):
    return filter_logits(logits, **how).exp()


def routing(logits, bias, top_k, **how):
    out = route(logits, bias, top_k, **how)
    return out.index, out.gate


def softmax_after_top_k(logits, bias, top_k):
    index, _ = routing(logits, bias, top_k)
    return index, logits.gather(1, index).softmax(-1)


def first_tile(x, at):
    """Rows beyond the first 64 stay as they are."""
    return torch.cat((turning(10)(x[:, :, :64], at[:, :64]), x[:, :, 64:]), 2)


def strides_forgotten(x, at):
    return turning(10)(torch.as_strided(x, x.shape, torch.empty(x.shape).stride()), at)


def sorting(index, n_experts, block, descending=False):
    chosen = index.flatten()
    order = len(chosen) - 1 - chosen.flip(0).argsort(stable=True) if descending else chosen.argsort(stable=True)
    return order, order.argsort(), F.pad(chosen.bincount(minlength=n_experts).cumsum(0), (1, 0))


def place_forgotten(index, n_experts, block):
    order, _, offsets = sorting(index, n_experts, block)
    return order, order, offsets


def by_blocks(x, w_in, w_out, index, gate):
    return apply_experts(x, w_in, w_out, index, gate, "grouped")


def unwritten(x, w_in, w_out, index, gate):
    """The gradient of an expert without rows is what memory held."""
    copy = w_in * 1
    if copy.requires_grad:
        copy.register_hook(lambda g: g.where(g.abs().amax((1, 2), keepdim=True) > 0, torch.nan))
    return by_blocks(x, copy, w_out, index, gate)


def louder_last(x, w_in, w_out, index, gate):
    return by_blocks(x, w_in, w_out * torch.arange(1, len(w_out) + 1)[:, None, None], index, gate)


def another_sum(x, w_in, w_out, index, gate):
    """As atomics do: not the same in its last digits."""
    return by_blocks(x, w_in, w_out, index, gate) * (1 + 1e-5 * torch.rand(1))


def lane_of_zero(logits, bias, top_k):
    """The lane behind the last expert can win, and is then called the last expert."""
    score = F.pad(logits.sigmoid(), (0, 1))
    index = F.pad(logits.sigmoid() + bias, (0, 1)).topk(top_k).indices
    gate = score.gather(1, index)
    return index.clamp(max=logits.shape[1] - 1), gate / gate.sum(1, keepdim=True)


def same_again(logits, bias, top_k):
    index = (logits + bias).argmax(1, keepdim=True).expand(-1, top_k)
    gate = logits.sigmoid().gather(1, index)
    return index, gate / gate.sum(1, keepdim=True)


def detached_gate(logits, bias, top_k):
    index, gate = routing(logits, bias, top_k)
    return index, gate.detach()


def bias_forgotten(logits, bias, top_k):
    return routing(logits, torch.zeros_like(bias), top_k)


def first_preferred(logits, bias, top_k):
    """Ties are broken by a slope that is too steep."""
    return routing(logits - torch.arange(logits.shape[1]), bias, top_k)


def not_renormalised(logits, bias, top_k):
    return routing(logits, bias, top_k, renormalise=False)


def with_backend(x, w_in, w_out, index, gate, name, activation):
    return apply_experts(x, w_in, w_out, index, gate, name, activation)


def experts_with_detached_gate(x, w_in, w_out, index, gate):
    return apply_experts(x, w_in, w_out, index, gate.detach())


def from_the_start(x, w_in, w_out, index, gate):
    """Reads the tokens from the beginning of their storage, wherever they begin."""
    return apply_experts(x.as_strided(x.shape, x.stride(), 0), w_in, w_out, index, gate)


def one_step_along(x, w_in, w_out, index, gate):
    """Takes the columns of the tokens to lie side by side."""
    return apply_experts(x.as_strided(x.shape, (x.stride(0), 1)), w_in, w_out, index, gate)


def experts_in_slot_order(x, w_in, w_out, index, gate):
    """Gates are sorted with the tokens, experts are not."""
    return apply_experts(x, w_in, w_out, index.sort(-1).values, gate)


def experts_by_number(x, w_in, w_out, index, gate):
    return apply_experts(x, w_in, w_out, index, gate * (1 + index))


def mixture(**changes):
    return MixtureOfExperts(**dict(d_model=WIDTH, n_experts=5, top_k=2, d_expert=3, dtype=WIDE) | changes)


def counted(layer):
    return lambda: layer.router.last.counts


def centred(x, valid):
    """A norm over the tokens, padding among them."""
    return x - x.mean(1, keepdim=True)


def shared_layers(x, w_in, w_out, mean=False):
    parts = [F.gelu(x @ a) @ b for a, b in zip(w_in, w_out, strict=True)]
    return sum(parts) / (len(parts) if mean else 1)


def up_for_the_loaded(bias, counts, top_k, rate):
    return bias - (sign_rule(bias, counts, top_k, rate) - bias)


def last_forgotten(bias, counts, top_k, rate):
    return torch.cat((sign_rule(bias, counts, top_k, rate)[:-1], torch.zeros(1, dtype=bias.dtype)))


def step_of_a_balancer(bias, parts, top_k, rate):
    router = Router(d_model=2, n_experts=len(bias), top_k=top_k, dtype=WIDE)
    router.bias.copy_(bias)
    balancer = Balancer(router, "sign", rate)
    for counts in parts:
        router.load += counts
    balancer.step()
    return router.bias


def step_for_each_part(bias, parts, top_k, rate):
    for counts in parts:
        bias = sign_rule(bias, counts, top_k, rate)
    return bias


def switch(probabilities, index):
    return switch_loss(Routing(index, probabilities.gather(1, index), probabilities, probabilities))


def switch_times_k(probabilities, index):
    return index.shape[1] * switch(probabilities, index)


def switch_of_counts(probabilities, index):
    return switch(probabilities.detach(), index)


def token_decode(*, q, lengths, scale, cut=None, joint=None, rank=None, k_latent=None, v_latent=None, weight=None, **_):
    """Chapter 12's, by whole matrices, for either kind of cache."""
    if joint is not None:
        keys, values = joint[:, None], joint.nan_to_num()
    else:
        keys = turning(q.shape[2])(split_heads(k_latent.double() @ weight.double().T, q.shape[1])).float()
        values = v_latent.nan_to_num()
    scores = (q[:, :, None] @ keys.mT)[:, :, 0] * scale
    seen = torch.arange(scores.shape[2]) < lengths[:, None, None]
    return (scores.where(seen, -torch.inf).softmax(-1) @ values)[..., :rank]


def unscaled(**tensors):
    return token_decode(**tensors | dict(scale=1.0))


def sees_all(*, lengths, **tensors):
    return token_decode(lengths=torch.full_like(lengths, 1000), **tensors)


def gapless(*, joint, **tensors):
    return token_decode(joint=torch.as_strided(joint, joint.shape, torch.empty(joint.shape).stride()), **tensors)


def overflowing(*, q, joint, rank, scale, **_):
    exps = (q @ joint.mT * scale).exp()
    return exps @ joint[..., :rank] / exps.sum(-1, keepdim=True)


def first_piece(*, cut, lengths, **tensors):
    return token_decode(lengths=lengths.clamp(max=cut[0]), **tensors)


def by_one_softmax(scores, values, block):
    return scores.softmax(1) @ values


def last_tile_wins(scores, values, block):
    first = (len(values) - 1) // block * block
    return by_one_softmax(scores[:, first:], values[first:], block)


def weighed(means, logs):
    return (logs.softmax(1)[..., None] * means).sum(1)


def served(model, prompts, new, slots, stop):
    server = Server(model, slots)
    for prompt, most in zip(prompts, new, strict=True):
        server.submit(prompt, most, temperature=0, stop=stop)
    return [story.tolist() for story in server.run().values()]


def served_with_padding(model, prompts, new, slots, stop):
    """Prompts are filled up on their left."""
    longest = max(map(len, prompts))
    lacking = [longest - len(prompt) for prompt in prompts]
    filled = [[0] * n + prompt for n, prompt in zip(lacking, prompts, strict=True)]
    return [story[n:] for n, story in zip(lacking, served(model, filled, new, slots, stop), strict=True)]


def served_without_stop(model, prompts, new, slots, stop):
    return served(model, prompts, new, slots, None)


def served_at_once(model, prompts, new, slots, stop):
    return served(model, prompts, new, len(prompts), stop)


def served_in_groups(model, prompts, new, slots, stop):
    groups = [slice(n, n + slots) for n in range(0, len(prompts), slots)]
    return [story for group in groups for story in served(model, prompts[group], new[group], slots, stop)]


def served_without_cache(model, prompts, new, slots, stop):
    pairs = zip(prompts, new, strict=True)
    return [generate(model, [p], n, temperature=0, stop=stop, use_cache=False)[0].tolist() for p, n in pairs]


def served_shortest_first(*asked):
    return sorted(served(*asked), key=len)


# ---- each check on the library's own, and on what is wrong: (check, a call of it[, what it says])


def of(check, *given, said=None, **how):
    run = partial(check, *given, **how)
    return (check, run) if said is None else (check, run, said)


def right():
    plain, turned, lm = mha(), mha(rope=turning()), language_model()
    for layer in (plain, decoupled()):
        yield of(attention.causal, layer, WIDTH)
    yield of(attention.past_is_a_set, mla(), WIDTH)
    yield of(attention.rows_apart, plain, WIDTH)
    yield of(attention.steps_equal_one_pass, turned, starting(turned), WIDTH)
    yield of(attention.unequal_rows, turned, starting(turned), WIDTH)
    yield of(attention.refuses_when_full, starting(plain), WIDTH)
    yield of(attention.refuses_other_rows, plain, starting(plain), WIDTH)
    yield of(attention.bytes_held, starting(mla(), LatentCache, sizes=R), WIDTH, 12)
    yield of(attention.copies_no_past, starting(decoupled(), JointLatentCache, sizes=JOINT), WIDTH, 6)
    yield of(attention.keys_lie_in_the_latent, nn.Sequential(mla().k_down, mla().k_up), WIDTH, 6)
    yield of(rope.turns_the_pairs, turning())
    yield of(rope.turns_the_pairs, turning(6, "interleaved"), 6, "interleaved")
    yield of(rope.scores_by_distance, turning())
    yield of(rope.layouts_differ_by_a_permutation, turning(), turning(8, "interleaved"))
    yield of(rope.order_and_distance, mla(rope=turning()), WIDTH)
    yield of(tiles.turns_every_tile, turning(10))
    yield of(tiles.routes_every_tile, routing)
    yield of(tiles.equals_are_all_different, routing)
    yield of(grouped.sorts_by_expert, sorting)
    yield of(grouped.says_where, sorting)
    for of_experts in (
        grouped.equals_loop_in_tiles,
        grouped.takes_views,
        grouped.nobodys_expert_gets_zeros,
        grouped.experts_in_another_order,
        grouped.same_bits_again,
    ):
        yield of(of_experts, by_blocks)
    for kind in ("joint", "latent"):
        for of_decode in (
            decode.equals_one_softmax,
            decode.rows_end_where_they_end,
            decode.takes_views,
            decode.large_scores,
            decode.any_cut,
        ):
            yield of(of_decode, token_decode, kind)
    yield of(decode.online_softmax, by_one_softmax)
    yield of(decode.merges_pieces, weighed)
    for of_serving in (
        serving.equals_each_alone,
        serving.ends_where_it_ends,
        serving.computes_no_more_rows,
        serving.takes_free_slots,
        serving.computes_no_past,
        serving.order_is_theirs,
    ):
        yield of(of_serving, served)
    yield of(compare.equals_oracle, mha(), plain, WIDTH)
    yield of(compare.equals_oracle, language_model().double(), language_model().double(), WIDTH, VOCAB)
    yield of(tokens.nothing_is_lost, Bytes(), ["once", "upon"])
    yield of(tokens.shortens, Pairs(), ["once upon a time"])
    yield of(tokens.sums_to_one, lambda context: [0.25] * 4, 4, CONTEXTS)
    yield of(model.tokens_causal, language_model().double(), VOCAB)
    yield of(model.tokens_in_steps, *model_in_steps(), VOCAB)
    yield of(model.begins_knowing_nothing, lm, VOCAB, 2, held(lm))
    yield of(model.tokens_apart, mixture(), WIDTH)
    yield of(model.bends, FeedForward(d_model=WIDTH, d_ff=32, dtype=WIDE), WIDTH)
    yield of(training.adamw_steps, lambda m: make_optimizers(m, "adamw", weight_decay=0.1)[0], lm.double())
    yield of(training.loss_in_pieces, chunked)
    for how in (dict(top_k=None), dict(top_k=4), dict(top_p=0.7)):
        yield of(training.draws_from_the_likeliest, partial(drawn, temperature=0.5, **how), 0.5, **how)
    yield of(training.rate_climbs_and_falls, learning_rate)
    for scores in ("sigmoid", "softmax"):
        this = partial(routing, scores=scores)
        yield of(routed.chooses_the_largest, this, scores)
        yield of(routed.gates_are_shares, this, scores)
        yield of(routed.bias_only_chooses, this)
        yield of(routed.permuting_experts_permutes_the_routing, this)
    for name in BACKENDS:
        for activation in ("gelu", "swiglu"):
            this = partial(with_backend, name=name, activation=activation)
            yield of(routed.equals_loop, this, activation)
            yield of(routed.permuting_experts_changes_nothing, this, activation)
    for n_shared in (0, 2):
        layer = mixture(n_shared=n_shared)
        yield of(routed.padding_changes_nothing, layer, WIDTH, counted(layer), 2, shared=n_shared > 0)
    yield of(routed.shared_equal_one_layer, shared_layers)
    for name, rule in RULES.items():
        yield of(balancing.equals_rule, rule, name)
        yield of(balancing.shift_stays_a_shift, rule, name=name)
        yield of(balancing.permuting_experts_permutes_the_bias, rule, name=name)
    for rule in (sign_rule, proportional_rule, algorithm_1, equation_4):
        yield of(balancing.lifts_the_less_loaded, rule)
    for rule in (sign_rule, proportional_rule, algorithm_1):
        yield of(balancing.balances, rule, 0.02)
    yield of(balancing.parts_count_as_one, step_of_a_balancer)
    yield of(balancing.moves_in_place, signed)
    yield of(balancing.forgets_the_counts, signed)
    yield of(balancing.balances, quantile_rule, 0.5, "quantile")
    yield of(balancing.equals_switch_loss, switch)


def signed(router):
    return Balancer(router, "sign", 0.1)


class _Wrong:
    """A balancer of one router that makes one mistake."""

    def __init__(self, router, step):
        self.step = partial(step, router)


def replacing_the_numbers(router):
    def step(router):
        router.bias.data = sign_rule(router.bias, router.load, router.top_k, 0.1)

    return _Wrong(router, step)


def replacing_the_bias(router):
    def step(router):
        router.bias = sign_rule(router.bias, router.load, router.top_k, 0.1)

    return _Wrong(router, step)


def idle(router):
    return _Wrong(router, lambda router: router.load.zero_())


def remembering(router):
    return _Wrong(router, lambda router: router.bias.copy_(sign_rule(router.bias, router.load, router.top_k, 0.1)))


def drifting(router):
    def step(router):
        router.bias.add_(torch.arange(len(router.bias)) / 10)
        router.load.zero_()

    return _Wrong(router, step)


def wrong():
    plain, turned, lm = mha(), mha(rope=turning()), language_model()
    yield of(attention.causal, Peeking(**HOW), WIDTH, said=r"output 0 sees input 1.*x \(2, 2, 16\)")
    yield of(attention.causal, lambda x: 0 * x, WIDTH, said=r"output 0 does not see its own input.*\(2, 1, 16\)")
    yield of(attention.past_is_a_set, turned, WIDTH, said=r"the past of x \(2, 3, 16\) in order \[1, 0\]")
    yield of(attention.rows_apart, lambda x: x - x.mean(0), WIDTH, said=r"x \(2, 1, 16\) against its rows")
    yield of(attention.steps_equal_one_pass, turned, starting(turned, times=2), WIDTH, said=r"1 token after 1 cached")
    yield of(attention.steps_equal_one_pass, turned, starting(turned, Late), WIDTH, said=r"1 token after 1 cached")
    yield of(
        attention.unequal_rows, turned, starting(turned, ragged=False), WIDTH, said=r"row 1 of prompts of \[2, 1\]"
    )
    yield of(attention.refuses_when_full, careless(plain), WIDTH, said=r"9 tokens took token 10: x \(2, 1, 16\)")
    yield of(
        attention.refuses_other_rows, plain, careless(plain), WIDTH, said=r"2 rows took a batch of 1: x \(1, 1, 16\)"
    )
    yield of(attention.bytes_held, starting(plain), WIDTH, 12, said=r"4096 bytes.*: 32 numbers a token, not 12")
    yield of(
        attention.copies_no_past, growing(plain), WIDTH, 16, said=r"401 tokens cached made a tensor \(2, 402, 16\)"
    )
    rebuilt = starting(decoupled(), JointLatentCache, sizes=JOINT, absorb=False)
    yield of(attention.copies_no_past, rebuilt, WIDTH, 6, said=r"401 tokens cached made a tensor .*: 3.4 times")
    shared = starting(decoupled(), JointLatentCache, sizes=JOINT, absorb=True)
    yield (
        attention.copies_no_past,
        partial(copies_with_broadcast, shared),
        r"made a tensor \(2, 2, 10, 402\): 3.4 times the 2 x 400 x 6",
    )
    yield of(attention.keys_lie_in_the_latent, plain.k_proj, WIDTH, 6, said="lie in 16 directions, not in 6")
    yield of(
        rope.turns_the_pairs, turning(8, "interleaved"), said=r"x \(1, 1, 1, 8\) at positions \[1\] in layout 'halves'"
    )
    yield of(rope.turns_the_pairs, lambda x, at: turning()(x, at + 1), said=r"x \(1, 1, 1, 8\) at positions \[0\]")
    yield of(rope.scores_by_distance, lambda x, at: x + at, said="length of a vector turned by position 5")
    yield of(
        rope.scores_by_distance, lambda x, at: turning()(x, at**2), said="score of positions 3 and 8, as of 2 and 7"
    )
    yield of(rope.scores_by_distance, alike(), said="64 distances have 16 scores")
    yield of(rope.layouts_differ_by_a_permutation, turning(), turning(), said=r"interleaved x \(1, 2, 9, 8\)")
    yield of(tiles.turns_every_tile, first_tile, said=r"x \(1, 3, 70, 10\)")
    yield of(tiles.turns_every_tile, strides_forgotten, said=r"x \(1, 2, 3, 10\), a transposed view")
    yield of(tiles.routes_every_tile, lane_of_zero, said=r"top 2 of logits \(1, 5\).*token \[0\] does not get")
    yield of(tiles.routes_every_tile, detached_gate, said=r"top 2 of logits \(1, 5\): gates, gradient of the logits")
    yield of(tiles.equals_are_all_different, same_again, said=r"top 3 of 5 equal scores: \[0, 0, 0\]")
    yield of(
        grouped.sorts_by_expert,
        partial(sorting, descending=True),
        said=r"a few tokens: index \(7, 3\), 5 experts: row 0 has slot",
    )
    yield of(grouped.says_where, place_forgotten, said=r"a few tokens: .*: slot \d+ is in row")
    yield of(grouped.equals_loop_in_tiles, experts_with_detached_gate, said=r"one token: .*, gradient of gate: 0 at")
    yield of(grouped.takes_views, from_the_start, said=r"x \(3, 9\), rows 4 to 6 of 7")
    yield of(grouped.takes_views, one_step_along, said=r"x \(3, 9\), every second column")
    yield of(grouped.nobodys_expert_gets_zeros, unwritten, said=r"one token: expert 1 has no token.*of w_in: nan")
    yield of(grouped.experts_in_another_order, louder_last, said=r"one token: output with experts in order \[2, 0, 1\]")
    yield of(grouped.same_bits_again, another_sum, said=r"one token: output, the second time")
    for kind, cache in (("joint", r"joint \(1, 3, 7\)"), ("latent", r"k_latent \(1, 3, 3\), v_latent \(1, 3, 3\)")):
        yield of(decode.equals_one_softmax, unscaled, kind, said=rf"{cache}, lengths \[3\]: ")
    yield of(decode.rows_end_where_they_end, sees_all, "joint", said=r"lengths \[3, 1\], NaN behind them: nan at \[1, ")
    yield of(
        decode.takes_views, gapless, "joint", said=r"joint \(2, 3, 4\), lengths \[3, 3\], views of longer storages"
    )
    yield of(decode.large_scores, overflowing, "joint", said=r"joint \(2, 70, 11\), .*, large scores: nan")
    yield of(decode.any_cut, first_piece, "joint", said=r"joint \(3, 70, 34\), .*, piece 16, block 16")
    yield of(decode.online_softmax, last_tile_wins, said=r"scores \(1, 2\), random, the first 0 .* block 1")
    yield of(decode.merges_pieces, lambda means, logs: means.mean(1), said=r"means \(1, 2, 1, 1\), all but the last")
    yield of(
        serving.equals_each_alone, served_with_padding, said=r"mha, 3 prompts, slots=1, stop=\d+: prompt 0.*: token \d"
    )
    yield of(
        serving.ends_where_it_ends, served_without_stop, said=r"slots=1, .*the story goes on behind its stop token"
    )
    yield of(serving.computes_no_more_rows, served_at_once, said=r"mha, 7 prompts, slots=1, stop=\d+: 7 rows in one")
    yield of(
        serving.takes_free_slots, served_in_groups, said=r"8 prompts, slots=2, .*calls of the model, 34 are enough"
    )
    yield of(serving.computes_no_past, served_without_cache, said=r"9 prompts, slots=3, .*: \d{4} tokens computed, 252")
    yield of(serving.order_is_theirs, served_shortest_first, said=r"in reverse, mha, 7 prompts, slots=2")
    yield of(
        rope.order_and_distance,
        TurnedLatent(latent_dim=6, rope=turning(), **HOW),
        WIDTH,
        said=r"\(2, 3, 16\).*moved by 100",
    )
    yield of(rope.order_and_distance, mha(rope=Still(8, 512)), WIDTH, said=r"the first two tokens of x \(2, 3, 16\)")
    yield of(
        compare.equals_oracle, Detached(**HOW), plain, WIDTH, said=r"x \(1, 1, 16\), gradient of v_proj.weight: 0 at"
    )
    yield of(compare.equals_oracle, mha(bias=False), plain, WIDTH, said=r"weights: missing \['k_proj.bias'")
    yield of(
        compare.equals_oracle, mha(d_head=4), plain, WIDTH, said=r"q_proj.weight \(8, 16\): the oracle's is \(16, 16\)"
    )
    yield of(tokens.nothing_is_lost, Drops(), said="'ï' comes back as ''")
    yield of(tokens.nothing_is_lost, Ends(), said=r"'<\|endoftext\|>' makes token 0")
    yield of(tokens.shortens, Bytes(), ["once upon"], said="1.00 tokens a byte in 1 texts")
    yield of(tokens.sums_to_one, lambda context: [0.25] * 3, 4, CONTEXTS, said=r"context \[\]: shape \(3,\)")
    yield of(tokens.sums_to_one, lambda context: [0.5, 0.5, 0.5, -0.5], 4, CONTEXTS, said="probability -0.5 of token 3")
    yield of(
        tokens.sums_to_one, lambda c: [0.25 + len(c)] * 4, 4, CONTEXTS, said=r"context \[0\]: probabilities sum to 5"
    )
    yield of(model.tokens_causal, peeking_model(), VOCAB, said=r"output 0 sees input 1.*x \(3, 2, 16\)")
    yield of(model.tokens_in_steps, *model_in_steps(times=2), VOCAB, said=r"\[1\]: the cache says that it holds 2")
    yield of(model.begins_knowing_nothing, lm, VOCAB, 2, 7, said="parameters, 7 counted")
    wide = [shaken(language_model(), 0.5), shaken(language_model(), 0.02)]
    yield of(model.begins_knowing_nothing, wide[0], VOCAB, 2, held(lm), said="first loss .* not ln 23 = 3.135")
    yield of(model.begins_knowing_nothing, wide[1], VOCAB, 2, held(lm), said="out_proj.weight begins with .*, not 0.01")
    yield of(model.tokens_apart, plain, WIDTH, said=r"x \(1, 2, 16\) against its tokens")
    yield of(model.bends, nn.Linear(WIDTH, WIDTH, dtype=WIDE), WIDTH, said=r"x \(2, 5, 16\) twice as large")
    yield of(
        training.adamw_steps, torch_adamw, language_model().double(), said=r"norm1.weight after a step with gradient"
    )
    yield of(training.loss_in_pieces, partial(chunked, times=2), said="loss of x .1, 1. in pieces of 1")
    yield of(training.loss_in_pieces, mean_of_means, said="loss of x .3, 2. in pieces of 2")
    cold = partial(drawn, temperature=0.5, top_k=3)
    yield of(training.draws_from_the_likeliest, cold, 0.5, 4, said="row 0 of logits .*: 3 tokens are left, not 4")
    yield of(training.draws_from_the_likeliest, cold, 1.0, 3, said="probabilities in row 0")
    yield of(
        training.draws_from_the_likeliest,
        partial(drawn, temperature=1.0, top_p=0.9),
        1.0,
        top_p=0.7,
        said="kept for top_p=0.7",
    )
    yield of(
        training.rate_climbs_and_falls, lambda n, **how: learning_rate(n + 1, **how), said="step 0 of 60: rate 0.4"
    )
    yield of(
        routed.chooses_the_largest, bias_forgotten, said=r"\(1, 3\) .*: token 0 gets experts \[0, 1\], the largest"
    )
    yield of(routed.chooses_the_largest, partial(routing, scores="softmax"), said="the largest with bias are")
    yield of(
        routed.gates_are_shares,
        partial(routing, bias_in_gate=True),
        said=r"top 2 of logits \(1, 3\) \(logits; bias: .*gates",
    )
    yield of(
        routed.gates_are_shares, softmax_after_top_k, said=r"top 2 of logits \(1, 3\).*: gates by token and expert"
    )
    yield of(routed.gates_are_shares, not_renormalised, said=r"top 1 of logits \(1, 1\).*: sum of a token's gates")
    yield of(routed.gates_are_shares, detached_gate, said=r"top 2 of logits \(1, 3\).*, gradient of the logits: 0 at")
    yield of(routed.bias_only_chooses, partial(routing, bias_in_gate=True), said="gates with 5.25 taken off every bias")
    yield of(routed.bias_only_chooses, bias_forgotten, said="bias 100 higher, and token 0 does not choose the last")
    yield of(
        routed.permuting_experts_permutes_the_routing,
        first_preferred,
        said=r"gates with experts in order \[1, 0\]|\[2, 0, 1\]",
    )
    yield of(
        routed.equals_loop, experts_with_detached_gate, said=r"one token: x \(1, 1\).*, gradient of gate: 0 at \[0, 0\]"
    )
    yield of(routed.equals_loop, experts_in_slot_order, said=r"chosen: x \(3, 2\), w_in \(4, 2, 3\): .* at \[")
    yield of(
        routed.permuting_experts_changes_nothing, experts_by_number, said=r"one token, odd widths: output with experts"
    )
    yield of(routed.permuting_experts_changes_nothing, experts_in_slot_order, said="output with")
    layer = mixture()
    yield of(
        routed.padding_changes_nothing, lambda x, valid: layer(x), WIDTH, said=r"x \(1, 2, 16\).*: output at padding"
    )
    yield of(
        routed.padding_changes_nothing, layer, WIDTH, lambda: layer.router.load, 2, said=r"slots counted, 2 are real"
    )
    yield of(routed.padding_changes_nothing, centred, WIDTH, shared=True, said=r"last row's tokens against them alone")
    yield of(
        routed.shared_equal_one_layer,
        partial(shared_layers, mean=True),
        said=r"x \(1, 2\) through shared w_in \(2, 2, 1\)",
    )
    yield of(balancing.equals_rule, equation_4, "proportional", said=r"counts \[2, 0\], top 1: next bias")
    yield of(balancing.equals_rule, proportional_rule, "algorithm-1", said=r"counts \[\d.*: next bias")
    yield of(
        balancing.lifts_the_less_loaded,
        up_for_the_loaded,
        said=r"counts \[2, 0\].*: expert 1 of 0 tokens gets bias -0.1",
    )
    yield of(balancing.lifts_the_less_loaded, RULES["none"], said=r"counts \[2, 0\].*the least loaded gets no more")
    yield of(balancing.shift_stays_a_shift, last_forgotten, said=r"counts \[2, 0\].*what 0.75 on every bias adds")
    yield of(balancing.permuting_experts_permutes_the_bias, last_forgotten, said=r"counts \[2, 0\].*in order \[1, 0\]")
    yield of(
        balancing.parts_count_as_one,
        step_for_each_part,
        said=r"counts \[8, 0, 0, 8\].*two more parts of a step: next bias",
    )
    yield of(balancing.moves_in_place, replacing_the_bias, said=r"counts \[2, 0\].*another tensor after the step")
    yield of(balancing.moves_in_place, replacing_the_numbers, said=r"counts \[2, 0\].*another tensor after the step")
    yield of(balancing.moves_in_place, idle, said=r"counts \[2, 0\].*the bias has not moved")
    yield of(balancing.forgets_the_counts, remembering, said=r"counts \[2, 0\].*2 of the slots are still counted")
    yield of(balancing.forgets_the_counts, drifting, said=r"counts \[2, 0\].*a step without tokens: bias")
    yield of(balancing.balances, equation_4, 0.02, said="8 experts, top 2, rate 0.02: CV")
    yield of(balancing.balances, up_for_the_loaded, 0.02, said="8 experts, top 2, rate 0.02: CV")
    yield of(balancing.equals_switch_loss, switch_times_k, said="loss of probabilities .1, 3., top 2")
    yield of(balancing.equals_switch_loss, switch_of_counts, said="top 1, gradient of the logits: 0 at")


CONTEXTS = [[0], []]
with torch.random.fork_rng():
    torch.manual_seed(0)
    RIGHT, WRONG = list(right()), list(wrong())


def name(check):
    return f"{check.__module__.split('.')[-1]}.{check.__name__}"


@pytest.mark.parametrize(("check", "run"), RIGHT, ids=[name(check) for check, _ in RIGHT])
def test_the_librarys_own_passes(check, run):
    before = torch.get_rng_state()
    figures = run()
    assert figures is None or all(isinstance(value, (int, float, str)) for value in figures.values())
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator moved"


@pytest.mark.parametrize(("check", "run", "said"), WRONG, ids=[name(check) for check, *_ in WRONG])
def test_a_wrong_version_fails_in_one_line(check, run, said):
    before = torch.get_rng_state()
    with pytest.raises(CheckFailed, match=said) as failed:
        run()
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 240
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator moved"


def test_every_check_is_shown_at_work():
    found = set()
    for info in pkgutil.iter_modules(moemla.checks.__path__):
        module = importlib.import_module(f"moemla.checks.{info.name}")
        public = {f for n, f in vars(module).items() if n[0] != "_" and getattr(f, "__module__", "") == module.__name__}
        found |= {f for f in public if getattr(f, "is_check", False)}
    assert len(found) > 30
    assert found == {check for check, _ in RIGHT} == {check for check, *_ in WRONG}


def test_a_seed_gives_the_input_and_is_named():
    def said(**seed):
        with pytest.raises(CheckFailed) as failed:
            attention.rows_apart(lambda x: x - x.mean(0), WIDTH, **seed)
        return str(failed.value)

    assert said() == said(seed=0) != said(seed=7)
    assert said(seed=7).endswith("(seed 7)")


def test_nothing_equals_nan_and_other_types_are_named():
    x = torch.ones(2, 3, dtype=WIDE)
    compare.same(x, x.clone(), "x")
    for found, wanted in ((x * torch.nan, x), (x, x * torch.nan)):
        with pytest.raises(CheckFailed, match=r"x: .*nan"):
            compare.same(found, wanted, "x")
    with pytest.raises(CheckFailed, match=r"x: 0.333333 at \[0, 0\], wanted 0.333333 .*e-0\d, in float32"):
        compare.same((x / 3).float(), x / 3, "x")
    with pytest.raises(CheckFailed, match=r"x: shape \(3, 2\), wanted \(2, 3\)"):
        compare.same(x.T, x, "x")


def test_bytes_are_counted_once_and_wherever_they_are():
    x = torch.zeros(4, 8, dtype=WIDE)
    held = Inputs(mha(), 2, 3)
    held.more = {"again": [x, x[:1]], "none": None}
    assert attention.bytes_of(held) == 2 * 3 * WIDTH * 8 + 4 * 8 * 8  # the layer's parameters are not kept of a token
    assert attention.bytes_of([x[:1]]) == 4 * 8 * 8  # a view holds the whole


def test_a_time_is_a_ratio():
    a, b = torch.randn(300, 300), torch.randn(10, 10)
    assert time_ratio(lambda: a @ a, lambda: b @ b)["time"] > 2


def test_readers_need_no_pytest():
    for path in Path(moemla.checks.__file__).parent.glob("*.py"):
        assert "pytest" not in path.read_text()
