"""The classes that a reader builds in the chapters go through the same property tests as the library's."""

from functools import cache

import numpy as np
import pytest
import torch

from moemla import KVCache, MultiHeadAttention, Tokenizer
from moemla.ngrams import NGram
from moemla.stories import stories
from tools.browser import ROOT
from tools.chapter_code import load_definitions

TEXTS = [story.text for story in stories(60, seed=5)]
STRANGE = ["", "naïve café", "😊 漢字", "tabs\tand\n\nlines  ", "<|endoftext|>", "\x00\x7f", "Don't! 12 34?"]


@cache
def chapter(name):
    return load_definitions(ROOT / "book" / f"{name}.ipynb")


def tokenizers():
    yield "library", lambda: Tokenizer.train(TEXTS, 400)
    yield "chapter", lambda: chapter("01-stories-and-tokens").BytePairs().train(TEXTS, 400)


def counted():
    def library(order, documents):
        return NGram(order, 400).fit(np.concatenate(documents), np.cumsum([0, *map(len, documents)])).distribution

    def by_hand(order, documents):
        model = chapter("01-stories-and-tokens").Counted(order, 400).fit(documents)
        return lambda context: np.array([model.probability(context, token) for token in range(400)])

    yield "library", library
    yield "chapter", by_hand


def attentions():
    yield "library", lambda: MultiHeadAttention(d_model=32, n_heads=4)
    yield "chapter", lambda: chapter("02-multi-head-attention").CausalAttention(32, 4)


def each(pairs):
    return pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in pairs])


# ---- chapter 1


@each(tokenizers())
def test_nothing_is_lost_and_no_text_ends_a_story(make):
    tokenizer = make()
    for text in [*STRANGE, *TEXTS[:5]]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert 0 not in ids


@each(tokenizers())
def test_merging_shortens(make):
    assert sum(len(make().encode(text)) for text in TEXTS) < 0.6 * sum(len(text.encode()) for text in TEXTS)


@each(counted())
@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one_in_every_context(make, order):
    tokenizer = Tokenizer.train(TEXTS, 400)
    documents = [np.array([0, *tokenizer.encode(text)]) for text in TEXTS]
    distribution = make(order, documents)
    for context in ([], [0], documents[0][3:5].tolist(), [399, 398], [0, 399]):
        p = distribution(context)
        assert p.shape == (400,) and (p >= 0).all()
        assert abs(p.sum() - 1) < 1e-9


# ---- chapter 2


@each(attentions())
def test_no_output_depends_on_a_later_input(make):
    x = torch.randn(1, 6, 32, requires_grad=True)
    out = make()(x)
    for i in range(6):
        (slope,) = torch.autograd.grad(out[0, i].sum(), x, retain_graph=True)
        assert (slope[0, i + 1 :] == 0).all() and slope[0, i].abs().max() > 0


@each(attentions())
def test_the_past_is_a_set(make):
    layer, x = make(), torch.randn(2, 8, 32)
    order = torch.cat((torch.randperm(7), torch.tensor([7])))
    torch.testing.assert_close(layer(x)[:, -1], layer(x[:, order])[:, -1], atol=1e-5, rtol=1e-5)


@each(attentions())
def test_rows_of_a_batch_do_not_meet(make):
    layer, x = make(), torch.randn(3, 5, 32)
    alone = torch.cat([layer(row[None]) for row in x])
    torch.testing.assert_close(layer(x), alone, atol=1e-5, rtol=1e-5)


def _library_steps(layer, x):
    held, out = KVCache(batch_size=2, max_len=8, n_kv_heads=4, d_head=8), []
    for t in range(x.shape[1]):
        out.append(layer(x[:, t : t + 1], held[0]))
        held.advance(1)
    return torch.cat(out, dim=1)


def _chapter_steps(layer, x):
    code = chapter("02-multi-head-attention")
    held = code.Cache(2, 4, max_len=8, d_head=8)
    return torch.cat([code.step(layer, x[:, t : t + 1], held) for t in range(x.shape[1])], dim=1)


@pytest.mark.parametrize(
    ("make", "steps"),
    [
        pytest.param(dict(attentions())["library"], _library_steps, id="library"),
        pytest.param(dict(attentions())["chapter"], _chapter_steps, id="chapter"),
    ],
)
def test_token_by_token_equals_all_at_once(make, steps):
    layer, x = make(), torch.randn(2, 8, 32)
    with torch.no_grad():
        torch.testing.assert_close(steps(layer, x), layer(x), atol=1e-5, rtol=1e-5)
