"""What a step is predicted to hold, against the bytes that live in one; shares over devices as arithmetic."""

import os
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moemla import complexity, footprint as footprint_module, losses
from moemla.balancing import Balancer
from moemla.config import VARIANTS, ModelConfig, TrainConfig
from moemla.footprint import Step, _blocks, _scores_kept, back_end, footprint, kept
from moemla.measuring import LiveBytes
from moemla.model import LanguageModel
from moemla.optim import make_optimizers
from moemla.training import train_step
from tools.book import ROOT

SMALL = dict(d_model=128, n_heads=4, vocab_size=1024, n_layers=3)
MODERN = dict(norm="rmsnorm", activation="swiglu", bias=False)
CASES = {  # variant, changes of the model, of the step
    "mha dense": ("mha", {}, {}),
    "gqa dense": ("gqa-rope", {}, {}),
    "mla-rope masked": ("moe-mla-rope", dict(backend="masked"), {}),
    "mla-rope grouped": ("moe-mla-rope", dict(backend="grouped"), {}),
    "wide experts, grouped": ("moe-mla", dict(backend="grouped", n_experts=16, d_expert=64), {}),
    "decoupled modern masked": ("moe-mla-decoupled", dict(backend="masked", **MODERN), {}),
    "decoupled, wide values": ("mla-decoupled", dict(d_nope=16, d_rope=8, d_value=32), {}),
    "one dense layer, no shared": ("moe-mha", dict(n_dense_layers=1, n_shared=0), {}),
    "dropout": ("mha", dict(dropout=0.1), {}),
    "dropout, experts": ("moe-mla-rope", dict(dropout=0.1), {}),
    "dropout, long rows": ("mha", dict(dropout=0.1, d_ff=8, vocab_size=64), dict(rows=1, seq_len=256)),
    "recompute": ("mha-rope", {}, dict(recompute=True)),
    "recompute, grouped": ("moe-mla-rope", dict(backend="grouped"), dict(recompute=True)),
    "bf16 dense": ("mha", {}, dict(precision="bf16")),
    "bf16 masked": ("moe-mla-rope", dict(backend="masked"), dict(precision="bf16")),
    "bf16 grouped modern": ("moe-mla-decoupled", dict(backend="grouped", **MODERN), dict(precision="bf16")),
    "bf16 recompute, masked": ("moe-mla-rope", dict(backend="masked"), dict(precision="bf16", recompute=True)),
    "bf16 dropout": ("gqa-rope", dict(dropout=0.1), dict(precision="bf16")),
    "micro-batches": ("moe-mla-rope", {}, dict(micro_batches=4)),
    "learnable frequencies": ("mha-rope", dict(rope_learnable=True), {}),
    "large vocabulary": ("mha", dict(vocab_size=12_000, n_layers=1), {}),
    "large vocabulary, bf16": ("mha", dict(vocab_size=12_000, n_layers=1), dict(precision="bf16")),
    "untied, few tokens": ("mha", dict(tie_embeddings=False, vocab_size=8000), dict(rows=1, seq_len=32)),
    "wide, few tokens": ("mha", dict(d_model=256, vocab_size=2000), dict(rows=2, seq_len=32, micro_batches=2)),
    "tied, few tokens": ("mha", dict(vocab_size=8000), dict(rows=1, seq_len=32)),
    "muon, few tokens": ("moe-mla-rope", {}, dict(optimizer="muon", rows=1, seq_len=32)),
}


def predicted(config: ModelConfig, **step):
    return footprint(config, Step(**dict(rows=8, seq_len=128, on_cpu=True) | step))


def measured(config: ModelConfig, wrap=None, **step) -> int:
    """The most bytes that live at once in the second step of a training, weights and optimizer with them."""
    step = Step(**dict(rows=8, seq_len=128) | step)
    settings = TrainConfig(
        batch_size=step.rows * step.micro_batches,
        seq_len=step.seq_len,
        micro_batches=step.micro_batches,
        precision=step.precision,
    )
    with LiveBytes() as live:
        model = LanguageModel(config).train()
        for block in model.blocks if step.recompute else ():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        optimizers, balancer = make_optimizers(model, step.optimizer), Balancer(model)
        trained = model if wrap is None else wrap(model)
        for _ in range(2):  # the first one makes the optimizer's state
            live.restart()
            tokens = torch.randint(config.vocab_size, (settings.batch_size, step.seq_len + 1))
            train_step(trained, optimizers, balancer, (tokens[:, :-1], tokens[:, 1:]), 1e-3, settings)
    return live.peak


def error(name: str, said, bytes_: int) -> float:
    off = said.total / bytes_ - 1
    print(f"{name:28} predicted {said.total / 1e6:7.2f} MB, measured {bytes_ / 1e6:7.2f}, {off:+.2%}, {said.moment}")
    return off


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("name", CASES)
def test_a_step_holds_what_is_predicted(name):
    variant, changes, step = CASES[name]
    config = ModelConfig.preset("tiny", variant, **SMALL | changes)
    assert abs(error(name, predicted(config, **step), measured(config, **step))) < 0.03


