"""Scores against sums written out story by story, shuffled sentences, and agreement on a model whose taste is known."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings, strategies as st

from moemla import evaluation
from moemla.config import ModelConfig
from moemla.errors import DataError, MoemlaError
from moemla.evaluation import (
    agreement_accuracy,
    bits_per_byte,
    document_nats,
    evaluate,
    perplexity,
    shuffle_sentences,
)
from moemla.model import LanguageModel
from moemla.stories import Agreement, Story, story
from moemla.tokenizer import Tokenizer
from tests.runs import STORIES, micro

KINDS = {
    "moe-mla": {},
    "moe-decoupled": dict(attention="mla-decoupled"),
    "mha-learned": dict(attention="mha", positions="learned", ffn="dense"),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES, 300)


def sharp(**changes) -> LanguageModel:
    """A model with opinions: weights far larger than fresh ones."""
    torch.manual_seed(1)
    model = LanguageModel(micro(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8)
    return model


def documents(*lengths: int) -> list[list[int]]:
    return [[0, *torch.randint(1, 300, (length,)).tolist()] for length in lengths]


def one_at_a_time(model: LanguageModel, document: list[int], context: int) -> float:
    """In float64, without padding, and written as the definition: stride by stride, token by token."""
    model = copy.deepcopy(model).double().eval()
    nats = 0.0
    for start in range(0, len(document) - 1, context):
        piece = document[start : start + context + 1]
        with torch.no_grad():
            logits = model(torch.tensor([piece[:-1]]))[0]
        for here, token in zip(logits, piece[1:], strict=True):
            nats += (here.exp().sum().log() - here[token]).item()
    return nats


# --- nats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [None, 64, 16, 7, 1], ids=str)
def test_nats_are_those_of_each_story_alone(kind, context):
    model, stories = sharp(**KINDS[kind]), documents(5, 64, 63, 65, 1, 150, 16, 33, 5)
    expected = torch.tensor([one_at_a_time(model, story, context or 64) for story in stories], dtype=torch.float64)
    found = document_nats(model, stories, context)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-4)


def test_a_story_does_not_depend_on_its_neighbours(monkeypatch):
    model, stories = sharp(), documents(3, 60, 20, 100, 20)
    together = document_nats(model, stories)
    alone = torch.cat([document_nats(model, [story]) for story in stories])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(document_nats(model, stories[::-1]).flip(0), together, rtol=1e-5, atol=1e-4)
    monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 50)  # a batch for nearly every story
    torch.testing.assert_close(document_nats(model, stories), together, rtol=1e-5, atol=1e-4)


def test_nothing_scored_is_nothing():
    assert document_nats(sharp(), [[0], [0, 5]])[0] == 0
    assert document_nats(sharp(), []).shape == (0,)


def test_the_model_is_left_as_it_was():
    model = sharp(dropout=0.5)
    stories = documents(30, 10)
    expected = document_nats(model, stories)
    model.train()
    assert torch.equal(document_nats(model, stories), expected)  # without dropout
    assert model.training
    with pytest.raises(ValueError, match="tokens="):
        document_nats(model, [[0, 300, 1]])  # no such token
    assert model.training


@pytest.mark.parametrize("context", [0, -5, 65])
def test_a_context_that_is_none_is_named(context):
    with pytest.raises(ValueError, match=rf"context={context}.*max_seq_len=64"):
        document_nats(sharp(), documents(5), context)


# --- evaluate -------------------------------------------------------------------------------------


def test_the_figures_by_hand(tokenizer):
    model, texts = sharp(), ["Tom saw a cat.", "“Wow!” said Mia. 😀", "", "A", "Mia " * 60]
    found = evaluate(model, tokenizer, iter(texts), context=16)
    stories = [tokenizer.encode(text) for text in texts if text]
    nats = sum(one_at_a_time(model, [tokenizer.eot, *ids], 16) for ids in stories)
    assert found.stories == 4
    assert found.tokens == sum(len(ids) for ids in stories)  # neither start nor end token
    assert found.bytes == sum(len(text.encode()) for text in texts) > sum(map(len, texts))
    assert found.nats_per_token == pytest.approx(nats / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / found.bytes, rel=1e-5)
    assert found.to_dict()["tokens"] == found.tokens


def test_a_model_that_knows_nothing(tokenizer):
    """Equal logits: ln V a token, V equally likely, and log2 V bits over the bytes of a token."""
    model = sharp()
    with torch.no_grad():
        model.embedding.weight.zero_()  # the head too
    found = evaluate(model, tokenizer, STORIES[:3])
    assert found.nats_per_token == pytest.approx(math.log(300), rel=1e-6)
    assert found.perplexity == pytest.approx(300, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(math.log2(300) * found.tokens / found.bytes, rel=1e-6)
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)


def test_load_counts_every_scored_token_once(tokenizer):
    """Padding, batches and strides leave no trace in the counts."""
    model = sharp()
    with torch.no_grad():
        for block in model.blocks:
            block.feedforward.router.bias[1] = -100  # never chosen
    counts = torch.zeros(2, 4, dtype=torch.long)
    for text in STORIES[:5]:
        with torch.no_grad():
            model(torch.tensor([[tokenizer.eot, *tokenizer.encode(text)][:-1]]))
        counts += torch.stack([routing.counts for routing in model.routing()])
    found = evaluate(model, tokenizer, STORIES[:5])
    tokens = sum(len(tokenizer.encode(text)) for text in STORIES[:5])
    assert counts.sum(1).tolist() == [2 * tokens] * 2
    load = counts.double()
    assert found.load_cv == pytest.approx((load.std(1, correction=0) / load.mean(1)).mean().item())
    assert found.load_max_violation == pytest.approx((load.max(1).values / load.mean(1) - 1).max().item())
    assert found.load_cv_floor == pytest.approx(math.sqrt((1 - 2 / 4) * 4 / (2 * tokens)))
    assert found.dead_experts == 2  # one in each layer
    assert not any(module._forward_hooks for module in model.modules())
    assert all(block.feedforward.router.load.sum() == 0 for block in model.blocks)  # the balancer's are its own


def test_a_dense_model_has_no_load(tokenizer):
    found = evaluate(sharp(**KINDS["mha-learned"]), tokenizer, STORIES[:2])
    assert (found.load_cv, found.load_cv_floor, found.load_max_violation, found.dead_experts) == (None,) * 4


@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_without_stories_there_is_nothing_to_evaluate(tokenizer, texts):
    with pytest.raises(DataError, match="no story"):
        evaluate(sharp(), tokenizer, texts)


# --- what is no number ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_model_whose_nats_are_no_numbers_is_refused(tokenizer, number):
    """One wrong row of the table: the first story that has this token is named, and nothing is given back."""
    model, texts = sharp(tie_embeddings=False), ["Tom saw a cat.", "Mia saw a cat.", "Tom saw Mia."]
    only = set(tokenizer.encode(texts[1])) - set(tokenizer.encode(texts[0]))
    with torch.no_grad():
        model.embedding.weight[min(only)] = number
    says = r"^story 2 of 3 has nan nats: the weights are damaged, or their training diverged$"
    with pytest.raises(MoemlaError, match=says):
        evaluate(model, tokenizer, texts)
    with torch.no_grad():
        model.head.weight[5] = number
    with pytest.raises(MoemlaError, match=r"^story 1 of \d+ has (nan|inf) nats: the weights are damaged"):
        agreement_accuracy(sharp_like(model), tokenizer, [marked("Tom saw Mia.", ("name", "Mia", "Tom"))])
    assert not any(module._forward_hooks for module in model.modules())


def sharp_like(model: LanguageModel) -> LanguageModel:
    """A copy, in training mode: what is refused leaves it so."""
    return copy.deepcopy(model).train()


def test_a_perplexity_beyond_what_a_float_holds(tokenizer):
    model = sharp(tie_embeddings=False)
    with torch.no_grad():
        model.head.weight *= 1e4
    found = evaluate(model, tokenizer, STORIES[:2])
    assert found.nats_per_token > 710 and found.perplexity == math.inf
    assert found.to_dict()["perplexity"] is None and json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert perplexity(709.0) == math.exp(709.0) and perplexity(710.0) == math.inf and perplexity(0.0) == 1.0


def test_frozen_blocks_stay_in_eval_mode():
    model = sharp(dropout=0.5).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    document_nats(model, documents(5, 9))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="tokens="):
        document_nats(model, [[0, 300, 1]])
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


# --- memory ---------------------------------------------------------------------------------------


def test_blocks_of_rows_change_nothing(monkeypatch):
    model, stories = sharp(), documents(5, 64, 63, 65, 1, 33)
    whole = document_nats(model, stories)
    seen = []
    model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape))
    for rows in (1, 7, 64):
        monkeypatch.setattr(evaluation, "CHUNK", rows)
        torch.testing.assert_close(document_nats(model, stories), whole, rtol=1e-6, atol=1e-5)
        assert max(shape[0] for shape in seen) <= rows
        seen.clear()


PEAK = """
import torch, moemla
from moemla.evaluation import document_nats
from tests.helpers import peak_memory
torch.set_num_threads(1)
model = moemla.LanguageModel(moemla.ModelConfig.preset("SIZE", vocab_size=50257))
stories = [[50256, *torch.randint(0, 50257, (length,)).tolist()] for length in (LENGTHS)]
assert 10 < document_nats(model, stories).sum() / sum(len(story) - 1 for story in stories) < 12
print(peak_memory() / 1e9)
"""


@pytest.mark.parametrize(
    "size,lengths",
    [("tiny", "[255] * 16"), pytest.param("XS", "[511] * 20 + [300] * 20", marks=pytest.mark.slow)],
    ids=["tiny", "XS"],
)
def test_evaluation_at_gpt2s_vocabulary_takes_little_memory(size, lengths):
    """All logits of a batch of 8,192 tokens would take 1.6 GB, and cross-entropy as much again."""
    code = PEAK.replace("SIZE", size).replace("LENGTHS", lengths)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 1.2, f"{done.stdout} GB"


# --- shuffled sentences ---------------------------------------------------------------------------

SENTENCES = st.lists(
    st.builds(
        lambda first, rest, end: f"{first}{rest}{end}",
        st.sampled_from(["Tom", '"Look', "A cat", '"I', "Mia"]),
        st.text("abc ,'", max_size=12).map(lambda text: " x" + text.rstrip() + "y"),
        st.sampled_from([".", "!", "?", '."', '?" asked Ben.', '!" she said.']),
    ),
    min_size=1,
    max_size=12,
)


@given(SENTENCES, st.lists(st.sampled_from([" ", "\n", "\n\n"]), min_size=12, max_size=12), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_shuffling_moves_whole_sentences_and_loses_none(sentences, gaps, seed):
    gaps = gaps[: len(sentences) - 1]
    text = "".join(a + b for a, b in zip(sentences, [*gaps, ""], strict=True))
    shuffled = shuffle_sentences(text, seed)
    assert shuffled == shuffle_sentences(text, seed)
    rest = shuffled
    left = Counter(sentences)
    for gap in [*gaps, ""]:  # the gaps stay where they were, whatever stands between them
        fits = [one for one in left if rest.startswith(one + gap) and left[one]]
        assert fits, (shuffled, rest)
        longest = max(fits, key=len)
        left[longest] -= 1
        rest = rest[len(longest) + len(gap) :]
    assert rest == "" and not any(left.values())


def test_shuffling_is_a_shuffle():
    sentences = [f"Sentence {word}." for word in ("one", "two", "three", "four", "five", "six")]
    text = "\n".join(" ".join(sentences[i : i + 2]) for i in (0, 2, 4))
    seen = {shuffle_sentences(text, seed) for seed in range(20)}
    assert len(seen) > 15
    assert all(one.count("\n") == 2 and sorted(one.replace("\n", " ").split(". ")) for one in seen)
    assert shuffle_sentences("Only one sentence.") == "Only one sentence." and shuffle_sentences("") == ""


def test_what_a_speaker_says_stays_with_the_speaker():
    text = 'It rained. "Why?" asked Mia. "Come in!" he said.'
    parts = {"It rained.", '"Why?" asked Mia.', '"Come in!" he said.'}
    for seed in range(6):
        shuffled = shuffle_sentences(text, seed)
        assert all(part in shuffled for part in parts) and len(shuffled) == len(text)


def test_a_built_in_story_keeps_its_words():
    text = story(0, 3).text
    assert Counter(shuffle_sentences(text).split()) == Counter(text.split())
    assert shuffle_sentences(text) != text


# --- agreement ------------------------------------------------------------------------------------


class Taste(LanguageModel):
    """Likes each byte as much as it is told, whatever came before."""

    def __init__(self, likes: dict[str, float]):
        super().__init__(ModelConfig(vocab_size=257, max_seq_len=128, d_model=8, n_heads=1, n_layers=1, ffn="dense"))
        self.bytes_only = Tokenizer.train(["a"], 257)
        table = torch.zeros(257)
        for letter, value in likes.items():
            table[self.bytes_only.encode(letter)] = value
        self.register_buffer("table", table)
        del self.head
        self.head = self.likes

    def features(self, tokens, *, cache=None, lengths=None):
        return tokens[..., None].float()

    def likes(self, x):
        return self.table.expand(*x.shape[:-1], 257)


def marked(text: str, *marks: tuple[str, str, str]) -> Story:
    """A story with (kind, right word, distractor) marked at the word's last place in the text."""
    places = ((kind, text.rindex(word), word, other) for kind, word, other in marks)
    return Story(text, tuple(Agreement(kind, at, at + len(word), 0, other) for kind, at, word, other in places))


