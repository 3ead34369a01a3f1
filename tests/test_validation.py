"""Scores on validation text disturb nothing, and the best model is kept."""

import os
from pathlib import Path

import pytest
import torch

from moemla import training, validation
from moemla.checkpoint import best_of, checkpoints, load
from moemla.model import LanguageModel
from moemla.runs import read_metrics
from moemla.shards import TokenShard
from moemla.tokenizer import Tokenizer
from moemla.training import train
from moemla.validation import Validation
from tests.runs import Stop, micro, quick, same_weights, stop_after, what_was_learnt


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Half a second less for each run."""
    monkeypatch.setattr(training, "matmul_rate", lambda *_: 1e10)


def test_validation_changes_nothing_but_the_log(tmp_path, data):
    config = micro(dropout=0.2)
    settings = quick(9, log_every=4, balance_rule="quantile", balance_rate=0.5, load_window=3)
    plain = train(config, settings, data, tmp_path / "plain", checkpoint_every=4)
    scored = train(config, settings, data, tmp_path / "scored", checkpoint_every=4, validate_every=2)
    assert same_weights(plain, scored) and not scored.training
    rows = read_metrics(tmp_path / "scored")
    assert [row.step for row in rows] == [2, 4, 6, 8, 9] and all(row.valid_loss for row in rows)
    assert [row.valid_loss for row in read_metrics(tmp_path / "plain")] == [None] * 3
    files = [run / "checkpoints" / "step-00000009" / "optimizer.safetensors"
             for run in (tmp_path / "plain", tmp_path / "scored")]  # fmt: skip
    assert files[0].read_bytes() == files[1].read_bytes()  # the random state too
    by_step = {row.step: row for row in read_metrics(tmp_path / "plain")}
    assert rows[1].load_cv == by_step[4].load_cv and rows[-1].load_cv == by_step[9].load_cv


def valid_loss_of(model: LanguageModel, data: Path, seq_len: int) -> float:
    tokens = torch.from_numpy(TokenShard(data / "valid.bin").tokens.astype("int64"))
    count = (len(tokens) - 1) // seq_len
    nats = [
        torch.nn.functional.cross_entropy(
            model(tokens[None, at : at + seq_len])[0].double(), tokens[at + 1 :][:seq_len]
        )
        for at in range(0, count * seq_len, seq_len)
    ]
    return torch.stack(nats).mean().item()


def test_the_best_model_is_kept_and_can_be_loaded(tmp_path, data):
    """A rate that is far too high at the end of the warm-up: the best model is not the last."""
    settings = quick(12, lr=0.6, warmup=12, optimizer="adamw")
    model = train(micro(), settings, data, tmp_path / "run", validate_every=3)
    losses = {row.step: row.valid_loss for row in read_metrics(tmp_path / "run") if row.valid_loss is not None}
    assert sorted(losses) == [3, 6, 9, 12]
    best = min(losses, key=losses.get)
    assert 3 < best < 12
    kept = best_of(tmp_path / "run")
    assert kept["step"] == best and kept["valid_loss"] == losses[best]
    found, tokenizer = load(tmp_path / "run" / "best")
    assert tokenizer.vocab_size == 300 and not same_weights(found, model)
    assert valid_loss_of(found, data, 16) == pytest.approx(losses[best], rel=1e-5)
    assert valid_loss_of(model, data, 16) == pytest.approx(losses[12], rel=1e-5)


def test_resume_keeps_the_best(tmp_path, data):
    settings, how = quick(12, lr=3.0, warmup=12, optimizer="adamw"), dict(validate_every=3, checkpoint_every=6)
    train(micro(), settings, data, tmp_path / "straight", **how)
    with pytest.raises(Stop):
        train(micro(), settings, data, tmp_path / "cut", on_progress=stop_after(8), **how)
    before = best_of(tmp_path / "cut")
    os.replace(tmp_path / "cut" / "best", tmp_path / "cut" / ".best.old")  # killed while two were exchanged
    train(micro(), settings, data, tmp_path / "cut", resume=True, **how)
    assert best_of(tmp_path / "cut") == best_of(tmp_path / "straight") == before
    assert same_weights(load(tmp_path / "cut" / "best")[0], load(tmp_path / "straight" / "best")[0])
    assert what_was_learnt(tmp_path / "cut") == what_was_learnt(tmp_path / "straight")
    assert not (tmp_path / "cut" / ".best.old").exists()


def test_only_so_many_tokens_are_scored(tmp_path, data, monkeypatch):
    monkeypatch.setattr(validation, "VALID_TOKENS", 40)
    seen = Validation(data, Tokenizer.load(data / "tokenizer.json"), quick(1), torch.device("cpu"))
    assert seen.tokens.shape == (2, 16)
    assert torch.equal(seen.tokens.flatten()[1:], seen.targets.flatten()[:-1])


# --- a run that gets no better --------------------------------------------------------------------

WORSE = dict(lr=0.6, warmup=12, optimizer="adamw")  # a rate that is far too high at the end of the warm-up


def steps_of(run) -> list[int]:
    return [row.step for row in read_metrics(run)]


def test_patience_ends_a_run_as_if_it_were_finished(tmp_path, data):
    settings = quick(40, log_every=5, **WORSE)
    model = train(micro(), settings, data, tmp_path / "run", validate_every=3, patience=3)
    losses = {row.step: row.valid_loss for row in read_metrics(tmp_path / "run") if row.valid_loss is not None}
    best, end = min(losses, key=losses.get), max(losses)
    assert end == best + 9 < 40 and best_of(tmp_path / "run")["step"] == best
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"step-{end:08d}"]
    last = read_metrics(tmp_path / "run")[-1]
    assert last.step == end and last.seconds_left == 0 and not model.training
    seen = []
    again = train(
        micro(), settings, data, tmp_path / "run", True, on_progress=seen.append, validate_every=3, patience=3
    )
    assert seen == [] and same_weights(again, model)
    with pytest.raises(Stop):  # who has more patience goes on
        train(micro(), settings, data, tmp_path / "run", True, None, None, stop_after(end + 1), 1, patience=9)
    assert steps_of(tmp_path / "run")[-1] == end + 1


def test_a_run_that_gets_better_goes_on_to_its_end(tmp_path, data):
    train(micro(), quick(12), data, tmp_path / "run", validate_every=2, patience=1)
    assert steps_of(tmp_path / "run")[-1] == 12


def test_a_resumed_run_has_lost_no_patience(tmp_path, data):
    """A checkpoint in the middle of the waiting; and one from before the best, which lies in best/ already."""
    settings, every = quick(40, **WORSE), dict(validate_every=3, patience=3)
    straight = train(micro(), settings, data, tmp_path / "straight", checkpoint_every=4, **every)
    best, end = best_of(tmp_path / "straight")["step"], steps_of(tmp_path / "straight")[-1]
    for death in (best + 1, best + 5, end - 1):
        run = tmp_path / f"cut-{death}"
        with pytest.raises(Stop):
            train(micro(), settings, data, run, False, 4, None, stop_after(death), **every)
        resumed = train(micro(), settings, data, run, True, 4, **every)
        assert same_weights(resumed, straight) and what_was_learnt(run) == what_was_learnt(tmp_path / "straight")
        assert best_of(run) == best_of(tmp_path / "straight")


def test_the_best_of_another_rhythm_is_not_lost(tmp_path, data):
    """best/ holds a later model than the checkpoint: a run that goes on with other steps to score leaves it there."""
    settings = quick(12, **WORSE)
    with pytest.raises(Stop):
        train(micro(), settings, data, tmp_path / "run", False, 5, None, stop_after(9), 3)
    kept = best_of(tmp_path / "run")
    assert kept["step"] in (6, 9)
    train(micro(), settings, data, tmp_path / "run", True, None, None, None, 12)
    assert best_of(tmp_path / "run") == kept and read_metrics(tmp_path / "run")[-1].valid_loss > kept["valid_loss"]


def test_a_score_that_is_no_number_ends_nothing(tmp_path, data, monkeypatch):
    monkeypatch.setattr(Validation, "loss", lambda *_: float("nan"))
    train(micro(), quick(4), data, tmp_path / "run", validate_every=2)
    assert [row.valid_loss for row in read_metrics(tmp_path / "run")] == [None] * 4
    assert best_of(tmp_path / "run") is None


def test_patience_needs_scores(tmp_path, data):
    with pytest.raises(ValueError, match=r"^patience=2: needs validate_every=N"):
        train(micro(), quick(2), data, tmp_path / "run", patience=2)
    assert not (tmp_path / "run").exists()
