"""Counted models: equal to a slow, plain counting of the formula, and a distribution for every context."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from moemla.ngrams import FALLBACK_DISCOUNTS, NGram, _discounts


def packed(stories: list[list[int]], eot: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and documents as a shard holds them."""
    tokens = [token for story in stories for token in (eot, *story)]
    starts = np.cumsum([0] + [1 + len(story) for story in stories])
    return np.array(tokens, dtype=np.uint16), starts


def slow_probability(stories, order, vocab_size, context, word):
    """The formula in the module's docstring, word for word, with sets and dictionaries."""
    counts = [defaultdict(int) for _ in range(order + 1)]  # by length
    before = [defaultdict(set) for _ in range(order + 1)]
    for story in stories:
        story = (0, *story)
        for end in range(2, len(story) + 1):
            for m in range(1, min(order, end) + 1):
                gram = story[end - m : end]
                counts[m][gram] += 1
                if end > m:
                    before[m][gram].add(story[end - m - 1])

    def p(m, context):
        if m == 0:
            return 1 / vocab_size
        lower = p(m - 1, context[1:])
        a = {g: c if m == order or not before[m][g] else len(before[m][g]) for g, c in list(counts[m].items())}
        found = _discounts(np.array(list(a.values()), dtype=np.int64))
        discount = {g: found[min(c, 3) - 1] for g, c in a.items()}
        same = [g for g in a if g[:-1] == context]
        if not same:
            return lower
        total = sum(a[g] for g in same)
        gram = (*context, word)
        top = a[gram] - discount[gram] if gram in a else 0.0
        return top / total + sum(discount[g] for g in same) / total * lower

    context = tuple(context)[max(0, len(context) - order + 1) :]
    return p(len(context) + 1, context)


corpora = st.lists(st.lists(st.integers(1, 5), max_size=8), min_size=1, max_size=8).filter(any)


@settings(deadline=None, max_examples=60)
@given(stories=corpora, order=st.integers(1, 5), context=st.lists(st.integers(0, 6), max_size=6))
def test_equal_to_plain_counting_for_any_context(stories, order, context):
    model = NGram(order, vocab_size=7).fit(*packed(stories))
    expected = [slow_probability(stories, order, 7, context, word) for word in range(7)]
    np.testing.assert_allclose(model.distribution(context), expected, rtol=1e-12)


@settings(deadline=None, max_examples=60)
@given(stories=corpora, order=st.integers(1, 5), context=st.lists(st.integers(0, 6), max_size=6))
def test_every_context_has_a_distribution(stories, order, context):
    p = NGram(order, vocab_size=7).fit(*packed(stories)).distribution(context)
    assert p.shape == (7,)
    assert (p > 0).all()
    assert p.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_large_vocabulary_sums_to_one_in_seen_and_unseen_contexts(order):
    """At order 4 the numbers fill all 64 bits."""
    rng = np.random.default_rng(0)
    stories = [(65_535 - rng.zipf(1.3, size=200).clip(max=65_535)).tolist() for _ in range(50)]
    model = NGram(order, vocab_size=65_536).fit(*packed(stories, eot=65_535))
    for context in ([65_535], stories[0][:3], [65_535, *stories[1][:2]], [1, 2, 3], [65_534, 65_534, 65_534]):
        assert model.distribution(context).sum() == pytest.approx(1, abs=1e-9)
    document = np.array([65_535, *stories[2]], dtype=np.uint16)
    one_by_one = [model.distribution(document[:i])[document[i]] for i in range(1, 40)]
    np.testing.assert_allclose(model.score(document)[:39], -np.log(one_by_one), rtol=1e-12)


def test_a_bigram_by_hand():
    """Stories `1 2` and `1 3`: the counts are too few to estimate discounts, so 0.5 is taken from a count of one.

    Unigrams: 1 stood behind EOT, 2 and 3 behind 1: a = 1 each of 3; half goes to the uniform 1/4.
    """
    model = NGram(2, vocab_size=4).fit(*packed([[1, 2], [1, 3]]))
    unigram = np.array([0, 1, 1, 1]) * (0.5 / 3) + 0.5 / 4
    np.testing.assert_allclose(model.distribution([]), unigram)
    # after EOT: 1 twice, 1.0 of 2 taken; after 1: 2 and 3 once each, half taken
    np.testing.assert_allclose(model.distribution([0]), np.array([0, 0.5, 0, 0]) + 0.5 * unigram)
    np.testing.assert_allclose(model.distribution([1]), np.array([0, 0, 0.25, 0.25]) + 0.5 * unigram)
    np.testing.assert_allclose(model.distribution([3]), unigram)  # nothing ever followed 3


@settings(deadline=None, max_examples=40)
@given(stories=corpora, order=st.integers(1, 4), heldout=st.lists(st.integers(1, 6), min_size=1, max_size=9))
def test_scores_are_the_logarithms_of_the_distributions(stories, order, heldout):
    model = NGram(order, vocab_size=7).fit(*packed(stories))
    document = np.array([0, *heldout], dtype=np.uint16)
    nats = model.score(document)
    assert nats.shape == (len(heldout),)
    expected = [-math.log(model.distribution(document[:i])[document[i]]) for i in range(1, len(document))]
    np.testing.assert_allclose(nats, expected, rtol=1e-12)


