"""The table of the chapters' checks, on files as readers write them: a wrong one fails by a named line."""

import re
from types import ModuleType

import pytest
import torch

from moemla.checks.chapters import CHAPTERS, looked_for, todo
from moemla.checks.compare import CheckFailed
from moemla.checks.finding import Reader
from tests.readers import FILES, SEQUENTIAL, WRONG, wrong_file


@pytest.fixture(autouse=True)
def wide():
    """As `moemla check` sets it."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def reader_of(source):
    module = ModuleType("reader_file")
    exec(source, vars(module))
    return Reader(module)


def lines(number, source):
    """{label: what it says, None where it holds, or the line itself where it is not run}, without the times."""
    said = {}
    for line in todo(number, reader_of(source)):
        if "time" in line.label:
            continue
        said[line.label] = line
        if line.check is not None:
            try:
                line.check()
                said[line.label] = None
            except CheckFailed as failed:
                said[line.label] = str(failed)
    return said


@pytest.mark.parametrize("number", CHAPTERS)
def test_a_right_file_holds(number):
    said = lines(number, FILES[number])
    assert sum(value is None for value in said.values()) >= 5
    assert {label: value for label, value in said.items() if isinstance(value, str)} == {}
    assert [line for line in said.values() if line is not None and line.missing] == []


@pytest.mark.parametrize(
    ("number", "old", "new", "label", "says"),
    [(number, *rest) for number, _, *rest in WRONG],
    ids=[f"{number} {story}" for number, story, *_ in WRONG],
)
def test_a_wrong_file_fails_by_a_named_line(number, old, new, label, says):
    said = lines(number, wrong_file(number, old, new))
    wrong = {name: text for name, text in said.items() if isinstance(text, str)}
    named = [text for name, text in wrong.items() if re.match(label, name)]
    assert named and re.search(says, named[0]), wrong
    assert all("\n" not in text for text in wrong.values())


def test_each_chapter_has_wrong_files():
    assert {number: sum(entry[0] == number for entry in WRONG) >= 3 for number in CHAPTERS} == dict.fromkeys(
        CHAPTERS, True
    )


def test_what_is_not_there_is_said_once_and_with_what_is():
    said = {line.label: line for line in todo(2, reader_of("class Mine:\n    def __init__(self, dim, heads): pass"))}
    assert list(said) == ["CausalAttention"] and said["CausalAttention"].missing
    assert (
        said["CausalAttention"].said
        == "class CausalAttention(d_model, n_heads, [max_len], [dropout]) was expected; the file has no class"
    )
    layer = "from torch import nn\nclass Mine(nn.Module):\n    def __init__(self, dim, heads): pass"
    (line,) = todo(2, reader_of(layer))
    assert line.said.endswith("the file has Mine(dim, heads)")
    assert all(line.missing for line in todo(6, reader_of("")) if line.label != "experts")


def test_several_that_fit_are_told_by_the_chapters_name():
    twice = FILES[2].replace("class CausalAttention(", "class First(") + "\n\nclass Second(First):\n    pass\n"
    (line,) = todo(2, reader_of(twice))
    assert line.missing and line.said == (
        "First and Second all fit class CausalAttention(d_model, n_heads, [max_len], [dropout]): "
        "call the one that is meant CausalAttention"
    )
    named = FILES[2] + "\n\nclass Other(CausalAttention):\n    pass\n"
    assert all(label.startswith("CausalAttention") for label in lines(2, named))
    renamed = lines(2, FILES[2].replace("CausalAttention", "Whatever"))
    assert "Whatever: outputs equal the library's" in renamed
    assert not any(isinstance(text, str) for text in renamed.values())


def test_what_is_imported_is_not_the_readers():
    (line,) = todo(2, reader_of("from moemla import MultiHeadAttention"))
    assert line.missing


def test_a_layer_with_the_librarys_cache_is_told_lengths():
    mine = "from moemla import MultiHeadAttention\nclass Mine(MultiHeadAttention):\n    pass\n"
    said = lines(2, mine)
    assert said["Mine with a cache: rows of unequal length equal each alone"] is None
    assert not any(isinstance(text, str) for text in said.values())


def test_what_may_be_left_out_is_said_in_short():
    said = {line.label: line.said for line in todo(8, reader_of(FILES[8])) if line.check is None}
    assert said["quantile_rule"] == "the file has no def quantile_rule(bias, margins, [top_k], rate)"
    other = FILES[8].replace("def switch_loss(probabilities, index)", "def switch_loss(p, index)")
    said = {line.label: line.said for line in todo(8, reader_of(other)) if line.check is None}
    idle = FILES[8].replace("def step(self)", "def go(self)")
    assert {line.label: line.said for line in todo(8, reader_of(idle))}["Balancer"] == "Balancer has no step()"
    assert said["switch_loss"].startswith(
        "def switch_loss(probabilities, index) was expected; the file has switch_loss(p"
    )


def test_a_layer_may_ask_for_its_length_and_take_steps_by_a_function():
    asks = FILES[2].replace("(self, d_model, n_heads):", "(self, d_model, n_heads, max_len, dropout):")
    without = asks.replace("forward(self, x, cache=None)", "go(self, x, cache)").replace(
        "class CausalAttention",
        "def step(layer, token, cache):\n    return layer.go(token, cache)\n\n\nclass CausalAttention",
    )
    both = without + "\n    def forward(self, x):\n        return self.go(x, None)\n"
    said = lines(2, both)
    assert not any(isinstance(text, str) for text in said.values())
    assert said["step: a prompt and steps equal one pass"] is None
    said = {line.label: line for line in todo(2, reader_of(both.replace("(layer, token, cache)", "(layer, token)")))}
    lacking = said["steps of CausalAttention"]
    assert lacking.missing and "the file has step(layer, token), split(x, heads), " in lacking.said
    assert lacking.said.endswith("and no forward takes cache")
    twice = both.replace("def step", "def one(layer, x, cache):\n    pass\n\n\ndef two")
    assert {line.label: line.said for line in todo(2, reader_of(twice))}["steps of CausalAttention"].startswith(
        "one and two all fit def step(layer, x, cache, [lengths]): call the one that is meant step"
    )


def test_a_rule_may_write_in_place_and_a_router_must_give_the_index_first():
    place = FILES[8].replace(
        "return bias + rate * torch.sign(load.mean() - load)",
        "bias += rate * torch.sign(load.mean() - load)\n    return bias",
    )
    assert not any(isinstance(text, str) for text in lines(8, place).values())
    turned = lines(6, FILES[6].replace("    return index, gate\n", "    return gate, index\n"))
    assert (
        turned["route: the k largest are chosen"]
        == "route gives tuple, not (index, gate) with whole numbers for the index (seed 0)"
    )


def test_the_librarys_own_layers_hold_and_a_bias_that_they_have_is_not_zero():
    experts = "from moemla import MixtureOfExperts\nclass Mine(MixtureOfExperts):\n    pass\n"
    for number in (6, 7):
        said = lines(number, experts)
        assert said["Mine: outputs equal the library's"] is said["Mine: padding changes nothing"] is None
    inside = experts.replace("pass", "def __init__(self, *, d_model, n_experts, top_k, d_expert):\n")
    inside += "        sizes = dict(d_model=d_model, n_experts=n_experts, top_k=top_k, d_expert=d_expert)\n"
    for wrong, fails in (("", False), (", bias_in_gate=True", True), (", renormalise=False", True)):
        said = lines(6, f"{inside}        super().__init__(**sizes{wrong})\n")
        assert isinstance(said["Mine: outputs equal the library's"], str) is fails


def test_what_is_looked_for_can_be_printed():
    for number in CHAPTERS:
        shown = looked_for(number)
        assert any(shown.values()) and all(re.match(r"(class|def) \w+\([\w, \[\]]+\)", text) for text in shown)


def test_numbers_of_a_sequential_are_no_experts_of_a_list():
    """One wide layer as it is mostly written, nn.Sequential(Linear, GELU, Linear), and a list of such."""
    assert [label for label, text in lines(7, SEQUENTIAL).items() if isinstance(text, str)] == []
    wide = """nn.Sequential(
                nn.Linear(d_model, n_shared * d_expert, bias=False),
                nn.GELU(),
                nn.Linear(n_shared * d_expert, d_model, bias=False),
            )"""
    narrow = """nn.ModuleList(
                nn.Sequential(
                    nn.Linear(d_model, d_expert, bias=False),
                    nn.GELU(),
                    nn.Linear(d_expert, d_model, bias=False),
                )
                for _ in range(n_shared)
            )"""
    several = SEQUENTIAL.replace(wide, narrow).replace("self.shared(flat)", "sum(one(flat) for one in self.shared)")
    assert several.count("ModuleList") == 1
    assert [label for label, text in lines(7, several).items() if isinstance(text, str)] == []


def test_padding_is_tried_without_shared_experts_too():
    """With them something is answered at padding, whether routed experts were taken there or not."""
    blind = SEQUENTIAL.replace("gate = gate * valid.flatten()[:, None]", "pass")
    wrong = {label: text for label, text in lines(7, blind).items() if isinstance(text, str)}
    assert list(wrong) == ["MixtureOfExperts: padding changes nothing"] and "output at padding" in wrong.popitem()[1]
