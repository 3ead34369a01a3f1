"""Bytes that a training step holds on one device, by arithmetic: weights, gradients, optimizer, activations, loss.

An activation is what autograd keeps on the way forward because a backward asks for it. `kept` lists it for one block,
tensor by tensor; `footprint` follows a step from there and names the moment at which most is held. The tests hold the
sum against the bytes that live in a step on a CPU; what a GPU's kernels do otherwise is marked, and was not measured.

N tokens of a micro-batch pass a device at once. A number of w bytes: 4, or 2 under autocast, where every product keeps
its own 16-bit copy of its input and each matrix has one too. Built in chapter 13.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from moemla import complexity
from moemla.config import ModelConfig, require, require_count

WIDE, INDEX = 4, 8  # bytes of float32 and int64
CHUNK, CPU_CHUNK, LINE = 512, 128, 64  # `losses`: rows of logits alive at once, and what their rows are padded to


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides the memory of a training step on one device, besides the model.

    `rows` sequences of `seq_len` tokens pass it at once, `micro_batches` times a step. `parallel`: ddp, every device
    has everything; fsdp, weights, gradients and optimizer in equal shares. `expert_parallel` devices share the routed
    experts. ValueError for counts below 1, or more devices for the experts than there are.
    """

    rows: int
    seq_len: int
    micro_batches: int = 1
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    optimizer: Literal["adamw", "muon"] = "adamw"
    recompute: bool = False
    gpus: int = 1
    parallel: Literal["ddp", "fsdp"] = "ddp"
    expert_parallel: int = 1
    on_cpu: bool = False

    def __post_init__(self):
        for name in ("rows", "seq_len", "micro_batches", "gpus", "expert_parallel"):
            require_count(name, getattr(self, name))
        for name in ("precision", "optimizer", "parallel"):
            allowed = get_args(type(self).__annotations__[name])
            require(getattr(self, name) in allowed, name, getattr(self, name), f"choose one of {', '.join(allowed)}")
        apart = self.gpus % self.expert_parallel == 0
        require(apart, "expert_parallel", self.expert_parallel, f"must divide gpus={self.gpus}")

    @property
    def tokens(self) -> int:
        """N, the tokens of a micro-batch on this device."""
        return self.rows * self.seq_len

    @property
    def narrow(self) -> bool:
        """Whether products are of 16-bit numbers."""
        return self.precision != "float32"

    @property
    def width(self) -> int:
        """Bytes of a number in a product."""
        return 2 if self.narrow else WIDE


@dataclass(frozen=True)
class Footprint:
    """Bytes by part at the `moment` of a step at which most is held."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


def back_end(config: ModelConfig, step: Step) -> str | None:
    """The back end that trains the experts, "masked" or "grouped"; None without experts.

    ValueError for one whose memory is not known here, or one that cannot send rows to other devices.
    """
    if config.ffn == "dense" or config.n_dense_layers == config.n_layers:
        return None
    name = config.backend
    if step.expert_parallel > 1:
        require(name in ("auto", "grouped"), "backend", name, "experts over several devices need 'grouped' (or 'auto')")
        return "grouped"
    if name == "auto":
        import torch

        from moemla.experts import choose

        anywhere = torch.zeros(1, device="cpu" if step.on_cpu else "meta")
        x = anywhere.expand(step.tokens, config.d_model)
        w_out = anywhere.expand(config.n_experts, config.d_expert, config.d_model)
        with torch.enable_grad():
            name = choose(x, w_out, config.top_k)
    require(name in ("masked", "grouped"), "backend", name, "memory is known for 'masked' and 'grouped'")
    return name


# ---- what autograd keeps


def kept(config: ModelConfig, layer: int, step: Step) -> dict[str, int]:
    """Bytes that one block keeps for its backward, by part: residual, attention, feedforward, copies of weights."""
    c, n, w = config, step.tokens, step.width
    routed = layer >= complexity.dense_layers(c)
    statistics = 2 if c.norm == "layernorm" else 1  # mean and 1/std, or 1/std alone
    normed = 0 if step.narrow else 2 * n * c.d_model * WIDE  # for the products, which keep their own copies if narrow
    if c.norm == "rmsnorm" and step.on_cpu:
        normed += 2 * n * c.d_model * WIDE  # not fused: x / rms as well
    if routed and step.narrow:
        normed += n * c.d_model * WIDE  # the router is always float32
    parts = dict(residual=2 * n * (c.d_model + statistics) * WIDE + normed)
    parts["attention"] = _attention_kept(c, step)
    if routed:
        parts["feedforward"] = _routed_kept(c, step) + _dense_kept(c, c.n_shared * c.d_expert, step)
    else:
        parts["feedforward"] = _dense_kept(c, c.d_ff, step)
    if c.dropout:
        parts["feedforward"] += n * c.d_model * (w if step.on_cpu else 1)  # the mask
    parts["copies of weights"] = _copies_kept(c, layer, step)
    return parts


def _inputs(config: ModelConfig, products: int, step: Step) -> int:
    """16-bit copies of a normalised input, one for each product that reads it; in float32 they share the norm's."""
    return products * step.tokens * config.d_model * 2 if step.narrow else 0


