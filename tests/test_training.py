"""Training learns, goes on after any interruption as if nothing had happened, and leaves no traces in the caller."""

import math
import os
import re
import signal

import pytest
import torch

from moemla import training
from moemla.balancing import Balancer, switch_loss, z_loss
from moemla.checkpoint import checkpoints, load
from moemla.config import TrainConfig
from moemla.errors import DataError, Diverged, MoemlaError
from moemla.measuring import matmul_rate
from moemla.model import LanguageModel
from moemla.optim import make_optimizers
from moemla.parallel import gradients
from moemla.routing import record_routing
from moemla.runs import Progress, read_metrics
from moemla.shards import Batches, TokenShard, write_shard
from moemla.tokenizer import Tokenizer
from moemla.training import train, train_step
from tests.helpers import close, model_of, tokens_of
from tests.runs import (
    Stop,
    code_of,
    files_in,
    fork,
    micro,
    quick,
    same_weights,
    stop_after,
    wait_for,
    what_was_learnt,
)


@pytest.fixture(autouse=True)
def quick_measuring(monkeypatch):
    """The real measurement, of smaller matrices: what else it does to the run must still show."""
    monkeypatch.setattr(training, "matmul_rate", lambda device, dtype: matmul_rate(device, dtype, 64))


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("changes", [{}, dict(attention="mha", ffn="dense", positions="learned")], ids=["moe", "dense"])
def test_the_loss_falls(tmp_path, data, optimizer, changes):
    model = train(micro(**changes), quick(60, optimizer=optimizer, log_every=5), data, tmp_path / "run")
    losses = [row.loss for row in read_metrics(tmp_path / "run")]
    assert losses[0] == pytest.approx(math.log(300), rel=0.1)  # a fresh model knows nothing
    assert losses[-1] < 0.6 * losses[0]
    assert not model.training
    assert (read_metrics(tmp_path / "run")[-1].load_cv is None) == (changes != {})


def test_a_step_is_the_plain_one(data):
    """train_step against torch alone: mean loss, clipped gradients, AdamW at the given rate, the balancing rule."""
    settings = quick(10, optimizer="adamw", clip=0.05, weight_decay=0.1)
    batch = Batches(TokenShard(data / "train.bin"), 4, 16).batch(3)
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(LanguageModel(micro()).train())
    mine, plain = models
    loss, norm = train_step(
        mine, make_optimizers(mine, "adamw", lr=7.0, weight_decay=0.1), Balancer(mine), batch, 3e-3, settings
    )

    logits = plain(batch[0])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())
    expected.backward()
    grads = torch.cat([p.grad.flatten() for p in plain.parameters()])
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(norm, grads.norm())
    assert norm > settings.clip
    with torch.no_grad():
        for (name, p), q in zip(plain.named_parameters(), mine.parameters(), strict=True):
            grad = p.grad * settings.clip / grads.norm()
            decay = 0.1 if p.dim() >= 2 else 0
            moved = p * (1 - 3e-3 * decay) - 3e-3 * grad / (grad.abs() + 1e-8)  # Adam's first step
            unsure = grad.abs() < 1e-6  # where Adam's eps and rounding weigh in
            torch.testing.assert_close(q[~unsure], moved[~unsure], atol=1e-5, rtol=1e-4, msg=name)
    for block, other in zip(plain.blocks, mine.blocks, strict=True):
        counts = block.feedforward.router.last.counts.float()
        torch.testing.assert_close(other.feedforward.router.bias, 1e-3 * (counts.mean() - counts).sign())
    assert all(p.grad is None for p in mine.parameters())


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_micro_batches_change_nothing_but_rounding(data, parts, optimizer):
    batches = Batches(TokenShard(data / "train.bin"), 4, 16)
    results = []
    for micro_batches in (1, parts):
        torch.manual_seed(0)
        model = LanguageModel(micro(), dtype=torch.float64).train()
        settings = quick(4, micro_batches=micro_batches, optimizer=optimizer)
        optimizers, balancer = make_optimizers(model, optimizer, 1e-2), Balancer(model)
        losses = [train_step(model, optimizers, balancer, batches.batch(i), 1e-2, settings)[0] for i in range(4)]
        results.append((model.state_dict(), torch.stack(losses), torch.stack(balancer.counts)))
    (one, losses, counts), (many, other_losses, other_counts) = results
    assert torch.equal(counts, other_counts) and counts.sum() == 2 * 4 * 16 * 2  # layers, rows, tokens, k
    torch.testing.assert_close(losses, other_losses, rtol=1e-6, atol=0)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_on_a_gpu_it_learns_and_goes_on_where_it_stopped(tmp_path, data, precision):
    how, settings = dict(device="cuda", checkpoint_every=10), quick(30, precision=precision)
    model = train(micro(), settings, data, tmp_path / "run", **how)
    rows = read_metrics(tmp_path / "run")
    assert model.embedding.weight.is_cuda
    assert rows[-1].loss < rows[0].loss
    with pytest.raises(Stop):
        train(micro(), settings, data, tmp_path / "cut", on_progress=stop_after(20), **how)
    train(micro(), settings, data, tmp_path / "cut", resume=True, **how)
    assert [row.step for row in read_metrics(tmp_path / "cut")] == [row.step for row in rows]
    assert read_metrics(tmp_path / "cut")[-1].loss == pytest.approx(rows[-1].loss, rel=0.02)


