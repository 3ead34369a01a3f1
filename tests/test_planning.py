"""Plans: the same counts as elsewhere, times by hand, and a change that is the smallest one that fits."""

from dataclasses import replace
from typing import get_args

import pytest

from moemla import complexity
from moemla.config import SIZES, VARIANTS, ModelConfig
from moemla.footprint import footprint
from moemla.planning import CARDS, GB, ROOM, Card, Job, plan


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_complexity(variant):
    for size in SIZES:
        config = ModelConfig.preset(size, variant)
        answer, counted = plan(config), complexity.parameters(config)
        assert answer.parameters == dict(total=counted.total, active=counted.active, embedding=counted.embedding)
        assert answer.flops_per_token == complexity.training_flops_per_token(config, seq_len=512)
        assert answer.flops == answer.flops_per_token * 50_000 * 128 * 512
        assert answer.peak == sum(answer.memory.values()) == footprint(config, Job().step).total


def test_the_defaults_are_the_papers_recipe():
    job = Job()
    assert (job.batch_size, job.seq_len, job.steps) == (128, 512, 50_000)
    assert (job.optimizer, job.precision, job.gpus, job.gpu) == ("adamw", "fp16", 8, "a100-40g")
    assert job.tokens == 3_276_800_000 and job.step.rows == 16
    assert set(get_args(Job.__annotations__["gpu"])) == {*CARDS, "cpu"}


def test_hours_and_cost_by_hand():
    config = ModelConfig.preset("XL", "mha")
    answer = plan(config, Job(gpus=4, mfu=0.25, price=3.0, precision="bf16"))
    seconds = answer.flops / (4 * 0.25 * 312e12)
    assert answer.hours == pytest.approx(seconds / 3600)
    assert answer.tokens_per_second == pytest.approx(3_276_800_000 / seconds)
    assert answer.gpu_hours == pytest.approx(4 * answer.hours) and answer.cost == pytest.approx(12 * answer.hours)
    assert plan(config, Job(gpus=4)).cost is None
    wide = plan(config, Job(gpus=4, mfu=0.25, precision="float32"))
    assert wide.hours / answer.hours == pytest.approx(312 / 19.5)  # no TF32 unless somebody asks torch for it


def test_what_is_run_beyond_what_routing_asks_for():
    dense, experts = ModelConfig.preset("M", "mha"), ModelConfig.preset("M", "moe-mla-rope")
    assert plan(dense).computed == 1.0 and plan(dense).backend is None
    head = 6 * 50_257 * 512
    again = plan(dense, Job(recompute=True))
    assert again.computed == pytest.approx((4 / 3 * (again.flops_per_token - head) + head) / again.flops_per_token)
    masked = plan(experts)
    idle = 9 * 6 * (62 - 6) * 2 * 512 * 32  # layers, three products of two FLOPs, experts, their two matrices
    assert masked.backend == "masked" and masked.computed == pytest.approx(1 + idle / masked.flops_per_token)
    grouped = plan(ModelConfig.preset("M", "moe-mla-rope", backend="grouped"))
    assert grouped.computed == 1.0 and grouped.hours == masked.hours
    assert plan(ModelConfig.preset("M", "moe-mla-rope", matched="literal")).backend == "grouped"  # wide experts


def with_room(monkeypatch, room: float) -> None:
    monkeypatch.setitem(CARDS, "a100-40g", Card(room / ROOM + 1, 312e12, 19.5e12))


def test_the_smallest_change_that_fits_is_named(monkeypatch):
    """Micro-batches as far as they go, then recomputation too, then shares of everything too."""
    config, job = ModelConfig.preset("L", "mha"), Job(batch_size=1024)

    def least(**changes) -> int:
        return footprint(config, replace(job, **changes).step).total

    assert plan(config, job).change is None and plan(config, job).fits
    with_room(monkeypatch, least(micro_batches=4))
    answer = plan(config, job)
    assert not answer.fits and answer.room < answer.peak
    assert answer.change == f"--micro-batches 4 brings it to {least(micro_batches=4) / GB:.2f} GB"
    assert plan(config, replace(job, micro_batches=4)).fits and not plan(config, replace(job, micro_batches=2)).fits

    with_room(monkeypatch, least(micro_batches=64, recompute=True))
    assert least(micro_batches=128) > plan(config, job).room
    assert plan(config, job).change.startswith("--micro-batches 64 --recompute brings it to")
    assert plan(config, replace(job, recompute=True, micro_batches=64)).fits
    assert not plan(config, replace(job, recompute=True, micro_batches=32)).fits

    with_room(monkeypatch, least(micro_batches=128, recompute=True) - 10)
    assert "--recompute --parallel fsdp brings it to" in plan(config, job).change

    with_room(monkeypatch, 0.1 * GB)
    assert plan(config, job).change.startswith("nothing here makes it fit (least, --micro-batches 128 --recompute")
    alone = Job(gpus=1, batch_size=1)
    assert plan(config, alone).change.startswith("nothing here makes it fit (least, ")
    assert "fsdp" not in plan(config, alone).change


