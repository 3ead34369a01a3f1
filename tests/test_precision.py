"""float16 with a loss scale: torch's own rule, one decision for a step, and nothing moves in a step that overflows."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist

from moemla import precision, training
from moemla.balancing import Balancer
from moemla.checkpoint import checkpoints, load
from moemla.config import TrainConfig
from moemla.distributed import World
from moemla.errors import Diverged
from moemla.model import LanguageModel
from moemla.optim import make_optimizers
from moemla.parallel import gradients, wrap
from moemla.precision import LossScaler, autocast
from moemla.runs import read_metrics
from moemla.shards import Batches, TokenShard
from moemla.training import train, train_step
from tests.runs import Stop, code_of, fork, micro, quick, same_weights, stop_after, what_was_learnt


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Half a second less for each run."""
    monkeypatch.setattr(training, "matmul_rate", lambda *_: 1e10)


@pytest.fixture
def quick_growth(monkeypatch):
    """The scale doubles after three good steps."""
    monkeypatch.setattr(precision, "GROW_AFTER", 3)


def fresh(**changes) -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(micro(**changes)).train()


def overflows(monkeypatch, *steps: int):
    """In these steps of a run, counted from 1, a gradient is infinite."""
    real, calls = training.gradient_norm, [0]

    def overflown(model, world):
        calls[0] += 1
        if calls[0] in steps:
            gradients(model)[-1].fill_(torch.inf)
        return real(model, world)

    monkeypatch.setattr(training, "gradient_norm", overflown)


def test_autocast_is_by_name():
    a = torch.ones(2, 2)
    for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast("cpu", name):
            assert (a @ a).dtype == dtype


def test_the_first_scale_and_the_growth_are_those_of_torch():
    torchs = torch.amp.GradScaler("cpu")
    assert (torchs.get_scale(), torchs.get_growth_interval()) == (LossScaler().scale, precision.GROW_AFTER)
    assert (torchs.get_growth_factor(), torchs.get_backoff_factor()) == (2.0, 0.5)


def test_decisions_scales_and_weights_are_those_of_gradscaler(data, monkeypatch, quick_growth):
    """Twenty steps, of which four overflow, two of them in a row."""
    bad = (1, 5, 6, 14)
    settings = TrainConfig(batch_size=4, seq_len=16, precision="fp16", clip=0.5, optimizer="adamw")
    batches = Batches(TokenShard(data / "train.bin"), 4, 16)
    ours, theirs = fresh(), fresh()
    (mine,), (other,) = (make_optimizers(model, "adamw", 1e-2) for model in (ours, theirs))
    balancers = Balancer(ours), Balancer(theirs)
    scaler, torchs = LossScaler(), torch.amp.GradScaler("cpu", growth_interval=3)
    overflows(monkeypatch, *bad)
    for step in range(1, 21):
        loss, _ = train_step(ours, [mine], balancers[0], batches.batch(step), 1e-2, settings, scaler)
        tokens, targets = batches.batch(step)
        with torch.autocast("cpu", torch.float16):
            expected = theirs(tokens, targets)
        torchs.scale(expected).backward()
        if step in bad:
            list(theirs.parameters())[-1].grad.fill_(torch.inf)
        torchs.unscale_(other)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.clip)
        torchs.step(other)
        before = torchs.get_scale()
        torchs.update()
        other.zero_grad()
        if torchs.get_scale() < before:  # torch's sign of an overflow
            balancers[1].routers[0].forget(), balancers[1].routers[1].forget()
        else:
            balancers[1].step()
        assert (torchs.get_scale() < before) == (step in bad) and torch.equal(loss, expected.detach())
        assert (scaler.scale, scaler.skipped) == (torchs.get_scale(), sum(one <= step for one in bad))
        assert same_weights(ours, theirs), step
    assert scaler.scale == 2.0**17


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_a_step_that_overflows_moves_nothing(data, monkeypatch, rule):
    """Weights, what the optimizers hold, bias and loads; the next step is the one that would have been without it."""
    settings = TrainConfig(batch_size=4, seq_len=16, precision="fp16")
    batches = Batches(TokenShard(data / "train.bin"), 4, 16)
    models = fresh(), fresh()
    overflows(monkeypatch, 1)
    for model, steps in zip(models, ((7, 3), (3,)), strict=True):
        optimizers, balancer = make_optimizers(model, "muon", 1e-2), Balancer(model, rule)
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        scaler = LossScaler() if len(steps) == 2 else LossScaler(scale=2.0**15)
        for step in steps:
            _, norm = train_step(model, optimizers, balancer, batches.batch(step), 1e-2, settings, scaler)
            assert norm.isfinite() == (step == 3)
            if step == 7:
                assert all(torch.equal(tensor, start[name]) for name, tensor in model.state_dict().items())
                assert not any(optimizer.state for optimizer in optimizers) and balancer.counts is None
                assert all(router.load.sum() == 0 for router in balancer.routers)
                assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.stack(balancer.counts).sum() == 2 * 4 * 16 * 2  # layers, rows, tokens, k: of one step
        assert scaler.scale == 2.0**15 and scaler.good == 1
    assert same_weights(*models)