def _scores_kept(config: ModelConfig, step: Step) -> bool:
    """Whether attention holds all T^2 scores: no fused kernel takes its dropout, its widths, or its grouped heads."""
    c, decoupled = config, config.attention == "mla-decoupled"
    grouped = c.attention == "mha" and c.n_kv_heads != c.n_heads
    wider = decoupled and c.d_value > c.d_nope + c.d_rope
    return c.dropout > 0 or wider if step.on_cpu else grouped and not step.narrow


def _attention_kept(config: ModelConfig, step: Step) -> int:
    c, n, w, heads = config, step.tokens, step.width, config.n_heads
    key, value = (c.d_head, c.d_head) if c.attention != "mla-decoupled" else (c.d_nope + c.d_rope, c.d_value)
    padded = max(key, value)  # torch's fused kernels want values as wide as keys
    shared = c.n_kv_heads if c.attention == "mha" else heads
    total = _inputs(c, 2 if c.attention == "mla-decoupled" else 3, step)
    if c.attention == "mla":
        total += 2 * n * c.latent_dim * w
    if c.attention == "mla-decoupled":  # kv_down's output, and [norm(latent); k_rope]
        total += 2 * n * (c.latent_dim + c.d_rope) * w
        total += n * c.latent_dim * WIDE * step.on_cpu + n * WIDE + n * c.latent_dim * WIDE * step.narrow
    if c.rope_learnable:  # keys and queries from before the turn
        turned = heads + 1 if c.attention == "mla-decoupled" else heads + shared
        total += n * turned * (c.d_rope if c.attention == "mla-decoupled" else c.d_head) * w
    if _scores_kept(c, step):
        scores = step.rows * heads * step.seq_len**2 * WIDE
        total += scores * (3 if c.dropout else 1)  # softmax, mask, their product
        return total + n * heads * (2 * key + padded) * WIDE + n * heads * value * w  # q, k, v; the merged output
    total += n * (heads * key + shared * (key + padded) + heads * padded) * w  # q, k, v, output
    if padded > value or c.rope_learnable:
        total += n * heads * value * w  # the output without the padding, merged
    return total + n * heads * WIDE  # logarithms of the softmax's sums


def _dense_kept(config: ModelConfig, hidden: int, step: Step) -> int:
    """z and its activation; SwiGLU has a gate, a value, silu(gate) and the product."""
    each = 4 if config.activation == "swiglu" else 2
    return step.tokens * each * hidden * step.width + (_inputs(config, 1, step) if hidden else 0)


def _routed_kept(config: ModelConfig, step: Step) -> int:
    c, n, w, e = config, step.tokens, step.width, config.n_experts
    swiglu = c.activation == "swiglu"
    total = _inputs(c, 1, step)
    total += n * (2 * e * WIDE + c.top_k * (INDEX + WIDE * (1 + c.renormalise + (c.routed_scale != 1))))
    if back_end(c, step) == "masked":  # z, its activation (and silu), and that weighed by the spread gates
        return total + n * e * WIDE + n * e * c.d_expert * (5 if swiglu else 3) * w
    slots = n * c.top_k  # z and its activation; which slot went where
    return total + slots * c.d_expert * (3 if swiglu else 2) * w + 4 * slots * INDEX + slots * w * step.narrow


