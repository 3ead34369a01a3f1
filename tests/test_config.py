"""ModelConfig and TrainConfig: the paper's sizes by hand, matching, and a clear error for every wrong setting."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from moemla import complexity, config
from moemla.config import SIZES, VARIANTS, ModelConfig, TrainConfig, architecture, setting
from moemla.errors import MoemlaError
from moemla.model import LanguageModel
from moemla.optim import make_optimizers
from moemla.paper.claims import load_claims
from moemla.runs import Run

PAPER_SIZES = ("XS", "S", "M", "L", "XL")
TABLE_1 = {"XS": 17.5e6, "S": 44.5e6, "M": 54.1e6, "L": 123.3e6, "XL": 202.7e6}


def unchecked_config():
    """ModelConfig as users have it, without the run-time types that the tests add: those would speak up first."""
    spec = importlib.util.spec_from_file_location("plain_config", config.__file__)
    spec.loader = importlib.machinery.SourceFileLoader("plain_config", config.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ModelConfig


PlainConfig = unchecked_config()


def dense_by_hand(size: str, vocab: int = 50257) -> int:
    """Tied table, 4 square matrices and a 4d feed-forward a block, a bias for each output, LayerNorm with bias."""
    layers, d = SIZES[size]["n_layers"], SIZES[size]["d_model"]
    attention = 4 * (d * d + d)
    feedforward = (d * 4 * d + 4 * d) + (4 * d * d + d)
    return vocab * d + layers * (attention + feedforward + 2 * 2 * d) + 2 * d


@pytest.mark.parametrize("size", PAPER_SIZES)
def test_table_1(size):
    rope = complexity.parameters(ModelConfig.preset(size, "mha-rope"))
    learned = complexity.parameters(ModelConfig.preset(size, "mha"))
    assert rope.total == dense_by_hand(size)
    assert abs(rope.total / TABLE_1[size] - 1) < 0.006
    assert learned.total == rope.total + 512 * SIZES[size]["d_model"]  # the position table and nothing else
    assert rope.active == rope.total


def test_m_is_exactly_54_104_064():
    assert complexity.parameters(ModelConfig.preset("M", "mha-rope")).total == 54_104_064


def test_matched_m_holds_as_much_and_uses_seven_tenths():
    counted = complexity.parameters(ModelConfig.preset("M", "moe-mla-rope"))
    assert abs(counted.total / 54_104_064 - 1) < 0.006
    assert 0.69 < counted.active_share < 0.71


@pytest.mark.parametrize("size", ["tiny", *PAPER_SIZES])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matched_totals(size, variant):
    config = ModelConfig.preset(size, variant)
    reference = config.reference()
    assert (reference.attention, reference.ffn, reference.positions) == ("mha", "dense", config.positions)
    assert reference == ModelConfig.preset(size, "mha" if config.positions == "learned" else "mha-rope")
    ratio = complexity.parameters(config).total / complexity.parameters(reference).total
    # The matching of experts knows nothing of the attention, so only moe over an attention of the same size is exact.
    same_attention = not variant.startswith("moe-") or variant.removeprefix("moe-") in ("mha", "mha-rope")
    paper = variant.removeprefix("moe-") in ("mla", "mla-rope")
    if same_attention or paper:
        assert abs(ratio - 1) < (0.0235 if size == "tiny" else 0.006), ratio


STYLES = {
    "plain": {},
    "swiglu": dict(activation="swiglu"),
    "rmsnorm": dict(norm="rmsnorm"),
    "untied": dict(tie_embeddings=False),
    "no bias": dict(bias=False),
    "learnable": dict(positions="rope", rope_learnable=True),
    "all": dict(activation="swiglu", norm="rmsnorm", tie_embeddings=False, bias=False, n_shared=0, d_head=6),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_built_model_counts_what_complexity_says(variant, style):
    small = dict(d_model=32, n_layers=2, n_experts=6, top_k=2, max_seq_len=16)
    config = ModelConfig.preset("tiny", variant, vocab_size=97, **small | STYLES[style])
    model = LanguageModel(config, device="meta")
    counted = complexity.parameters(config)
    assert sum(p.numel() for p in model.parameters()) == counted.total
    routed = [p for name, p in model.named_parameters() if name.endswith(("w_in", "w_out"))]
    idle = sum(p.numel() // config.n_experts * (config.n_experts - config.top_k) for p in routed)
    assert counted.active == counted.total - idle
    positions = [p for name, p in model.named_parameters() if name.startswith(("position.", "rope."))]
    embedding = model.embedding.weight.numel() + sum(p.numel() for p in positions)
    embedding += 0 if config.tie_embeddings else model.head.weight.numel()
    assert counted.embedding == embedding


WRONG = [
    *[
        (name, value, {})
        for name in ("vocab_size", "max_seq_len", "n_layers", "d_model", "n_heads")
        for value in (0, -1)
    ],
    *[(name, 2.0, {}) for name in ("d_model", "n_heads", "n_kv_heads", "latent_dim", "d_ff", "n_experts", "top_k")],
    *[(name, True, {}) for name in ("n_layers", "d_expert", "n_shared", "n_dense_layers")],
    *[("n_dense_layers", value, {}) for value in (-1, 1.0, None, 5)],
    ("n_dense_layers", 1, dict(ffn="dense")),
    *[(name, "8", {}) for name in ("d_model", "n_heads", "d_head", "d_nope", "d_rope", "d_value", "n_shared")],
    *[(name, None, {}) for name in ("vocab_size", "n_layers", "n_shared", "top_k", "dropout", "bias", "positions")],
    *[(name, None, {}) for name in ("attention", "ffn", "norm", "activation", "backend", "reading", "rope_layout")],
    *[(name, "bogus", {}) for name in ("attention", "cache", "positions", "rope_layout", "ffn", "scores", "norm")],
    *[(name, "bogus", {}) for name in ("activation", "backend", "reading")],
    *[(name, 1, {}) for name in ("renormalise", "bias_in_gate", "bias", "tie_embeddings", "rope_learnable")],
    *[("dropout", value, {}) for value in (-0.1, 1.0, float("nan"), "0.1")],
    *[("rope_theta", value, {}) for value in (1.0, -5.0, float("inf"), "big")],
    *[("routed_scale", value, {}) for value in (0.0, -1.0, float("nan"), float("inf"), "1")],
    ("n_shared", -1, {}),
    ("vocab_size", 1, {}),
    ("n_heads", 3, {}),
    ("n_kv_heads", 3, dict(attention="mha")),
    ("n_kv_heads", 2, dict(attention="mla")),
    ("n_kv_heads", 2, dict(attention="mla-decoupled")),
    ("d_value", 7, dict(attention="mha")),
    ("d_value", 7, dict(attention="mla")),
    ("positions", "learned", dict(attention="mla-decoupled")),
    ("positions", "none", dict(attention="mla-decoupled")),
    ("d_model", 644, {}),
    ("d_model", 4, {}),
    ("n_heads", 7, dict(d_model=648)),
    ("rope_learnable", True, dict(positions="learned")),
    ("rope_learnable", True, dict(attention="mha", positions="none")),
    ("d_head", 5, dict(attention="mha")),
    ("d_rope", 5, dict(attention="mla-decoupled")),
    ("cache", "latent", dict(attention="mha")),
    ("cache", "kv", dict(attention="mla")),
    ("cache", "joint", dict(attention="mla")),
    ("cache", "hybrid", dict(attention="mla-decoupled")),
    ("top_k", 63, {}),
    ("top_k", 4, dict(n_experts=3)),
]


@pytest.mark.parametrize(("field", "value", "others"), WRONG)
def test_a_wrong_setting_names_field_value_and_what_is_right(field, value, others):
    with pytest.raises(ValueError) as caught:
        PlainConfig(**others | {field: value})
    message = str(caught.value)
    assert message.startswith(f"{field}={value!r}: ")
    assert len(message.split(": ", 1)[1].split()) >= 3


def test_every_field_is_checked():
    """No field swallows a value of no known kind."""
    for field in dataclasses.fields(ModelConfig):
        with pytest.raises(ValueError, match=field.name):
            PlainConfig(**{field.name: object()})


def test_choices_are_listed():
    with pytest.raises(ValueError, match="mha, mla, mla-decoupled"):
        ModelConfig(attention="flash")


@pytest.mark.parametrize("n_heads", [1, 3, 5, 15, 43, 129, 215, 645])
def test_645_wide_has_no_even_head(n_heads):
    """The paper's FLOP-matched width (audit A9): odd, so no number of heads leaves pairs to rotate, nor whole rows."""
    for positions in ("rope", "learned"):
        with pytest.raises(ValueError, match=r"d_model=645: must be a multiple of 8 .*640"):
            ModelConfig(d_model=645, n_heads=n_heads, positions=positions)
    with pytest.raises(ValueError, match=r"d_head=\d+: RoPE turns pairs of dimensions"):
        ModelConfig(d_model=640, n_heads=n_heads, d_head=645 // n_heads)


def test_645_wide_with_8_heads_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="d_model=645: must be a multiple of 8"):
        ModelConfig.preset("M", d_model=645)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (dict(size="XXL"), "size"),
        (dict(size="M", variant="moe"), "variant"),
        (dict(size="M", matched="speed"), "matched"),
        (dict(size="M", widht=3), "changes"),
        (dict(size="M", d_model="512"), "d_model"),
        (dict(size="M", d_model=None), "d_model"),
        (dict(size="M", variant="moe-mha", matched="flops", n_heads=0), "n_heads"),
        (dict(size="M", vocab_size=0), "vocab_size"),
    ],
)
def test_wrong_preset(wrong, field):
    with pytest.raises(ValueError, match=f"^{field}="):
        PlainConfig.preset(**wrong)


