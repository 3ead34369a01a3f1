"""What a training holds, takes and costs, before it runs: memory of a GPU, hours and money, by arithmetic.

Parameters and FLOPs are those of `complexity`, memory is `footprint`'s. How much of a card's peak a training reaches is
an assumption, `mfu`, and is printed as one. Nothing here was measured on the card. Built in chapter 13.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from moemla import complexity
from moemla.config import ModelConfig, require, require_count
from moemla.footprint import Footprint, Step, back_end, footprint

GB = 10**9
ROOM = 0.9  # of a card's memory, an assumption: the rest is for CUDA's context, NCCL's buffers and the allocator's gaps


@dataclass(frozen=True)
class Card:
    """A device: bytes of memory, and FLOP/s of matrix products in 16 bits and in float32."""

    memory: float
    half: float
    full: float


# Without sparsity, which doubles the printed rates; float32 without TF32, which torch leaves off.
CARDS = {
    # NVIDIA A100 Tensor Core GPU, data sheet 1758950 (June 2021): 312 TFLOPS in BF16 and FP16, 19.5 in FP32.
    "a100-40g": Card(40 * GB, 312e12, 19.5e12),
    "a100-80g": Card(80 * GB, 312e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU, data sheet, H100 SXM: 1,979 TFLOPS in BF16 and FP16 with sparsity, 67 in FP32.
    "h100": Card(80 * GB, 989.5e12, 67e12),
    # NVIDIA H200 Tensor Core GPU, data sheet, H200 SXM: the same rates, 141 GB.
    "h200": Card(141 * GB, 989.5e12, 67e12),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """How to train, on what, and at what price; the defaults are the paper's (section 3.3).

    Of "cpu", this machine, memory and rate are measured. ValueError for settings that do not fit each other.
    """

    batch_size: int = 128  # sequences a step, on all GPUs together
    seq_len: int = 512  # tokens a sequence
    steps: int = 50_000
    precision: Literal["float32", "bf16", "fp16"] = "fp16"  # 16 bits: autocast, weights stay float32
    optimizer: Literal["adamw", "muon"] = "adamw"
    micro_batches: int = 1  # parts of a GPU's share of a step, one after the other
    recompute: bool = False  # blocks keep their input alone and run forward again in the backward
    gpus: int = 8
    gpu: Literal["a100-40g", "a100-80g", "h100", "h200", "cpu"] = "a100-40g"
    parallel: Literal["ddp", "fsdp"] = "ddp"  # fsdp: weights, gradients and optimizer in shares
    expert_parallel: int = 1  # GPUs that share the routed experts
    mfu: float = 0.3  # model FLOPs over the card's peak: an assumption
    price: float | None = None  # of one GPU for one hour

    def __post_init__(self):
        for name in ("batch_size", "seq_len", "steps", "micro_batches", "gpus"):
            require_count(name, getattr(self, name))
        require(self.gpu in (*CARDS, "cpu"), "gpu", self.gpu, f"choose one of {', '.join(CARDS)}, cpu")
        require(self.gpu != "cpu" or self.gpus == 1, "gpus", self.gpus, "must be 1 for gpu='cpu', this machine")
        parts = self.gpus * self.micro_batches
        right = f"must be a multiple of gpus x micro_batches = {parts}"
        require(self.batch_size % parts == 0, "batch_size", self.batch_size, right)
        require(0 < self.mfu <= 1, "mfu", self.mfu, "must be above 0 and at most 1")
        priced = self.price is None or 0 <= self.price < math.inf
        require(priced, "price", self.price, "must be 0 or more, for one GPU and one hour")
        self.step  # noqa: B018  (refuses what is wrong with the rest)

    @property
    def step(self) -> Step:
        """What one GPU does in a step."""
        names = ("seq_len", "micro_batches", "precision", "optimizer", "recompute", "gpus", "parallel")
        shared = {name: getattr(self, name) for name in (*names, "expert_parallel")}
        return Step(rows=self.batch_size // self.gpus // self.micro_batches, on_cpu=self.gpu == "cpu", **shared)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.steps * self.batch_size * self.seq_len


@dataclass(frozen=True)
class Plan:
    """The answer, in plain numbers: FLOPs, bytes, seconds' tokens, hours, and money if there is a price.

    `memory` is that of one GPU by part at the `moment` of a step at which most is held, `peak` its sum, `room` what a
    card has for it; `change` says what to set otherwise if it does not fit. `flops` are those of the model, as routing
    asks; `computed` is how many times as many the back end and recomputation run.
    """

    parameters: dict[str, int]
    flops_per_token: int
    flops: int
    backend: str | None
    computed: float
    moment: str
    memory: dict[str, int]
    peak: int
    room: int
    fits: bool
    change: str | None
    peak_flops: float
    tokens_per_second: float
    hours: float
    gpu_hours: float
    cost: float | None


def plan(config: ModelConfig, job: Job | None = None) -> Plan:
    """What training `config` as `job` says will hold, take and cost.

    ValueError for a job that the model cannot do: sequences past max_seq_len, experts over devices by another back end.
    """
    job = Job() if job is None else job
    right = f"must be at most max_seq_len={config.max_seq_len}"
    require(job.seq_len <= config.max_seq_len, "seq_len", job.seq_len, right)
    experts, ranks = (config.n_experts if config.ffn == "moe" else 1), job.expert_parallel
    right = f"{experts} experts leave a GPU without any; take fewer" if experts > 1 else "the model has no experts"
    require(-(-experts // ranks) * (ranks - 1) < experts, "expert_parallel", ranks, right)
    card, counted, held = _card(job), complexity.parameters(config), footprint(config, job.step)
    flops = complexity.training_flops_per_token(config, job.seq_len)
    rate = job.gpus * job.mfu * (card.half if job.step.narrow else card.full) / flops
    hours = job.tokens / rate / 3600
    room = int(ROOM * card.memory)
    fits = held.total <= room
    return Plan(
        parameters={name: getattr(counted, name) for name in ("total", "active", "embedding")},
        flops_per_token=flops,
        flops=flops * job.tokens,
        backend=back_end(config, job.step),
        computed=_computed(config, job) / flops,
        moment=held.moment,
        memory=held.parts,
        peak=held.total,
        room=room,
        fits=fits,
        change=None if fits else _change(config, job, room),
        peak_flops=card.half if job.step.narrow else card.full,
        tokens_per_second=rate,
        hours=hours,
        gpu_hours=hours * job.gpus,
        cost=None if job.price is None else hours * job.gpus * job.price,
    )


def _card(job: Job) -> Card:
    """The card of a job; of "cpu" this machine's memory, and its rate as it is measured now."""
    if job.gpu != "cpu":
        return CARDS[job.gpu]

    from moemla.measuring import matmul_rate
    from moemla.precision import DTYPES

    rate = matmul_rate("cpu", DTYPES[job.precision])
    return Card(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rate, rate)