def test_every_moment_is_somewhere_the_highest():
    cases = [
        (ModelConfig.preset("tiny", variant, **SMALL | changes), step) for variant, changes, step in CASES.values()
    ]
    assert {predicted(config, **step).moment for config, step in cases} == {
        "the loss",
        "the backward of the loss",
        "the backward of a feed-forward",
        "the backward of an attention",
        "the gradient of the token table",
        "the optimizer",
    }


def drawn(seed: int) -> tuple[ModelConfig, dict]:
    """Any model and step that the formula knows."""
    r = random.Random(seed)
    pick = r.choice
    changes = dict(vocab_size=pick((256, 1000, 9001)), n_layers=pick((1, 2, 5)), d_model=pick((64, 128, 192)))
    changes |= dict(n_heads=4, norm=pick(("layernorm", "rmsnorm")), activation=pick(("gelu", "swiglu")))
    changes |= dict(bias=pick((True, False)), tie_embeddings=pick((True, False)), dropout=pick((0.0, 0.1)))
    variant = pick(VARIANTS)
    if variant.startswith("moe"):
        changes |= dict(backend=pick(("masked", "grouped")), n_experts=pick((4, 16, 62)), n_shared=pick((0, 1, 2)))
        changes |= dict(d_expert=pick((8, 32, 128)), top_k=pick((1, 2, 4)), n_dense_layers=pick((0, 1)))
    if "mla" in variant:
        changes |= dict(latent_dim=pick((16, 64)))
    if "decoupled" in variant:
        changes |= dict(d_nope=pick((16, 32)), d_rope=pick((8, 32)), d_value=pick((16, 48)))
    step = dict(rows=pick((2, 8)), seq_len=pick((32, 128)), micro_batches=pick((1, 2)), recompute=pick((True, False)))
    step |= dict(precision=pick(("float32", "bf16")), optimizer=pick(("adamw", "muon")))
    return ModelConfig.preset("tiny", variant, **changes), step


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 100))])
def test_any_step_holds_what_is_predicted(seed):
    config, step = drawn(seed)
    assert abs(error(f"drawn {seed}", predicted(config, **step), measured(config, **step))) < 0.1


def test_blocks_of_logits_are_those_of_the_loss():
    for name in ("CHUNK", "CPU_CHUNK", "LINE"):
        assert getattr(footprint_module, name) == getattr(losses, name)


def test_a_block_by_hand():
    """Dense multi-head attention in float32: 16 N D numbers of 4 bytes, and statistics."""
    config = ModelConfig.preset("tiny", "mha", d_model=64, n_heads=4)
    n, d = 2 * 32, 64
    parts = kept(config, 0, Step(rows=2, seq_len=32))
    assert parts == {
        "residual": 4 * (2 * n * d + 2 * n * d + 4 * n),  # inputs of two norms, what they make, mean and 1/std
        "attention": 4 * (4 * n * d + 4 * n),  # q, k, v, output; a sum for each head
        "feedforward": 4 * (2 * 4 * n * d),  # before and after the activation
        "copies of weights": 0,
    }


@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_a_built_model(name):
    variant, changes, _ = CASES[name]
    config = ModelConfig.preset("tiny", variant, **SMALL | changes)
    model = LanguageModel(config)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    learnable = 0 if model.rope is None else sum(p.numel() for p in model.rope.parameters())  # in each block's list
    assert _blocks(config, Step(rows=1, seq_len=1)) == [numbers - learnable for numbers in blocks]
    loads = sum(router.load.nbytes for router in Balancer(model).routers)
    bytes_ = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) + loads
    assert footprint(config, Step(rows=1, seq_len=1)).parts["weights"] == bytes_


def test_ddp_keeps_a_second_copy_of_the_gradients():
    config = ModelConfig.preset("tiny", "mha", **SMALL)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        bytes_ = measured(config, DistributedDataParallel, rows=1)
    finally:
        dist.destroy_process_group()
    assert abs(error("ddp", predicted(config, rows=1, gpus=2), bytes_)) < 0.03
    assert predicted(config, rows=1, gpus=2).total - predicted(config, rows=1).total > 0.9 * 4 * (
        complexity.parameters(config).total
    )


def test_fsdp_divides_and_gathers():
    config = ModelConfig.preset("L", "mha")
    numbers, step = complexity.parameters(config).total, dict(rows=16, seq_len=512, precision="bf16", gpus=8)
    alone, shared = (footprint(config, Step(**step, parallel=parallel)) for parallel in ("ddp", "fsdp"))
    assert alone.parts["weights"] == 4 * numbers and shared.parts["weights"] == 4 * numbers // 8
    assert shared.parts["optimizer"] == alone.parts["optimizer"] // 8 == 8 * numbers // 8
    assert shared.parts["activations"] == alone.parts["activations"]
    block = _blocks(config, Step(rows=1, seq_len=1))[0]
    whole = numbers - config.n_layers * block + block  # tables, the last norm, and one block
    assert shared.parts["working"] - alone.parts["working"] == 4 * whole


