"""Parameters, FLOPs and cache bytes from a config alone.

Plain integers from anything that has the fields of `ModelConfig`: nothing is imported but the standard
library. What is counted is what a built model holds; the tests compare the two. A multiply-add is one MAC,
or two FLOPs. Built in chapter 9.
"""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Parameters:
    """Trainable numbers of a model, all layers together.

    `active` is what one token touches: everything but the routed experts that it was not sent to. The token
    table counts whole (it is the head's matrix when tied). The balancing bias is a buffer and is in none of
    these.
    """

    token_embedding: int
    position_embedding: int
    head: int  # 0 when tied to the token table
    attention: int  # projections, their biases, and the norm on the joint latent
    feedforward: int  # dense FFN, or routed plus shared experts; without the router
    routed: int  # the routed experts' part of `feedforward`
    shared: int  # the shared experts' part of `feedforward`
    router: int
    norms: int  # two a block and the final one
    total: int
    active: int

    @property
    def embedding(self) -> int:
        """Token table, learned positions, and the head where it is not tied."""
        return self.token_embedding + self.position_embedding + self.head

    @property
    def active_share(self) -> float:
        """`active` over `total`."""
        return self.active / self.total


def parameters(config: Any) -> Parameters:
    """Count the parameters of `LanguageModel(config)` without building it (Table 1)."""
    d, layers = config.d_model, config.n_layers
    token = config.vocab_size * d
    position = config.max_seq_len * d if config.positions == "learned" else 0
    if getattr(config, "rope_learnable", False):  # one frequency for each pair of dimensions, shared by the layers
        position = (config.d_rope if config.attention == "mla-decoupled" else config.d_head) // 2
    head = 0 if config.tie_embeddings else config.vocab_size * d
    attention = layers * (sum(i * o for i, o in attention_matrices(config)) + _attention_extras(config))
    norms = (2 * layers + 1) * d * (2 if config.norm == "layernorm" and config.bias else 1)
    leading = dense_layers(config)
    dense = leading * _ffn(config, config.d_ff, bias=config.bias)
    expert = (layers - leading) * _ffn(config, config.d_expert, bias=False)
    routed, idle = config.n_experts * expert, (config.n_experts - config.top_k) * expert
    shared = config.n_shared * expert  # one FFN of width S * d_expert: the same numbers
    router = (layers - leading) * d * config.n_experts
    feedforward = dense + routed + shared
    total = token + position + head + attention + feedforward + router + norms
    return Parameters(
        token_embedding=token,
        position_embedding=position,
        head=head,
        attention=attention,
        feedforward=feedforward,
        routed=routed,
        shared=shared,
        router=router,
        norms=norms,
        total=total,
        active=total - idle,
    )


def dense_layers(config: Any) -> int:
    """Layers without experts: all where ffn is dense, else the leading `n_dense_layers`."""
    return config.n_layers if config.ffn == "dense" else getattr(config, "n_dense_layers", 0)


def attention_matrices(config: Any) -> list[tuple[int, int]]:
    """(inputs, outputs) of each matrix of one attention layer, in the layer's order. Built in chapter 3.

    `mha`: q, k, v, out (grouped-query where n_kv_heads < n_heads). `mla`, eqs. 13-14: q, k_down, k_up,
    v_down, v_up, out. `mla-decoupled`: q, kv_down, k_up, v_up, out.
    """
    d, heads, k, r = config.d_model, config.n_heads, config.d_head, config.latent_dim
    if config.attention == "mha":
        kv = config.n_kv_heads * k
        return [(d, heads * k), (d, kv), (d, kv), (heads * k, d)]
    value = heads * config.d_value
    if config.attention == "mla":
        return [(d, heads * k), (d, r), (r, heads * k), (d, r), (r, value), (value, d)]
    if config.attention == "mla-decoupled":
        query = heads * (config.d_nope + config.d_rope)
        return [(d, query), (d, r + config.d_rope), (r, heads * config.d_nope), (r, value), (value, d)]
    raise ValueError(f"attention={config.attention!r}: choose one of mha, mla, mla-decoupled")