def test_accuracy_counts_what_the_model_finds_likelier():
    model = Taste({"a": 5.0, "b": 1.0})
    stories = [
        marked("xx aa saw zz.", ("name", "aa", "bb"), ("object", "zz", "bb")),  # right, wrong
        marked("xx bb saw aa", ("name", "bb", "aa"), ("object", "aa", "zz")),  # wrong, right (at the very end)
        marked("ab", ("name", "ab", "zb")),  # right
        marked("ab zz.", ("object", "zz", "yy")),  # no opinion is no agreement
        marked("nothing is marked here."),
    ]
    found = agreement_accuracy(model, model.bytes_only, stories)
    assert found == {"name": pytest.approx(2 / 3), "object": pytest.approx(1 / 3), "all": 3 / 6}


def test_the_character_behind_the_word_counts():
    """Likes m, and after an m nothing but m: "Tim" is likelier than "Tia" until the word has to end."""

    class Stutter(Taste):
        def likes(self, x):
            logits = torch.zeros(*x.shape[:-1], 257)
            m = self.bytes_only.encode("m")[0]
            logits[..., m] = torch.where(x[..., 0] == m, 50.0, 1.0)
            return logits

    model = Stutter({})
    for text, share in (("Then Tim", 1.0), ("Then Tim ran.", 0.0)):
        assert agreement_accuracy(model, model.bytes_only, [marked(text, ("name", "Tim", "Tia"))])["all"] == share


