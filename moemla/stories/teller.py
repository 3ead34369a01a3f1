"""The teller: a plot told with things of the world, and a record of who and what was mentioned.

Notable:
- `story(seed, index)` depends on its two arguments alone, so any story of a corpus can be made without the others
- the only source of chance is `random.Random(str).random()`, whose stream Python guarantees across versions
- things of the world are chosen when the text first needs them, and then stay what they are to the last sentence
- names, pronouns and objects that earlier text determines are recorded with their spans (`Agreement`)
- pronouns stand only where one character can be meant; otherwise the teller says the name

The vocabulary is in `world`, the plots and their wording in `plots`. Their template language:
`[a|b]` one of these, `<a>` more often in longer stories, `@macro` a shared passage, `{slot}` a thing of the world.
Character slots (h hero, f friend, m grown-up, k stranger): `{h}` subject, `{h.o}` object, `{h.s}` possessive, each as a
pronoun where that is clear; `{H}` the name, `{H.s}` the name's possessive, `{h!}` a name that the text before
determines, `{h.he}`, `{h.him}`, `{h.his}`, `{h.self}` the pronoun within a clause, `{h.kind}` and so on its attributes.
`{^}` makes the next letter a capital, and "a" before a slot becomes "an" where the word asks for it.
Built in chapter 1.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from moemla.stories import plots, world

MIN_WORDS, MAX_WORDS = 100, 300

_LITERAL, _CHOICE, _OPTION, _MACRO, _CHARACTER, _THING, _ARTICLE, _CAPITAL = range(8)
_ROLES = "hfmk"
_PRONOUNS = (
    {"he": "he", "him": "him", "his": "his", "self": "himself"},
    {"he": "she", "him": "her", "his": "her", "self": "herself"},
)
_CASE = {"": "he", "o": "him", "s": "his"}  # what `{h}`, `{h.o}`, `{h.s}` become when a pronoun is clear
# Two things of one kind that a story may hold: the second is the wrong answer for the first, and the other way round.
_RIVAL = {"o": "x", "x": "o", "food": "food2", "food2": "food", "crop": "crop2", "crop2": "crop"}
_RIVAL |= {"baby": "baby2", "baby2": "baby"}
_TOKEN = re.compile(r"[\[\]|<>]|@[a-z]+|\{[^}]*\}|[^\[\]|<>@{]+")
# A question or an exclamation inside quotes may go on ("Why?" asked Mia), so its closing quote ends no sentence here.
_SENTENCE_END = re.compile(r'[.!?](?=\s|$)|\."(?=\s|$)|[?!]"(?=\n|\s[A-Z"])')
_TO_CAPITAL = re.compile(r'((?:^|\n|[.!?] |\." )"?|(?<=\s)")([a-z])')


@dataclass(frozen=True)
class Agreement:
    """A place in a story where earlier text determines the next word or words.

    `Story.text[start:end]` is right and `distractor` is wrong there; `antecedent` is the offset, at least a sentence
    earlier, where the one meant was introduced. `kind` is "name", "pronoun" or "object". A model agrees when it
    finds the right words likelier than the distractor.
    """

    kind: str
    start: int
    end: int
    antecedent: int
    distractor: str


@dataclass(frozen=True)
class Story:
    """A story of 100 to 300 words, paragraphs separated by a newline, and its agreements."""

    text: str
    agreements: tuple[Agreement, ...]


def story(seed: int, index: int) -> Story:
    """Story number `index` of the endless corpus `seed`: the same bytes on every machine."""
    for attempt in range(1000):
        teller = _Teller(random.Random(f"moemla:{seed}:{index}:{attempt}").random)
        told = teller.tell()
        if MIN_WORDS <= told.text.count(" ") + told.text.count("\n") + 1 <= MAX_WORDS:
            return told
    raise AssertionError(f"no story of {MIN_WORDS} to {MAX_WORDS} words for seed {seed}, index {index}")


def stories(count: int, seed: int = 0, start: int = 0) -> Iterator[Story]:
    """Stories `start` to `start + count - 1` of the corpus `seed`, one after the other."""
    for index in range(start, start + count):
        yield story(seed, index)


class _Character:
    """Someone in a story, and when the text last spoke of them."""

    def __init__(self, name: str, gender: int, attributes: dict[str, str]):
        self.name, self.gender, self.attributes = name, gender, attributes
        self.first_position = self.first_sentence = -1
        self.last_sentence = -9  # of any mention in this paragraph
        self.pronouns_in_a_row = 0


class _Teller:
    """Tells one story: walks a plot's template and keeps the world, the text so far and the discourse."""

    def __init__(self, uniform: Callable[[], float]):
        self.uniform = uniform
        self.world: dict[str, object] = {}
        self.cast: list[_Character] = []
        self.pieces: list[str] = []
        self.position = self.sentence = 0
        self.first_mention: dict[str, tuple[int, int]] = {}  # of a thing: position, sentence
        self.topic: _Character | None = None
        self.quoted = self.capital = self.space = False
        self.article = ""  # an "a" or "A" that waits for its word
        self.at_break = True  # at the start of a paragraph
        self.agreements: list[Agreement] = []

    def pick(self, n: int) -> int:
        return int(self.uniform() * n)

    def one_of(self, items):
        return items[self.pick(len(items))]

    def tell(self) -> Story:
        self.plot = self.one_of(plots.PLOTS)
        self.kind = self.one_of(self.plot.worlds)
        self.world.update(self.plot.fixed)
        # The longer the story, the more of its optional sentences are told: none, about half, all of them.
        self.detail = self.one_of(plots.DETAIL)
        self.run(_compile(self.plot.template))
        text = _TO_CAPITAL.sub(lambda match: match[1] + match[2].upper(), "".join(self.pieces))
        return Story(text, tuple(self.agreements))

    def run(self, nodes: tuple) -> None:
        for node in nodes:
            code = node[0]
            if code == _LITERAL:
                self.put(node[1])
                self.sentence += node[2]
                self.quoted ^= node[3]
                if node[4]:  # a new paragraph starts with names
                    self.topic = None
                    for character in self.cast:
                        character.last_sentence = -9
            elif code == _CHOICE:
                self.run(self.one_of(node[1]))
            elif code == _CHARACTER:
                self.refer(node[1], node[2], node[3], node[4])
            elif code == _THING:
                self.mention(node[1])
            elif code == _MACRO:
                self.run(_macro(node[1], self.kind))
            elif code == _OPTION:
                if self.detail == 2 or (self.detail == 1 and self.pick(2)):
                    self.run(node[1])
            elif code == _ARTICLE:
                self.article = node[1]
            else:
                self.capital = True
                self.sentence += 1

    def put(self, text: str) -> None:
        """Adds text. A space at its end waits for the next word, so that what is left out leaves no double space."""
        if text[:1] == " ":
            self.space, text = not self.at_break, text[1:]
        if not text:
            return
        if self.article:
            article, self.article = self.article, ""
            self.put(article + ("n " if text[0] in "aeiou" and not text.startswith(("uni", "use", "one")) else " "))
        if self.capital:
            text, self.capital = text[0].upper() + text[1:], False
        if self.space:
            self.space = False
            if text[0] not in "\n.,!?":
                text = " " + text
        if text[-1] == " ":
            self.space, text = True, text[:-1]
        self.pieces.append(text)
        self.position += len(text)
        self.at_break = text[-1] == "\n"

    def mention(self, key: str) -> None:
        """A thing of the world; a second mention in a later sentence is an agreement if its rival was mentioned."""
        value = self.thing(key)
        if "{" in value or "[" in value:
            self.run(_compile(value))
            return
        indefinite = self.article
        self.put(value)
        if key not in _RIVAL:
            return
        start = self.position - len(value)
        first = self.first_mention.setdefault(key, (start, self.sentence))
        if first[1] < self.sentence and _RIVAL[key] in self.first_mention and not indefinite:
            wrong = self.thing(_RIVAL[key])
            self.agreements.append(Agreement("object", start, self.position, first[0], wrong))

    def thing(self, key: str) -> str:
        if key not in self.world:
            world.choose(self, key)
        return self.world[key]

    def character(self, role: str) -> _Character:
        if role not in self.world:
            name, gender, attributes = world.character(self, role)
            self.world[role] = _Character(name, gender, attributes)
            self.cast.append(self.world[role])
        return self.world[role]

    def refer(self, role: str, form: str, named: bool, marked: bool) -> None:
        """A character by name or pronoun, in the form that the slot asks for."""
        who = self.character(role)
        if form in who.attributes:
            value = who.attributes[form]
            self.run(_compile(value)) if "{" in value or "[" in value else self.put(value)
            return
        rivalled = any(
            other is not who and other.gender == who.gender and other.last_sentence >= self.sentence - 1
            for other in self.cast
        )
        if form in _CASE:
            recent = who.last_sentence >= self.sentence - 1 and not rivalled and who.pronouns_in_a_row < 2
            if named or not recent or (form == "" and self.topic is not who):
                self.say_name(who, role, marked, "'s" if form == "s" else "")
            else:
                self.say_pronoun(who, _CASE[form])
                who.pronouns_in_a_row += form == ""
        elif form == "he" and rivalled and self.topic is not who:
            self.say_name(who, role, marked, "")
        else:
            self.say_pronoun(who, form)
        who.last_sentence = self.sentence
        if form in ("", "he") and not self.quoted:
            self.topic = who

    def say_name(self, who: _Character, role: str, marked: bool, ending: str) -> None:
        who.pronouns_in_a_row = 0
        start = self.position + self.space
        if who.first_position < 0:
            who.first_position, who.first_sentence = start, self.sentence
        elif marked and who.first_sentence < self.sentence:
            other = self.world.get("f" if role == "h" else "h")
            if other is not None and other.first_position >= 0:
                span = (start, start + len(who.name), who.first_position)
                self.agreements.append(Agreement("name", *span, other.name))
        self.put(who.name)
        self.put(ending)

    def say_pronoun(self, who: _Character, form: str) -> None:
        start, word = self.position + self.space, _PRONOUNS[who.gender][form]
        # The first word of a sentence that tells the gender is the one that reaches back.
        if 0 <= who.first_sentence < self.sentence and who.last_sentence < self.sentence:
            wrong = _PRONOUNS[1 - who.gender][form]
            self.agreements.append(Agreement("pronoun", start, start + len(word), who.first_position, wrong))
        self.put(word)