@settings(deadline=None, max_examples=40)
@given(stories=corpora, order=st.integers(1, 4), heldout=corpora)
def test_stories_are_separate(stories, order, heldout):
    """Scoring a shard is scoring its stories one by one, and the order of stories does not matter in training."""
    model = NGram(order, vocab_size=7).fit(*packed(stories))
    apart = [model.score(np.array([0, *story], dtype=np.uint16)) for story in heldout]
    np.testing.assert_array_equal(model.nats(*packed(heldout)), np.concatenate(apart))
    turned = NGram(order, vocab_size=7).fit(*packed(stories[::-1]))
    np.testing.assert_array_equal(turned.nats(*packed(heldout)), model.nats(*packed(heldout)))


def test_end_and_start_tokens_are_not_scored():
    tokens, documents = packed([[1, 2], [], [3]])
    assert NGram(3, vocab_size=4).fit(tokens, documents).nats(tokens, documents).shape == (3,)


def test_longer_contexts_help_on_text_that_needs_them():
    """Tokens of a process with a memory of two: the trigram must come near its entropy, the bigram must not."""
    rng = np.random.default_rng(1)
    table = rng.dirichlet(np.full(8, 0.1), size=(9, 9))  # p(next | two before), ids 1 to 8

    def story():
        a, b, out = 0, 0, []
        for _ in range(300):
            a, b = b, 1 + rng.choice(8, p=table[a, b])
            out.append(int(b))
        return out

    train, heldout = packed([story() for _ in range(80)]), [story() for _ in range(20)]
    true = [-math.log(table[a, b][c - 1]) for s in heldout for a, b, c in zip([0, 0, *s], [0, *s], s, strict=False)]
    nats = [NGram(order, 9).fit(*train).nats(*packed(heldout)).mean() for order in (1, 2, 3, 4)]
    assert nats[0] > nats[1] + 0.2 > nats[2] + 0.6
    assert 0.97 * np.mean(true) < nats[2] < 1.05 * np.mean(true)
    assert nats[2] < nats[3] < 1.05 * nats[2]  # a memory of three only costs


def test_discounts_follow_chen_and_goodman():
    counts = np.repeat([1, 2, 3, 4, 9], [100, 30, 12, 7, 5])
    y = 100 / 160
    expected = (1 - 2 * y * 30 / 100, 2 - 3 * y * 12 / 30, 3 - 4 * y * 7 / 12)
    assert _discounts(counts) == pytest.approx(expected)
    for degenerate in ([1, 1, 1], [2, 2, 3], np.repeat([1, 2, 3, 4], [1, 1, 9, 9])):
        assert _discounts(np.array(degenerate)) == FALLBACK_DISCOUNTS


def test_stories_shorter_than_the_order_are_counted_as_far_as_they_go():
    short, enough = (NGram(order, vocab_size=4).fit(*packed([[1], [2]])) for order in (4, 2))
    np.testing.assert_array_equal(short.distribution([0]), enough.distribution([0]))
    assert short.distribution([0, 1, 2]).sum() == pytest.approx(1)


def test_a_million_tokens_are_counted_in_seconds():
    import time

    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.2, size=1_000_000).clip(max=4095).astype(np.uint16)
    documents = np.arange(0, 1_000_001, 200)
    tokens[documents[:-1]] = 0
    start = time.perf_counter()
    NGram(4, 4096).fit(tokens, documents).nats(tokens[:20_000], documents[:101])
    assert time.perf_counter() - start < 12  # 5 million within a minute


@pytest.mark.parametrize(
    ("order", "vocab_size", "message"),
    [
        (0, 4096, "order=0: must be 1 to 5 for vocab_size=4096"),
        (6, 4096, "order=6: must be 1 to 5"),
        (5, 50_257, "order=5: must be 1 to 4 for vocab_size=50257"),
        (2, 1, "vocab_size=1: must be 2 or more"),
    ],
)
def test_what_does_not_fit_is_refused(order, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        NGram(order, vocab_size)


def test_wrong_input_is_named():
    model = NGram(2, vocab_size=4)
    tokens, documents = packed([[1, 2], [3]])
    with pytest.raises(ValueError, match=r"call fit\(tokens, documents\) first"):
        model.nats(tokens, documents)
    with pytest.raises(ValueError, match=r"documents: must start with 0 and end with len\(tokens\) = 5"):
        model.fit(tokens, documents[:-1])
    with pytest.raises(ValueError, match="tokens=0 to 4: must be 0 to 3"):
        model.fit(*packed([[4]]))
    with pytest.raises(ValueError, match="nothing to count"):
        model.fit(*packed([[], []]))
    with pytest.raises(ValueError, match="tokens=9 to 9: must be 0 to 3"):
        model.fit(tokens, documents).distribution([9])
