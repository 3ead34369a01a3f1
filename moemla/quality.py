"""What can be counted in a told story without a judge: who is in it, pronouns that agree, phrases nobody has written.

The counts know the built-in stories: their names (`moemla.stories.world`) and who is a he. They say nothing of a story
from elsewhere. Case counts: Ivy is somebody, ivy is a plant. Built in chapter 18.
"""

import re
from collections.abc import Iterable
from itertools import pairwise

from moemla.config import require_count
from moemla.stories import world

HE = frozenset(world.BOYS + world.HE_ANIMALS)
SHE = frozenset(world.GIRLS + world.SHE_ANIMALS)
MENTIONS = 10  # of names, from the start of a story; those of the corpus have eight or more in 150 words
_WORD = re.compile(r"[A-Za-z]+(?:'(?!s\b)[a-z]+)?|'s\b|[.,!?]")
_SPEECH = re.compile(r'"[^"]*"?')


def words(text: str) -> list[str]:
    """Words and the marks . , ! ? in their order, 's on its own; quotation marks and line ends are left out."""
    return _WORD.findall(text)


def names(text: str) -> list[str]:
    """Every mention of a name, in order. Aunts and uncles do not count, nor who has only a trade."""
    return [word for word, named in _marked(text) if named]


def _marked(text: str) -> list[tuple[str, bool]]:
    """Each word, and whether it names somebody; Uncle Ned is an uncle."""
    pairs = pairwise(["", *words(text)])
    return [(word, (word in HE or word in SHE) and before not in ("Uncle", "Aunt")) for before, word in pairs]


def cast(text: str, mentions: int = MENTIONS) -> int:
    """How many different names stand among the first mentions: 2 in a story of the corpus.

    A model that forgets whom its story is about names somebody else each time. A text of fewer mentions can only have
    fewer names.
    """
    require_count("mentions", mentions)
    return len(set(names(text)[:mentions]))


def pronouns(text: str) -> tuple[int, int]:
    """How many times he and she, outside speech, are right and wrong.

    Counted only while all who were named so far are of one gender, so that there is one right word. An aunt or an
    uncle may be meant: in the corpus one in two hundred is counted as wrong.
    """
    right = wrong = 0
    named: set[bool] = set()  # whether those named so far are a he
    for word, is_name in _marked(_SPEECH.sub(" ", text)):
        if is_name:
            named.add(word in HE)
        elif word.lower() in ("he", "she") and len(named) == 1:
            agrees = (word.lower() == "he") in named
            right, wrong = right + agrees, wrong + (not agrees)
    return right, wrong


class Phrases:
    """The phrases of some texts: all sequences of `length` words, every name taken for the same word.

    `unknown(text)` counts a text's phrases that are not among them: a measure of grammar that needs no grammar. It
    takes a good new sentence for a mistake where its words never stood side by side.
    """

    def __init__(self, texts: Iterable[str], length: int = 3):
        require_count("length", length)
        self.length, self.known = length, set()
        for text in texts:
            self.known.update(self._of(text))

    def unknown(self, text: str) -> int:
        """How many of the text's phrases are in none of the texts, each occurrence counted."""
        return sum(phrase not in self.known for phrase in self._of(text))

    def _of(self, text: str) -> Iterable[tuple[str, ...]]:
        masked = ["NAME" if named else word for word, named in _marked(text)]
        return zip(*(masked[start:] for start in range(self.length)), strict=False)
