"""Our code, its alternatives and a peer on this machine, in turn, each beside a limit found in the same run.

The experts, attention in decode, a training step, decoding; `kernel_bench` has kernels alone, `serving_bench` a step of
many rows. Built in chapter 14.
"""

import importlib.metadata
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from moemla import complexity, kernels, results
from moemla.attention import MultiHeadAttention
from moemla.cache import HybridCache, JointLatentCache, KVCache, LatentCache
from moemla.cells import Cell
from moemla.config import ModelConfig, require
from moemla.devices import default_device, usable_device
from moemla.experts import BACKENDS, Experts, experts
from moemla.feedforward import FeedForward, width_in
from moemla.kernel_bench import affordable, bench_kernels, with_kernels
from moemla.latent_attention import DecoupledLatentAttention, MultiHeadLatentAttention
from moemla.measuring import Row, Work, limits, measure
from moemla.model import LanguageModel
from moemla.moe import MixtureOfExperts
from moemla.precision import DTYPES
from moemla.rope import RotaryEmbedding
from moemla.serving import step_bytes, step_flops
from moemla.serving_bench import bench_serving


def _forward(program: Callable[[], Tensor]) -> Callable:
    def run():
        with torch.no_grad():
            program()

    return run


def _backward(program: Callable[[], Tensor]) -> Callable:
    return lambda: program().sum().backward()


def _compiled(tensor: Tensor) -> bool:
    """Whether kernels run here as they are meant to: interpreted ones would only measure the interpreter."""
    return tensor.is_cuda and kernels.usable(tensor)


# ---- the mixture of experts


def bench_moe(
    config: ModelConfig,
    tokens: tuple[int, ...] = (1, 16, 256, 4096),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 1.0,
    against: str | None = None,
) -> list[Row]:
    """Routed experts by every back end, the whole layer, and its dense feed-forward. Built in chapter 11.

    One layer of `config` on (N, D) tokens routed at random, for each N; forward alone, and from 16 tokens on forward
    and backward. The limit is that of the work that routing asks for. On a GPU kernels have rows of their own, and so
    has Liger's fused mixture of experts where it is installed (SwiGLU). against="transformers" adds DeepseekV3's.
    """
    c, machine, rows = config, limits(device, dtype), []
    factory = dict(device=device, dtype=dtype)
    sizes = dict(d_model=c.d_model, n_experts=c.n_experts, d_expert=c.d_expert, activation=c.activation)
    layer = MixtureOfExperts(
        **sizes, top_k=c.top_k, n_shared=c.n_shared, **factory
    ).eval()  # in eval nothing is counted
    dense = FeedForward(d_model=c.d_model, d_ff=c.d_ff, activation=c.activation, bias=False, **factory)
    w_in, w_out = layer.experts.w_in, layer.experts.w_out
    peer = _peer_layer(c, factory) if against == "transformers" else None
    each = c.d_model * (1 + width_in(1, c.activation))  # numbers of an expert for each unit of its width
    for n in tokens:
        x = torch.randn(1, n, c.d_model, **factory, requires_grad=True)
        index = torch.rand(n, c.n_experts, device=device).topk(c.top_k).indices
        gate = torch.rand(n, c.top_k, **factory, requires_grad=True)
        routed = {
            name: lambda name=name, x=x, i=index, g=gate: experts(x[0], w_in, w_out, i, g, name, c.activation)
            for name in BACKENDS
            if affordable(name, n, w_in, c.top_k, machine) and (name != "triton" or _compiled(x))
        }
        whole = {"ours": lambda x=x: layer(x)}
        if _compiled(x):
            whole["ours kernels"] = with_kernels(whole["ours"])
        if liger := _liger(w_in, w_out, c.activation):
            routed["liger"] = lambda x=x, i=index, g=gate: liger(x[0], i, g)
        if peer:
            routed["transformers"] = lambda x=x, i=index, g=gate: peer.experts(x[0], i, g)
            whole["transformers"] = lambda x=x: peer(x)
        chosen = min(c.n_experts, n * c.top_k)
        parts = (  # programs, width that a token passes, width that is read
            ("routed", routed, c.top_k * c.d_expert, chosen * c.d_expert),
            ("layer", whole, (c.top_k + c.n_shared) * c.d_expert, (chosen + c.n_shared) * c.d_expert),
            ("dense", {"ours": lambda x=x: dense(x)}, c.d_ff, c.d_ff),
        )
        for part, programs, passed, read in parts:
            flops, moved = 2 * n * each * passed, (each * read + 2 * n * c.d_model) * x.element_size()
            for mode, wrap, times in (("forward", _forward, 1), ("forward+backward", _backward, 3)):
                if mode == "forward" or n >= 16:
                    timed = {name: wrap(program) for name, program in programs.items()}
                    need = Work(times * flops, times * moved)
                    rows += measure(f"{part} {mode} n={n}", timed, need, n, machine, seconds)
    return rows