def test_bf16_is_autocast_and_learns(tmp_path, data):
    model = train(micro(), quick(30, precision="bf16"), data, tmp_path / "run")
    assert model.embedding.weight.dtype == torch.float32
    rows = read_metrics(tmp_path / "run")
    assert rows[-1].loss < 0.7 * rows[0].loss
    plain = train(micro(), quick(30), data, tmp_path / "plain")
    assert not same_weights(model, plain)


def test_the_seed_decides(tmp_path, data):
    one, same, other = (
        train(micro(dropout=0.1), quick(3, seed=seed), data, tmp_path / name)
        for name, seed in (("one", 5), ("same", 5), ("other", 6))
    )
    assert same_weights(one, same) and not same_weights(one, other)


# --- going on -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("log_every", [1, 5], ids=["each-step", "between-two-rows"])
def test_resume_is_exact(tmp_path, data, optimizer, dropout, log_every):
    """Twelve steps at once, and six, a death at ten, and six again: weights, log and balancing bias bit by bit."""
    config = micro(dropout=dropout)
    settings = quick(12, optimizer=optimizer, log_every=log_every, load_window=8, balance_rate=0.01)
    straight = train(config, settings, data, tmp_path / "straight", checkpoint_every=6)
    with pytest.raises(Stop):
        train(config, settings, data, tmp_path / "cut", checkpoint_every=6, on_progress=stop_after(10))
    assert [path.name for path in checkpoints(tmp_path / "cut")] == ["step-00000006"]
    assert what_was_learnt(tmp_path / "cut")[-1]["step"] == 10
    torch.rand(17)  # another process is somewhere else with its random numbers
    seen = []
    resumed = train(config, settings, data, tmp_path / "cut", resume=True, checkpoint_every=6, on_progress=seen.append)

    assert same_weights(straight, resumed)
    assert what_was_learnt(tmp_path / "cut") == what_was_learnt(tmp_path / "straight")
    assert seen[0].step == (7 if log_every == 1 else 10)
    bias = torch.stack([block.feedforward.router.bias for block in resumed.blocks])
    assert bias.abs().max() > 0
    assert same_weights(load(tmp_path / "cut")[0], straight)
    seconds = [row.seconds for row in read_metrics(tmp_path / "cut")]
    assert seconds == sorted(seconds) and seconds[0] > 0
    same = [(run / "checkpoints/step-00000012/optimizer.safetensors").read_bytes()
            for run in (tmp_path / "straight", tmp_path / "cut")]  # fmt: skip
    assert same[0] == same[1]


def test_the_balancing_bias_is_saved_and_goes_on(tmp_path, data):
    settings = quick(8, balance_rate=0.01)
    with pytest.raises(Stop):
        train(micro(), settings, data, tmp_path / "run", checkpoint_every=4, on_progress=stop_after(5))
    saved, _ = load(tmp_path / "run")
    bias = torch.stack([block.feedforward.router.bias for block in saved.blocks])
    assert 0 < bias.abs().max() <= 0.04 + 1e-6
    shown = []
    after = train(micro(), settings, data, tmp_path / "run", resume=True, on_progress=shown.append)
    assert [row.step for row in shown] == [5, 6, 7, 8]
    moved = torch.stack([block.feedforward.router.bias for block in after.blocks]) - bias
    assert 0 < moved.abs().max() <= 0.04 + 1e-6  # from there, not from zero


