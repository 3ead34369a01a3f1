"""What is counted in a told story: on the corpus, on stories with a planted fault, and by hand."""

import random

import pytest

from moemla.quality import HE, SHE, Phrases, cast, names, pronouns, words
from moemla.stories import stories

HELD_OUT = [story.text for story in stories(200, seed=1)]


def test_by_hand():
    text = 'Mia met Tom by the ivy. "He is late, Mia," said Ivy.\nShe ran, and Tom\'s hat fell!'
    assert words("No! I can't, Tom's dad\nsaid.") == ["No", "!", "I", "can't", ",", "Tom", "'s", "dad", "said", "."]
    assert names(text) == ["Mia", "Tom", "Mia", "Ivy", "Tom"]  # the plant is nobody
    assert cast(text) == 3 and cast(text, 1) == 1 and cast(text, 2) == cast(text, 3) == 2
    assert cast("Nobody was there.") == 0 and names("") == []
    assert names("Uncle Ned met Ned, Aunt Rosa and Mom.") == ["Ned"]


def test_no_name_is_both():
    assert not HE & SHE and len(HE | SHE) > 200


@pytest.mark.parametrize(
    "text, counted",
    [
        ("Mia sat down. She ate. He ate.", (1, 1)),
        ("Tom sat. He ate, and he slept.", (2, 0)),
        ('Tom sat. "She is late," he said.', (1, 0)),  # speech is left out
        ('Tom sat. "She is late', (0, 0)),  # a story may end within it
        ("He saw Mia.", (0, 0)),  # nobody was named before
        ("Tom saw Mia. He ran and she ran.", (0, 0)),  # either may be meant
        ("Mia and Amy sat. She ate.", (1, 0)),
        ("Mia sat. Her hat fell on him.", (0, 0)),
        ("Mia sat with Uncle Ned. She ate.", (1, 0)),
        ('"Tom!" said Mia. She ran.', (1, 0)),  # a name in speech does not count either
    ],
)
def test_pronouns(text, counted):
    assert pronouns(text) == counted


def test_the_corpus_is_what_the_counts_say():
    """Two names, pronouns that agree: figures of the docstrings."""
    casts = [cast(text) for text in HELD_OUT]
    assert set(casts) == {2}
    assert min(len(names(" ".join(text.split(" ")[:150]))) for text in HELD_OUT) >= 8
    right, wrong = (sum(counts) for counts in zip(*map(pronouns, HELD_OUT), strict=True))
    assert right > 300 and wrong <= 0.02 * right


def test_renaming_changes_nothing():
    """Another boy for the boy, another girl for the girl, everywhere."""
    he, she = sorted(HE), sorted(SHE)
    others = dict(zip(he, he[1:] + he[:1], strict=True)) | dict(zip(she, she[1:] + she[:1], strict=True))
    phrases = Phrases(HELD_OUT[:50])
    for text in HELD_OUT[50:80]:
        renamed = text
        for name in set(names(text)):
            renamed = renamed.replace(name, f"<{name}>")
        for name in set(names(text)):
            renamed = renamed.replace(f"<{name}>", others[name])
        assert renamed != text and cast(renamed) == cast(text) and pronouns(renamed) == pronouns(text)
        assert phrases.unknown(renamed) == phrases.unknown(text)


def test_a_stranger_is_seen():
    rng = random.Random(0)
    for text in HELD_OUT[:50]:
        told = names(text)
        stranger = rng.choice(sorted((HE | SHE) - set(told)))
        third = text.index(told[2], text.index(told[1], text.index(told[0]) + 1) + 1)
        assert cast(text[:third] + stranger + text[third + len(told[2]) :]) == cast(text) + 1


def test_phrases_by_hand():
    known = Phrases(["The cat sat. The cat ran."], length=2)
    assert known.unknown("The cat sat. The cat ran.") == 0
    assert known.unknown("The cat sat") == 0 and known.unknown("sat cat") == 1  # order counts
    assert known.unknown("The dog ran. The dog ran.") == 4  # (The, dog), (dog, ran), each twice
    assert known.unknown("") == known.unknown("Moon") == 0  # no phrase at all
    assert Phrases(["Tom ran to Mia."]).unknown("Amy ran to Amy.") == 0  # names are one word
    assert Phrases([]).unknown("a b c d") == 2 and Phrases(iter(["a b c"])).unknown("a b c") == 0


def test_two_exchanged_words_are_seen():
    """What the chapter relies on: a story with two words exchanged has more unknown phrases, nearly always."""
    known = Phrases(story.text for story in stories(3000))
    rng, seen = random.Random(0), 0
    for text in HELD_OUT[:100]:
        pieces = text.split(" ")
        at = rng.randrange(len(pieces) - 1)
        pieces[at : at + 2] = pieces[at + 1], pieces[at]
        seen += known.unknown(" ".join(pieces)) > known.unknown(text)
    assert seen >= 85


@pytest.mark.parametrize("wrong", [0, -1, True])
def test_wrong_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="mentions="):
        cast("Tom", wrong)
    with pytest.raises(ValueError, match="length="):
        Phrases([], wrong)