def _liger(w_in: Tensor, w_out: Tensor, activation: str) -> Callable | None:
    """Liger's fused mixture of experts with the same weights, in its layout; None where it cannot run."""
    try:
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction
    except ImportError:
        return None
    if activation != "swiglu" or not w_in.is_cuda:
        return None
    first, second = (weight.detach().mT.contiguous().requires_grad_() for weight in (w_in, w_out))
    return lambda x, index, gate: LigerFusedMoEFunction.apply(x, first, second, index.int(), gate)


# ---- attention


def bench_attention(
    config: ModelConfig,
    lengths: tuple[int, ...] = (128, 512, 2048),
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 0.5,
) -> list[Row]:
    """One layer of every form of attention: a token for each row behind a cache of each length. Built in chapter 12.

    Widths are those of `config`; grouped-query attention has a quarter of the key heads. On a GPU the latent forms have
    a second row, with their kernels. The limit counts weights and
    cache, read once, and the products of the form as it is computed here.
    """
    c, machine, rows = config, limits(device, dtype), []
    factory = dict(device=device, dtype=dtype)
    heads, width, r, few = c.n_heads, c.d_head, c.latent_dim, max(1, c.n_heads // 4)
    for length in lengths:
        rope = RotaryEmbedding(width, length + 1, device=device, dtype=dtype)
        plain = dict(d_model=c.d_model, n_heads=heads, bias=False, rope=rope, **factory)
        full, grouped = (MultiHeadAttention(n_kv_heads=g, d_head=width, **plain) for g in (heads, few))
        latent = MultiHeadLatentAttention(latent_dim=r, d_head=width, **plain)
        joint = DecoupledLatentAttention(latent_dim=r, d_nope=width, d_value=width, **plain)
        room = dict(batch_size=batch_size, max_len=length + 1, **factory)
        forms = {  # layer, cache, multiply-adds for each token held
            "mha": (full, KVCache(n_kv_heads=heads, d_head=width, **room), 2 * heads * width),
            f"gqa-{few}": (grouped, KVCache(n_kv_heads=few, d_head=width, **room), 2 * heads * width),
            "mla latent": (latent, LatentCache(latent_dim=r, **room), heads * ((r + 1) * width + r)),
            "mla hybrid": (
                latent,
                HybridCache(n_heads=heads, d_head=width, latent_dim=r, **room),
                heads * (width + r),
            ),
            "decoupled": (joint, JointLatentCache(latent_dim=r, d_rope=width, **room), heads * (2 * r + width)),
        }
        x = torch.randn(batch_size, 1, c.d_model, **factory)
        programs, work = {}, {}
        for name, (layer, held, macs) in forms.items():
            for buffer in held.buffers:
                buffer.normal_()
            held.lengths = [length] * batch_size
            program = lambda layer=layer, held=held, x=x: layer(x, held[0])  # noqa: E731
            weights = sum(p.numel() for p in layer.parameters())
            moved = weights * x.element_size() + batch_size * length * held.bytes_per_token()
            programs[name], work[name] = _forward(program), Work(2 * batch_size * (weights + length * macs), moved)
            if name in ("mla latent", "decoupled") and _compiled(x):
                programs[f"{name}, kernel"], work[f"{name}, kernel"] = _forward(with_kernels(program)), work[name]
        rows += measure(f"decode length={length} batch={batch_size}", programs, work, batch_size, machine, seconds)
    return rows


# ---- the whole model


def bench_train(
    config: ModelConfig,
    batch_size: int = 8,
    seq_len: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 10.0,
    against: str | None = None,
    backends: tuple[str, ...] = ("auto",),
    compiled: bool = False,
) -> list[Row]:
    """A training step: loss, gradients, and one call of the same fused AdamW on every side. Built in chapter 13.

    Parameters are float32; another dtype is autocast. against="transformers": DeepseekV3 with the same weights, whose
    loss must be ours before anything is timed (ArithmeticError). compiled adds a step under torch.compile.
    """
    torch.manual_seed(0)
    machine, model = limits(device, dtype), LanguageModel(config, device=device).train()
    tokens = torch.randint(0, config.vocab_size, (batch_size, seq_len), device=device)
    targets = torch.cat((tokens[:, 1:], tokens.new_full((batch_size, 1), -1)), dim=1)
    losses = {}
    for name in backends:
        losses[f"ours {name}"] = lambda name=name: _use(model, name)(tokens, targets)
    if compiled:
        graph = torch.compile(model)
        losses["ours compiled"] = lambda: _use(model, "auto", graph)(tokens, targets)
    models = dict.fromkeys(losses, model)
    if against == "transformers":
        peer = _peer(model)
        losses["transformers"], models["transformers"] = (lambda: peer(input_ids=tokens, labels=tokens).loss), peer
        ours, theirs = model(tokens, targets).item(), losses["transformers"]().item()
        if abs(ours - theirs) > 1e-3:
            raise ArithmeticError(f"the peer computes something else: its loss is {theirs}, ours {ours}")
    optimizers = {id(one): torch.optim.AdamW(one.parameters(), lr=1e-5, fused=True) for one in models.values()}
    programs = {name: _step(loss, optimizers[id(models[name])], device, dtype) for name, loss in losses.items()}
    flops = tokens.numel() * complexity.training_flops_per_token(config, seq_len)
    moved = 10 * 4 * complexity.parameters(config).total  # read twice, a gradient written; AdamW reads 4, writes 3
    return measure(f"train {batch_size}x{seq_len}", programs, Work(flops, moved), tokens.numel(), machine, seconds)


def bench_decode(
    config: ModelConfig,
    held: int = 128,
    new: int = 32,
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 5.0,
    against: str | None = None,
    compiled: bool = False,
) -> list[Row]:
    """Greedy decoding of `new` tokens behind `held` ones, with a cache.

    against="transformers": DeepseekV3 with the same weights and its own cache, which must write the same tokens.
    """
    torch.manual_seed(0)
    machine, model = limits(device, dtype), LanguageModel(config, device=device, dtype=dtype).eval()
    prompt = torch.randint(0, config.vocab_size, (batch_size, held), device=device)
    kept = model.new_cache(batch_size, held + new)
    with torch.inference_mode():
        first = model.next_logits(prompt, kept).argmax(-1, keepdim=True)

    def ours(step=model.next_logits):
        kept.crop(held)
        token, written = first, []
        with torch.inference_mode():
            for _ in range(new):
                token = step(token, kept).argmax(-1, keepdim=True)
                written.append(token)
        return torch.cat(written, dim=1)

    programs: dict[str, Callable[[], Tensor]] = {"ours": ours}
    if compiled:
        try:
            ours(model.compiled_next_logits)
            programs["ours compiled"] = lambda: ours(model.compiled_next_logits)
        except RuntimeError as error:  # torch.compile needs a C++ compiler
            print(f"no compiled row: {str(error).splitlines()[0]}", file=sys.stderr)
    if against == "transformers":
        programs["transformers"] = _peer_decode(_peer(model).eval(), prompt, first, new)
        if not torch.equal(ours(), programs["transformers"]()):
            raise ArithmeticError("the peer writes other tokens from the same weights")
    moved = new * step_bytes(config, batch_size, held + new // 2, dtype.itemsize).total
    flops = new * step_flops(config, batch_size, held + new // 2)
    return measure(f"decode {new} behind {held}", programs, Work(flops, moved), new * batch_size, machine, seconds)


def _use(model: LanguageModel, backend: str, graph: Callable | None = None) -> Callable:
    """The model, or a graph compiled from it, with this back end from now on."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.backend = backend
    return model if graph is None else graph  # a compiled module asks its inside for a length


def _step(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer, device, dtype) -> Callable:
    kind = torch.device(device).type
    context = nullcontext if dtype == torch.float32 else lambda: torch.autocast(kind, dtype)

    def run():
        with context():
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


# ---- the peer


def _peer(model: LanguageModel) -> nn.Module:
    from moemla import interop

    return interop.to_deepseek_v3(model)


def _peer_layer(config: ModelConfig, factory: dict) -> nn.Module:
    """DeepseekV3's mixture of experts with random weights, routing by its own router."""
    peer = _peer(LanguageModel(ModelConfig.from_dict(config.to_dict() | {"n_layers": 1, "vocab_size": 8})))
    return peer.model.layers[0].mlp.to(**factory).eval()


def _peer_decode(peer: nn.Module, prompt: Tensor, first: Tensor, new: int) -> Callable[[], Tensor]:
    from transformers import DynamicCache

    kept = DynamicCache(config=peer.config)
    with torch.inference_mode():
        peer(input_ids=prompt, past_key_values=kept, use_cache=True)

    def run():
        token, written = first, []
        with torch.inference_mode():
            for _ in range(new):
                token = peer(input_ids=token, past_key_values=kept, use_cache=True).logits[:, -1:].argmax(-1)
                written.append(token)
            kept.crop(-new)  # back to the prompt
        return torch.cat(written, dim=1)

    return run


# ---- one call for the command line


SHAPE = ("batch_size", "seq_len", "compiled")
TAKES = dict(train=(*SHAPE, "backends"), decode=SHAPE, moe=("tokens",), attention=("tokens", "batch_size"))
TAKES |= dict(kernels=("tokens", "lengths", "batch_size"), serving=("tokens", "batch_size"))
LENGTHS, HELD = (128, 512, 2048), (128, 1024, 4096)  # of caches, where none are named: one layer, a whole model
PLAIN = dict(batch_size=None, seq_len=256, tokens=(), lengths=(), backends=("auto",), compiled=None)


def run(what: str, device: str | None = None, seconds: float = 2.0, **chosen) -> results.Result:
    """What `moemla bench` does: a `Result` whose measures are the limits and the rows.

    `chosen` are the command's other options. ValueError for those that do not go together.
    """
    device = str(default_device() if device is None else usable_device(device))
    for name in ("batch_size", "seq_len", "tokens", "lengths"):
        for value in chosen[name] if name in ("tokens", "lengths") else [chosen[name]]:
            require(value is None or value >= 1, name, value, "must be at least 1")
    for name, plain in PLAIN.items():
        fits = name in TAKES[what] or chosen[name] == plain
        require(fits, name, chosen[name], f"bench {what} takes none")
    require(bool(chosen["backends"]), "backends", chosen["backends"], "name at least one")
    peer = chosen["against"]
    require(what in ("train", "decode", "moe") or not peer, "against", peer, f"bench {what} has no peer")
    config = _config(chosen)
    experts_too = what not in ("moe", "kernels") or config.ffn == "moe"
    require(experts_too, "variant", chosen["variant"], "has no experts to measure")
    dtype = DTYPES[chosen["dtype"]]
    common: dict[str, Any] = dict(device=device, dtype=dtype, seconds=seconds)
    begin = time.perf_counter()
    if what == "moe":
        tokens = chosen["tokens"] or (1, 16, 256, 4096)
        rows = bench_moe(config, tokens, against=chosen["against"], **common)
    elif what in ("attention", "serving"):
        bench, lengths = dict(attention=(bench_attention, LENGTHS), serving=(bench_serving, HELD))[what]
        rows = bench(config, chosen["tokens"] or lengths, chosen["batch_size"] or 1, **common)
    elif what == "kernels":
        sizes = {name: chosen[name] for name in ("tokens", "lengths", "batch_size") if chosen[name]}
        rows = bench_kernels(config, **sizes, **common)
    elif what == "train":
        sizes = dict(batch_size=chosen["batch_size"] or 8, seq_len=chosen["seq_len"], backends=chosen["backends"])
        rows = bench_train(config, **sizes, against=chosen["against"], compiled=bool(chosen["compiled"]), **common)
    else:
        sizes = dict(batch_size=chosen["batch_size"] or 1, held=chosen["seq_len"])
        compiled = chosen["compiled"] is not False
        rows = bench_decode(config, **sizes, against=chosen["against"], compiled=compiled, **common)
    machine = limits(device, dtype)
    measures = dict(products_flops_per_second=machine.products, operation_seconds=machine.operation)
    measures |= dict(rows=[asdict(row) for row in rows])
    origin = results.provenance(time.perf_counter() - begin)
    if chosen["against"]:
        origin["transformers"] = importlib.metadata.version("transformers")
    return results.of(cell_of(what, device, config, chosen), measures, origin)


def cell_of(what: str, device: str, config: ModelConfig, chosen: dict[str, Any]) -> Cell:
    """A bench as a cell: what was measured of which model, and all options."""
    more = {"train": f"-{chosen['variant']}-{chosen['batch_size'] or 8}x{chosen['seq_len']}"}
    more["serving"] = f"-{chosen['batch_size'] or 1}-rows"
    words = f"{what}-{chosen['size']}-{config.d_expert}-{chosen['dtype']}{more.get(what, '')}"
    arm = re.sub(r"[^A-Za-z0-9.]+", "-", words)
    tags = dict(arm=arm, what=what, device=device) | chosen
    if what != "kernels":  # the only one that has them
        tags.pop("lengths", None)
    return Cell(experiment="bench", scale=torch.device(device).type, tags=tags, model=config)


def _config(chosen: dict) -> ModelConfig:
    changes = dict(vocab_size=chosen["vocab_size"], max_seq_len=max(512, chosen["seq_len"] + 64))
    changes |= {} if chosen["d_expert"] is None else dict(d_expert=chosen["d_expert"])
    if chosen["against"]:
        changes |= dict(activation="swiglu", norm="rmsnorm", bias=False, rope_layout="interleaved")
    return ModelConfig.preset(chosen["size"], chosen["variant"], matched=chosen["matched"], **changes)