def test_agreement_of_built_in_stories(tokenizer):
    """A model without opinions cannot prefer; one kind a mark, and a share of all of them."""
    stories = [story(0, number) for number in range(3)]
    found = agreement_accuracy(sharp(max_seq_len=1024), tokenizer, stories)
    kinds = Counter(mark.kind for one in stories for mark in one.agreements)
    assert set(found) == {*kinds, "all"}
    total = sum(found[kind] * count for kind, count in kinds.items())
    assert found["all"] == pytest.approx(total / sum(kinds.values()))


# ---- loads in windows


def test_loads_over_a_batch_and_within_a_sequence_by_hand():
    """Each window counted from what the routers chose, one window after another."""
    model = LanguageModel(micro(n_layers=2)).train()
    config = model.config
    tokens = torch.randint(0, config.vocab_size, (6, 16))
    profile = evaluation.load_profile(model, tokens, rows=3)
    assert model.training  # left as it was
    model.eval()
    alone = []  # (window, layer, expert)
    with torch.no_grad():
        for window in tokens:
            model(window[None])
            alone.append(torch.stack([routing.counts for routing in model.routing()]))
    alone = torch.stack(alone)
    batches = torch.stack([alone[:3].sum(0), alone[3:].sum(0)])
    assert profile["counts"] == alone.sum(0).tolist()
    for name, counts, size in (("batch", batches, 48), ("sequence", alone, 16)):
        each = [layer for window in counts for layer in window]
        wanted = dict(
            tokens=size,
            cv=sum(map(evaluation.coefficient_of_variation, each)) / len(each),
            max_violation=sum(map(evaluation.max_violation, each)) / len(each),
            cv_floor=evaluation.noise_floor(config.n_experts, config.top_k, size),
        )
        assert profile[name] == pytest.approx(wanted)


def test_an_odd_batch_at_the_end_is_no_window_of_its_own():
    model = LanguageModel(micro()).eval()
    tokens = torch.randint(0, model.config.vocab_size, (5, 8))
    whole, cut = (evaluation.load_profile(model, rows, rows=2) for rows in (tokens, tokens[:4]))
    assert whole["batch"] == cut["batch"] and whole["sequence"] != cut["sequence"]
    few = evaluation.load_profile(model, tokens[:1], rows=2)
    assert few["batch"]["tokens"] == 8 and few["batch"]["cv"] == pytest.approx(few["sequence"]["cv"])
