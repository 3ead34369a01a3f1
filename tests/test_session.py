"""A run that begins with the weights of another: what it takes, what it refuses, and what it says of them."""

import json
import shutil

import pytest
import torch

from moemla import training
from moemla.checkpoint import checkpoints, load
from moemla.data import prepare
from moemla.errors import MoemlaError
from moemla.model import LanguageModel
from moemla.runs import read_metrics
from moemla.tokenizer import Tokenizer
from moemla.training import train
from tests.runs import Stop, files_in, micro, quick, same_weights, stop_after, what_was_learnt, write_texts


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Half a second less for each run."""
    monkeypatch.setattr(training, "matmul_rate", lambda *_: 1e10)


@pytest.fixture(scope="module")
def before(data):
    """A run of six steps, with a balancing bias that has moved."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "matmul_rate", lambda *_: 1e10)
        train(micro(), quick(6, balance_rate=0.05, seed=4), data, data.parent / "before", checkpoint_every=3)
    return data.parent / "before"


def first_state(monkeypatch, *how, **more):
    """(the weights before the first step, the trained model)."""
    kept, real = [], training.train_step

    def noting(model, optimizers, *rest):
        if not kept:
            kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            assert not any(optimizer.state for optimizer in optimizers)
        return real(model, optimizers, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training, "train_step", noting)
        model = train(*how, **more)
    return kept[0], model


def test_it_begins_with_the_weights_and_the_bias_and_with_a_schedule_of_its_own(tmp_path, data, before, monkeypatch):
    settings = quick(5, lr=3e-3, warmup=2, optimizer="adamw")
    start, _ = first_state(monkeypatch, micro(), settings, data, tmp_path / "run", init=before)
    source, _ = load(before)
    assert start.keys() == source.state_dict().keys()
    assert all(torch.equal(tensor, start[name]) for name, tensor in source.state_dict().items())
    assert any(tensor.abs().max() > 0 for name, tensor in start.items() if name.endswith("router.bias"))
    rows = read_metrics(tmp_path / "run")
    assert [row.step for row in rows] == [1, 2, 3, 4, 5] and rows[0].lr == 1.5e-3
    assert rows[0].loss < 0.95 * read_metrics(before)[0].loss


def test_the_last_checkpoint_of_a_run_and_not_the_first(tmp_path, data, before, monkeypatch):
    start, _ = first_state(monkeypatch, micro(), quick(1), data, tmp_path / "run", init=before)
    first, last = (load(path)[0].state_dict() for path in checkpoints(before))
    assert torch.equal(start["norm.weight"], last["norm.weight"])
    assert not torch.equal(start["norm.weight"], first["norm.weight"])


def test_a_saved_model_may_have_another_dropout(tmp_path, data, monkeypatch):
    saved = LanguageModel(micro(dropout=0.3))
    saved.save(tmp_path / "saved", Tokenizer.load(data / "tokenizer.json"))
    start, model = first_state(monkeypatch, micro(), quick(1), data, tmp_path / "run", init=str(tmp_path / "saved"))
    assert torch.equal(start["embedding.weight"], saved.embedding.weight) and model.config.dropout == 0


def test_what_it_began_with_is_written_down(tmp_path, data, before):
    train(micro(), quick(1), data, tmp_path / "run", init=before)
    record = json.loads((tmp_path / "run" / "train.json").read_text())["init"]
    assert record["absolute_folder"] == str(before.resolve()) and len(record["sha256"]) == 64
    assert (tmp_path / "run" / record["folder"]).resolve() == before.resolve()
    train(micro(), quick(1), data, tmp_path / "again", init=before)
    assert json.loads((tmp_path / "again" / "train.json").read_text())["init"]["sha256"] == record["sha256"]
    train(micro(), quick(1), data, tmp_path / "third", init=tmp_path / "run")  # one step on: other weights
    assert json.loads((tmp_path / "third" / "train.json").read_text())["init"]["sha256"] != record["sha256"]
    train(micro(), quick(1), data, tmp_path / "plain")
    assert json.loads((tmp_path / "plain" / "train.json").read_text())["init"] is None