def test_experts_over_devices_keep_their_share():
    config = ModelConfig.preset("M", "moe-mla-rope", matched="literal")
    counted, step = complexity.parameters(config), dict(rows=16, seq_len=512, precision="bf16", gpus=8)
    apart = footprint(config, Step(**step, expert_parallel=8)).parts
    here = counted.total - counted.routed + counted.routed * 8 // 62  # 62 experts: six devices have 8, two have 7
    assert apart["weights"] - 4 * here < 4 * config.max_seq_len * 3 * 64 + 10**5  # the rest is tables
    assert apart["optimizer"] == 8 * here
    rest = counted.total - counted.routed
    assert apart["gradients"] == 4 * rest  # at the loss there are none but DDP's buckets, which leave the experts out
    both = footprint(config, Step(**step, expert_parallel=8, parallel="fsdp")).parts
    assert both["optimizer"] == 8 * counted.total // 8  # everything is divided by eight once, not twice
    with pytest.raises(ValueError, match="backend='masked': experts over several devices need 'grouped'"):
        back_end(ModelConfig(backend="masked"), Step(**step, expert_parallel=2))


def test_a_gpu_has_kernels_that_a_cpu_lacks():
    """Dropout without scores, masks of a byte, RMSNorm in one pass; but no grouped heads in float32."""
    dropped = ModelConfig.preset("M", "mha", dropout=0.1)
    assert _scores_kept(dropped, Step(rows=1, seq_len=8, on_cpu=True)) and not _scores_kept(
        dropped, Step(rows=1, seq_len=8)
    )
    grouped = ModelConfig.preset("M", "gqa-rope")
    assert _scores_kept(grouped, Step(rows=1, seq_len=8))
    assert not _scores_kept(grouped, Step(rows=1, seq_len=8, precision="bf16"))
    normed = ModelConfig.preset("M", "mha", norm="rmsnorm")
    on = {where: kept(normed, 0, Step(rows=4, seq_len=64, on_cpu=where))["residual"] for where in (True, False)}
    assert on[True] - on[False] == 2 * 4 * 64 * 512 * 4


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(rows=0), "rows=0: must be a whole number of at least 1"),
        (dict(gpus=4, expert_parallel=3), "expert_parallel=3: must divide gpus=4"),
        (dict(precision="fp8"), "precision='fp8': choose one of float32, bf16, fp16"),
        (dict(parallel="tp"), "parallel='tp': choose one of ddp, fsdp"),
    ],
    ids=str,
)
def test_wrong_steps_are_refused(wrong, said):
    with pytest.raises(Exception) as refused:  # beartype's own complaint about a type comes first in tests
        Step(**dict(rows=1, seq_len=8) | wrong)
    assert str(refused.value) == said or type(refused.value).__name__ == "TypeCheckError"


def test_other_back_ends_are_refused():
    with pytest.raises(ValueError, match="backend='loop': memory is known for 'masked' and 'grouped'"):
        footprint(ModelConfig(backend="loop"), Step(rows=1, seq_len=8))


CHILD = """
import sys
from tests.test_footprint import ModelConfig, measured, predicted

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

small = ModelConfig.preset("tiny", "moe-mla-rope", n_layers=1)
measured(small, rows=1)  # libraries are loaded, buffers of threads made
config = ModelConfig.preset("tiny", "moe-mla-rope", d_model=256, n_heads=8, vocab_size=8000, n_layers=6)
open("/proc/self/clear_refs", "w").write("5")  # the highest so far is forgotten
before = status("VmRSS")
measured(config, rows=16, seq_len=256)
print(status("VmHWM") - before, predicted(config, rows=16, seq_len=256).total)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="only Linux tells the highest memory")
def test_a_process_grows_by_what_is_predicted():
    """The kernel's own count; blocks of 64 KiB and more are given back at once."""
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    grown, said = map(int, done.stdout.split())
    print(f"process grew by {grown / 1e6:.1f} MB, predicted {said / 1e6:.1f}, {said / grown - 1:+.2%}")
    assert abs(said / grown - 1) < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", ["mha", "moe-mla-rope"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_gpu_holds_what_is_predicted(variant, precision):
    config = ModelConfig.preset("M", variant, dropout=0.1)
    settings = TrainConfig(batch_size=16, seq_len=512, precision=precision)
    model = LanguageModel(config, device="cuda").train()
    optimizers, balancer = make_optimizers(model, "adamw"), Balancer(model)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        tokens = torch.randint(config.vocab_size, (16, 513))
        train_step(model, optimizers, balancer, (tokens[:, :-1], tokens[:, 1:]), 1e-3, settings)
    bytes_ = torch.cuda.max_memory_allocated()
    said = predicted(config, rows=16, seq_len=512, precision=precision, on_cpu=False)
    assert abs(error(f"GPU {variant} {precision}", said, bytes_)) < 0.1
