"""One configuration for every model of the book and one for every training: fields, checks, the paper's sizes.

Needs no torch. A field left at None is filled in from the others when the config is made, so a finished config holds
plain values only. Built in chapter 5.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from moemla import complexity

CHOICES = {
    "attention": ("mha", "mla", "mla-decoupled"),
    "cache": ("kv", "latent", "hybrid", "joint"),
    "positions": ("learned", "rope", "none"),
    "rope_layout": ("halves", "interleaved"),
    "ffn": ("dense", "moe"),
    "scores": ("sigmoid", "softmax"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "backend": ("auto", "masked", "loop", "grouped", "gather", "triton"),
    "reading": ("working", "literal"),
}
CACHES = {"mha": ("kv",), "mla": ("latent", "hybrid"), "mla-decoupled": ("joint",)}  # first: the default
# Table 1 of the paper; `tiny` is this project's own, for laptops.
SIZES = {
    "tiny": dict(n_layers=4, d_model=128, n_heads=4),
    "XS": dict(n_layers=6, d_model=256, n_heads=8),
    "S": dict(n_layers=6, d_model=512, n_heads=8),
    "M": dict(n_layers=9, d_model=512, n_heads=8),
    "L": dict(n_layers=12, d_model=768, n_heads=12),
    "XL": dict(n_layers=12, d_model=1024, n_heads=16),
}
ATTENTIONS = ("mha", "mha-rope", "gqa-rope", "mla", "mla-rope", "mla-decoupled")
VARIANTS = (*ATTENTIONS, *(f"moe-{name}" for name in ATTENTIONS))
MATCHES = ("parameters", "active", "literal", "flops")
ROW = 8  # widths in multiples of 8: rows of 16 bytes in 16-bit types, which fast products on a GPU ask for


def require(condition: bool, field: str, value: Any, right: str) -> None:
    """Raises ValueError naming the field, its value and what would be right."""
    if not condition:
        raise ValueError(f"{field}={value!r}: {right}")


def require_count(field: str, value: Any, least: int = 1) -> None:
    """`require` for a whole number of at least `least`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, field, value, f"must be a whole number of at least {least}")


VERSION = 1  # of config.json, train.json and state.json; a file without a version is older than the first
# Fields that came after version 0: the value that repeats what was done without the field. Entries never change.
ADDED: dict[str, dict[str, Any]] = {
    "ModelConfig": {"n_dense_layers": 0},
    "TrainConfig": {"schedule": "cosine", "decay": 0.2},
}


def stored_fields(
    name: str, known: Iterable[str], values: dict[str, Any], version: int | None = None
) -> dict[str, Any]:
    """What a file holds for the class `name`, with `ADDED` for the fields that it is too old to have.

    ValueError for a field that is not `known`, naming it and the `version` of the file where that is newer.
    Built in chapter 13.
    """
    version = values.get("version", version or 0)
    values = {field: value for field, value in values.items() if field != "version"}
    unknown = sorted(set(values) - set(known))
    newer = isinstance(version, int) and version > VERSION
    right = f"written by a newer moemla (version {version}; this one knows {VERSION}): use that one" if newer else ""
    require(not unknown, "fields", unknown, right or f"no such field of {name}")
    return ADDED.get(name, {}) | values


