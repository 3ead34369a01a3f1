"""Each kernel alone against the plain function it must equal, beside the bytes and products that cannot be saved.

On a GPU a program is captured once as a CUDA graph and its replay is timed: Python and the launches of single kernels
then do not count. What waits for the GPU cannot be captured and runs as it is: "grouped" does, for its experts' counts,
wherever torch has no grouped product. Built in chapter 14.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moemla import kernels
from moemla.attention import attend_shared, split_heads
from moemla.config import ModelConfig
from moemla.experts import Experts, experts
from moemla.feedforward import FeedForward, width_in
from moemla.measuring import Limits, LiveBytes, Row, Work, limits, measure
from moemla.moe import MixtureOfExperts
from moemla.rope import RotaryEmbedding
from moemla.routing import route

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # of the largest number
ROW_LENGTH = 512  # tokens of a sequence: more of them are further rows
TRAINED = 16  # tokens from which on a backward pass is measured: nobody trains on one
MOST_BYTES = 2e9  # what a plain decode may take for its rebuilt keys or scores
WARM_UP = 3  # calls before a capture: Triton compiles, cuBLAS takes its workspace

Program = Callable[[], tuple[Tensor, ...]]


class _Part(NamedTuple):
    """Programs that must equal the first of them, what they are differentiated by, and the least work."""

    programs: dict[str, Program]
    leaves: list[Tensor]
    forward: Work
    both: Work


def bench_kernels(
    config: ModelConfig,
    tokens: tuple[int, ...] = (1, 256, 4096, 65536),
    lengths: tuple[int, ...] = (512, 8192, 32768),
    batch_size: int = 16,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 0.5,
) -> list[Row]:
    """RoPE, router, experts, the layer of them, and both decodes: each kernel beside its plain function and its limit.

    Widths are those of `config`. All but the decodes see N tokens at once, for each of `tokens`, forward, and from 16
    on forward and backward; "dense" is the feed-forward (`d_ff`) that the layer stands in place of. A decode has one
    query for each of `batch_size` rows behind a cache of each length. The limit counts every input and output once, and
    the products; a replayed graph starts nothing. Where kernels cannot run their rows are left out; a plain decode is,
    where it would take more than 2 GB. ArithmeticError where a program computes something else than the plain one.
    """
    machine, rows, factory = limits(device, dtype), [], dict(device=device, dtype=dtype)
    reason = kernels.why_not(torch.empty(0, **factory))
    if reason is not None:
        print(f"no kernel rows: {reason}", file=sys.stderr)
    for n in tokens:
        parts = {"rope": _rope, "router": _router, "experts": _experts, "layer": _layer, "dense": _dense}
        for name, build in parts.items():
            rows += _both_ways(name, build(config, n, machine, factory, reason is None), n, machine, seconds)
    for length in lengths:
        for name, build in {"latent": _latent, "joint": _joint}.items():
            programs, work = build(config, length, batch_size, factory, reason is None)
            if programs:
                rows += _measure(f"{name} decode length={length}", programs, work, batch_size, machine, seconds)
    return rows


def captured(program: Callable[[], Any], device: torch.device | str) -> Callable[[], Any]:
    """The replay of a CUDA graph of one call; the program itself on a CPU, and where it cannot be captured.

    A replay computes on the tensors that the call saw, which have to outlive it.
    """
    if torch.device(device).type != "cuda":
        return program
    with torch.cuda.device(torch.device(device)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                program()
            waits = _waits(program)
        torch.cuda.current_stream().wait_stream(side)
        if waits:  # a capture that fails leaves torch's random numbers unusable: it is not even tried
            return program
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                program()
        except RuntimeError:
            return program
        return graph.replay


def _waits(program: Callable[[], Any]) -> bool:
    """Whether a call waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls this mode a prototype
        try:
            torch.cuda.set_sync_debug_mode("error")
            program()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return False


