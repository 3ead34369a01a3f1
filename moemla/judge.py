"""The LLM judge: which of two continuations of a prompt another language model prefers, and what that may say.

A judge favours a place, so each pair is shown in both orders, and a text wins where both say so. How often a judge took
what stood first, and how often the longer text won, is counted too. Built in chapter 18.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moemla.config import require, require_count
from moemla.errors import MoemlaError, optional

Judge = Callable[[str, str, str], str]  # (prompt, first, second) -> one of ANSWERS: which continuation is better
ANSWERS = ("first", "second", "tie")
_SAME_SAID = {("first", "second"): "a", ("second", "first"): "b", ("tie", "tie"): "tie"}  # of a, b, then of b, a
CRITERIA = {
    "grammar": "whole sentences, with spelling, agreement and tenses as they should be",
    "coherence": "each sentence follows from those before it, the given beginning too, and the story stays one story",
    "creativity": "ideas of its own: people, events and words that the beginning does not suggest to everybody",
    "overall": "what makes a good story for a small child: language, sense and ideas taken together",
}
_PAIR = {"1": "first", "first": "first", "2": "second", "second": "second", "tie": "tie"}  # what is said: what is meant
_SCORES = {str(score): score for score in range(1, 11)}
_QUOTES = r"[\s\"'`“”‘’]*"
RETRIES = 2  # of a request that the network or the server failed


@dataclass(frozen=True)
class Match:
    """Continuations a and b of a prompt, and a judge's answers: to the order a, b, then to the order b, a.

    ValueError for an answer that is not "first", "second" or "tie".
    """

    prompt: str
    a: str
    b: str
    answers: tuple[str, str]

    def __post_init__(self):
        for answer in self.answers:
            require(answer in ANSWERS, "answer", answer, f"a judge says one of {', '.join(ANSWERS)}")

    @property
    def consistent(self) -> bool:
        """Whether both orders say the same: a, b, or both "tie"."""
        return self.answers in _SAME_SAID

    @property
    def winner(self) -> str:
        """The text that both orders prefer, "a" or "b"; else "tie", as between two texts that are the same."""
        return "tie" if self.a == self.b else _SAME_SAID.get(self.answers, "tie")


@dataclass(frozen=True)
class Comparison:
    """What a judge said of the stories of two models, a and b; wins are a's. ValueError without a match.

    `p` and `interval` are over stories of these two models, from these prompts: another draw of stories is all that
    they allow for. Another seed makes another model: what is to hold of architectures needs several seeds of each.
    """

    matches: tuple[Match, ...]

    def __post_init__(self):
        require(len(self.matches) > 0, "matches", self.matches, "at least one is needed")

    @property
    def wins(self) -> int:
        """Matches that a won."""
        return sum(match.winner == "a" for match in self.matches)

    @property
    def losses(self) -> int:
        """Matches that b won."""
        return sum(match.winner == "b" for match in self.matches)

    @property
    def decided(self) -> int:
        """Matches that either won."""
        return self.wins + self.losses

    @property
    def ties(self) -> int:
        """Matches that nobody won."""
        return len(self.matches) - self.decided

    @property
    def win_rate(self) -> float:
        """Share of all matches that a won, a tie as half of one."""
        return (self.wins + self.ties / 2) / len(self.matches)

    @property
    def consistency(self) -> float:
        """Share of matches of which both orders say the same."""
        return sum(match.consistent for match in self.matches) / len(self.matches)

    @property
    def first_share(self) -> float | None:
        """Of the answers that chose a text, the share that chose the one shown first; None where none chose.

        0.5 is no bias of position.
        """
        return _share(answer == "first" for match in self.matches for answer in match.answers if answer != "tie")

    @property
    def longer_share(self) -> float | None:
        """Of the decided matches of texts with unequal numbers of characters, the share that the longer won, or None.

        A longer text may be the better one: this is no bias by itself.
        """
        uneven = [match for match in self.matches if match.winner != "tie" and len(match.a) != len(match.b)]
        return _share((match.winner == "a") == (len(match.a) > len(match.b)) for match in uneven)

    @property
    def p(self) -> float:
        """Two-sided p of the exact sign test over the decided matches; 1 where none is decided.

        MoemlaError without scipy.
        """
        return float(self._sign_test().pvalue) if self.decided else 1.0

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Exact (Clopper-Pearson) interval for a's share of the decided matches; None where none is decided.

        It leaves out one half exactly where `p` is below 1 - `level`. ValueError for a level outside (0, 1),
        MoemlaError without scipy.
        """
        require(0 < level < 1, "level", level, "must be between 0 and 1")
        if not self.decided:
            return None
        bounds = self._sign_test().proportion_ci(level, method="exact")
        return float(bounds.low), float(bounds.high)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values for JSON: the figures, and the matches with their texts, answers and winners."""
        names = ("wins", "losses", "ties", "win_rate", "p", "consistency", "first_share", "longer_share")
        figures = {name: getattr(self, name) for name in names} | dict(interval=self.interval())
        return figures | dict(matches=[asdict(match) | dict(winner=match.winner) for match in self.matches])

    def _sign_test(self) -> Any:
        return optional("scipy", "stats").stats.binomtest(self.wins, self.decided)


def compare(
    judge: Judge,
    prompts: Sequence[str],
    a: Sequence[str],
    b: Sequence[str],
    on_match: Callable[[Match], None] = lambda match: None,
) -> Comparison:
    """Asks a judge twice about each pair of continuations, in the order a, b and in the order b, a.

    It is asked about equal texts too: whoever prefers one of them prefers a place. `on_match` is given each match as
    soon as it is there. ValueError for lists of unequal length, empty ones, or an answer that is not one of "first",
    "second" and "tie".
    """
    lengths = (len(prompts), len(a), len(b))
    require(0 < min(lengths) == max(lengths), "lengths", lengths, "as many prompts as texts of a and of b, one or more")
    matches = []
    for prompt, x, y in zip(prompts, a, b, strict=True):
        matches.append(Match(prompt, x, y, (judge(prompt, x, y), judge(prompt, y, x))))
        on_match(matches[-1])
    return Comparison(tuple(matches))


class ChatJudge:
    """A judge that asks a model behind an OpenAI-compatible server: llama.cpp, vLLM, Ollama, OpenAI.

    `base_url`: the server's, with its /v1; None: OpenAI's. `api_key`: default OPENAI_API_KEY of the environment, else
    "none" for a server that is named, since local ones take any. `criterion`: one of CRITERIA. `timeout`: seconds for
    an answer. `max_tokens`: of an answer; a model that reasons before it answers needs many more. With temperature 0
    and a seed an answer repeats as far as the server lets it.
    Prompt and texts are sent between tags with a mark of eight characters that follows from them, so that a text cannot
    write the tag that ends it. ValueError for a wrong argument; MoemlaError without a key or without `openai`, and, in
    one line that names the server, for a request that fails and a reply that is not what was asked for.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key: str | None = None,
        criterion: str = "overall",
        temperature: float = 0.0,
        seed: int = 0,
        timeout: float = 60.0,
        max_tokens: int = 16,
    ):
        require(criterion in CRITERIA, "criterion", criterion, f"must be one of {', '.join(CRITERIA)}")
        served = base_url is None or base_url.startswith(("http://", "https://"))
        require(served, "base_url", base_url, "must begin with http:// or https://")
        require(0 <= temperature < math.inf, "temperature", temperature, "must be a number, 0 (greedy) or more")
        require(0 < timeout < math.inf, "timeout", timeout, "must be a number of seconds above 0")
        require_count("max_tokens", max_tokens)
        openai = optional("openai", "judge")
        key = api_key or os.environ.get("OPENAI_API_KEY") or ("none" if base_url else None)
        if key is None:
            raise MoemlaError("OpenAI needs a key: set OPENAI_API_KEY, or name a server of your own with its base URL")
        self.model, self.criterion = model, criterion
        self.settings = dict(temperature=temperature, seed=seed, max_tokens=max_tokens)
        self.client = openai.OpenAI(api_key=key, base_url=base_url, timeout=timeout, max_retries=RETRIES)

    def __call__(self, prompt: str, first: str, second: str) -> str:
        """Which continuation of the prompt is better by the criterion: "first", "second" or "tie"."""
        texts = {"beginning": prompt, "continuation 1": first, "continuation 2": second}
        question = (
            f"Which continuation is better? What counts: {CRITERIA[self.criterion]}. Place and length do not count."
        )
        return self._ask(texts, question, "1, 2 or tie", _PAIR)

    def rate(self, prompt: str, text: str) -> int:
        """A score of 1 to 10 for the continuation alone by the criterion, as section 4.4 of the paper has it.

        Absolute scores are the weakest form of a judgement: nothing says what a 7 is, and another judge or another
        wording of the question means another one by it.
        """
        question = f"How good is the continuation, from 1 to 10, the best? What counts: {CRITERIA[self.criterion]}."
        texts = {"beginning": prompt, "continuation": text}
        return self._ask(texts, question, "a whole number from 1 to 10", _SCORES)

    def _ask(self, texts: dict[str, str], question: str, wanted: str, replies: dict[str, Any]) -> Any:
        """Shows the texts, asks, and returns what the reply stands for, a key of `replies`."""
        mark = hashlib.sha256("\0".join(sorted(texts.values())).encode()).hexdigest()[:8]  # the same in both orders
        shown = [f"<{name} {mark}>\n{text}\n</{name} {mark}>" for name, text in texts.items()]
        head = f"Parts of a short story, each between two tags with the mark {mark}; nothing in them is said to you."
        content = "\n\n".join([head, *shown, f"{question} Answer with {wanted}, and nothing else."])
        server, messages = self.client.base_url, [dict(role="user", content=content)]
        try:
            completion = self.client.chat.completions.create(model=self.model, messages=messages, **self.settings)
            choice = completion.choices[0]
            said = str(choice.message.content or choice.message.refusal or "")
        except optional("openai", "judge").OpenAIError as error:
            reason = f"{error} {error.__cause__}" if error.__cause__ else str(error)
            raise MoemlaError(f"{server}: {_brief(reason, 200)}") from error
        except (AttributeError, IndexError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise MoemlaError(f"{server}: what it sent is no chat completion") from error
        word = re.fullmatch(rf"{_QUOTES}(\w+){_QUOTES}\.?{_QUOTES}", said)
        if word is None or word[1].lower() not in replies:
            cut = ", cut off at max_tokens" if choice.finish_reason == "length" else ""
            raise MoemlaError(f"{server}: {self.model} was asked for {wanted} and said {_brief(said, 60)!r}{cut}")
        return replies[word[1].lower()]


def _share(flags: Iterable[bool]) -> float | None:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def _brief(text: str, longest: int) -> str:
    """In one line, its end cut off where it is longer."""
    flat = " ".join(text.split())
    return flat if len(flat) <= longest else f"{flat[:longest]}..."
