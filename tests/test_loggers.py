"""Rows for TensorBoard and Weights & Biases: what they are told, when, and one line where the package is missing.

Neither is asked for here: modules of the same names note what they are called with.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from moemla.errors import MoemlaError
from moemla.loggers import LOGGERS, make_logger, scalars
from moemla.runs import Progress

SETTINGS = dict(model=dict(n_layers=2, d_ff=None), train=dict(lr=0.1))


def row(step: int, **more) -> Progress:
    speed = dict(seconds=1.0, tokens_per_second=2.0, utilisation=0.5, seconds_left=3.0)
    return Progress(step=step, tokens=64 * step, loss=5.0, lr=0.1, grad_norm=0.7, **speed, **more)


@pytest.fixture
def calls(monkeypatch) -> list:
    """What the two packages are called with, in order."""
    noted = []

    def noting(name: str):
        return lambda *args, **more: noted.append((name, *args, *([more] if more else [])))

    def writer(folder, **more):
        noted.append(("open", folder, more))
        return SimpleNamespace(**{name: noting(name) for name in ("add_text", "add_scalar", "flush", "close")})

    def init(**more):
        noted.append(("init", more))
        return SimpleNamespace(log=noting("log"), finish=noting("finish"))

    for name, members in (
        ("tensorboard", {}),
        ("torch.utils.tensorboard", dict(SummaryWriter=writer)),
        ("wandb", dict(init=init)),
    ):
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return noted


def test_the_numbers_of_a_row():
    plain = dict(tokens=64, loss=5.0, lr=0.1, seconds=1.0, tokens_per_second=2.0, utilisation=0.5, seconds_left=3.0)
    assert dict(scalars(row(1))) == plain | dict(grad_norm=0.7)
    skipped = row(1, load_cv=0.2, load_cv_by_layer=[0.1, 0.3], max_violation_by_layer=[0.5, 0.7], loss_scale=4.0)
    skipped.grad_norm = None
    layers = {
        "load_cv/layer-0": 0.1,
        "load_cv/layer-1": 0.3,
        "max_violation/layer-0": 0.5,
        "max_violation/layer-1": 0.7,
    }
    assert dict(scalars(skipped)) == plain | layers | dict(load_cv=0.2, loss_scale=4.0)


def test_tensorboard_gets_the_settings_once_and_each_number_at_its_step(tmp_path, calls):
    logger = make_logger("tensorboard", tmp_path / "run", SETTINGS)
    assert calls == [] and not (tmp_path / "run").exists()  # a start that is refused leaves nothing
    logger(row(7))
    logger(row(8, valid_loss=4.0))
    logger.close()
    assert calls[:3] == [
        ("open", str(tmp_path / "run" / "tensorboard"), dict(purge_step=7)),  # what lies past the checkpoint is hidden
        ("add_text", "model", "n_layers: 2  \nd_ff: None"),
        ("add_text", "train", "lr: 0.1"),
    ]
    numbers = [call[1:] for call in calls if call[0] == "add_scalar"]
    assert numbers == [(*pair, row_.step) for row_ in (row(7), row(8, valid_loss=4.0)) for pair in scalars(row_)]
    assert [call[0] for call in calls].count("flush") == 2 and calls[-1] == ("close",)


@pytest.mark.parametrize(("mode", "expected"), [(None, "offline"), ("", "offline"), ("online", "online")])
def test_wandb_is_offline_unless_the_environment_says_otherwise(tmp_path, calls, monkeypatch, mode, expected):
    if mode is not None:
        monkeypatch.setenv("WANDB_MODE", mode)
    logger = make_logger("wandb", tmp_path / "first", SETTINGS)
    assert calls == []
    logger(row(7))
    logger(row(8))
    logger.close()
    told = dict(project="moemla", group="first", name="first from step 7", dir=str(tmp_path / "first"))
    assert calls[0] == ("init", told | dict(config=SETTINGS, mode=expected))
    assert calls[1:] == [("log", dict(scalars(row(n))), dict(step=n)) for n in (7, 8)] + [("finish",)]


@pytest.mark.parametrize("name", LOGGERS)
def test_what_was_never_called_is_closed_without_a_word(tmp_path, calls, name):
    make_logger(name, tmp_path, SETTINGS).close()
    assert calls == []


@pytest.mark.parametrize("name", LOGGERS)
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MoemlaError, match=rf"{name} is not installed: pip install 'moemla\[{name}\]'"):
        make_logger(name, tmp_path, SETTINGS)


def test_an_unknown_name():
    with pytest.raises(ValueError, match="logger='mlflow': choose tensorboard or wandb"):
        make_logger("mlflow", ".", SETTINGS)