def affordable(backend: str, n: int, w_in: Tensor, top_k: int, machine: Limits) -> bool:
    """Whether a back end of the experts is measured: not where it takes seconds a call, or copies gigabytes."""
    if backend == "masked":
        return 12 * n * w_in.numel() / machine.products < 3
    return backend != "gather" or n * top_k / len(w_in) * w_in.nbytes < 3e8


# ---- forward, and forward and backward


def _both_ways(name: str, part: _Part, n: int, machine: Limits, seconds: float) -> list[Row]:
    programs = {program: _without_gradients(run) for program, run in part.programs.items()}
    rows = _measure(f"{name} forward n={n}", programs, part.forward, n, machine, seconds)
    if n >= TRAINED:
        upstream = torch.randn_like(next(iter(programs.values()))()[0])
        programs = {program: _gradients(run, part.leaves, upstream) for program, run in part.programs.items()}
        rows += _measure(f"{name} forward+backward n={n}", programs, part.both, n, machine, seconds)
    return rows


def _measure(case: str, programs: dict[str, Program], work: Work, n: int, machine: Limits, seconds: float) -> list[Row]:
    """Rows of programs that are equal: that is looked at before anything is timed."""
    _require_all_equal(case, programs)
    replayed = {name: captured(program, machine.device) for name, program in programs.items()}
    return measure(case, programs, work, n, machine, seconds, replayed)


def _require_all_equal(case: str, programs: dict[str, Program]) -> None:
    first, *others = programs.items()
    wanted = first[1]()
    for name, program in others:
        _require_equal(f"{case}: {name}", program(), wanted)