@cache
def _macro(name: str, kind: str) -> tuple:
    options = plots.MACROS.get(f"{name}.{kind}") or plots.MACROS[name]
    return ((_CHOICE, tuple(_compile(option) for option in options)),)


@cache
def _compile(template: str) -> tuple:
    """The nodes of a template. Raises ValueError when its brackets do not match."""
    tokens = _TOKEN.findall(template)
    return _parse(tokens, 0, "")[0]


def _parse(tokens: list[str], at: int, closing: str) -> tuple[tuple, int]:
    branches: list[list] = [[]]
    while at < len(tokens):
        token = tokens[at]
        at += 1
        if token == closing:
            break
        if token == "|":
            branches.append([])
        elif token == "[":
            node, at = _parse(tokens, at, "]")
            branches[-1].append(node)
        elif token == "<":
            inner, at = _parse(tokens, at, ">")
            branches[-1].append((_OPTION, inner))
        elif token in "]>":
            raise ValueError(f"template={''.join(tokens)!r}: {token!r} has no opening")
        elif token[0] == "@":
            branches[-1].append((_MACRO, token[1:]))
        elif token[0] == "{":
            branches[-1].append(_slot(token[1:-1]))
        else:
            dynamic = at < len(tokens) and tokens[at][0] in "[{"
            article = dynamic and re.search(r"(?:^|[\s\"])[aA] $", token)
            literal = token[:-2] if article else token
            if literal:
                ends = len(_SENTENCE_END.findall(literal))
                quote = literal.count('"') % 2 == 1
                branches[-1].append((_LITERAL, literal, ends, quote, "\n" in literal))
            if article:
                branches[-1].append((_ARTICLE, token[-2]))
    else:
        if closing:
            raise ValueError(f"template={''.join(tokens)!r}: lacks {closing!r}")
    if closing == "]":
        return (_CHOICE, tuple(tuple(branch) for branch in branches)), at
    if len(branches) > 1:
        raise ValueError(f"template={''.join(tokens)!r}: '|' stands outside brackets")
    return tuple(branches[0]), at


def _slot(text: str) -> tuple:
    if text == "^":
        return (_CAPITAL,)
    if text in _PRONOUNS[0]:  # the hero's, for short
        return (_CHARACTER, "h", text, False, False)
    head, _, form = text.partition(".")
    marked = head.endswith("!")
    role = head.rstrip("!")
    if role.lower() in _ROLES and len(role) == 1:
        return (_CHARACTER, role.lower(), form, role.isupper() or marked, marked)
    return (_THING, text.rstrip("!"))
