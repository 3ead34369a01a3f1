"""What chapters share: a table that any reader can see, small data, and a loop that does the same each time."""

import linecache
import time
from types import ModuleType

import IPython
import pytest
import torch
import torch.distributed as dist
from torch import nn

import moemla
from moemla.balancing import switch_loss
from moemla.lessons import _needed, ranks, show_table, small_data, train_small

DATA = dict(stories=60, vocab_size=300, valid=5)
SIZES = dict(vocab_size=300, n_layers=2, d_model=16, n_heads=2, n_experts=4, top_k=2, d_expert=8, max_seq_len=32)


def model_of(variant="moe-mla-rope", **sizes):
    torch.manual_seed(3)
    return moemla.LanguageModel(moemla.ModelConfig.preset("tiny", variant, **SIZES | sizes))


def short(model, **settings):
    return train_small(model, small_data(**DATA), 6, **dict(lr=1e-2, rows=4, length=16) | settings)


# ---- a table


@pytest.fixture
def displayed(monkeypatch):
    """What a notebook would be asked to show."""
    shown = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: shown.append(data))
    return shown


ROWS = [["a | b", 1.5, 12_345, "+2 %"], ["$R$", -0.25, 3, ""]]


def test_a_table_in_a_notebook_is_markdown_with_text_beside_it(displayed):
    show_table(ROWS, ["name", "nats", "tokens", "more"], digits=2)
    (data,) = displayed
    assert data["text/markdown"].splitlines() == [
        "| name | nats | tokens | more |",
        "|:---|---:|---:|---:|",
        r"| a \| b | 1.50 | 12,345 | +2 % |",
        "| $R$ | -0.25 | 3 |  |",
    ]


def test_a_table_elsewhere_is_printed_in_columns(capsys):
    show_table(ROWS, ["name", "nats", "tokens", "more"])
    assert capsys.readouterr().out.splitlines() == [
        "name     nats  tokens  more",
        "a | b   1.500  12,345  +2 %",
        "$R$    -0.250       3",
    ]


def test_a_row_is_as_long_as_the_header():
    with pytest.raises(ValueError, match=r"rows=\['a'\]: each must have 2 cells"):
        show_table([["a"]], ["name", "nats"])


# ---- data


def test_small_data_is_made_once_and_holds_whole_stories():
    data = small_data(**DATA)
    assert small_data(**DATA) is data and small_data(**DATA | {"seed": 1}) is not data
    told = [story.text for story in moemla.stories.stories(65, seed=0)]
    assert data.texts == tuple(told[60:])
    for stream, texts in ((data.train, told[:60]), (data.valid, told[60:])):
        assert data.tokenizer.decode(stream.tolist(), keep_eot=True) == "".join(f"<|endoftext|>{t}" for t in texts)
        assert (stream == data.tokenizer.eot).sum() == len(texts) and stream[0] == data.tokenizer.eot


def test_a_batch_is_windows_and_what_follows_them():
    data = small_data(**DATA)
    tokens, targets = data.batch(torch.Generator().manual_seed(0), rows=50, length=7)
    assert tokens.shape == targets.shape == (50, 7) and torch.equal(tokens[:, 1:], targets[:, :-1])
    windows = data.train.unfold(0, 8, 1)
    for row, last in zip(tokens, targets[:, -1:], strict=True):
        assert (windows == torch.cat([row, last])).all(1).any()


# ---- training


def test_training_is_the_same_each_time_and_disturbs_nothing():
    data = small_data(**DATA)
    assert data.train.shape[0] > 1000
    before = torch.get_num_threads(), torch.random.get_rng_state()
    torch.set_num_threads(2)
    runs = []
    for disturbance in (0, 5):
        model = model_of(dropout=0.1)
        torch.manual_seed(disturbance)
        state = torch.random.get_rng_state()
        runs.append(short(model))
        assert torch.equal(torch.random.get_rng_state(), state) and torch.get_num_threads() == 2
    torch.set_num_threads(before[0])
    assert runs[0] == runs[1] and len(runs[0]) == 6
    assert short(model_of(dropout=0.1), seed=1) != runs[0]


def test_it_learns():
    losses = train_small(model_of(), small_data(**DATA), 60, lr=2e-2, rows=8, length=16)
    assert losses[0] == pytest.approx(5.7, abs=0.1) and losses[-1] < losses[0] - 1


def test_the_rate_climbs_and_falls_to_a_thirtieth(monkeypatch):
    rates, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    train_small(model_of(), small_data(**DATA), 20, lr=1e-2, rows=2, length=8)
    assert rates[0] == 5e-3 and max(rates) == rates[2] == rates[1] == 1e-2
    assert 1e-2 / 30 < rates[-1] < 1.1 * (1e-2 / 30) + 1e-4