def test_small_gradients_would_vanish_without_a_scale():
    """1e-9 is zero in float16, and 65,536 times that is not."""
    settings = TrainConfig(batch_size=1, seq_len=4, precision="fp16", clip=1e9)

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 4))

        def forward(self, tokens, targets):
            return 1e-9 * (tokens.float() @ self.weight).float().sum()

    norms = []
    for scaler in (None, LossScaler()):
        model = Small()
        batch = torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)
        norms.append(train_step(model, [], Balancer(model), batch, 0.0, settings, scaler)[1])
    assert norms[0] == 0 and norms[1] == pytest.approx(4e-9, rel=1e-2)


def test_it_learns_and_says_what_it_left_out(tmp_path, data, monkeypatch):
    overflows(monkeypatch, 2, 30)
    model = train(micro(), quick(30, precision="fp16"), data, tmp_path / "run", validate_every=30)
    rows = read_metrics(tmp_path / "run")
    assert model.embedding.weight.dtype == torch.float32
    assert rows[-1].loss < 0.7 * rows[0].loss
    assert [row.skipped for row in rows] == [0, *[1] * 28, 2]
    assert [row.loss_scale for row in rows] == [2.0**16, *[2.0**15] * 28, 2.0**14]
    assert [row.step for row in rows if row.grad_norm is None] == [2, 30] and rows[1].load_window == 1
    train(micro(), quick(3), data, tmp_path / "plain")
    assert {(row.skipped, row.loss_scale) for row in read_metrics(tmp_path / "plain")} == {(None, None)}


def test_resume_is_exact(tmp_path, data, monkeypatch, quick_growth):
    """Scale, good steps and skipped ones are in the checkpoint: it is written between two doublings."""
    config, settings = micro(dropout=0.1), quick(12, precision="fp16", log_every=4)
    for name, bad in (("straight", (3, 9)), ("cut", (3, 9)), ("cut", (9 - 5,))):
        with monkeypatch.context() as patched:
            overflows(patched, *bad)
            resume = (tmp_path / name).exists()
            watch = stop_after(8) if name == "cut" and not resume else None
            try:
                model = train(config, settings, data, tmp_path / name, resume, checkpoint_every=5, on_progress=watch)
            except Stop:
                state = json.loads((checkpoints(tmp_path / "cut")[-1] / "state.json").read_text())
                assert state["step"] == 5 and state["scaler"] == asdict(LossScaler(2.0**15, good=2, skipped=1))
    assert same_weights(model, load(tmp_path / "straight")[0])
    assert what_was_learnt(tmp_path / "cut") == what_was_learnt(tmp_path / "straight")
    files = [(checkpoints(tmp_path / name)[-1] / "optimizer.safetensors").read_bytes() for name in ("cut", "straight")]
    assert files[0] == files[1]
    assert [row.loss_scale for row in read_metrics(tmp_path / "cut")] == [2.0**15, 2.0**16, 2.0**16]


def test_a_scale_below_one_is_a_divergence(tmp_path, data, monkeypatch):
    """Seventeen overflows in a row from 65,536; the state that is kept is that of before the last of them."""
    overflows(monkeypatch, *range(3, 40))
    with pytest.raises(Diverged, match=r"^step 19 .*overflow float16 without any loss scale.*after step 18,") as error:
        train(micro(), quick(30, precision="fp16"), data, tmp_path / "run")
    assert "\n" not in str(error.value)
    state = json.loads((checkpoints(tmp_path / "run")[-1] / "state.json").read_text())
    assert state["scaler"] == asdict(LossScaler(1.0, good=0, skipped=16))


def test_a_loss_that_is_no_number_is_no_overflow(tmp_path, data, monkeypatch):
    """No scale would mend it."""
    real = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda self, *args, **more: real(self, *args, **more) * torch.nan)
    with pytest.raises(Diverged, match="the loss is nan"):
        train(micro(), quick(3, precision="fp16"), data, tmp_path / "run")


def of_two_ranks(rank: int, folder, data) -> None:
    """What train_step does on each of two ranks: a gradient of the second one overflows, then its loss is no number."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    world, model = World.current(), fresh()
    wrapped, optimizers, balancer = wrap(model, world), make_optimizers(model, "muon", 1e-2), Balancer(model)
    settings, scaler = TrainConfig(batch_size=4, seq_len=16, precision="fp16"), LossScaler()
    batches = Batches(TokenShard(data / "train.bin"), 4, 16, world=world)
    said, bad = [], world.rank == 1
    for step, (factor, grad) in enumerate([(1.0, 1.0), (1.0, math.inf), (1.0, 1.0), (math.nan, 1.0)]):
        hooks = [model.norm.bias.register_hook(lambda g, grad=grad: g * grad if bad else g)]
        hooks += [model.register_forward_hook(lambda m, a, out, factor=factor: out * factor if bad else out)]
        try:
            loss, norm = train_step(wrapped, optimizers, balancer, batches.batch(step), 1e-2, settings, scaler, world)
            said.append((loss.item(), norm.item(), scaler.scale))
        except Diverged as error:
            said.append(str(error))
        for hook in hooks:
            hook.remove()
    torch.save((said, model.state_dict()), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_decide_alike(tmp_path, data):
    children = [fork(lambda rank=rank: of_two_ranks(rank, tmp_path, data)) for rank in range(2)]
    assert [code_of(child) for child in children] == [0, 0]
    (said, weights), (other, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert said == other and all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    assert [scale for *_, scale in said[:3]] == [2.0**16, 2.0**15, 2.0**15]
    assert said[1][1] == math.inf and said[3].startswith("the loss is nan, ")