def architecture(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `ModelConfig` that say what the model computes, without `backend`, which says by what code.

    Two runs whose configs differ in nothing else are one run. Built in chapter 13.
    """
    return {name: value for name, value in values.items() if name != "backend"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one language model, checked when it is made; every chapter adds its fields.

    Widths are counts of numbers, not bytes. `n_experts` counts the routed experts (the paper's N_r = 62), `n_shared`
    those that every token passes (N_s = 2), `top_k` the routed experts a token takes (k = 6). None means "follows from
    the others".
    """

    vocab_size: int = 4096
    max_seq_len: int = 512
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    n_kv_heads: int | None = None  # fewer than n_heads: grouped-query attention
    d_head: int | None = None  # d_model / n_heads
    attention: str = "mla"
    latent_dim: int | None = None  # r; d_model / 2
    d_nope: int | None = None  # decoupled form: width of a head that is not rotated
    d_rope: int | None = None  # decoupled form: width of the rotated key that all heads share
    d_value: int | None = None  # width of a head's value
    cache: str | None = None  # what is kept of past tokens
    positions: str = "rope"
    rope_theta: float = 10000.0
    rope_layout: str = "halves"
    rope_learnable: bool = False  # frequencies as parameters, as the text above eq. 9 has them
    ffn: str = "moe"
    d_ff: int | None = None  # 4 d_model
    n_dense_layers: int = 0  # leading layers with a dense feed-forward of d_ff instead of experts
    n_experts: int = 62
    n_shared: int = 2
    top_k: int = 6
    d_expert: int | None = None  # d_model / 16 (working) or d_model (literal: a quarter of 4 d_model)
    scores: str | None = None  # sigmoid (working) or softmax (literal)
    bias_in_gate: bool | None = None  # False (working) or True (literal, Algorithm 1 lines 3-4)
    renormalise: bool = True  # gates sum to one over the chosen experts, eq. 2
    routed_scale: float = 1.0
    norm: str = "layernorm"
    activation: str = "gelu"
    bias: bool = True  # in attention, dense feed-forward and LayerNorm; experts and router have none
    tie_embeddings: bool = True
    dropout: float = 0.0
    backend: str = "auto"  # how routed experts are computed, see experts.py
    reading: str = "working"

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            open_ = value is None and name in ("cache", "scores")  # filled in below
            require(open_ or value in allowed, name, value, f"choose one of {', '.join(allowed)}")
        self._fill()
        self._check()

    def _fill(self) -> None:
        def default(name, value):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

        for name in ("d_model", "n_heads"):
            require_count(name, getattr(self, name))
        near = self.d_model // ROW * ROW
        right = f"must be a multiple of {ROW} (rows of 16 bytes in 16-bit types), such as {max(near, ROW)}"
        require(self.d_model % ROW == 0, "d_model", self.d_model, right)
        if self.d_head is None:
            right = f"the heads must divide d_model={self.d_model}, or d_head must be given"
            require(self.d_model % self.n_heads == 0, "n_heads", self.n_heads, right)
        literal = self.reading == "literal"
        default("d_head", self.d_model // self.n_heads)
        default("n_kv_heads", self.n_heads)
        default("latent_dim", max(1, self.d_model // 2))
        default("d_nope", self.d_head)
        default("d_rope", self.d_head)
        default("d_value", self.d_head)
        default("cache", CACHES[self.attention][0])
        default("d_ff", 4 * self.d_model)
        default("d_expert", self.d_model if literal else fine_width(self.d_model))
        default("scores", "softmax" if literal else "sigmoid")
        default("bias_in_gate", literal)

    def _check(self) -> None:
        for field in fields(self):
            if field.type in (int, int | None) and field.name not in ("n_shared", "n_dense_layers"):
                require_count(field.name, getattr(self, field.name))
            if field.type is float:
                value = getattr(self, field.name)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                require(number and math.isfinite(value), field.name, value, "must be a finite number")
        for name in ("rope_learnable", "renormalise", "bias_in_gate", "bias", "tie_embeddings"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "must be True or False")
        for name in ("n_shared", "n_dense_layers"):
            require_count(name, getattr(self, name), least=0)
        leading, most = self.n_dense_layers, self.n_layers if self.ffn == "moe" else 0
        right = f"must be at most n_layers={most}" if most else "only ffn='moe' has leading dense layers"
        require(leading <= most, "n_dense_layers", leading, right)
        require(self.vocab_size >= 2, "vocab_size", self.vocab_size, "must be at least 2")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "must be at least 0 and below 1")
        require(self.rope_theta > 1, "rope_theta", self.rope_theta, "must be above 1 (10000 is usual)")
        scale = self.routed_scale
        require(scale > 0, "routed_scale", scale, "must be above 0")
        heads, kv_heads = self.n_heads, self.n_kv_heads
        require(heads % kv_heads == 0, "n_kv_heads", kv_heads, f"must divide n_heads={heads}")
        grouped = kv_heads != heads
        require(not grouped or self.attention == "mha", "n_kv_heads", kv_heads, "only attention='mha' groups its heads")
        if self.attention == "mla-decoupled":
            require(self.positions == "rope", "positions", self.positions, "the decoupled form needs 'rope'")
        else:
            right = f"must equal d_head={self.d_head}; only the decoupled form sets it apart"
            require(self.d_value == self.d_head, "d_value", self.d_value, right)
        if self.positions == "rope":
            name = "d_rope" if self.attention == "mla-decoupled" else "d_head"
            width = getattr(self, name)
            require(width % 2 == 0, name, width, "RoPE turns pairs of dimensions: the width must be even")
        learnable = self.rope_learnable
        require(not learnable or self.positions == "rope", "rope_learnable", learnable, "only positions='rope' has any")
        allowed = CACHES[self.attention]
        right = f"attention={self.attention!r} can keep {' or '.join(allowed)}"
        require(self.cache in allowed, "cache", self.cache, right)
        if self.ffn == "moe":
            right = f"must be at most n_experts={self.n_experts}"
            require(self.top_k <= self.n_experts, "top_k", self.top_k, right)

    @classmethod
    def preset(
        cls, size: str, variant: str = "moe-mla-rope", matched: str = "parameters", vocab_size: int = 50257, **changes
    ):
        """A model of the paper's Table 1 (or `tiny`) in one of the variants, matched to dense multi-head attention.

        size: tiny, XS, S, M, L, XL. variant: mha, mha-rope, gqa-rope, mla, mla-rope, mla-decoupled, each also with
        `moe-` before it. matched, against the dense `mha` of the same size and kind of positions: "parameters" (equal
        totals: experts of d/16, or d_ff solved), "active" (experts of d/2: equal active feed-forward width), "literal"
        (experts of d, the paper's quarter), "flops" (equal forward FLOPs by width). `changes` override single fields.
        Built in chapter 9.
        """
        require(size in SIZES, "size", size, f"choose one of {', '.join(SIZES)}")
        require(variant in VARIANTS, "variant", variant, f"choose one of {', '.join(VARIANTS)}")
        require(matched in MATCHES, "matched", matched, f"choose one of {', '.join(MATCHES)}")
        unknown = sorted(set(changes) - {field.name for field in fields(cls)})
        require(not unknown, "changes", unknown, "no such field of ModelConfig")
        base = dict(SIZES[size], vocab_size=vocab_size)
        attention = variant.removeprefix("moe-")
        base["positions"] = "rope" if attention.endswith(("rope", "decoupled")) else "learned"
        base["ffn"] = "moe" if variant.startswith("moe-") else "dense"
        base["attention"] = {"mha-rope": "mha", "gqa-rope": "mha", "mla-rope": "mla"}.get(attention, attention)
        if attention == "gqa-rope":
            base["n_kv_heads"] = max(1, changes.get("n_heads", base["n_heads"]) // 4)
        settings = base | changes
        require_count("d_model", settings["d_model"])
        if matched == "flops":
            settings = _match_flops(cls, settings, changes)
        elif base["ffn"] == "moe" and "d_expert" not in changes and settings.get("reading") != "literal":
            width = {
                "parameters": fine_width(settings["d_model"]),
                "active": settings["d_model"] // 2,
                "literal": settings["d_model"],
            }[matched]
            settings["d_expert"] = width
        elif base["ffn"] == "dense" and matched == "parameters" and "d_ff" not in changes:
            settings["d_ff"] = _match_d_ff(cls, settings)
        return cls(**settings)

    def reference(self) -> "ModelConfig":
        """The dense multi-head model of the same depth, width and kind of positions: what this one is matched against.

        Built in chapter 9.
        """
        return _reference(type(self), self.to_dict())

    def require_vocabulary(self, tokenizer: Any) -> None:
        """ValueError where a tokenizer, if there is one, has not as many tokens as the model."""
        if tokenizer is not None and tokenizer.vocab_size != self.vocab_size:
            raise ValueError(f"tokenizer: has {tokenizer.vocab_size} tokens, and the model {self.vocab_size}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`, and of a file's "version"; ValueError for a field that does not exist."""
        return cls(**stored_fields("ModelConfig", [field.name for field in fields(cls)], values))


def setting(text: str) -> tuple[str, Any]:
    """FIELD=VALUE as the name of a field of `ModelConfig` and a value of its type. Built in chapter 13.

    ValueError for a field that does not exist, or a value of another type.
    """
    name, _, value = text.partition("=")
    kinds = {field.name: field.type for field in fields(ModelConfig)}
    require(name in kinds and bool(value), "set", text, f"FIELD=VALUE, a field being one of {', '.join(kinds)}")
    kind = next(kind for kind in (bool, int, float, str) if kinds[name] in (kind, kind | None))
    words = {int: "a whole number", float: "a number", bool: "True or False"}
    try:
        if kind is bool:
            return name, {"true": True, "false": False}[value.lower()]
        return name, kind(value)
    except (ValueError, KeyError):
        raise ValueError(f"set={text!r}: {name} must be {words[kind]}") from None


def fine_width(d_model: int) -> int:
    """Expert width F = d/16 in multiples of 8: then 64 experts hold what one dense FFN of 4d holds (audit of Table 2).

    Built in chapter 9.
    """
    return max(ROW, round(d_model / 16 / ROW) * ROW)


def _reference(cls, settings: dict[str, Any]) -> ModelConfig:
    kept = ("vocab_size", "max_seq_len", "n_layers", "d_model", "n_heads", "norm", "activation", "bias")
    shared = {name: settings[name] for name in (*kept, "tie_embeddings") if name in settings}
    heads = settings["n_heads"]
    if heads > 0 and settings["d_model"] % (2 * heads):  # they have a width of their own: sums are those of one head
        shared["n_heads"] = 1
    return cls(**shared, attention="mha", ffn="dense", positions=settings["positions"])


def _match_d_ff(cls, settings: dict[str, Any]) -> int:
    """The d_ff (multiple of 8) that brings a dense model of another attention to the reference's total."""
    target = complexity.parameters(_reference(cls, settings)).total
    one, two = (complexity.parameters(cls(**settings | {"d_ff": ROW * n})).total for n in (1, 2))
    rows = 1 + round((target - one) / (two - one))
    return ROW * max(1, rows)


def _match_flops(cls, settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The width, with an even head and 16-byte rows, whose forward FLOPs come nearest to the reference's."""
    target = complexity.flops_per_token(_reference(cls, settings), seq_len=settings.get("max_seq_len", cls.max_seq_len))
    step = math.lcm(2 * settings["n_heads"], ROW)
    widths = range(step, 4 * settings["d_model"] + 1, step)

    def distance(wide: dict[str, Any]) -> int:
        config = cls(**wide)
        return abs(complexity.flops_per_token(config, seq_len=config.max_seq_len) - target)

    return min((settings | {"d_model": width} | changes for width in widths), key=distance)


WARMUP = 50  # steps of a training, where none are given


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. The defaults are for the `tiny` model, ten minutes on two CPU cores."""

    steps: int = 1000
    batch_size: int = 16  # sequences a step
    seq_len: int = 256  # tokens a sequence
    micro_batches: int = 1  # parts of a step whose gradients are summed
    optimizer: Literal["muon", "adamw"] = "muon"
    lr: float = 1e-2
    min_lr: float = 0.0
    warmup: int | None = None  # steps; 50
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"  # of the rate, after the warm-up
    decay: float = 0.2  # wsd: the last share of the steps, in which the rate falls
    weight_decay: float = 0.1
    clip: float = 1.0  # L2 norm of all gradients
    precision: Literal["float32", "bf16", "fp16"] = "float32"  # 16 bits: autocast; fp16 with a loss scale
    balance_rule: Literal["sign", "proportional", "algorithm-1", "equation-4", "quantile", "none"] = "sign"
    balance_rate: float | None = None  # the rule's own
    switch_loss: float = 0.0  # weight of the auxiliary loss, summed over layers; with micro-batches a pass more
    z_loss: float = 0.0  # weight of the router's z-loss
    seed: int = 0
    log_every: int = 10  # steps
    load_window: int = 16  # steps over which the load of the experts is counted

    def __post_init__(self):
        for name in ("optimizer", "schedule", "precision", "balance_rule"):
            allowed = get_args(type(self).__annotations__[name])
            require(getattr(self, name) in allowed, name, getattr(self, name), f"choose one of {', '.join(allowed)}")
        for name in ("steps", "batch_size", "seq_len", "micro_batches", "log_every", "load_window"):
            require_count(name, getattr(self, name))
        right = f"must divide batch_size={self.batch_size}"
        require(self.batch_size % self.micro_batches == 0, "micro_batches", self.micro_batches, right)
        for name in ("warmup", "seed"):
            value = getattr(self, name)
            open_ = value is None and name == "warmup"
            right = "must be a whole number from 0 to 2**63 - 1"
            require(open_ or (type(value) is int and 0 <= value < 2**63), name, value, right)
        right = f"must be at most steps={self.steps}, or the rate never reaches lr"
        require(self.warmup is None or self.warmup <= self.steps, "warmup", self.warmup, right)
        object.__setattr__(self, "warmup", WARMUP if self.warmup is None else self.warmup)
        for name in ("lr", "clip", "balance_rate", "decay", "min_lr", "weight_decay", "switch_loss", "z_loss"):
            value = getattr(self, name)
            if value is None and name == "balance_rate":
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(number and math.isfinite(value), name, value, "must be a finite number")
            positive = name in ("lr", "clip", "balance_rate", "decay")
            right = "must be above 0" if positive else "must be 0 or more"
            require(value > 0 if positive else value >= 0, name, value, right)
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"must be at most lr={self.lr}")
        require(self.decay <= 1, "decay", self.decay, "a share of the steps, at most 1")
        rate = self.balance_rate
        share = self.balance_rule != "quantile" or rate is None or rate <= 1
        require(share, "balance_rate", rate, "the quantile rule goes a share of the way, at most 1")

    @classmethod
    def paper(cls, **changes) -> "TrainConfig":
        """The paper's own training (section 3.3), done there on eight GPUs; `changes` override single fields.

        AdamW (0.9, 0.95), 50,000 steps of 128 x 512 tokens in fp16 with a loss scale. The dropout of 0.1 that belongs
        to it is the model's: `ModelConfig.preset("M", dropout=0.1)`. Balancing is left as it is here.
        """
        rates = dict(
            optimizer="adamw", lr=3e-4, min_lr=1e-5, schedule="cosine", warmup=5000, weight_decay=0.1, clip=1.0
        )
        return cls(**dict(steps=50_000, batch_size=128, seq_len=512, precision="fp16") | rates | changes)