def test_any_model_of_logits_will_do():
    torch.manual_seed(0)
    table = nn.Sequential(nn.Embedding(300, 8), nn.Linear(8, 300))
    losses = short(table, lr=5e-2)
    assert losses[-1] < losses[0]


def test_who_is_told_after_each_step():
    told = []

    class Watch:
        def step(self):
            told.append("balancer")

    losses = short(model_of(), balancer=Watch(), after_step=lambda step, loss: told.append((step, loss)))
    assert told == [x for step, loss in enumerate(losses, 1) for x in ("balancer", (step, loss))]


def test_a_balancer_of_the_library_moves_the_bias():
    model = model_of()
    short(model, balancer=moemla.Balancer(model))
    assert all(router.bias.abs().max() > 0 for router in moemla.Balancer(model).routers)


def test_a_penalty_trains_and_is_not_recorded():
    plain, punished, seen = model_of(), model_of(), []

    def penalty(routings):
        seen.append(len(routings))
        return 10 * sum(map(switch_loss, routings))

    losses = short(plain), short(punished, penalty=penalty)
    assert seen == [2] * 6
    assert losses[0][0] == losses[1][0] and losses[0][1:] != losses[1][1:]


def test_steps_are_counted():
    with pytest.raises(ValueError, match="steps=0"):
        train_small(model_of(), small_data(**DATA), 0)


# ---- several processes

START = torch.tensor([1.0, 10.0])
WIDTH = 3


class Layer(nn.Module):
    def forward(self, x):
        return WIDTH * x


class Twice(Layer):
    """A class that needs another."""

    def forward(self, x):
        return super().forward(x) * 2


def outer(x):
    def inner():
        return Twice()(x)

    return inner()


def summed(world):
    print(f"rank {world.rank} of {world.size}")
    x = START * (world.rank + 1)
    dist.all_reduce(x)
    return outer(x), moemla.ModelConfig.preset("tiny").top_k


def failing(world):
    if world.rank == 1:
        raise ValueError("size=3: must be 4")
    world.wait()


def test_a_function_runs_on_several_ranks_with_whatever_it_names(capsys):
    answer, top_k = ranks(summed)
    assert torch.equal(answer, 6 * 3 * START) and top_k == 6
    assert capsys.readouterr().out.splitlines() == ["rank 0 of 2", "rank 1 of 2"]


def test_the_error_is_that_of_the_rank_that_failed_first():
    with pytest.raises(RuntimeError, match=r"^rank 1: ValueError: size=3: must be 4$"):
        ranks(failing)


def test_ranks_that_give_no_answer_are_ended():
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"no answer of 2 ranks within 0\.5 seconds"):
        ranks(summed, seconds=0.5)
    assert time.monotonic() - begin < 30


def cell(source: str, name: str) -> ModuleType:
    """A cell of a notebook, whose source only linecache knows."""
    notebook = ModuleType("__main__")
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), vars(notebook))
    return notebook


CELL = """
import torch.nn.functional as F
from moemla import Router as Chooser
import torch
WIDTH = 2
other = 5
class Layer:
    def width(self):
        return WIDTH
class Wide(Layer):
    def width(self):
        other = 3
        return other * super().width()
def unused():
    return 1
@torch.no_grad()
def quiet():
    return Wide().width()
def main(world):
    return quiet(), F.relu, Chooser, [WIDTH for WIDTH in (1, 2)]
"""


def test_what_is_sent_is_what_a_function_names_and_no_more():
    definitions, values = _needed(cell(CELL, "cell-1").main)
    assert values == {"WIDTH": 2}
    imports = [part for part in definitions if part.startswith(("import", "from"))]
    assert imports == [
        "from moemla.routing import Router as Chooser",
        "import torch.nn.functional as F",
        "import torch as torch",
    ]
    sources = [part.splitlines()[0] for part in definitions if part not in imports]
    assert sources == ["class Layer:", "class Wide(Layer):", "@torch.no_grad()", "def main(world):"]
    exec("\n".join(definitions), values)


def test_what_cannot_be_sent_is_said():
    notebook = cell(CELL + "layer = Layer()\ndef main(world):\n    return layer\n", "cell-2")
    with pytest.raises(ValueError, match="layer='Layer': is an object of a class of the notebook; make it in `main`"):
        _needed(notebook.main)
    exec("def main(world): return 1", vars(notebook))
    with pytest.raises(ValueError, match="main=main: no source"):
        _needed(notebook.main)
    with pytest.raises(ValueError, match="size=0"):
        ranks(summed, size=0)