def _copies_kept(config: ModelConfig, layer: int, step: Step) -> int:
    """Matrices in 16 bits; in float32 only the one that `masked` lays out anew."""
    c = config
    if step.narrow:
        return 2 * (_matrices(c, layer, step) - _router(c, layer))
    masked = layer >= complexity.dense_layers(c) and back_end(c, step) == "masked"
    return masked * c.n_experts * c.d_model * (2 if c.activation == "swiglu" else 1) * c.d_expert * WIDE


# ---- weights


def _router(config: ModelConfig, layer: int) -> int:
    return config.d_model * config.n_experts if layer >= complexity.dense_layers(config) else 0


def _experts_here(config: ModelConfig, step: Step) -> int:
    return -(-config.n_experts // step.expert_parallel)  # of the device that has most


def _matrices(config: ModelConfig, layer: int, step: Step) -> int:
    """Numbers in the matrices and biases of a block, as this device holds them."""
    c, inner = config, 3 if config.activation == "swiglu" else 2
    biases = 0
    attention = sum(i * o for i, o in complexity.attention_matrices(c))
    if c.bias:
        biases += sum(o for _, o in complexity.attention_matrices(c))
    if layer >= complexity.dense_layers(c):
        experts = _experts_here(c, step) + c.n_shared
        return attention + biases + _router(c, layer) + experts * inner * c.d_model * c.d_expert
    if c.bias:
        biases += (inner - 1) * c.d_ff + c.d_model
    return attention + biases + inner * c.d_model * c.d_ff


def _routed(config: ModelConfig, layer: int, step: Step) -> int:
    """Numbers of a block's routed experts on this device."""
    c = config
    each = (3 if c.activation == "swiglu" else 2) * c.d_model * c.d_expert
    return _experts_here(c, step) * each if layer >= complexity.dense_layers(c) else 0


def _leaves(config: ModelConfig, layer: int, step: Step) -> int:
    """Numbers of the matrices whose 16-bit copies autocast itself makes, and keeps until the loss is there."""
    return _matrices(config, layer, step) - _router(config, layer) - _routed(config, layer, step)


def _norms(config: ModelConfig) -> int:
    return config.d_model * (2 if config.norm == "layernorm" and config.bias else 1)


def _blocks(config: ModelConfig, step: Step) -> list[int]:
    """Numbers of each block."""
    latent = config.latent_dim if config.attention == "mla-decoupled" else 0
    return [_matrices(config, layer, step) + 2 * _norms(config) + latent for layer in range(config.n_layers)]


# ---- a step


def footprint(config: ModelConfig, step: Step) -> Footprint:
    """The moment of a step at which most is held, and the bytes by part: six kinds of moments are compared.

    The loss, with every activation and a block of logits; its backward, where the gradient of the head is scaled; the
    feed-forward and the attention of each block on the way back; the token table's gradient; the optimizer. With
    micro-batches the second one counts, which finds gradients there. Under DDP its buckets are a second copy of the
    gradients, but of experts that are spread; under FSDP the token table is gathered, and the block at hand with its
    whole gradients.
    """
    c, n = config, step.tokens
    shards = step.gpus if step.parallel == "fsdp" else 1
    whole = replace(step, expert_parallel=1)
    here, alone = _blocks(c, step), _blocks(c, whole)
    blocks, owner = (alone, whole) if shards > 1 else (here, step)  # FSDP divides by all devices, experts too
    outside = complexity.parameters(c).total - sum(alone)  # tables and the last norm
    numbers = outside + sum(blocks)
    table = c.vocab_size * c.d_model * WIDE
    gathered = (outside + max(here)) * WIDE if shards > 1 else 0
    spread = sum(_routed(c, layer, step) for layer in range(c.n_layers)) if step.expert_parallel > 1 else 0
    held = dict(
        weights=numbers * WIDE // shards + _buffers(c),
        gradients=(numbers - spread) * WIDE if step.gpus > 1 and shards == 1 else 0,  # DDP's buckets
        optimizer=_optimizer(c, owner, numbers) // shards,
    )
    before = numbers * WIDE // shards if step.micro_batches > 1 else 0
    each = [sum(kept(c, layer, step).values()) for layer in range(c.n_layers)]
    looked_at = [_looked_at(c, layer, step) for layer in range(c.n_layers)]
    seen = [n * c.d_model * WIDE + last for last in looked_at] if step.recompute else each
    features = n * c.d_model * WIDE  # behind the last norm, whose input is kept
    normed = features * (2 if c.norm == "rmsnorm" and step.on_cpu else 1)
    loss = (n * c.d_model + c.vocab_size * c.d_model) * WIDE
    cached = 2 * sum(_leaves(c, layer, step) for layer in range(c.n_layers)) if step.recompute and step.narrow else 0

    def moment(name, gradients=0, activations=0, loss=0, working=0):
        now = held | dict(activations=activations, loss=loss, working=working + gathered)
        return Footprint(name, now | dict(gradients=held["gradients"] + gradients))

    moments = [
        moment("the loss", before, sum(seen) + normed + features + cached, loss, _loss_working(c, step)),
        moment("the backward of the loss", before, sum(seen) + normed, 2 * loss),
    ]
    for layer in range(c.n_layers):
        later = table + sum(blocks[layer + 1 :]) * WIDE // shards if not before else before + table * c.tie_embeddings
        later += here[layer] * WIDE if shards > 1 else 0
        activations = sum(seen[:layer]) + each[layer] + sum(looked_at[layer + (not step.recompute) :])
        residual = n * c.d_model * WIDE
        for name, freed, gradients, working in _backward(c, layer, step):
            gradients = 0 if before else gradients * WIDE // shards
            moments.append(moment(name, later + gradients, activations - freed, 0, residual + working))
    final = before or (sum(blocks) * WIDE // shards + table * (not c.tie_embeddings))
    slopes = (3 if c.tie_embeddings else 1) * table  # of the head, of the embedding, their sum; or of the embedding
    moments.append(moment("the gradient of the token table", final + slopes, sum(looked_at), 0, n * c.d_model * WIDE))
    moments.append(moment("the optimizer", numbers * WIDE // shards, sum(looked_at), 0, _optimizer_working(c, step)))
    return max(moments, key=lambda one: one.total)


def _buffers(config: ModelConfig) -> int:
    """Rotary tables (cos, sin, and both as wide as a head), balancing bias and counts."""
    c, total = config, 0
    if c.positions == "rope" and not c.rope_learnable:
        total += 3 * c.max_seq_len * (c.d_rope if c.attention == "mla-decoupled" else c.d_head) * WIDE
    return total + (c.n_layers - complexity.dense_layers(c)) * c.n_experts * (WIDE + INDEX)


def _looked_at(config: ModelConfig, layer: int, step: Step) -> int:
    """The routing that a router keeps to be looked at: logits, scores, choice and gates."""
    if layer < complexity.dense_layers(config):
        return 0
    return step.tokens * (2 * config.n_experts * WIDE + config.top_k * (INDEX + WIDE))


def _loss_working(config: ModelConfig, step: Step) -> int:
    """A block of logits and its softmax; from the second block on those of the one before are still there."""
    n, w, vocab, d = step.tokens, step.width, config.vocab_size, config.d_model
    rows, line = min(CPU_CHUNK if step.on_cpu else CHUNK, n), LINE // w
    logits = rows * (-(-vocab // line) * line)
    again = n > rows
    slopes = 2 * rows * d * WIDE  # of a block of features, before and after it is scaled
    if not step.narrow:
        return logits * (w + WIDE) + max(again * logits * WIDE, slopes)
    copies = (n + vocab) * d * 2  # features and table
    softmax = logits * (WIDE * (1 + again) + 2 * again + WIDE * step.on_cpu)  # widened first where no kernel does both
    return copies + logits * 2 + max(softmax, logits * (WIDE + 2) + max(vocab * d * 2, slopes))


def _backward(config: ModelConfig, layer: int, step: Step) -> list[tuple[str, int, int, int]]:
    """(name, activations freed before, parameters that have their gradient, bytes of work) of a block's two halves."""
    c, n, w = config, step.tokens, step.width
    swiglu, residual = c.activation == "swiglu", n * c.d_model * WIDE
    parts = kept(c, layer, step)
    if layer < complexity.dense_layers(c):
        gradients = c.d_ff * c.d_model
        working = n * c.d_ff * (2 if swiglu else 1) * w + n * c.d_model * (w if c.dropout or step.narrow else 0)
    else:
        hidden, shared = n * c.d_expert, n * c.d_model * w  # of one expert that takes all; the shared experts' slope
        gradients = _experts_here(c, step) * c.d_expert * c.d_model
        if back_end(c, step) == "masked":  # slopes of both factors in float32, before they are narrow again
            working = (
                shared + hidden * c.n_experts * (12 - 2 * step.recompute if step.narrow else 8) + n * c.n_experts * WIDE
            )
        else:  # rows and their slopes, gathered; once more where they are sent to other devices
            sent = 2 if step.expert_parallel > 1 else 1
            gradients = 0 if step.narrow else gradients * (3 if swiglu else 2)
            working = 2 * shared + c.top_k * ((1 + sent) * n * c.d_model + (4 if swiglu else 2) * hidden) * w
    ffn = ("the backward of a feed-forward", 0, gradients, working)
    whole = _matrices(c, layer, step) - sum(i * o for i, o in complexity.attention_matrices(c))
    value = c.d_head if c.attention != "mla-decoupled" else max(c.d_nope + c.d_rope, c.d_value)
    working = residual + 4 * n * c.n_heads * value * w
    if _scores_kept(c, step):
        working += step.rows * c.n_heads * step.seq_len**2 * WIDE
    freed = parts["feedforward"] + parts["residual"] // 2 - _looked_at(c, layer, step)
    return [ffn, ("the backward of an attention", freed, whole, working)]


def _optimizer(config: ModelConfig, step: Step, numbers: int) -> int:
    """AdamW: two moments for each number. Muon: one for a block's matrix."""
    matrices = sum(count for count, _ in _muon_shapes(config, step)) if step.optimizer == "muon" else 0
    return (2 * numbers - matrices) * WIDE


def _muon_shapes(config: ModelConfig, step: Step) -> list[tuple[int, tuple[int, int]]]:
    """(numbers, shape) of the matrices that Muon treats together, those of one shape in all layers."""
    c, counts = config, {}
    inner = 2 if c.activation == "swiglu" else 1
    for layer in range(c.n_layers):
        shapes = [(o, i) for i, o in complexity.attention_matrices(c)]
        if layer < complexity.dense_layers(c):
            shapes += [(inner * c.d_ff, c.d_model), (c.d_model, c.d_ff)]
        else:
            hidden = c.n_shared * c.d_expert
            shapes += _experts_here(c, step) * [(c.d_model, inner * c.d_expert), (c.d_expert, c.d_model)]
            shapes += [(inner * hidden, c.d_model), (c.d_model, hidden)] if hidden else []
        for shape in shapes:
            counts[shape] = counts.get(shape, 0) + shape[0] * shape[1]
    return [(count, shape) for shape, count in counts.items()]


def _optimizer_working(config: ModelConfig, step: Step) -> int:
    """AdamW is fused. Muon: six of the stack it makes orthogonal, or four beside four Gram matrices; and the last."""
    if step.optimizer == "adamw":
        return 0
    working, last = [], 0
    for count, (rows, columns) in _muon_shapes(config, step):
        gram = count * min(rows, columns) // max(rows, columns)
        working.append((max(6 * count + gram, 4 * count + 4 * gram) + last) * WIDE)
        last = count
    return max(working)