@pytest.mark.parametrize("named", [True, False])
def test_it_goes_on_when_what_it_began_with_is_gone(tmp_path, data, before, named):
    shutil.copytree(before, tmp_path / "source")
    settings = quick(8)
    straight = train(micro(), settings, data, tmp_path / "straight", init=tmp_path / "source")
    with pytest.raises(Stop):
        train(micro(), settings, data, tmp_path / "cut", False, 3, on_progress=stop_after(5), init=tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    more = dict(init=tmp_path / "source") if named else {}
    assert same_weights(train(micro(), settings, data, tmp_path / "cut", True, **more), straight)
    assert what_was_learnt(tmp_path / "cut") == what_was_learnt(tmp_path / "straight")


def test_a_run_and_what_it_began_with_move_together(tmp_path, data, before):
    shutil.copytree(before, tmp_path / "a" / "source")
    with pytest.raises(Stop):
        how = dict(checkpoint_every=2, on_progress=stop_after(2), init=tmp_path / "a" / "source")
        train(micro(), quick(4), data, tmp_path / "a" / "run", **how)
    (tmp_path / "a").rename(tmp_path / "b")
    train(micro(), quick(4), data, tmp_path / "b" / "run", True, init=tmp_path / "b" / "source")


def test_a_run_that_began_otherwise_is_refused(tmp_path, data, before):
    shutil.copytree(before, tmp_path / "other")
    train(micro(), quick(2), data, tmp_path / "with", init=before)
    train(micro(), quick(2), data, tmp_path / "without")
    for run, init, says in (
        ("with", tmp_path / "other", rf"with holds a run that began with the weights of {before}: repeat that"),
        ("without", before, "without holds a run that began without init: repeat that"),
    ):
        with pytest.raises(MoemlaError, match=says):
            train(micro(), quick(2), data, tmp_path / run, resume=True, init=init)


def test_before_the_first_checkpoint_it_is_read_again(tmp_path, data, before):
    shutil.copytree(before, tmp_path / "source")
    how = dict(checkpoint_every=None, on_progress=stop_after(2))
    with pytest.raises(Stop):
        train(micro(), quick(4), data, tmp_path / "run", init=tmp_path / "source", **how)
    assert not checkpoints(tmp_path / "run")
    with pytest.raises(MoemlaError, match="holds a run that began with the weights of"):
        train(micro(), quick(4), data, tmp_path / "run", resume=True)
    straight = train(micro(), quick(4), data, tmp_path / "straight", init=before)
    shutil.copytree(tmp_path / "run", tmp_path / "second")
    resumed = train(micro(), quick(4), data, tmp_path / "run", True, init=tmp_path / "source")
    assert same_weights(resumed, straight)
    shutil.rmtree(checkpoints(tmp_path / "source")[-1])
    with pytest.raises(MoemlaError, match=r"source has other weights now than when .*second began with them"):
        train(micro(), quick(4), data, tmp_path / "second", True, init=tmp_path / "source")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(d_expert=16), r"d_expert 8, not 16"),
        (dict(top_k=1, n_layers=1), r"n_layers 2, not 1, top_k 2, not 1"),
        (dict(attention="mha"), r"attention 'mla', not 'mha'"),
    ],
    ids=str,
)
def test_another_architecture_is_refused_by_its_fields(tmp_path, data, before, changes, says):
    with pytest.raises(MoemlaError, match=rf"before holds another model \(.*{says}.*\): train one") as error:
        train(micro(**changes), quick(2), data, tmp_path / "run", init=before)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_another_tokenizer_or_none_is_refused(tmp_path, data, before):
    texts = write_texts(tmp_path)
    texts["train"].write_text(texts["train"].read_text().replace("park", "lake").replace("cat", "cow"))
    prepare(tmp_path / "data", source="files", vocab_size=300, **texts)
    with pytest.raises(MoemlaError, match="before was trained with another tokenizer") as error:
        train(micro(), quick(2), tmp_path / "data", tmp_path / "run", init=before)
    LanguageModel(micro()).save(tmp_path / "saved")
    with pytest.raises(MoemlaError, match=r"saved has no tokenizer\.json"):
        train(micro(), quick(2), data, tmp_path / "run", init=tmp_path / "saved")
    with pytest.raises(MoemlaError, match="nowhere holds no model"):
        train(micro(), quick(2), data, tmp_path / "run", init=tmp_path / "nowhere")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_diverged_run_goes_on_in_another_folder(tmp_path, data, monkeypatch):
    """The error's own advice."""
    real = training.gradient_norm
    norms = iter([1.0, 1.0, 1.0, torch.nan])
    with monkeypatch.context() as patched, pytest.raises(MoemlaError) as error:
        patched.setattr(training, "gradient_norm", lambda *of: real(*of) * next(norms))
        train(micro(), quick(9), data, tmp_path / "run")
    assert f"--init {tmp_path / 'run'} goes on from the state after step 3" in str(error.value)
    assert "config.json" in files_in(tmp_path / "run")
    train(micro(), quick(2, lr=1e-3), data, tmp_path / "slower", init=tmp_path / "run")