def _attention_extras(config: Any) -> int:
    """Biases (one an output) and the RMSNorm weight on the joint latent."""
    biases = sum(o for _, o in attention_matrices(config)) if config.bias else 0
    return biases + (config.latent_dim if config.attention == "mla-decoupled" else 0)


def _ffn(config: Any, hidden: int, bias: bool) -> int:
    """d -> hidden (twice that for SwiGLU, which has a gate and a value) -> d."""
    inner = (2 if config.activation == "swiglu" else 1) * hidden
    return config.d_model * (inner + hidden) + (inner + config.d_model if bias else 0)


def block_macs_per_token(config: Any, seq_len: int = 512, layer: int = -1) -> int:
    """Multiply-adds of one block's matrix products for one token among `seq_len`. Built in chapter 6.

    `layer` is the block's number (default: the last), since leading layers may have a dense feed-forward.

    Every token is counted against all `seq_len` keys, the paper's n^2 (eq. 15), not halved for the causal
    mask; a latent form rebuilds keys and values once a token. Norms, softmax, rotations and biases are left
    out. Experts are counted as routing asks, the router and top_k + n_shared of them, whatever a back end
    spends beyond that.
    """
    attention = sum(i * o for i, o in attention_matrices(config))
    attention += seq_len * config.n_heads * (_key_width(config) + _value_width(config))
    if layer % config.n_layers < dense_layers(config):
        return attention + _ffn(config, config.d_ff, bias=False)
    expert = _ffn(config, config.d_expert, bias=False)
    return attention + config.d_model * config.n_experts + (config.top_k + config.n_shared) * expert


def flops_per_token(config: Any, seq_len: int = 512) -> int:
    """Forward FLOPs of one token: 2 x (`block_macs_per_token` of each block + the head's V x d).

    Built in chapter 6.
    """
    blocks = sum(block_macs_per_token(config, seq_len, layer) for layer in range(config.n_layers))
    return 2 * (blocks + config.vocab_size * config.d_model)


def training_flops_per_token(config: Any, seq_len: int = 512) -> int:
    """Three times the forward pass: each product has two gradients. Built in chapter 13."""
    return 3 * flops_per_token(config, seq_len)


def cache_bytes_per_token(config: Any, dtype_bytes: int = 2) -> int:
    """Bytes one token leaves in the cache of the whole model, all layers (Theorem 3.4). Built in chapter 3.

    A layer keeps, for `kv`, keys and values of each key-value head; `latent`, the paper's two latents, 2r;
    `hybrid`, rotated keys and the value latent, H d_k + r; `joint`, DeepSeek's latent and its one rotary
    key, r + d_rope. `dtype_bytes` is 2 for bf16 and fp16.
    """
    if config.cache == "kv":
        kv_heads = config.n_kv_heads if config.attention == "mha" else config.n_heads
        width = kv_heads * (_key_width(config) + _value_width(config))
    elif config.cache == "latent":
        width = 2 * config.latent_dim
    elif config.cache == "hybrid":
        width = config.n_heads * _key_width(config) + config.latent_dim
    elif config.cache == "joint":
        width = config.latent_dim + config.d_rope
    else:
        raise ValueError(f"cache={config.cache!r}: choose one of kv, latent, hybrid, joint")
    return config.n_layers * width * dtype_bytes


def _key_width(config: Any) -> int:
    return config.d_nope + config.d_rope if config.attention == "mla-decoupled" else config.d_head


def _value_width(config: Any) -> int:
    return config.d_head if config.attention == "mha" else config.d_value


def routing_combinations(n_experts: int, top_k: int) -> int:
    """Ways to choose `top_k` of `n_experts` routed experts (abstract, section 3.1). Built in chapter 6."""
    return math.comb(n_experts, top_k)
