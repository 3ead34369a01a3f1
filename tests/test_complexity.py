"""Counts from the config against the model that is built, against the paper's table, and against hand counts."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import moemla
from moemla import ModelConfig, complexity

SMALL = dict(vocab_size=97, max_seq_len=24, n_layers=3, d_model=32, n_heads=4, n_experts=7, n_shared=2, top_k=3)
ATTENTIONS = {
    "mha": dict(attention="mha", positions="learned"),
    "mha-rope": dict(attention="mha"),
    "gqa-rope": dict(attention="mha", n_kv_heads=2),
    "no positions": dict(attention="mha", positions="none"),
    "wide heads": dict(attention="mha", d_head=12),
    "mla": dict(attention="mla", positions="learned", latent_dim=10),
    "mla hybrid": dict(attention="mla", cache="hybrid"),
    "decoupled": dict(attention="mla-decoupled", latent_dim=12, d_nope=6, d_rope=4, d_value=10),
}
FEEDFORWARDS = {
    "dense": dict(ffn="dense", d_ff=40),
    "experts": dict(ffn="moe", d_expert=8),
    "no shared": dict(ffn="moe", d_expert=16, n_shared=0),
    "leading dense": dict(ffn="moe", d_expert=8, d_ff=40, n_dense_layers=1),
    "all dense": dict(ffn="moe", d_expert=8, d_ff=40, n_dense_layers=3),
}
STYLES = {
    "as the paper": dict(),
    "bare": dict(bias=False, tie_embeddings=False),
    "modern": dict(norm="rmsnorm", activation="swiglu"),
    "modern bare": dict(norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False),
}


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ffn", FEEDFORWARDS)
@pytest.mark.parametrize("style", STYLES)
def test_counts_what_a_built_model_holds(attention, ffn, style):
    config = ModelConfig(**SMALL | ATTENTIONS[attention] | FEEDFORWARDS[ffn] | STYLES[style])
    model = moemla.LanguageModel(config)
    count = complexity.parameters(config)
    assert count.total == sum(p.numel() for p in model.parameters())
    parts = count.embedding + count.attention + count.feedforward + count.router + count.norms
    layers = [block.feedforward for block in model.blocks]
    dense = sum(p.numel() for f in layers if isinstance(f, moemla.FeedForward) for p in f.parameters())
    assert parts == count.total and count.feedforward == count.routed + count.shared + dense


@pytest.mark.parametrize("ffn", FEEDFORWARDS)
def test_active_parameters_are_those_that_one_token_moves(ffn):
    """A gradient from one token reaches exactly the active parameters (the token table whole: it is the head)."""
    config = ModelConfig(**SMALL | FEEDFORWARDS[ffn], positions="rope", bias=False, backend="loop")
    model = moemla.LanguageModel(config)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        tokens = torch.randint(config.vocab_size, (1, 1))
    model(tokens, tokens).backward()
    expert = config.d_model * config.d_expert * 2
    idle = 0
    for p in model.parameters():
        if p.dim() == 3 and p.shape[0] == config.n_experts:  # stacked experts: those with no gradient were not met
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            idle += sum(p[e].numel() for e in range(len(p)) if not grad[e].any())
    count = complexity.parameters(config)
    assert count.total - count.active == idle
    routed = sum(isinstance(block.feedforward, moemla.MixtureOfExperts) for block in model.blocks)
    assert routed == {"dense": 0, "all dense": 0, "leading dense": 2}.get(ffn, 3)
    assert idle == routed * (config.n_experts - config.top_k) * expert


TABLE_1 = {"XS": (17.5, 17.60), "S": (44.5, 44.65), "M": (54.1, 54.10), "L": (123.3, 123.65), "XL": (202.7, 202.62)}


@pytest.mark.parametrize("size", TABLE_1)
def test_table_1(size):
    printed, expected = TABLE_1[size]
    total = complexity.parameters(ModelConfig.preset(size, "mha-rope")).total
    assert round(total / 1e6, 2) == expected and abs(total / 1e6 / printed - 1) < 6e-3


def test_medium_by_hand():
    """Size M, MHA with biases and LayerNorm, tied head, no position table."""
    d, layers = 512, 9
    attention = 4 * (d * d + d)
    feedforward = d * 2048 + 2048 + 2048 * d + d
    by_hand = 50257 * d + layers * (attention + feedforward + 4 * d) + 2 * d
    assert complexity.parameters(ModelConfig.preset("M", "mha-rope")).total == by_hand == 54_104_064


def test_matched_medium():
    """64 experts of a sixteenth of the width hold what one FFN holds; a token takes about 70 % of the whole."""
    dense = complexity.parameters(ModelConfig.preset("M", "mha-rope"))
    for variant in ("moe-mha-rope", "moe-mla-rope"):
        config = ModelConfig.preset("M", variant)
        count = complexity.parameters(config)
        assert config.d_expert == 32 and abs(count.total / dense.total - 1) < 6e-3
        assert abs(count.active_share - 0.70) < 0.01


def test_flops_are_those_of_the_matrix_products():
    """Torch's own counter on a forward pass agrees, attention included, written out so that it is seen."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig(**SMALL | FEEDFORWARDS["dense"], attention="mla", positions="rope", bias=False)
    model = moemla.LanguageModel(config).eval()
    steps = 16
    tokens = torch.zeros(1, steps, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(tokens)
    assert counter.get_total_flops() == steps * complexity.flops_per_token(config, steps)


def test_flops_by_hand():
    """Dense M at 512 keys: 12 d^2 of matrices and 2 n d of attention a layer, and the head."""
    config = ModelConfig.preset("M", "mha-rope")
    by_hand = 2 * (9 * (12 * 512**2 + 2 * 512 * 512) + 50257 * 512)
    assert complexity.flops_per_token(config) == by_hand
    assert complexity.training_flops_per_token(config) == 3 * by_hand
    moe = ModelConfig.preset("M", "moe-mha-rope")
    by_hand = 2 * (9 * (4 * 512**2 + 2 * 512 * 512 + 62 * 512 + 8 * 2 * 512 * 32) + 50257 * 512)
    assert complexity.flops_per_token(moe) == by_hand
    latent = ModelConfig.preset("M", "mla-rope", d_ff=2048)
    assert complexity.flops_per_token(latent) == complexity.flops_per_token(config)


def test_flops_with_leading_dense_layers():
    """A dense layer of d_ff in the place of a router, top_k routed and two shared experts, one for one."""
    costs = [
        complexity.flops_per_token(ModelConfig.preset("M", "moe-mla-rope", n_dense_layers=n, d_ff=96))
        for n in (0, 1, 9)
    ]
    dense, experts = 2 * 512 * 96, 62 * 512 + 8 * 2 * 512 * 32
    assert [cost - costs[0] for cost in costs] == [2 * n * (dense - experts) for n in (0, 1, 9)]
    all_dense = ModelConfig.preset("M", "mla-rope", d_ff=96)
    assert costs[-1] == complexity.flops_per_token(all_dense)
    mixed = ModelConfig.preset("M", "moe-mla-rope", n_dense_layers=1, d_ff=96)
    first, last = (complexity.block_macs_per_token(mixed, layer=layer) for layer in (0, -1))
    assert first == complexity.block_macs_per_token(all_dense) and first - last == dense - experts


def test_experts_cost_what_is_active_not_what_is_held():
    few, many = (ModelConfig.preset("M", "moe-mla-rope", n_experts=e) for e in (62, 124))
    assert complexity.parameters(many).total > 1.3 * complexity.parameters(few).total
    extra = complexity.flops_per_token(many) - complexity.flops_per_token(few)
    assert extra == 2 * 9 * 62 * 512  # the router's new rows alone


@pytest.mark.parametrize(
    ("variant", "changes", "per_layer"),
    [
        ("mha", {}, 1024),
        ("gqa-rope", {}, 256),
        ("mla-rope", {}, 512),
        ("mla-rope", {"cache": "hybrid"}, 768),
        ("mla-decoupled", {}, 320),
        ("mla-rope", {"latent_dim": 64}, 128),
    ],
)
def test_cache_widths_at_m(variant, changes, per_layer):
    config = ModelConfig.preset("M", variant, **changes)
    assert complexity.cache_bytes_per_token(config) == 9 * per_layer * 2
    assert complexity.cache_bytes_per_token(config, dtype_bytes=4) == 9 * per_layer * 4


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_cache_bytes_are_those_of_the_storage(attention):
    config = ModelConfig(**SMALL | ATTENTIONS[attention] | FEEDFORWARDS["dense"])
    cache = moemla.LanguageModel(config).new_cache(batch_size=1, max_len=8)
    stored = sum(buffer.element_size() * buffer.numel() for buffer in cache.buffers)
    assert stored == 8 * complexity.cache_bytes_per_token(config, dtype_bytes=4)


def test_unknown_forms_are_named():
    for field, function in (("attention", complexity.parameters), ("cache", complexity.cache_bytes_per_token)):
        config = SimpleNamespace(**ModelConfig().to_dict() | {field: "flash"})
        with pytest.raises(ValueError, match=f"{field}='flash'"):
            function(config)


def test_combinations():
    assert complexity.routing_combinations(62, 6) == 62 * 61 * 60 * 59 * 58 * 57 // 720 == 61_474_519
    small = complexity.routing_combinations(5, 2)
    assert small == sum(1 for _ in itertools.combinations(range(5), 2))


# The paper's formulas.