def test_resume_without_a_checkpoint_starts(tmp_path, data):
    model = train(micro(), quick(2), data, tmp_path / "empty", resume=True)
    assert same_weights(model, train(micro(), quick(2), data, tmp_path / "plain"))
    with pytest.raises(Stop):  # died before the first checkpoint
        train(micro(), quick(2), data, tmp_path / "early", on_progress=stop_after(1))
    again = train(micro(), quick(2), data, tmp_path / "early", resume=True)
    assert same_weights(model, again) and what_was_learnt(tmp_path / "early") == what_was_learnt(tmp_path / "plain")


def test_resume_of_a_finished_run_changes_nothing(tmp_path, data):
    model = train(micro(), quick(3), data, tmp_path / "run")
    log = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = train(micro(), quick(3), data, tmp_path / "run", resume=True)
    assert same_weights(model, again) and (tmp_path / "run" / "metrics.jsonl").read_bytes() == log


def test_a_tokenizer_that_does_not_match_is_refused(tmp_path, data):
    for name in ("train.bin", "data.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    Tokenizer.train(["A b."], 300).save(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="tokenizer"):
        train(micro(), quick(2), tmp_path, tmp_path / "run")
    with pytest.raises(ValueError, match=r"vocab_size=301.*300"):
        train(micro(vocab_size=301), quick(2), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- what goes wrong ------------------------------------------------------------------------------


def poison(monkeypatch, step: int, value: float = math.nan):
    """In this step of a run, counted from 1, one number of the last norm's bias has a gradient that is none."""
    real, calls = training.gradient_norm, [0]

    def poisoned(model, world):
        calls[0] += 1
        if calls[0] == step:
            (gradient,) = [grad for grad in gradients(model) if grad.shape == (16,)][-1:]
            gradient[3] = value
        return real(model, world)

    monkeypatch.setattr(training, "gradient_norm", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("log_every", [1, 8])
def test_a_gradient_that_is_no_number_stops_before_it_does_harm(tmp_path, data, monkeypatch, log_every, value):
    """Step 5 of epoch 0 or so; what is kept is the run of four steps, and --resume meets the same end."""
    settings, config = quick(16, log_every=log_every), micro(dropout=0.1)
    with monkeypatch.context() as patched:
        poison(patched, 5, value=value)
        with pytest.raises(Diverged) as error:
            train(config, settings, data, tmp_path / "run", checkpoint_every=3)
    batches, run = Batches(TokenShard(data / "train.bin"), 4, 16), tmp_path / "run"
    where = rf"step 5 \(epoch {batches.epoch(4)}, from window {16 % batches.windows} on\)"
    why = r"the loss is \d\.\d+, 1 of 16 numbers in the gradient of norm\.bias are nan or inf"
    stays = rf"--init {run} goes on from the state after step 4, in another folder, with a lower --lr"
    assert re.fullmatch(f"{where}: {why}: {stays}", str(error.value))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000003", "step-00000004"]
    assert all(math.isfinite(row.loss) for row in read_metrics(tmp_path / "run"))
    again = train(config, settings, data, tmp_path / "run", resume=True)  # whatever it was has gone
    straight = train(config, settings, data, tmp_path / "straight")
    assert same_weights(again, straight)  # dropout too: the state is that of before the step
    assert what_was_learnt(tmp_path / "run") == what_was_learnt(tmp_path / "straight")


def test_a_loss_that_is_no_number_stops_too(tmp_path, data, monkeypatch):
    settings = quick(16)

    def broken(self, tokens, targets=None, **more):
        real = LanguageModel.features(self, tokens, **more).sum() * 0
        return real + (math.inf if next(steps) == 3 else 1.0)

    steps = iter(range(20))
    monkeypatch.setattr(LanguageModel, "forward", broken)
    with pytest.raises(Diverged, match=r"^step 4 .*the loss is inf, .*after step 3, in another folder"):
        train(micro(), settings, data, tmp_path / "run", checkpoint_every=None)


def test_where_nothing_was_learnt_nothing_is_kept(tmp_path, data, monkeypatch):
    poison(monkeypatch, 1)
    with pytest.raises(Diverged, match=r"^step 1 .*norm.bias are nan or inf: start again, with a lower --lr"):
        train(micro(), quick(3), data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_diverged_does_so_again_and_writes_nothing(tmp_path, data, monkeypatch):
    poison(monkeypatch, 3)
    with pytest.raises(Diverged) as error:
        train(micro(), quick(9), data, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in files_in(tmp_path / "run")}
    poison(monkeypatch, 1)
    with pytest.raises(Diverged) as again:
        train(micro(), quick(9), data, tmp_path / "run", resume=True)
    assert str(again.value) == str(error.value)
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in files_in(tmp_path / "run")}


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, data):
    """A rate that is past all measure: the gradient is one, the weights after the step are none."""
    settings = quick(6, lr=1e38, clip=1e30, weight_decay=10.0, optimizer="adamw")
    with pytest.raises(Diverged, match=r"embedding.weight is not of numbers any more: start again, with a lower --lr"):
        train(micro(), settings, data, tmp_path / "run", checkpoint_every=1)
    assert not checkpoints(tmp_path / "run")


def test_a_real_divergence_is_caught(tmp_path, data):
    """Weights of 1e30 make losses that are no numbers."""
    with pytest.raises(Diverged, match=r"^step \d+ .*the loss is (nan|inf)"):
        train(micro(), quick(40, lr=1e30, clip=1e30, optimizer="adamw"), data, tmp_path / "run")


def test_auxiliary_losses_act_on_the_routers_and_are_not_in_the_loss():
    """The reported loss is nats alone."""
    model = model_of("mla-rope", torch.float64, n_experts=7, top_k=2).train()
    text = tokens_of(4, 8), tokens_of(4, 8, seed=3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = []
    for how in (dict(), dict(switch_loss=0.5, z_loss=0.1)):
        model.load_state_dict(start)
        optimizers = [torch.optim.SGD(model.parameters(), lr=1.0)]
        settings = TrainConfig(batch_size=4, seq_len=8, clip=1e9, **how)
        loss, _ = train_step(model, optimizers, Balancer(model, "none"), text, 1.0, settings)
        routers = torch.stack([block.feedforward.router.weight for block in model.blocks]).detach().clone()
        moved.append((loss, routers))
    assert torch.equal(moved[0][0], moved[1][0])
    assert not torch.equal(moved[0][1], moved[1][1])
    model.load_state_dict(start)
    model.zero_grad()
    with record_routing(model) as routings:
        loss = model(*text)
    loss = loss + sum(0.5 * switch_loss(r) + 0.1 * z_loss(r) for r in routings)
    wanted = torch.autograd.grad(loss, [block.feedforward.router.weight for block in model.blocks])
    before = torch.stack([start[f"blocks.{i}.feedforward.router.weight"] for i in range(len(model.blocks))])
    close(before - torch.stack(wanted), moved[1][1], 1e-12)


@pytest.mark.parametrize(
    "settings,how,message",
    [
        (dict(seq_len=65), {}, "seq_len=65.*max_seq_len=64"),
        ({}, dict(checkpoint_every=-5), "checkpoint_every=-5"),
        ({}, dict(device="cuda:99"), "device='cuda:99'"),
        ({}, dict(device="toaster"), "device='toaster'"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_leaves_no_run(tmp_path, data, settings, how, message):
    with pytest.raises(ValueError, match=message) as error:
        train(micro(), quick(2, **settings), data, tmp_path / "run", **how)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_text_too_short_for_a_window_leaves_no_run(tmp_path, data):
    tokenizer = Tokenizer.load(data / "tokenizer.json")
    for name in ("tokenizer.json", "data.json"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    write_shard(tmp_path / "train.bin", tokenizer, [[5, 6, 7]])
    with pytest.raises(DataError, match="4 tokens"):
        train(micro(), quick(2), tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- signals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_leaves_a_checkpoint_that_goes_on(tmp_path, data, number):
    run, settings = tmp_path / "run", quick(20_000)
    child = fork(lambda: train(micro(), settings, data, run, checkpoint_every=None))
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_metrics(run)) >= 3)
        os.kill(child, number)
    finally:
        code = code_of(child)
    assert code == 130
    steps = [row.step for row in read_metrics(run)]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] < 20_000
    assert [path.name for path in checkpoints(run)] == [f"step-{steps[-1]:08d}"]
    with pytest.raises(Stop):
        train(micro(), settings, data, run, resume=True, on_progress=stop_after(steps[-1] + 2))
    assert [row.step for row in read_metrics(run)] == list(range(1, steps[-1] + 3))


def test_the_handlers_of_signals_are_given_back(tmp_path, data):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stop):
        train(micro(), quick(2), data, tmp_path / "run", on_progress=stop_after(1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_trains_outside_the_main_thread(tmp_path, data):
    """A notebook or a server may: signals are not ours there."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, micro(), quick(2), data, tmp_path / "run").result()
    assert [row.step for row in read_metrics(tmp_path / "run")] == [1, 2]
    assert isinstance(read_metrics(tmp_path / "run")[0], Progress)


# --- losses that are no mean over parts -----------------------------------------------------------


def skewed(**changes):
    """Rows that differ: each takes experts of its own, so that what is even over the step is not so in a part."""
    model = model_of("mla-rope", torch.float64, n_experts=7, top_k=2, **changes).train()
    for row in range(8):
        model.embedding.weight.data[row] *= 1 + row
    rows = torch.arange(8)[:, None].expand(8, 9)
    return model, rows, tokens_of(8, 9, seed=3)


def gradients_of_a_step(model, batch, **how):
    """(the loss, every gradient before it was clipped, the loads and biases that the step left)."""
    kept = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: kept.extend(p.grad.clone() for p in model.parameters()))
    settings, balancer = TrainConfig(batch_size=8, clip=1e9, **how), Balancer(model)
    loss, _ = train_step(model, [optimizer], balancer, batch, 0.0, settings)
    assert all(module.load.sum() == 0 and module.training for module in balancer.routers)
    biases = [module.bias for module in balancer.routers]
    return [loss, *kept, *biases, *(counts.double() for counts in balancer.counts or ())]


AUXILIARY = dict(switch_loss=0.7, z_loss=0.3)


@pytest.mark.parametrize("parts", [2, 8])
@pytest.mark.parametrize("how", [dict(switch_loss=0.7), AUXILIARY], ids=["switch", "switch and z"])
def test_a_step_in_parts_has_the_gradients_of_the_whole(parts, how):
    results = []
    for micro_batches in (1, parts):
        model, tokens, targets = skewed()
        results.append(gradients_of_a_step(model, (tokens, targets), micro_batches=micro_batches, **how))
    for whole, summed in zip(*results, strict=True):
        close(summed, whole, 1e-9, scale=1e-3)
    model, tokens, targets = skewed()
    without = gradients_of_a_step(model, (tokens, targets))
    router = [name for name, _ in model.named_parameters()].index("blocks.0.feedforward.router.weight") + 1
    assert (results[0][router] - without[router]).norm() > 0.1 * without[router].norm()  # the losses weigh something


def test_the_counts_of_the_step_are_those_of_its_dropout():
    """The pass that only counts draws the numbers that the real one will draw, and leaves the generator as it was."""
    seen = []
    for how in (dict(switch_loss=0.7), dict(z_loss=1e-12)):
        model, tokens, targets = skewed(dropout=0.4)
        torch.manual_seed(5)
        out = gradients_of_a_step(model, (tokens, targets), micro_batches=4, **how)
        seen.append((out, torch.rand(1)))
    (with_counts, drawn), (without, as_drawn) = seen
    assert torch.equal(with_counts[0], without[0]) and torch.equal(drawn, as_drawn)
    for counts, wanted in zip(with_counts[-2:], without[-2:], strict=True):
        assert torch.equal(counts, wanted)


def test_parts_with_unequal_numbers_of_targets_are_weighed_by_them():
    results = []
    for micro_batches in (1, 8):
        model, tokens, targets = skewed()
        targets = targets.masked_fill(torch.arange(9) > torch.arange(8)[:, None] - 1, -1)  # none in the first row
        results.append(gradients_of_a_step(model, (tokens, targets), micro_batches=micro_batches, **AUXILIARY))
    for whole, summed in zip(*results, strict=True):
        close(summed, whole, 1e-9, scale=1e-3)


@pytest.mark.parametrize("rows", [3, 7])
def test_parts_of_unequal_rows_are_weighed_by_them(rows):
    results = []
    for micro_batches in (1, 4):
        model, tokens, targets = skewed()
        batch = tokens[:rows], targets[:rows]
        results.append(gradients_of_a_step(model, batch, micro_batches=micro_batches, **AUXILIARY))
    for whole, summed in zip(*results, strict=True):
        close(summed, whole, 1e-9, scale=1e-3)


def test_a_dense_model_has_no_auxiliary_loss():
    model = model_of("mla-rope", torch.float64, ffn="dense").train()
    text = tokens_of(8, 9), tokens_of(8, 9, seed=3)
    assert gradients_of_a_step(model, text, micro_batches=2, **AUXILIARY)[0] > 0


# --- a start that fails leaves nothing ------------------------------------------------------------


def test_a_first_step_that_fails_leaves_no_run(tmp_path, data, monkeypatch):
    """A batch that the memory does not hold, say."""

    def too_large(*_):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_step", too_large)
        with pytest.raises(torch.OutOfMemoryError):
            train(micro(), quick(2, batch_size=8), data, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        (tmp_path / "made").mkdir()
        with pytest.raises(torch.OutOfMemoryError):
            train(micro(), quick(2, batch_size=8), data, tmp_path / "made")
        assert not files_in(tmp_path / "made") and (tmp_path / "made").is_dir()
    train(micro(), quick(2), data, tmp_path / "run")
    train(micro(), quick(2), data, tmp_path / "made")


@pytest.mark.parametrize(
    "how",
    [dict(device="meta"), dict(validate_every=-1), dict(checkpoint_every=1.5), dict(validate_every=True)],
    ids=str,
)
def test_arguments_that_cannot_work_leave_no_run(tmp_path, data, how):
    (name,) = how
    with pytest.raises(Exception, match=name) as error:  # beartype's own complaint about a type comes first in tests
        train(micro(), quick(2), data, tmp_path / "run", **how)
    assert isinstance(error.value, ValueError) or "type" in type(error.value).__name__.lower()
    assert not (tmp_path / "run").exists()
    train(micro(), quick(2), data, tmp_path / "run")


def test_validation_text_that_is_not_there_leaves_no_run(tmp_path, data):
    for name in ("tokenizer.json", "data.json", "train.bin"):
        (tmp_path / name).write_bytes((data / name).read_bytes())
    with pytest.raises(DataError, match=r"valid\.bin"):
        train(micro(), quick(2), tmp_path, tmp_path / "run", validate_every=1)
    assert not (tmp_path / "run").exists()
    train(micro(), quick(2), tmp_path, tmp_path / "run")


# --- one folder, one process ----------------------------------------------------------------------


def test_a_second_process_is_told_at_once_and_a_killed_one_is_in_nobodys_way(tmp_path, data):
    run, settings = tmp_path / "run", quick(20_000)
    child = fork(lambda: train(micro(), settings, data, run, checkpoint_every=5))
    try:
        wait_for(lambda: len(checkpoints(run)) == 2)
        for resume in (False, True):
            with pytest.raises(MoemlaError, match=rf"is being written by process {child} \(moemla train\)") as error:
                train(micro(), settings, data, run, resume=resume)
            assert "\n" not in str(error.value)
    finally:
        os.kill(child, signal.SIGKILL)
        code = code_of(child)
    assert code == -signal.SIGKILL  # it was at work until then
    seen = []
    with pytest.raises(Stop):
        train(micro(), settings, data, run, resume=True, on_progress=lambda row: (seen.append(row.step), stop_now()))
    assert seen and seen[0] > 5


def stop_now():
    raise Stop


# --- the caller's settings ------------------------------------------------------------------------


def callers_settings() -> tuple:
    smallest = torch.full((), torch.finfo(torch.float32).tiny)
    return (
        torch.get_rng_state().tolist(),
        (smallest / 2).item(),  # 0 where denormals are flushed
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("ends", ["well", "badly", "refused"])
@pytest.mark.parametrize("flushed", [False, True])
def test_the_callers_settings_of_torch_stay(tmp_path, data, ends, flushed):
    torch.set_flush_denormal(flushed)
    try:
        torch.manual_seed(77)
        torch.rand(3)
        before = callers_settings()
        assert (before[1] == 0) == flushed
        if ends == "well":
            train(micro(dropout=0.1), quick(2), data, tmp_path / "run", validate_every=1)
        else:
            with pytest.raises((Stop, ValueError)):
                changes = dict(vocab_size=301) if ends == "refused" else dict(dropout=0.1)
                train(micro(**changes), quick(2), data, tmp_path / "run", on_progress=stop_after(1))
        assert callers_settings() == before
    finally:
        torch.set_flush_denormal(False)