def _computed(config: ModelConfig, job: Job) -> int:
    """FLOPs of a token as they are run: `masked` puts it through every expert, recomputation through blocks twice."""
    if back_end(config, job.step) == "masked":
        config = replace(config, top_k=config.n_experts)
    head = 2 * config.vocab_size * config.d_model
    blocks = complexity.flops_per_token(config, job.seq_len) - head
    return (4 if job.recompute else 3) * blocks + 3 * head


def _change(config: ModelConfig, job: Job, room: int) -> str:
    """The smallest change that fits: micro-batches, then recomputation too, then FSDP too."""
    least: tuple[Job, Footprint] | None = None
    for other in _others(job):
        held = footprint(config, other.step)
        if held.total <= room:
            return f"{_options(job, other)} brings it to {held.total / GB:.2f} GB"
        if least is None or held.total < least[1].total:
            least = other, held
    other, held = least
    said = f"{_options(job, other) or 'the settings as they are'}: {held.total / GB:.2f} GB"
    return f"nothing here makes it fit (least, {said}); take a larger card, more GPUs or a smaller model"


def _others(job: Job) -> Iterator[Job]:
    share = job.batch_size // job.gpus
    parts = [parts for parts in range(job.micro_batches, share + 1) if share % parts == 0]
    wider = [(job.recompute, job.parallel), (True, job.parallel), (True, "fsdp" if job.gpus > 1 else job.parallel)]
    for recompute, parallel in dict.fromkeys(wider):
        for micro in parts:
            yield replace(job, micro_batches=micro, recompute=recompute, parallel=parallel)


def _options(job: Job, other: Job) -> str:
    """What differs, as the command's options."""
    words = [f"--micro-batches {other.micro_batches}"] if other.micro_batches != job.micro_batches else []
    words += ["--recompute"] if other.recompute != job.recompute else []
    return " ".join([*words, *(["--parallel fsdp"] if other.parallel != job.parallel else [])])
