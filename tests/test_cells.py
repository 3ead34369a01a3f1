"""A cell's key never changes, its name says what it is, and what two runs differ in is named."""

from dataclasses import fields, make_dataclass, replace

import pytest

from moemla import cells
from moemla.cells import (
    DEFAULTS,
    FREE,
    Cell,
    completed,
    differences,
    distinct,
    key_of,
    model_config,
    train_config,
)
from moemla.config import VARIANTS, ModelConfig, TrainConfig

SIZES = dict(vocab_size=4096, max_seq_len=512)
SCHEDULE = dict(steps=600, batch_size=8, seq_len=256, optimizer="muon", warmup=60)


def cell(arm="mha", variant="mha", lr=1e-2, seed=0, model=None, tags=None, **train) -> Cell:
    return Cell(
        experiment="latent-cost",
        scale="cpu",
        data="0a2abc174271c494",
        tags=dict(arm=arm) | (tags or {}),
        model=model_config("tiny", variant, **SIZES | (model or {})),
        train=train_config(**SCHEDULE | dict(lr=lr, min_lr=lr / 30, seed=seed) | train),
    )


# Of November 2026. They are names of runs that took hours: a change here is a mistake, whatever its reason.
KEYS = {
    "plain": (cell(), "210145433de0"),
    "rate and seed": (cell(lr=4e-2, seed=3), "16d4f61e3d6a"),
    "latents": (cell("mla-rope", "mla-rope"), "2f79d0afeac7"),
    "experts": (cell("moe", "moe-mla-rope"), "9614b1e3d967"),
    "decoupled": (cell("moe-dec", "moe-mla-decoupled", model=dict(rope_layout="interleaved")), "a4de36a9b091"),
    "another width": (cell("r32", "mla-rope", model=dict(latent_dim=32)), "c57f5f2fd071"),
    "another rule": (cell("quantile", "moe-mla-rope", balance_rule="quantile", balance_rate=0.5), "27512674729a"),
    "another optimizer": (cell("adamw", optimizer="adamw", weight_decay=0.0), "0a06b8da4b26"),
    "another text": (cell(tags=dict(text="files", scored=8)), "63755673eb24"),
    "nothing trained": (
        Cell(experiment="latent-cost", scale="cpu", data="0a", tags=dict(arm="counted")),
        "25c74ccca6ba",
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_are_kept_for_ever(name):
    made, key = KEYS[name]
    assert made.key == key
    assert len({one.key for one, _ in KEYS.values()}) == len(KEYS) == 10


def test_every_setting_stands_in_the_table():
    """A new field has its value here that repeats what was done before it: keys and comparisons go on."""
    for part, config in (("model", ModelConfig), ("train", TrainConfig)):
        names = [entry.name for entry in fields(config)]
        assert sorted([*DEFAULTS[part], *FREE[part]]) == sorted(names), f"add the field to cells.DEFAULTS[{part!r}]"


@pytest.mark.parametrize("part, name", [(part, name) for part in DEFAULTS for name in DEFAULTS[part]])
def test_what_the_table_says_is_not_in_the_key_and_all_else_is(part, name):
    settings = cell().settings
    for value in ("another", DEFAULTS[part][name]):
        changed = settings | {part: settings[part] | {name: value}}
        same = value == settings[part][name]
        if value is not ...:
            assert (key_of("latent-cost", changed) == cell().key) == same
    if DEFAULTS[part][name] is not ... and settings[part][name] == DEFAULTS[part][name]:
        older = {field: value for field, value in settings[part].items() if field != name}  # before it was there
        assert key_of("latent-cost", settings | {part: older}) == cell().key
        assert not differences(settings, settings | {part: older})
        assert completed(settings | {part: older}) == settings


def test_the_back_end_is_in_no_key():
    made = cell("moe", "moe-mla-rope")
    other = replace(made, model=replace(made.model, backend="loop"))
    assert other.key == made.key and other.name == made.name and not differences(made.settings, other.settings)


def test_one_and_one_point_nought_are_one_setting():
    whole, number = (cell("experts", "moe-mla-rope", clip=clip, lr=1, min_lr=0) for clip in (2, 2.0))
    assert whole.key == number.key == replace(whole, train=replace(whole.train, lr=1.0, min_lr=0.0)).key
    assert cell(tags=dict(rows=(1, 2))).key == cell(tags=dict(rows=[1, 2])).key


@pytest.mark.parametrize("variant", VARIANTS)
def test_cells_inherit_no_default(variant, monkeypatch):
    """Today the frozen values are those of the classes; if a default changes, a cell stays what it was."""
    made = model_config("tiny", variant, **SIZES)
    assert made == ModelConfig.preset("tiny", variant, **SIZES)
    changed = dict(dropout=0.5, n_experts=16, norm="rmsnorm", tie_embeddings=False)
    entries = [(name, type(value), value) for name, value in changed.items()]
    later = make_dataclass("Later", entries, bases=(ModelConfig,), frozen=True, kw_only=True)
    monkeypatch.setattr(cells, "ModelConfig", later)
    assert later.preset("tiny", variant, **SIZES).to_dict() != made.to_dict()
    assert model_config("tiny", variant, **SIZES).to_dict() == made.to_dict()


def test_what_has_no_default_is_asked_for():
    with pytest.raises(ValueError, match="lacks seed"):
        train_config(**SCHEDULE, lr=1e-2, min_lr=0.0)
    with pytest.raises(ValueError, match="lacks vocab_size"):
        model_config("tiny", "mha", max_seq_len=512)


def test_a_name_can_be_read():
    assert cell("moe-mla-rope-active", lr=1e-2, seed=3).name == "moe-mla-rope-active_lr0.01_seed3"
    assert cell("mla-rope-200steps", lr=5e-3).name == "mla-rope-200steps_lr0.005_seed0"
    assert cell(tags=dict(text="builtin")).name == "mha_lr0.01_seed0"
    assert cell(tags=dict(text="files")).name == "mha_lr0.01_seed0_0a2abc"
    assert Cell(experiment="latent-cost", scale="cpu", tags=dict(arm="counted")).name == "counted"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(tags={}), "arm=None"),
        (dict(tags=dict(arm="mha_rope")), "arm='mha_rope'"),  # an underscore parts the name
        (dict(tags=dict(arm="../x")), "arm='../x'"),
        (dict(experiment="Table 2"), "experiment='Table 2'"),
        (dict(scale=".."), r"scale='\.\.'"),
    ],
)
def test_what_no_file_can_be_called_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Cell(**dict(experiment="a", scale="cpu", tags=dict(arm="mha")) | changes)


def test_differences_are_named_with_both_values():
    one, other = cell().settings, cell("mla", "mla", seed=2).settings
    found = differences(one, other)
    assert found["train.seed"] == (0, 2) and found["tags.arm"] == ("mha", "mla")
    assert found["model.attention"] == ("mha", "mla") and "train.lr" not in found and "data" not in found
    assert differences(one, one) == {}


def test_two_cells_of_one_name_are_refused():
    distinct([cell(), cell(seed=1), cell("mla", "mla")])
    with pytest.raises(ValueError, match=r"two are called mha_lr0.01_seed0, and differ in train.warmup"):
        distinct([cell(), cell("mla", "mla"), cell(warmup=6)])
    with pytest.raises(ValueError, match="differ in nothing"):
        distinct([cell(), cell()])
    with pytest.raises(ValueError, match="two are called MHA"):  # a disk may know no capitals
        distinct([cell(), cell("MHA")])