def _require_equal(what: str, ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    """Within the tolerance of the narrowest: a router's float32 gradient went through the 16 bits of its layer."""
    tolerance = max((TOLERANCE[tensor.dtype] for tensor in wanted if tensor.is_floating_point()), default=0)
    for place, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        if not b.is_floating_point():
            equal = torch.equal(a, b)
        else:
            a, b = a.detach().float(), b.detach().float()
            off, largest = (a - b).abs().max().item(), b.abs().max().item()
            equal = off <= tolerance * largest  # false for a NaN
        if not equal:
            raise ArithmeticError(f"{what} computes something else: result {place} is not that of the plain function")


def _without_gradients(program: Program) -> Program:
    def run():
        with torch.no_grad():
            return program()

    return run


def _gradients(program: Program, leaves: list[Tensor], upstream: Tensor) -> Program:
    return lambda: torch.autograd.grad(program()[0], leaves, upstream)


def with_kernels(program: Callable[[], Any], on: bool = True) -> Callable[[], Any]:
    """The program, run with kernels on, or off, whatever is set outside."""

    def run():
        before = kernels.enable(on)
        try:
            return program()
        finally:
            kernels.enable(before)

    return run


def _plainly(program: Program) -> Program:
    return with_kernels(program, False)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


# ---- what sees N tokens


def _rope(c: ModelConfig, n: int, machine: Limits, factory: dict, usable: bool) -> _Part:
    """Queries as a layer has them: (B, H, T, K), cut from (B, T, H K)."""
    batch = n // ROW_LENGTH if n % ROW_LENGTH == 0 else 1
    turn = RotaryEmbedding(c.d_head, n // batch, layout=c.rope_layout, **factory)
    x = torch.randn(batch, n // batch, c.n_heads, c.d_head, **factory).transpose(1, 2).requires_grad_()
    programs = {"plain": _plainly(lambda: (turn(x),))}
    if usable:
        from moemla.kernels.rope import rope

        interleaved = c.rope_layout == "interleaved"
        programs["kernel"] = lambda: (rope(x, turn.cos, turn.sin, None, 0, interleaved, False),)
    moved = _bytes(x, x, turn.cos, turn.sin)
    return _Part(programs, [x], Work(0, moved), Work(0, 2 * moved))


def _router(c: ModelConfig, n: int, machine: Limits, factory: dict, usable: bool) -> _Part:
    """Logits without ties, so that all choose the same; counts belong to it, as a training pass needs them."""
    whole = dict(device=factory["device"], dtype=torch.float32)
    ranks = torch.rand(n, c.n_experts, **whole).argsort(-1)
    logits = (8 * (ranks + 0.5) / c.n_experts - 4).requires_grad_()
    bias = torch.zeros(c.n_experts, **whole)
    gating = dict(scores=c.scores, bias_in_gate=c.bias_in_gate, renormalise=c.renormalise, routed_scale=c.routed_scale)

    def plain():
        routing = route(logits, bias, c.top_k, **gating)
        return routing.gate, routing.index, routing.probabilities, routing.counts

    programs: dict[str, Program] = {"plain": _plainly(plain)}
    if usable:
        from moemla.kernels.routing import route as in_one_pass

        weighing = (c.scores == "softmax", c.bias_in_gate, c.renormalise, float(c.routed_scale))
        programs["kernel"] = lambda: in_one_pass(logits, bias, None, c.top_k, *weighing)
    gate, index, scores, counts = programs["plain"]()
    forward = _bytes(logits, bias, gate, index, scores, counts)
    return _Part(programs, [logits], Work(0, forward), Work(0, forward + _bytes(gate, index, scores, logits)))


def _experts(c: ModelConfig, n: int, machine: Limits, factory: dict, usable: bool) -> _Part:
    layer = Experts(d_model=c.d_model, n_experts=c.n_experts, d_expert=c.d_expert, activation=c.activation, **factory)
    w_in, w_out = layer.w_in, layer.w_out
    x = torch.randn(n, c.d_model, **factory, requires_grad=True)
    index = torch.rand(n, c.n_experts, device=factory["device"]).topk(c.top_k).indices
    gate = torch.rand(n, c.top_k, **factory, requires_grad=True)
    programs: dict[str, Program] = {
        name: lambda name=name: (experts(x, w_in, w_out, index, gate, name, c.activation),)
        for name in ("grouped", "masked")
        if affordable(name, n, w_in, c.top_k, machine)
    }
    if usable:
        from moemla.kernels.experts import routed_experts

        programs["kernel"] = lambda: (routed_experts(x, w_in, w_out, index, gate, c.activation)[0],)
    each = c.d_model * (1 + width_in(1, c.activation))  # numbers of an expert for each unit of its width
    chosen = min(c.n_experts, n * c.top_k)
    flops = 2 * n * each * c.top_k * c.d_expert
    moved = (each * chosen * c.d_expert + 2 * n * c.d_model) * x.element_size()
    return _Part(programs, [x, w_in, w_out, gate], Work(flops, moved), Work(3 * flops, 3 * moved))


def _layer(c: ModelConfig, n: int, machine: Limits, factory: dict, usable: bool) -> _Part:
    """Router, routed and shared experts; the router reads its logits, all apart, from x: so all choose the same."""
    gating = dict(scores=c.scores, bias_in_gate=c.bias_in_gate, renormalise=c.renormalise, routed_scale=c.routed_scale)
    sizes = dict(d_model=c.d_model, n_experts=c.n_experts, top_k=c.top_k, d_expert=c.d_expert, n_shared=c.n_shared)
    layer = MixtureOfExperts(**sizes, **gating, activation=c.activation, **factory)
    with torch.no_grad():
        torch.nn.init.eye_(layer.router.weight)
        x = torch.randn(1, n, c.d_model, **factory)
        x[..., : c.n_experts] = 8 * torch.rand(1, n, c.n_experts, device=x.device).argsort(-1) / c.n_experts - 4

    def through(backend: str) -> Program:
        def run():
            layer.experts.backend = backend
            return (layer(x),)

        return run

    names = [name for name in ("grouped", "masked") if affordable(name, n, layer.experts.w_in, c.top_k, machine)]
    programs = {name: _plainly(through(name)) for name in names}
    if usable:
        programs["kernel"] = with_kernels(through("triton"))
    routed = _experts(c, n, machine, factory, False).forward
    weights = [layer.router.weight, *(layer.shared.parameters() if layer.shared else ())]  # every token passes them
    flops = routed.flops + sum(2 * n * weight.numel() for weight in weights)
    moved = routed.moved + _bytes(*weights)
    return _Part(programs, [x.requires_grad_(), *layer.parameters()], Work(flops, moved), Work(3 * flops, 3 * moved))


def _dense(c: ModelConfig, n: int, machine: Limits, factory: dict, usable: bool) -> _Part:
    layer = FeedForward(d_model=c.d_model, d_ff=c.d_ff, activation=c.activation, bias=c.bias, **factory)
    x = torch.randn(1, n, c.d_model, **factory, requires_grad=True)
    flops = 2 * n * (layer.up.weight.numel() + layer.down.weight.numel())
    moved = _bytes(x, x, *layer.parameters())
    leaves = [x, *layer.parameters()]
    return _Part({"plain": lambda: (layer(x),)}, leaves, Work(flops, moved), Work(3 * flops, 3 * moved))


# ---- decode


def _latent(c: ModelConfig, length: int, batch: int, factory: dict, usable: bool) -> tuple[dict[str, Program], Work]:
    """The paper's cache: keys are rebuilt from K latents and turned, V latents are summed."""
    heads, width, r = c.n_heads, c.d_head, c.latent_dim
    turn = RotaryEmbedding(width, length, layout=c.rope_layout, **factory)
    q, k, v = (torch.randn(batch, *shape, **factory) for shape in ((heads, width), (length, r), (length, r)))
    weight = torch.randn(heads * width, r, **factory) * r**-0.5
    bias = torch.randn(heads * width, **factory) if c.bias else None

    def plain(rows: int = batch):
        keys = turn(split_heads(F.linear(k[:rows], weight, bias), heads))
        return (attend_shared(q[:rows, :, None], keys, v[:rows])[:, :, 0],)

    def kernel():
        from moemla.kernels.decode import latent_decode

        interleaved = c.rope_layout == "interleaved"
        return (latent_decode(q, k, v, weight, bias, turn.cos, turn.sin, None, interleaved, width**-0.5),)

    flops = 2 * batch * length * heads * ((r + 1) * width + r)
    moved = _bytes(q, k, v, weight, bias, turn.cos, turn.sin) + batch * heads * r * q.element_size()
    return _decodes("latent", plain, kernel if usable else None, batch), Work(flops, moved)


def _joint(c: ModelConfig, length: int, batch: int, factory: dict, usable: bool) -> tuple[dict[str, Program], Work]:
    """The joint latent: its rows are the keys of all heads, their first R numbers the values."""
    heads, r, width, scale = c.n_heads, c.latent_dim, c.latent_dim + c.d_rope, (c.d_nope + c.d_rope) ** -0.5
    q, joint = (torch.randn(batch, *shape, **factory) for shape in ((heads, width), (length, width)))

    def plain(rows: int = batch):
        some = joint[:rows, None]
        return (attend_shared(q[:rows, :, None], some, some[:, 0], None, scale)[:, :, 0, :r],)

    def kernel():
        from moemla.kernels.decode import joint_decode

        return (joint_decode(q, joint, None, r, scale),)

    moved = _bytes(q, joint) + batch * heads * r * q.element_size()
    return _decodes("joint", plain, kernel if usable else None, batch), Work(
        2 * batch * length * heads * (r + width), moved
    )


def _decodes(name: str, plain: Callable[..., tuple[Tensor]], kernel: Program | None, batch: int) -> dict[str, Program]:
    """The programs to be timed; where the plain one takes too much, its first row still says what is right."""
    with torch.no_grad(), LiveBytes() as live:
        (first,) = _plainly(lambda: plain(1))()
    programs = {"plain": _plainly(plain)} if batch * live.peak <= MOST_BYTES else {}
    if kernel is not None:
        programs["kernel"] = kernel
        _require_equal(f"{name} decode: kernel", (kernel()[0][:1],), (first,))
    return {name: _without_gradients(program) for name, program in programs.items()}