def test_a_change_keeps_what_is_asked_for(monkeypatch):
    config, job = ModelConfig.preset("L", "mha"), Job(micro_batches=2, recompute=True)
    with_room(monkeypatch, footprint(config, replace(job, micro_batches=8).step).total)
    assert plan(config, job).change.startswith("--micro-batches 8 brings it to")


def test_memory_falls_with_every_change():
    config = ModelConfig.preset("XL", "moe-mla-rope", dropout=0.1)
    peaks = [
        plan(config, Job(**changes)).peak
        for changes in (
            {},
            dict(micro_batches=4),
            dict(micro_batches=4, recompute=True),
            dict(micro_batches=4, recompute=True, parallel="fsdp"),
        )
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 4


def test_a_cpu_is_measured(monkeypatch):
    monkeypatch.setattr("moemla.measuring.matmul_rate", lambda device, dtype: 2e11)
    answer = plan(ModelConfig.preset("tiny", vocab_size=4096), Job(gpu="cpu", gpus=1, precision="float32"))
    assert answer.peak_flops == 2e11 and answer.room > GB / 2
    assert answer.backend == "grouped"  # so many tokens at once are sorted on a CPU


@pytest.mark.parametrize("matched", ["parameters", "active", "literal"])
def test_what_fits_the_papers_cards(matched):
    """All but the largest with experts as wide as the model, whose gradients micro-batches would only keep longer."""
    for size in ("M", "XL"):
        for variant in VARIANTS:
            answer = plan(ModelConfig.preset(size, variant, matched=matched, dropout=0.1))
            literal = matched == "literal" and size == "XL" and variant.startswith("moe")
            assert answer.fits != literal
            assert not literal or answer.change.startswith("--recompute brings it to")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(steps=0), "steps=0: must be a whole number of at least 1"),
        (dict(gpus=7), "batch_size=128: must be a multiple of gpus x micro_batches = 7"),
        (dict(micro_batches=32), "batch_size=128: must be a multiple of gpus x micro_batches = 256"),
        (dict(gpu="cpu"), "gpus=8: must be 1 for gpu='cpu', this machine"),
        (dict(mfu=0.0), "mfu=0.0: must be above 0 and at most 1"),
        (dict(mfu=1.5), "mfu=1.5: must be above 0 and at most 1"),
        (dict(price=-1.0), "price=-1.0: must be 0 or more, for one GPU and one hour"),
        (dict(price=float("nan")), "price=nan: must be 0 or more, for one GPU and one hour"),
        (dict(expert_parallel=3), "expert_parallel=3: must divide gpus=8"),
    ],
    ids=str,
)
def test_a_job_that_cannot_be_is_refused(wrong, said):
    with pytest.raises(ValueError) as refused:
        Job(**wrong)
    assert str(refused.value) == said


def test_a_model_that_cannot_do_the_job_is_refused():
    with pytest.raises(ValueError, match="seq_len=1024: must be at most max_seq_len=512"):
        plan(ModelConfig.preset("M"), Job(seq_len=1024))
    with pytest.raises(ValueError, match="expert_parallel=8: the model has no experts"):
        plan(ModelConfig.preset("M", "mha"), Job(expert_parallel=8))
    for experts in (4, 9):  # nine are two each on four GPUs, one on the fifth, none on the last three
        with pytest.raises(
            ValueError, match=f"expert_parallel=8: {experts} experts leave a GPU without any; take fewer"
        ):
            plan(ModelConfig.preset("M", n_experts=experts, top_k=2), Job(expert_parallel=8))
    assert plan(ModelConfig.preset("M", n_experts=15, top_k=2), Job(expert_parallel=8)).fits
