"""The language model: pre-norm blocks of attention and feed-forward between a token table and its transpose.

A block is eqs. 11-12. Notable: one rotary table serves all layers; head and embedding are one table as long as they
share their numbers, whatever the config says; only `Block` and the model read the config. Built in chapter 5.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache as once
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moemla import complexity
from moemla.attention import MultiHeadAttention
from moemla.cache import Cache, HybridCache, JointLatentCache, KVCache, LatentCache, LayerCache
from moemla.config import VERSION, ModelConfig
from moemla.devices import Layer, require_known, same_storage
from moemla.feedforward import FeedForward
from moemla.files import replacing, write_json
from moemla.latent_attention import DecoupledLatentAttention, MultiHeadLatentAttention
from moemla.linear import Linear
from moemla.losses import linear_cross_entropy
from moemla.moe import MixtureOfExperts
from moemla.rope import RotaryEmbedding
from moemla.routing import Routing

INIT_STD = 0.02  # GPT-2's


def _norm(config: ModelConfig, factory: dict) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=1e-6, **factory)
    return nn.LayerNorm(config.d_model, bias=config.bias, **factory)


def _attention(config: ModelConfig, rope: RotaryEmbedding | None, factory: dict) -> nn.Module:
    common = dict(
        d_model=config.d_model, n_heads=config.n_heads, bias=config.bias, dropout=config.dropout, rope=rope, **factory
    )
    if config.attention == "mha":
        return MultiHeadAttention(n_kv_heads=config.n_kv_heads, d_head=config.d_head, **common)
    if config.attention == "mla":
        return MultiHeadLatentAttention(latent_dim=config.latent_dim, d_head=config.d_head, **common)
    widths = dict(latent_dim=config.latent_dim, d_nope=config.d_nope, d_value=config.d_value)
    return DecoupledLatentAttention(**widths, **common)


def _feedforward(config: ModelConfig, layer: int, factory: dict) -> nn.Module:
    if layer < complexity.dense_layers(config):
        return FeedForward(
            d_model=config.d_model, d_ff=config.d_ff, activation=config.activation, bias=config.bias, **factory
        )
    return MixtureOfExperts(
        d_model=config.d_model,
        n_experts=config.n_experts,
        n_shared=config.n_shared,
        top_k=config.top_k,
        d_expert=config.d_expert,
        scores=config.scores,
        bias_in_gate=config.bias_in_gate,
        renormalise=config.renormalise,
        routed_scale=config.routed_scale,
        activation=config.activation,
        backend=config.backend,
        **factory,
    )


class Block(Layer):
    """h = x + attention(norm(x)); out = h + feedforward(norm(h)), (B, T, D) -> (B, T, D).

    `layer` is its number, from 0: the first `n_dense_layers` have no experts.
    """

    def __init__(
        self, config: ModelConfig, rope: RotaryEmbedding | None = None, layer: int = 0, device=None, dtype=None
    ):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.norm1, self.norm2 = _norm(config, factory), _norm(config, factory)
        self.attention = _attention(config, rope, factory)
        self.feedforward = _feedforward(config, layer, factory)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Float[Tensor, "b t d"], cache: LayerCache | None = None, valid: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b t d"]:
        x = x + self.attention(self.norm1(x), cache)
        normed = self.norm2(x)
        routed = isinstance(self.feedforward, MixtureOfExperts)
        return x + self.dropout(self.feedforward(normed, valid) if routed else self.feedforward(normed))


@once
def _warn_of_copying() -> None:
    warnings.warn(
        "targets are the tokens themselves, so the model learns to copy: shift them by one, "
        "model(text[:, :-1], text[:, 1:])",
        stacklevel=5,  # past the module's __call__, to who called the model
    )


def _copies(tokens: Int[Tensor, "b t"], targets: Int[Tensor, "b t"]) -> bool:
    """Whether each target that is scored is the token it stands at; a row of one token repeated may be so rightly.

    Values are compared on a CPU only: a GPU would have to be waited for at each step.
    """
    if same_storage(tokens, targets) or tokens.device.type != "cpu":
        return same_storage(tokens, targets)
    scored = targets >= 0
    kept = targets[scored]
    return torch.equal(kept, tokens[scored]) and kept.numel() > 0 and bool(kept.min() != kept.max())


class LanguageModel(Layer):
    """A decoder-only language model built from a `ModelConfig`. Built in chapter 5; with experts in chapter 9.

    model(tokens) gives logits (B, T, V); model(tokens, targets) the mean nats per target, and targets are the tokens
    that follow: model(text[:, :-1], text[:, 1:]). `dtype` float32 (default), float64 or bfloat16; router, balancing
    bias and rotary tables stay float32 or wider.

    Built on the meta device, it becomes a model by `to_empty` and then `reset_parameters` or `load_state_dict`, or by
    `load_state_dict(..., assign=True)`.
    """

    def __init__(self, config: ModelConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        factory = dict(device=device, dtype=dtype)
        self.embedding = nn.Embedding(config.vocab_size, config.d_model, **factory)
        learned = config.positions == "learned"
        self.position = nn.Embedding(config.max_seq_len, config.d_model, **factory) if learned else None
        self.rope = None
        if config.positions == "rope":
            width = config.d_rope if config.attention == "mla-decoupled" else config.d_head
            angles = dict(theta=config.rope_theta, layout=config.rope_layout, learnable=config.rope_learnable)
            self.rope = RotaryEmbedding(width, config.max_seq_len, **angles, **factory)
        self.blocks = nn.ModuleList(Block(config, self.rope, layer, **factory) for layer in range(config.n_layers))
        self.norm = _norm(config, factory)
        self.head = Linear(config.d_model, config.vocab_size, bias=False, **factory)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialise()

    def reset_parameters(self) -> None:
        """Initial weights, drawn again: those that the constructor draws from the same seed, bit by bit."""
        super().reset_parameters()
        self._initialise()

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one table now, whatever the config said."""
        return same_storage(self.head.weight, self.embedding.weight)

    @property
    def described(self) -> ModelConfig:
        """The config as the model is now: head and rotation may have been changed since."""
        rope = {} if self.rope is None else dict(rope_theta=self.rope.theta, rope_layout=self.rope.layout)
        return replace(self.config, tie_embeddings=self.tied, **rope)

    def weights(self) -> dict[str, Tensor]:
        """`state_dict` with each tensor once: no head that is the embedding, no frequencies by the layers' names."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if ".attention.rope." not in name and not (self.tied and name == "head.weight")
        }

    def _apply(self, fn, recurse=True):
        tied = self.tied
        super()._apply(fn, recurse)
        if tied:  # `to_empty` has made two parameters of it
            self.head.weight = self.embedding.weight
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """Where there is one table here, one is read: a file may name it once, or twice with the same numbers."""
        names = [f"{prefix}embedding.weight", f"{prefix}head.weight"]
        if self.tied and names[0] in state_dict:
            table, head = (state_dict.get(name, state_dict[names[0]]) for name in names)
            if not (same_storage(table, head) or table.is_meta or head.is_meta or torch.equal(table, head)):
                errors.append(f"{names[1]}: differs from {names[0]}; it needs a model with tie_embeddings=False")
            if local_metadata.get("assign_to_params_buffers"):
                table = nn.Parameter(table, requires_grad=self.embedding.weight.requires_grad)
            state_dict |= dict.fromkeys(names, table)
        shared = f"{prefix}rope.inv_freq"
        if shared in state_dict:  # learnable, and named once
            for layer in range(len(self.blocks)):
                state_dict.setdefault(f"{prefix}blocks.{layer}.attention.rope.inv_freq", state_dict[shared])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    @torch.no_grad()
    def _initialise(self) -> None:
        """GPT-2's initial weights: normal, std 0.02; W^Kr and W^Vr of the paper's form have 1 / sqrt(R).

        The 2 L matrices that write to the residual stream are smaller by sqrt(2 L). With 1 / sqrt(R) the product of
        down and up starts as multi-head attention's one matrix does, and not 0.02 sqrt(R) times as small. (The
        decoupled form has a norm between the two.) Experts and router draw their own first, so that they can be used
        alone; here they are drawn again, and the first draw stays: without it a seed would give other weights.
        """
        paper = self.config.attention == "mla"
        residual = INIT_STD / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "down.weight", "w_out")) and "_down" not in name:
                nn.init.normal_(parameter, std=residual)
            elif paper and name.endswith(("k_up.weight", "v_up.weight")):
                nn.init.normal_(parameter, std=self.config.latent_dim**-0.5)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        targets: Int[Tensor, "b t"] | None = None,
        *,
        cache: Cache | None = None,
        lengths: Int[Tensor, "b"] | None = None,
    ) -> Float[Tensor, "b t v"] | Float[Tensor, ""]:
        """tokens (B, T) int64 -> logits (B, T, V); with targets (B, T) the mean nats over those that are not negative.

        targets[b, t] is the token that follows tokens[b, t]: model(text[:, :-1], text[:, 1:]). Nothing is shifted here;
        targets that are the tokens themselves get one warning (not in compiled code, and on a GPU only where they are
        one tensor). cache: from `new_cache`; the tokens are appended to it. lengths (B,): row b holds lengths[b]
        tokens, the rest is padding on the right, which takes no expert, no count and no loss. ValueError past
        max_seq_len, for shapes that do not fit, tokens outside the vocabulary or lengths outside 0 .. T (the last two
        are looked at on the CPU only).
        """
        if targets is not None and targets.shape != tokens.shape:
            raise ValueError(f"targets.shape={tuple(targets.shape)}: must be the tokens', {tuple(tokens.shape)}")
        if targets is not None and not torch.compiler.is_compiling() and _copies(tokens, targets):
            _warn_of_copying()
        x = self.features(tokens, cache=cache, lengths=lengths)
        if targets is None:
            return self.head(x)
        if lengths is not None:
            targets = targets.masked_fill(~self._valid(tokens, lengths), -1)
        targets = targets.flatten()
        if not isinstance(self.head, nn.Linear):  # an adapter, say: its weight is not all of it
            nats = F.cross_entropy(self.head(x).flatten(0, 1).float(), targets.clamp(min=0), reduction="none")
            return nats.masked_fill(targets < 0, 0.0).sum() / (targets >= 0).sum().clamp(min=1)
        return linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets)

    @staticmethod
    def _valid(tokens: Int[Tensor, "b t"], lengths: Int[Tensor, "b"]) -> Bool[Tensor, "b t"]:
        return torch.arange(tokens.shape[1], device=tokens.device) < torch.as_tensor(lengths).to(tokens.device)[:, None]

    def features(
        self, tokens: Int[Tensor, "b t"], *, cache: Cache | None = None, lengths: Int[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b t d"]:
        """What the head sees, (B, T, D), after the last norm; arguments as `forward`'s."""
        require_known(tokens.device)
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(f"cache: is a {type(cache).__name__}; give the whole cache, of `new_cache`")
        if tokens.dim() != 2:
            raise ValueError(f"tokens.shape={tuple(tokens.shape)}: give (B, T)")
        steps = tokens.shape[1]
        held = 0 if cache is None else cache.length
        if held + steps > self.config.max_seq_len:
            raise ValueError(f"length={held + steps}: must be at most max_seq_len={self.config.max_seq_len}")
        valid = None
        if lengths is not None:
            lengths = torch.as_tensor(lengths)
            if lengths.is_floating_point() or lengths.dtype == torch.bool:
                raise ValueError(f"lengths: are {lengths.dtype}; give whole numbers")
            if lengths.shape != tokens.shape[:1]:
                raise ValueError(f"lengths.shape={tuple(lengths.shape)}: must have one for each of {len(tokens)} rows")
            # A cache takes them to the host in any case; else a GPU would have to be waited for.
            seen = cache is not None or (lengths.device.type == "cpu" and not torch.compiler.is_compiling())
            if seen and len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= steps:
                raise ValueError(f"lengths={lengths.tolist()}: must be between 0 and the {steps} tokens of a row")
            valid = self._valid(tokens, lengths)
        try:
            x = self.embedding(tokens)
        except IndexError:  # on a GPU, an assertion of the device
            low, high, last = int(tokens.min()), int(tokens.max()), self.config.vocab_size - 1
            raise ValueError(f"tokens={low} to {high}: must be between 0 and {last}") from None
        if self.position is not None:
            where = (0, steps) if cache is None else cache.where(steps, tokens.device)
            x = x + self.position.weight[slice(*where) if isinstance(where, tuple) else where]
        for layer, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[layer], valid)
        if cache is not None:
            cache.remember(tokens)
            cache.advance(steps if lengths is None else lengths.tolist())
        return self.norm(x)

    def next_logits(self, tokens: Int[Tensor, "b t"], cache: Cache | None = None) -> Float[Tensor, "b v"]:
        """Logits behind the last of the tokens (B, T): (B, V)."""
        return self.head(self.features(tokens, cache=cache)[:, -1])

    @property
    def compiled_next_logits(self) -> Callable:
        """`next_logits` under torch.compile, made at the first use; for one token at a time. Built in chapter 14."""
        if "_compiled" not in self.__dict__:
            self.__dict__["_compiled"] = torch.compile(self.next_logits)
        return self.__dict__["_compiled"]

    def __getstate__(self):  # compiled code neither pickles nor copies
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def new_cache(self, batch_size: int = 1, max_len: int | None = None, dtype=None) -> Cache:
        """An empty cache of the kind that the config names, on the model's device. Built in chapter 2."""
        c, weight = self.config, self.embedding.weight
        max_len = c.max_seq_len if max_len is None else max_len
        storage = dict(n_layers=c.n_layers, batch_size=batch_size, max_len=max_len)
        storage |= dict(device=weight.device, dtype=dtype or weight.dtype)
        if c.cache == "kv":
            return KVCache(n_kv_heads=c.n_kv_heads, d_head=c.d_head, **storage)
        if c.cache == "latent":
            return LatentCache(latent_dim=c.latent_dim, **storage)
        if c.cache == "hybrid":
            return HybridCache(n_heads=c.n_heads, d_head=c.d_head, latent_dim=c.latent_dim, **storage)
        return JointLatentCache(latent_dim=c.latent_dim, d_rope=c.d_rope, **storage)

    def routing(self) -> list[Routing]:
        """For each mixture-of-experts layer, what its router decided in the last forward pass, and in that one alone.

        To look at: indices, gates, probabilities, counts, without gradients. Losses need the passes themselves, which
        `moemla.routing.record_routing` collects. Built in chapter 6.
        """
        layers = [block.feedforward for block in self.blocks]
        return [
            layer.router.last
            for layer in layers
            if isinstance(layer, MixtureOfExperts) and layer.router.last is not None
        ]

    def save(self, path: str | os.PathLike, tokenizer=None) -> None:
        """Writes config.json and model.safetensors (and tokenizer.json) into the folder `path`.

        The config is `described`: a head that is no longer the embedding is written too, a rope that was changed named.
        Of a wrapped model, `unwrapped(model).save(path)`. Under FSDP2, or with experts
        over ranks, every rank calls it, and the first one writes. ValueError for the tokenizer of another vocabulary,
        which `moemla.load` would refuse.
        """
        from safetensors.torch import save

        self.config.require_vocabulary(tokenizer)
        state = self.weights()
        sharded = any(hasattr(tensor, "full_tensor") for tensor in state.values())  # all gather, one writes
        writes = not sharded or torch.distributed.get_rank() == 0
        for name, tensor in state.items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            state[name] = whole.cpu() if sharded and writes else whole if writes else None  # one whole tensor at a time
        if not writes:
            return
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.contiguous() for name, tensor in state.items()}
        with replacing(folder / "model.safetensors") as file:
            file.write(save(weights))
        write_json(folder / "config.json", {"version": VERSION} | self.described.to_dict())
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer.json")


def unwrapped(model: nn.Module) -> LanguageModel:
    """The LanguageModel inside what DDP or torch.compile made of it; one that is not wrapped is returned as it is.

    For the methods that a wrapper does not know: `save`, `routing`, `new_cache`. TypeError where there is none.
    Built in chapter 13.
    """
    inner = model
    while not isinstance(inner, LanguageModel):
        inside = vars(inner).get("_modules", {}) if isinstance(inner, nn.Module) else {}
        inner = inside.get("module", inside.get("_orig_mod"))
        if inner is None:
            raise TypeError(f"model: {type(model).__name__} holds no LanguageModel as its `module`; hand over that one")
    return inner