def test_expert_widths_of_each_matching():
    for size in PAPER_SIZES:
        d = SIZES[size]["d_model"]
        assert ModelConfig.preset(size).d_expert == d // 16
        assert ModelConfig.preset(size, matched="active").d_expert == d // 2
        assert ModelConfig.preset(size, matched="literal").d_expert == d
        assert ModelConfig.preset(size, reading="literal").d_expert == d


def test_readings():
    working, literal = ModelConfig(), ModelConfig(reading="literal")
    assert (working.scores, working.bias_in_gate, working.d_expert) == ("sigmoid", False, 8)
    assert (literal.scores, literal.bias_in_gate, literal.d_expert) == ("softmax", True, 128)
    mixed = ModelConfig(reading="literal", scores="sigmoid", bias_in_gate=False, d_expert=5)
    assert (mixed.scores, mixed.bias_in_gate, mixed.d_expert) == ("sigmoid", False, 5)


@pytest.mark.parametrize("size", ["tiny", "XS", "M"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_matching_is_the_nearest_width_with_an_even_head(size, variant):
    config = ModelConfig.preset(size, variant, matched="flops")
    heads = SIZES[size]["n_heads"]
    assert config.n_heads == heads
    assert config.d_model == config.n_heads * config.d_head
    assert config.d_head % 2 == 0
    assert config.d_model % 8 == 0
    small = dict(SIZES[size], positions=config.positions)
    target = complexity.flops_per_token(ModelConfig(**small, vocab_size=50257, attention="mha", ffn="dense"))

    def miss(d_model):
        given = {name: getattr(config, name) for name in ("attention", "positions", "ffn", "n_layers", "n_heads")}
        given |= dict(vocab_size=50257, d_model=d_model)
        given |= dict(n_kv_heads=heads // 4) if "gqa" in variant else {}
        return abs(complexity.flops_per_token(ModelConfig(**given)) - target)

    step = 2 * heads if heads % 4 == 0 else 8 * heads
    assert miss(config.d_model) <= min(miss(config.d_model + step), miss(config.d_model - step))


def test_flops_matching_at_m_is_no_645():
    config = ModelConfig.preset("M", "moe-mla-rope", matched="flops")
    reference = ModelConfig.preset("M", "mha-rope")
    ratio = complexity.flops_per_token(config) / complexity.flops_per_token(reference)
    assert config.d_model > 512
    assert abs(ratio - 1) < 0.02, (config.d_model, ratio)


def test_changes_win_over_matching():
    assert ModelConfig.preset("M", d_expert=40).d_expert == 40
    assert ModelConfig.preset("M", "mla-rope", latent_dim=64, d_ff=100).d_ff == 100
    narrow, wide = (ModelConfig.preset("M", "mla-rope", latent_dim=r) for r in (64, 512))
    assert narrow.d_ff > 4 * 512 > wide.d_ff  # what a latent saves goes to the feed-forward, and back


def test_dict_and_json_roundtrip():
    config = ModelConfig.preset("XS", "moe-mla-decoupled", dropout=0.1, cache="joint")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="widht"):
        ModelConfig.from_dict(config.to_dict() | {"widht": 3})


def test_a_config_from_before_there_were_leading_dense_layers():
    saved = ModelConfig().to_dict()
    del saved["n_dense_layers"]
    assert ModelConfig.from_dict(saved) == ModelConfig() and ModelConfig().n_dense_layers == 0


def test_frozen_and_by_name_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().d_model = 3
    with pytest.raises(TypeError):
        ModelConfig(4096)
    assert all(value is not None for value in ModelConfig().to_dict().values())


def test_decoupled_presets_have_the_papers_68_percent():
    config, reference = ModelConfig.preset("M", "moe-mla-decoupled"), ModelConfig.preset("M", "mha-rope")
    assert (config.latent_dim, config.d_nope, config.d_rope, config.d_value) == (256, 64, 64, 64)
    ratio = complexity.cache_bytes_per_token(config) / complexity.cache_bytes_per_token(reference)
    assert ratio == 1 - 0.6875
    assert complexity.cache_bytes_per_token(ModelConfig.preset("M", "mla-rope")) * 2 == (
        complexity.cache_bytes_per_token(reference)
    )
    assert complexity.cache_bytes_per_token(ModelConfig.preset("M", "gqa-rope")) * 4 == (
        complexity.cache_bytes_per_token(reference)
    )


def test_cache_bytes_of_config_equal_storage():
    for form in VARIANTS:
        config = ModelConfig.preset("tiny", form, vocab_size=50, max_seq_len=16)
        cache = LanguageModel(config, device="meta").new_cache(2, 16, dtype=torch.bfloat16)
        assert cache.bytes_per_token() == complexity.cache_bytes_per_token(config, dtype_bytes=2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n_experts=14", ("n_experts", 14)),
        ("rope_theta=5e5", ("rope_theta", 5e5)),
        ("renormalise=false", ("renormalise", False)),
        ("cache=hybrid", ("cache", "hybrid")),
        ("latent_dim=32", ("latent_dim", 32)),
    ],
)
def test_any_field_is_set_by_its_name(text, expected):
    assert setting(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("experts=14", "set='experts=14': FIELD=VALUE"),
        ("n_experts", "FIELD=VALUE"),
        ("n_experts=many", "n_experts must be a whole number"),
        ("dropout=x", "dropout must be a number"),
        ("bias=1", "bias must be True or False"),
    ],
)
def test_what_cannot_be_set_is_named(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        setting(text)


def test_the_architecture_is_all_but_the_code_that_computes_it():
    """What two runs must have alike to be one: every field but the back end of the experts."""
    plain = ModelConfig()
    other = architecture(ModelConfig(backend="loop").to_dict())
    assert other == architecture(plain.to_dict())
    assert set(other) == {field.name for field in dataclasses.fields(ModelConfig)} - {"backend"}
    assert architecture(ModelConfig(scores="softmax").to_dict()) != other


def test_a_run_goes_on_with_another_back_end_and_no_other_model(tmp_path):
    def run(**changes):
        data = dict(hash="of the data", splits={})
        return Run(tmp_path, tmp_path / "run", ModelConfig(**changes), TrainConfig(), trained, data)

    trained = SimpleNamespace(hash="of the tokenizer", save=lambda path: None)
    (tmp_path / "run").mkdir()
    run().begin()
    run(backend="loop").check(resume=True)
    with pytest.raises(MoemlaError, match=r"other settings \(top_k\)"):
        run(backend="loop", top_k=1).check(resume=True)


# --- TrainConfig ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong,message",
    [
        (dict(steps=0), "steps=0"),
        (dict(steps=1.5), r"steps=1\.5"),
        (dict(batch_size=-1), "batch_size=-1"),
        (dict(batch_size=4, micro_batches=3), "micro_batches=3.*batch_size=4"),
        (dict(log_every=0), "log_every=0"),
        (dict(lr=0.0), r"lr=0\.0"),
        (dict(lr=float("nan")), "lr=nan"),
        (dict(clip=-1.0), r"clip=-1\.0"),
        (dict(balance_rate=0.0), "balance_rate"),
        (dict(warmup=-1), "warmup=-1"),
        (dict(min_lr=-1e-3), "min_lr"),
        (dict(weight_decay=-0.1), "weight_decay"),
        (dict(seed=-1), "seed=-1"),
        (dict(optimizer="sgd"), "optimizer='sgd'.*muon, adamw"),
        (dict(precision="fp8"), "precision='fp8'.*bf16, fp16"),
        (dict(schedule="linear"), "schedule='linear'.*cosine, wsd, constant"),
        (dict(decay=0.0), r"decay=0\.0"),
        (dict(decay=1.5), r"decay=1\.5.*at most 1"),
        (dict(balance_rule="loss"), "balance_rule='loss'.*sign"),
        (dict(switch_loss=-0.01), "switch_loss"),
        (dict(z_loss=-0.01), "z_loss"),
    ],
    ids=str,
)
def test_wrong_settings_of_training_are_named(wrong, message):
    with pytest.raises(Exception) as error:  # beartype's own complaint about a type comes first in tests
        TrainConfig(**wrong)
    assert isinstance(error.value, ValueError) or "type" in type(error.value).__name__.lower()
    if isinstance(error.value, ValueError):
        error.match(message)


