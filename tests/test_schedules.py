"""The course of the learning rate over a run, step by step."""

import pytest

from moemla import training
from moemla.config import TrainConfig
from moemla.optim import learning_rate
from moemla.runs import read_metrics
from moemla.schedules import rate_at
from moemla.training import train
from tests.runs import micro, quick


def rates(steps=20, count=None, **settings):
    settings = TrainConfig(**dict(steps=steps, lr=2.0, min_lr=0.5, warmup=4) | settings)
    return [rate_at(step, settings) for step in range(count or steps)]


def test_the_cosine_is_that_of_before():
    assert rates(count=25) == [learning_rate(step, lr=2.0, min_lr=0.5, warmup=4, steps=20) for step in range(25)]


def test_constant_stays_after_the_warm_up():
    assert rates(schedule="constant") == [0.5, 1.0, 1.5, *[2.0] * 17]


def test_wsd_stays_and_falls_in_a_line_over_the_last_share():
    """Of 20 steps the last 5: each takes a fifth of the way, and step 20, which is not done, would be at min_lr."""
    expected = [0.5, 1.0, 1.5, *[2.0] * 13, 1.7, 1.4, 1.1, 0.8, 0.5, 0.5]
    assert rates(schedule="wsd", decay=0.25, count=22) == pytest.approx(expected)
    assert rates(schedule="wsd", decay=0.25, min_lr=0.0)[-1] == pytest.approx(2.0 / 5)  # the last step still moves


def test_wsd_never_falls_within_the_warm_up():
    expected = [0.5, 1.0, 1.5, 2.0, *(2.0 - 1.5 * step / 16 for step in range(16))]
    assert rates(schedule="wsd", decay=1.0) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("warmup", "steps", "decay"), [(0, 1, 1.0), (0, 10, 0.001), (10, 10, 0.5), (50, 10, 0.2)])
def test_the_rate_is_defined_at_the_edges(schedule, warmup, steps, decay):
    """A warm-up of 50 is longer than 10 steps where none is given: the default."""
    warmup = None if warmup == 50 else warmup
    course = rates(steps, steps + 3, schedule=schedule, warmup=warmup, decay=decay, min_lr=0.0)
    assert all(0 < rate <= 2.0 for rate in course[:steps])


def test_a_run_follows_its_schedule(tmp_path, data, monkeypatch):
    monkeypatch.setattr(training, "matmul_rate", lambda *_: 1e10)
    train(micro(), quick(5, schedule="wsd", decay=0.4, lr=1e-2), data, tmp_path / "run")
    assert [row.lr for row in read_metrics(tmp_path / "run")] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 5e-3])
