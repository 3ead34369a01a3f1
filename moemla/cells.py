"""A cell: one run of an experiment as a value, with a key, and with a name that a person can read.

A cell gives every setting and inherits no default. Its key hashes what differs from DEFAULTS, a frozen table of what
was done when keys were made first: a setting that is added later enters it with the value that repeats what was done
without it, and no key changes. Built in chapter 15.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from moemla.config import ModelConfig, TrainConfig, require

KEY_VERSION = 1
# Entries are added and never change; tests/test_cells.py keeps ten keys for ever. One that is `...` has no default:
# every cell gives it, and it is always in the key.
DEFAULTS: dict[str, dict[str, Any]] = {
    "model": dict(
        vocab_size=...,
        max_seq_len=...,
        n_layers=...,
        d_model=...,
        n_heads=...,
        n_kv_heads=...,
        d_head=...,
        attention=...,
        latent_dim=...,
        d_nope=...,
        d_rope=...,
        d_value=...,
        cache=...,
        positions=...,
        rope_theta=10000.0,
        rope_layout="halves",
        rope_learnable=False,
        ffn=...,
        d_ff=...,
        n_dense_layers=0,
        n_experts=62,
        n_shared=2,
        top_k=6,
        d_expert=...,
        scores=...,
        bias_in_gate=...,
        renormalise=True,
        routed_scale=1.0,
        norm="layernorm",
        activation="gelu",
        bias=True,
        tie_embeddings=True,
        dropout=0.0,
        reading="working",
    ),
    "train": dict(
        steps=...,
        batch_size=...,
        seq_len=...,
        micro_batches=1,
        optimizer=...,
        lr=...,
        min_lr=...,
        warmup=...,
        weight_decay=0.1,
        clip=1.0,
        precision="float32",
        balance_rule="sign",
        balance_rate=None,
        switch_loss=0.0,
        z_loss=0.0,
        seed=...,
        log_every=10,
        load_window=16,
        schedule="cosine",
        decay=0.2,
    ),
}
FREE = {"model": ("backend",), "train": ()}  # how the same numbers are computed: in no key, in no comparison
BUILTIN = "builtin"  # the tag `text` of a cell on the built-in stories
EXPERIMENT = re.compile(r"[a-z0-9][a-z0-9-]*")  # of scales too
ARM = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*")  # no underscore: it parts a name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of an experiment.

    `data` is the hash of the prepared data in hex, None where no text is read. `tags` holds what a run is besides its
    settings, plain values: `arm`, its name in the experiment; `text`, where that is not "builtin"; and what else the
    experiment's work and table ask for. `model` and `train` are None where nothing is built or trained.
    """

    experiment: str
    scale: str
    data: str | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)
    model: ModelConfig | None = None
    train: TrainConfig | None = None

    def __post_init__(self):
        for name, pattern, value in (
            ("experiment", EXPERIMENT, self.experiment),
            ("scale", EXPERIMENT, self.scale),
            ("arm", ARM, self.tags.get("arm")),
        ):
            fits = isinstance(value, str) and bool(pattern.fullmatch(value))
            require(fits, name, value, f"must match {pattern.pattern}")

    @property
    def settings(self) -> dict[str, Any]:
        """All of it as plain values, as its result keeps them."""
        configs = {"model": self.model, "train": self.train}
        held = {part: None if config is None else _plain(config) for part, config in configs.items()}
        tags = {name: list(value) if isinstance(value, tuple) else value for name, value in self.tags.items()}
        return {"scale": self.scale, "data": self.data, "tags": tags, **held}

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits."""
        return key_of(self.experiment, self.settings)

    @property
    def name(self) -> str:
        """ARM_lr0.01_seed3, and six digits of the data's hash unless the text is built in."""
        return name_of(self.settings)


def _plain(config: ModelConfig | TrainConfig) -> dict[str, Any]:
    """The fields of a config; whole numbers in a field of numbers as such, so that 1 and 1.0 are one setting."""
    held = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        whole = isinstance(value, int) and not isinstance(value, bool)
        held[entry.name] = float(value) if whole and entry.type in (float, float | None) else value
    return held


def digest(value: Any) -> str:
    """Twelve hexadecimal digits of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def key_of(experiment: str, settings: Mapping[str, Any]) -> str:
    """The key of the cell with these settings: a hash of what differs from DEFAULTS."""
    told = dict(settings, experiment=experiment, key_version=KEY_VERSION)
    for part, table in DEFAULTS.items():
        if told[part] is not None:
            told[part] = {
                name: value
                for name, value in told[part].items()
                if name not in FREE[part] and value != table.get(name, ...)
            }
    return digest(told)


def name_of(settings: Mapping[str, Any]) -> str:
    """The name of the cell with these settings; see `Cell.name`."""
    tags, train = settings["tags"], settings["train"]
    parts = [str(tags["arm"])]
    if train is not None:
        parts += [f"lr{train['lr']:g}", f"seed{train['seed']}"]
    if tags.get("text", BUILTIN) != BUILTIN:
        parts.append(settings["data"][:6])
    return "_".join(parts)


def model_config(size: str, variant: str, **settings: Any) -> ModelConfig:
    """`ModelConfig.preset` for a cell: what neither the preset nor `settings` says comes from DEFAULTS.

    So a default of `ModelConfig` that changes later changes no cell.
    """
    require(
        "vocab_size" in settings and "max_seq_len" in settings,
        "settings",
        sorted(settings),
        "lacks vocab_size or max_seq_len",
    )
    return ModelConfig.preset(size, variant, **{**_frozen("model"), **settings})


def train_config(**settings: Any) -> TrainConfig:
    """A `TrainConfig` for a cell: what is not given comes from DEFAULTS; ValueError where there is none either."""
    whole = {**_frozen("train"), **settings}
    missing = [name for name in DEFAULTS["train"] if name not in whole]
    require(not missing, "settings", sorted(settings), f"lacks {', '.join(missing)}")
    return TrainConfig(**whole)


def _frozen(part: str) -> dict[str, Any]:
    return {name: value for name, value in DEFAULTS[part].items() if value is not ...}


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those that came after them, from DEFAULTS."""
    whole = dict(settings)
    for part in DEFAULTS:
        if whole.get(part) is not None:
            whole[part] = {**_frozen(part), **whole[part]}
    return whole


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings in which two runs differ, by dotted name ("train.lr"), with both values; None is none.

    Settings that came later than a run are completed; what is free (the back end of the experts) is passed over.
    """
    left, right = (dict(leaves(completed(settings))) for settings in (a, b))
    free = {f"{part}.{name}" for part, names in FREE.items() for name in names}
    names = [name for name in {**left, **right} if name not in free]
    return {name: (left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)}


def leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def distinct(cells: Iterable[Cell]) -> None:
    """ValueError where two cells have one name (in one experiment and scale)."""
    seen: dict[tuple[str, str, str], Cell] = {}
    for cell in cells:
        twin = seen.setdefault((cell.experiment, cell.scale, cell.name.lower()), cell)  # some disks know no capitals
        if twin is not cell:
            apart = ", ".join(differences(twin.settings, cell.settings)) or "nothing"
            raise ValueError(f"cells: two are called {cell.name}, and differ in {apart}; give each an arm of its own")