@pytest.mark.parametrize(
    "wrong,message",
    [
        (dict(steps=20, warmup=21), r"warmup=21: must be at most steps=20"),
        (dict(lr=1e-3, min_lr=2e-3), r"min_lr=0\.002: must be at most lr=0\.001"),
        (dict(balance_rule="quantile", balance_rate=3.0), r"balance_rate=3\.0.*at most 1"),
        (dict(seed=2**70), "seed="),
        (dict(seed=True), "seed=True"),
        (dict(steps=True), "steps=True"),
        *[
            (dict([(name, value)]), f"{name}={value}: must be a finite number")
            for name in ("lr", "min_lr", "weight_decay", "clip", "decay", "balance_rate", "switch_loss", "z_loss")
            for value in (math.inf, math.nan)
        ],
    ],
    ids=str,
)
def test_settings_of_training_that_cannot_work_are_named(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(**wrong)
    assert "\n" not in str(error.value)


def test_the_default_warm_up_is_that_of_before():
    assert TrainConfig().warmup == TrainConfig(steps=3).warmup == 50
    assert TrainConfig(steps=20, warmup=20).warmup == 20


def test_the_papers_recipe():
    """Section 3.3; what the ledger holds of it is compared with the ledger."""
    recipe, ledger = TrainConfig.paper(), {claim.id: claim.printed for claim in load_claims()}
    for name, row in (
        ("batch_size", "A25-sequences"),
        ("seq_len", "A25-length"),
        ("steps", "A25-steps"),
        ("warmup", "A25-warmup-steps"),
        ("weight_decay", "S33-weight-decay"),
        ("clip", "S33-clip"),
    ):
        assert getattr(recipe, name) == float(ledger[row].split()[0].replace(",", "")), name
    assert (recipe.optimizer, recipe.lr, recipe.min_lr, recipe.schedule) == ("adamw", 3e-4, 1e-5, "cosine")
    assert recipe.precision == "fp16" and ledger["S33-betas"] == "0.9 and 0.95"
    (adam,) = make_optimizers(LanguageModel(ModelConfig(), device="meta"), recipe.optimizer)
    assert {group["betas"] for group in adam.param_groups} == {(0.9, 0.95)}
    assert TrainConfig.paper(steps=9, warmup=3, lr=1e-3) == dataclasses.replace(recipe, steps=9, warmup=3, lr=1e-3)


def test_heads_with_a_width_of_their_own_have_a_reference():
    odd = ModelConfig.preset("tiny", "moe-mla-rope", n_heads=3, d_head=32)
    same = ModelConfig.preset("tiny", "moe-mla-rope").reference()
    assert complexity.parameters(odd.reference()) == complexity.parameters(same)
    assert ModelConfig.preset("tiny", "mla-rope", n_heads=3, d_head=32).d_ff >= 8


def test_grouped_queries_take_a_quarter_of_the_heads_that_are_there():
    heads = [ModelConfig.preset("tiny", "gqa-rope", n_heads=n).n_kv_heads for n in (2, 4, 16)]
    assert heads == [1, 1, 4]
