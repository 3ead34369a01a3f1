"""Chapter 14: many prompts and few slots; each story is the one written alone, and no step is wasted.

`call(model, prompts, new, slots, stop)` gives the stories, prompt and continuation, in the order of the prompts. What
is computed is seen at the model's embedding: the rows and steps of each call.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from heapq import heapreplace
from itertools import zip_longest

import torch
from torch import nn

from moemla.checks.compare import CheckFailed, check, require
from moemla.config import ModelConfig
from moemla.generation import generate
from moemla.model import LanguageModel

WORDS = 40
SIZES = dict(n_layers=2, d_model=32, n_heads=4, vocab_size=WORDS, max_seq_len=256)
SCALE = 0.4  # standard deviation of matrices: stories differ, and end at different lengths
LENGTHS, NEW = (2, 1, 5, 8, 1, 3, 6), (3, 9, 14, 1, 12, 6, 10)  # of prompts, and the most new tokens of each
MANY = ((1, 1), (3, 1), (3, 2), (7, 3), (4, 9))  # prompts and slots
SHORT, UNEVEN = (2, 1) * 4, (12, 1) * 4  # in groups of two, each would wait for its longest
LOW, STAGGERED = (4, 1, 3) * 3, (8, 12, 16, 20, 14, 18, 10, 20, 12)  # stories that end one by one


@dataclass
class Case:
    """What a function is called with; the first prompt begins with the stop token."""

    variant: str
    model: LanguageModel
    prompts: list[list[int]]
    new: list[int]
    stop: int
    slots: int = 1

    @property
    def said(self) -> str:
        """The input, for a line."""
        return f"{self.variant}, {len(self.prompts)} prompts, slots={self.slots}, stop={self.stop}"

    def of(self, number: int) -> str:
        """One of its prompts, for a line."""
        return f"{self.said}: prompt {number}, {self.prompts[number]}, {self.new[number]} new"

    def run(self, call: Callable) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """The stories, and the rows and steps of each call of the model."""
        calls: list[tuple[int, int]] = []
        seen = self.model.embedding.register_forward_pre_hook(lambda layer, args: calls.append(tuple(args[0].shape)))
        with seen, torch.no_grad():
            stories = call(self.model, self.prompts, self.new, self.slots, self.stop)
        require(bool(calls), f"{self.said}: the model is not called")
        return stories, calls

    def steps(self) -> int:
        """Steps until all is written, one a new token, where each prompt in turn takes the slot that is free first."""
        free = [0] * self.slots
        for most in self.new:
            heapreplace(free, free[0] + most)
        return max(free)


def _case(variant: str, lengths: tuple[int, ...], new: tuple[int, ...], share: float = 0.5, slots: int = 1) -> Case:
    """The stop token is the one that ends most nearly this share of the stories early."""
    model = LanguageModel(ModelConfig.preset("tiny", variant, **SIZES), dtype=torch.float64).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # norms stay as they are: else the last one says the same of every story
            nn.init.normal_(parameter, std=SCALE)
    prompts = [torch.randint(WORDS, (length,)).tolist() for length in lengths]
    stories = generate(model, prompts, max(new), temperature=0)
    early = [set(s[len(p) : len(p) + n - 1].tolist()) for s, p, n in zip(stories, prompts, new, strict=True)]
    stop = min(range(WORDS), key=lambda word: abs(sum(word in words for words in early) - share * len(early)))
    prompts[0][0] = stop
    return Case(variant, model, prompts, list(new), stop, slots)


def _same(story: list[int], wanted: list[int], what: str) -> None:
    for place, (ours, theirs) in enumerate(zip_longest(story, wanted, fillvalue="none")):
        if ours != theirs:
            raise CheckFailed(f"{what}: token {place} of the story is {ours}, wanted {theirs}")


@check
def equals_each_alone(call: Callable) -> None:
    """Each story is the one that `generate` writes of its prompt alone."""
    for variant in ("mha", "mla-rope"):
        whole = _case(variant, LENGTHS, NEW)
        pairs = zip(whole.prompts, whole.new, strict=True)
        alone = [generate(whole.model, [p], n, temperature=0, stop=whole.stop)[0].tolist() for p, n in pairs]
        for prompts, slots in MANY:
            case = replace(whole, prompts=whole.prompts[:prompts], new=whole.new[:prompts], slots=slots)
            for number, story in enumerate(case.run(call)[0]):
                _same(story, alone[number], case.of(number))


@check
def ends_where_it_ends(call: Callable) -> None:
    """A story goes on to its stop token, which is kept, or to its number; a stop token of the prompt ends nothing."""
    whole = _case("mha", LENGTHS, NEW)
    for slots in (1, 3):
        case = replace(whole, slots=slots)
        for number, story in enumerate(case.run(call)[0]):
            prompt, most, what = case.prompts[number], case.new[number], case.of(number)
            written = story[len(prompt) :]
            require(story[: len(prompt)] == prompt, f"{what}: the story does not begin with it")
            require(case.stop not in written[:-1], f"{what}: the story goes on behind its stop token")
            require(len(written) <= most, f"{what}: {len(written)} new tokens")
            ended = len(written) == most or written[-1:] == [case.stop]
            require(ended, f"{what}: ends after {len(written)} new tokens, and not with the stop token")


@check
def computes_no_more_rows(call: Callable) -> None:
    """No call of the model has more rows than there are slots."""
    whole = _case("mha", LENGTHS, NEW)
    for slots in (1, 3):
        case = replace(whole, slots=slots)
        most = max(rows for rows, _ in case.run(call)[1])
        require(most <= slots, f"{case.said}: {most} rows in one call")


@check
def takes_free_slots(call: Callable) -> None:
    """Calls are no more than steps where a free slot is taken at once, and one for each prompt."""
    whole = _case("mha", SHORT, UNEVEN, share=0)
    for slots in (1, 2):
        case = replace(whole, slots=slots)
        calls, most = len(case.run(call)[1]), case.steps() + len(case.prompts)
        require(calls <= most, f"{case.said}, new {case.new}: {calls} calls of the model, {most} are enough")


@check
def computes_no_past(call: Callable) -> None:
    """Each token goes through the model once: prompts padded to the longest, then steps, idle slots included."""
    case = _case("mha", LOW, STAGGERED, share=0, slots=3)
    computed = sum(rows * steps for rows, steps in case.run(call)[1])
    most = case.slots * (len(LOW) * max(LOW) + case.steps())
    require(computed <= most, f"{case.said}, new {case.new}: {computed} tokens computed, {most} are enough")


@check
def order_is_theirs(call: Callable) -> None:
    """Prompts in reverse get the same stories in reverse."""
    case = _case("mha", LENGTHS, NEW, slots=2)
    backwards = replace(case, prompts=case.prompts[::-1], new=case.new[::-1])
    for number, pair in enumerate(zip(backwards.run(call)[0], case.run(call)[0][::-1], strict=True)):
        _same(*pair, f"in reverse, {backwards.of(number)}")
