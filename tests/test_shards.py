"""Token shards, of which every bit is checked, and batches, of which any step can be had at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from moemla.distributed import World
from moemla.errors import DataError
from moemla.shards import Batches, TokenShard, check_tokenizer, write_shard
from moemla.tokenizer import Tokenizer
from tests.texts import STORIES


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(STORIES * 4, vocab_size=300)


@pytest.fixture(scope="module")
def ring(tokenizer, tmp_path_factory) -> TokenShard:
    """One document of 101 tokens, all different: a window names its place."""
    path = tmp_path_factory.mktemp("ring") / "ring.bin"
    write_shard(path, tokenizer, [list(range(100, 200))])
    return TokenShard(path)


# --- shards ---------------------------------------------------------------------------------------


def test_a_shard_keeps_every_story_behind_its_eot(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    ids = tokenizer.encode_batch([*STORIES, ""])
    write_shard(path, tokenizer, iter(ids))
    shard = TokenShard(path)
    assert len(shard) == 5
    assert (shard.vocab_size, shard.tokenizer_hash) == (tokenizer.vocab_size, tokenizer.hash)
    assert shard.tokens.dtype == np.uint16
    assert shard.documents.dtype == np.int64
    assert shard.documents.tolist() == np.cumsum([0] + [1 + len(i) for i in ids]).tolist()
    for i, expected in enumerate(ids):
        assert shard.document(i).tolist() == [tokenizer.eot, *expected]
    assert [tokenizer.decode(shard.document(i)) for i in range(4)] == STORIES
    assert list(tmp_path.iterdir()) == [path]
    for i in (-1, 5):
        with pytest.raises(IndexError, match=f"document={i}: .* has 5"):
            shard.document(i)


def test_ids_up_to_65535_fit(tmp_path):
    path = tmp_path / "wide.bin"
    tokenizer = Tokenizer.__new__(Tokenizer)  # the widest there can be, without training one
    tokenizer.__dict__.update(vocab_size=65_536, eot=0, hash="ab" * 32)
    write_shard(path, tokenizer, [[65_535, 1]])
    assert TokenShard(path).tokens.tolist() == [0, 65_535, 1]
    with pytest.raises(ValueError, match="ids=0 to 65536: must be 0 to 65535"):
        write_shard(path, tokenizer, [[65_536, 0]])
    assert TokenShard(path).tokens.tolist() == [0, 65_535, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_shards_that_are_not_right_are_named(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES))
    whole = path.read_bytes()
    header = TokenShard.HEADER.size + TokenShard.SUMS.size
    cases = {
        "is not a token shard of moemla": [b"", b"PK\3\4" + whole[4:], bytes(64) + whole[64:]],
        "is cut short inside its header": [whole[:63], whole[:8]],
        "has version 3, not 2": [whole[:8] + b"\3" + whole[9:]],
        rf"is damaged: {len(whole) - 1} bytes, its header says {len(whole)}": [whole[:-1]],
        rf"is damaged: {len(whole) + 2} bytes, its header says {len(whole)}": [whole + b"\0\0"],
        rf"is damaged: {header} bytes": [whole[:header]],
        "is damaged: stories out of order": [whole[:-40] + whole[-8:] * 5],
    }
    for message, contents in cases.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(DataError, match=rf"some\.bin {message}") as caught:
                TokenShard(path)
            assert "moemla prepare" in str(caught.value)
            assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"cannot read .*none\.bin: No such file"):
        TokenShard(tmp_path / "none.bin")


def version_1(shard: Path) -> bytes:
    """The bytes of the same shard as it was written before there were checksums."""
    whole = shard.read_bytes()
    return whole[:8] + b"\1" + whole[9:64] + whole[72:]


def test_every_bit_of_a_shard_is_checked(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES[:2]))
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"some\.bin (is|has) .*`moemla prepare"):
            TokenShard(path)
    path.write_bytes(whole)
    TokenShard(path, check=True)


def test_a_shard_of_the_version_before_is_read_and_its_ids_looked_at(tmp_path, tokenizer):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES))
    tokens, documents = TokenShard(path).tokens.tolist(), TokenShard(path).documents.tolist()
    old = version_1(path)
    path.write_bytes(old)
    shard = TokenShard(path)
    assert shard.tokens.tolist() == tokens
    assert shard.documents.tolist() == documents
    check_tokenizer(shard, tokenizer)
    size = tokenizer.vocab_size
    path.write_bytes(old[:64] + size.to_bytes(2, "little") + old[66:])
    with pytest.raises(DataError, match=rf"some\.bin is damaged: token {size} in a vocabulary of {size}; run `moemla"):
        TokenShard(path)
    path.write_bytes(old[:12] + (size + 1).to_bytes(4, "little") + old[16:])
    with pytest.raises(DataError, match=rf"is damaged: a vocabulary of {size + 1}, its tokenizer has {size}"):
        check_tokenizer(TokenShard(path), tokenizer)


def test_a_large_shard_is_read_at_opening_only_when_asked(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "some.bin"
    write_shard(path, tokenizer, tokenizer.encode_batch(STORIES * 9))
    whole = path.read_bytes()
    monkeypatch.setattr(TokenShard, "CHECKED", 100)
    path.write_bytes(whole[:72] + b"\1\0" + whole[74:])
    TokenShard(path)
    with pytest.raises(DataError, match="its tokens do not have their checksum"):
        TokenShard(path, check=True)
    path.write_bytes(whole[:72] + b"\xff\xff" + whole[74:])
    batches = Batches(TokenShard(path), 1, 8)  # whose batches are looked at all the same
    with pytest.raises(DataError, match=f"is damaged: token 65535 in a vocabulary of {tokenizer.vocab_size}"):
        for step in range(batches.steps_per_epoch):
            batches.batch(step)
    path.write_bytes(whole[:64] + whole[64:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(DataError, match="is damaged"):  # as are header and documents
        TokenShard(path, check=False)


def test_a_shard_of_another_tokenizer_is_refused(ring, tokenizer):
    check_tokenizer(ring, tokenizer)
    other = Tokenizer.train(STORIES[:2] * 4, vocab_size=280)
    with pytest.raises(DataError, match=f"tokenizer {tokenizer.hash[:12]}, not {other.hash[:12]}"):
        check_tokenizer(ring, other)


# --- batches --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    seq_len=st.integers(1, 100),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
)
def test_each_epoch_visits_every_window_once(ring, seq_len, batch_size, seed, epoch):
    batches = Batches(ring, batch_size, seq_len, seed)
    assert batches.windows == 101 // seq_len
    first = epoch * batches.windows  # of the stream of windows
    rows = []
    for step in range(first // batch_size, (first + batches.windows) // batch_size + 1):
        tokens, targets = batches.batch(step)
        assert tokens.shape == targets.shape == (batch_size, seq_len)
        assert tokens.dtype == targets.dtype == torch.int64
        rows += [(step * batch_size + b, tokens[b], targets[b]) for b in range(batch_size)]
    predicted = []
    for index, tokens, targets in rows:
        assert torch.equal(tokens[1:], targets[:-1])
        start = ring.tokens.tolist().index(int(tokens[0]))  # all tokens differ
        window = [int(ring.tokens[(start + i) % 101]) for i in range(seq_len + 1)]
        assert [*tokens.tolist(), int(targets[-1])] == window
        if first <= index < first + batches.windows:
            predicted += targets.tolist()
    assert len(predicted) == len(set(predicted)) == batches.windows * seq_len


def test_batches_are_a_function_of_the_step(ring):
    batches = Batches(ring, 4, 7, seed=5)
    straight = [batch for batch, _ in zip(batches, range(40), strict=False)]
    resumed = Batches(ring, 4, 7, seed=5)
    for step in (39, 0, 17, 17, 3, 38):
        for ours, theirs in zip(resumed.batch(step), straight[step], strict=True):
            assert torch.equal(ours, theirs)


def test_epochs_and_seeds_have_orders_of_their_own(ring):
    batches = Batches(ring, 10, 10)
    assert batches.windows == 10
    assert batches.steps_per_epoch == 1
    assert [batches.epoch(step) for step in range(3)] == [0, 1, 2]
    orders = [batches.batch(0)[0], batches.batch(1)[0], Batches(ring, 10, 10, seed=1).batch(0)[0]]
    for i in range(3):
        for j in range(i):
            assert not torch.equal(orders[i], orders[j])
            # the cuts move too, not only their order
            assert set(orders[i][:, 0].tolist()) != set(orders[j][:, 0].tolist())


def test_steps_of_an_epoch_are_rounded_up(ring):
    batches = Batches(ring, 4, 10)
    assert batches.steps_per_epoch == 3
    assert [batches.epoch(step) for step in range(6)] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_the_rows_of_one_batch(ring, ranks):
    whole = Batches(ring, 12, 9, seed=2)
    parts = [Batches(ring, 12, 9, seed=2, world=World(rank, ranks)) for rank in range(ranks)]
    for step in range(5):
        for side in range(2):
            together = torch.cat([part.batch(step)[side] for part in parts])
            assert torch.equal(together, whole.batch(step)[side])
        assert {part.epoch(step) for part in parts} == {whole.epoch(step)}


def test_a_shard_smaller_than_a_window_says_how_many_tokens_are_needed(ring):
    assert Batches(ring, 3, 100).batch(0)[0].shape == (3, 100)
    with pytest.raises(DataError, match=r"has 101 tokens; one window of seq_len=101 needs 102"):
        Batches(ring, 3, 101)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
        ({"seq_len": 0}, "seq_len=0: must be a whole number of at least 1"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"world": World(0, 3)}, "batch_size=4: must be a multiple of the 3 ranks"),
    ],
)
def test_wrong_settings_of_batches_are_named(ring, wrong, message):
    with pytest.raises(ValueError, match=message):
        Batches(ring, **({"batch_size": 4, "seq_len": 8} | wrong))
    with pytest.raises(IndexError, match="step=-1"):
        Batches(ring, 4, 8).batch(-1)


def test_batches_can_be_trained_on(ring):
    """They are tensors of their own: writing into one changes neither the shard nor the next batch."""
    tokens, targets = Batches(ring, 2, 5).batch(0)
    before = targets.clone()
    tokens.fill_(0)
    assert torch.equal(targets, before)
    assert torch.equal(Batches(ring, 2, 5).batch(0)[1], before)
