"""Activation checkpointing and torch.compile: other ways to the same numbers."""

import copy
import json
import subprocess
import sys

import pytest
import torch

from moemla import training
from moemla.balancing import Balancer
from moemla.config import TrainConfig
from moemla.runs import read_metrics
from moemla.training import recomputed, train, train_step
from tests.helpers import model_of, tokens_of
from tests.runs import Stop, micro, quick, same_weights, stop_after, what_was_learnt


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Half a second less for each run."""
    monkeypatch.setattr(training, "matmul_rate", lambda *_: 1e10)


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "changes", [{}, dict(dropout=0.2), dict(ffn="dense", attention="mha", positions="learned")], ids=str
)
def test_recomputed_numbers_are_the_same_bit_by_bit(tmp_path, data, changes, precision):
    """Weights, losses, loads, the bias that they move, and auxiliary losses; with dropout too."""
    more = dict(switch_loss=0.1, z_loss=0.01, micro_batches=2, balance_rate=0.01, precision=precision)
    settings = quick(6, **more)
    plain = train(micro(**changes), settings, data, tmp_path / "plain")
    again = train(micro(**changes), settings, data, tmp_path / "again", recompute=True)
    assert same_weights(plain, again) and what_was_learnt(tmp_path / "plain") == what_was_learnt(tmp_path / "again")


@pytest.mark.parametrize("rule", ["sign", "quantile"])
def test_what_is_recomputed_is_counted_once(rule):
    model = model_of("mla-rope", n_experts=7, top_k=2).train()
    balancer = Balancer(model, rule)
    with recomputed(model):
        for text in (tokens_of(4, 8), tokens_of(2, 8)):
            model(text, text.roll(1, 1)).backward()
    for router in balancer.routers:
        assert router.load.sum() == (4 + 2) * 8 * 2  # rows, tokens, k
        assert rule == "sign" or router.margins.sum() == (4 + 2) * 8 * 7  # every expert would need some bias


def test_blocks_are_run_again_and_keep_less():
    model = model_of("mla-rope").train()
    text = tokens_of(4, 8)
    passes, kept = [], []
    for block in model.blocks:
        block.norm1.register_forward_hook(lambda *_: passes.append(1))

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    def step():
        passes.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(text, text.roll(1, 1))
        held = sum(kept)
        loss.backward()
        return len(passes), held

    (plain, much), layers = step(), len(model.blocks)
    with recomputed(model):
        twice, little = step()
    assert (plain, twice) == (layers, 2 * layers) and little < much / 3
    assert step() == (plain, much)


def test_the_model_is_as_it_was_afterwards():
    model = model_of("mla-rope").train()
    names = list(model.state_dict())
    with recomputed(torch.nn.parallel.DataParallel(model)):  # a wrapper that has the model as its module
        assert list(model.state_dict()) == names
    assert all("forward" not in vars(block) for block in model.blocks)
    copy.deepcopy(model)
    with pytest.raises(Stop), recomputed(model):
        raise Stop
    assert all("forward" not in vars(block) for block in model.blocks)


def test_a_recomputed_run_goes_on_as_it_likes(tmp_path, data):
    """With or without: it is no setting of what is learnt. train.json says how the run was begun."""
    config, settings = micro(dropout=0.1), quick(6)
    straight = train(config, settings, data, tmp_path / "straight")
    with pytest.raises(Stop):
        train(config, settings, data, tmp_path / "cut", False, 2, on_progress=stop_after(3), recompute=True)
    assert same_weights(train(config, settings, data, tmp_path / "cut", True), straight)
    facts = json.loads((tmp_path / "cut" / "train.json").read_text())
    assert facts["computed"] == dict(compile=False, recompute=True) and "recompute" not in facts["train"]


def test_the_model_is_trained_through_its_compiled_form(tmp_path, data, monkeypatch):
    """Compiled once, for one shape, around what the ranks share; without a compiler here."""
    asked = []

    def compiled(model, dynamic):
        asked.append((type(model).__name__, dynamic))
        return Through(model)

    monkeypatch.setattr(torch, "compile", compiled)
    model = train(micro(), quick(4), data, tmp_path / "run", validate_every=2, compile=True)
    assert asked == [("LanguageModel", False)] and Through.passes == 4
    assert same_weights(model, train(micro(), quick(4), data, tmp_path / "plain"))
    assert type(model).__name__ == "LanguageModel" and len(read_metrics(tmp_path / "run")) == 4


class Through(torch.nn.Module):
    passes = 0

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, *args):
        Through.passes += 1
        return self._orig_mod(*args)


# In a process of its own: the compiler cannot look through the run-time checks of shapes that the tests install.
COMPILED = """
import sys
from pathlib import Path
import torch
from functools import partial
from moemla import training
from tests.runs import make_data, micro, quick, what_was_learnt

training.matmul_rate = lambda *_: 1e10
torch.compile = partial(torch.compile, backend=sys.argv[2])
folder = Path(sys.argv[1])
data = make_data(folder)
settings = quick(4, switch_loss=0.1, balance_rate=0.01)
for number, how in enumerate([{}, dict(compile=True), dict(compile=True, recompute=True)]):
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        training.train(micro(), settings, data, folder / str(number), validate_every=2, **how)
    torch._dynamo.reset()
plain, *others = [what_was_learnt(folder / str(number)) for number in range(3)]
for rows in others:
    for one, row in zip(plain, rows, strict=True):
        assert one.keys() == row.keys()
        for name in ("loss", "valid_loss", "grad_norm"):
            assert one[name] is None or abs(one[name] - row[name]) < 1e-4 * abs(one[name]), (name, one, row)
        assert abs(one["load_cv"] - row["load_cv"]) < 0.05, (one, row)
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_learn_the_same(tmp_path, backend):
    how = dict(capture_output=True, text=True, timeout=900, check=False)
    done = subprocess.run([sys.executable, "-c", COMPILED, str(tmp_path), backend], **how)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_step_inside_is_the_step_outside():
    """For anyone's own loop."""
    results = []
    for inside in (False, True):
        model = model_of("mla-rope", dropout=0.1).train()
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1)]
        batch = tokens_of(4, 8), tokens_of(4, 8, seed=3)
        with recomputed(model) if inside else torch.enable_grad():
            torch.manual_seed(3)
            loss, norm = train_step(model, optimizers, Balancer(model), batch, 0.1, TrainConfig(batch_size=4))
        results.append((loss, norm, model.state_dict()))
    (loss, norm, weights), (other, others_norm, others) = results
    assert torch.equal(loss, other) and torch.equal(norm, others_norm)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
