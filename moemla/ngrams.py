"""Counted n-gram language models: the yardstick that a network must beat.

Interpolated Kneser-Ney with three discounts for each order ("modified", Chen and Goodman 1998):

    p_m(w | c) = (a(cw) - D(a(cw))) / a(c.)  +  gamma(c) p_{m-1}(w | c without its first token)
    gamma(c)   = sum over w of D(a(cw)) / a(c.),     p_0(w) = 1 / V

a is the count at the highest order, and below it the number of different tokens that stood before the n-gram; one
that has only been seen at the start of a story keeps its count. An unseen w adds nothing to the first term; for an
unseen context p_m = p_{m-1}. So p_m(. | c) sums to one over the vocabulary for every c. Contexts do not reach into
the story before, and EOT, which stands first in each story, is a context but never a prediction.

Notable: no dictionaries. An n-gram is one 64-bit number, counting is sorting, looking up is a binary search.
Built in chapter 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moemla.config import require

KEY_BITS = 64
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # KenLM's, for texts too short to estimate them

Keys = list[tuple[np.ndarray, np.ndarray]]  # for each order: n-grams as numbers, and which predictions they end in


@dataclass(frozen=True)
class _Table:
    """The n-grams of one order as sorted numbers, and their contexts (the same numbers without the last token)."""

    grams: np.ndarray  # (G,) uint64
    share: np.ndarray  # (G,) (a - D(a)) / a(c.)
    contexts: np.ndarray  # (C,) uint64
    gamma: np.ndarray  # (C,)


class NGram:
    """A counted model of `order` tokens (2: bigram) over `vocab_size` ids.

    order times the bits of an id must be at most 64: a 4-gram for any 16-bit ids, a 5-gram for 4,096 of them.
    """

    def __init__(self, order: int, vocab_size: int) -> None:
        require(vocab_size >= 2, "vocab_size", vocab_size, "must be 2 or more")
        self._bits = (vocab_size - 1).bit_length()
        most = KEY_BITS // self._bits
        require(1 <= order <= most, "order", order, f"must be 1 to {most} for vocab_size={vocab_size}")
        self.order, self.vocab_size = order, vocab_size
        self._tables: list[_Table] = []

    def fit(self, tokens: np.ndarray, documents: np.ndarray) -> "NGram":
        """Count `tokens` (N,), stories starting at `documents` (D + 1,) with their EOT. Returns the model itself."""
        keys = self._keys(tokens, documents)
        if not len(keys[0][0]):
            raise ValueError("tokens: no story has a token after its EOT, so there is nothing to count")
        tables: list[_Table] = []
        longer = None
        for m in range(self.order, 0, -1):
            grams, counts = np.unique(keys.pop()[0], return_counts=True)
            if longer is not None:  # each different (m + 1)-gram is one different token before the m-gram it ends in
                ends, before = np.unique(longer & np.uint64((1 << self._bits * m) - 1), return_counts=True)
                counts[np.searchsorted(grams, ends)] = before
            if len(grams):  # no story may be as long as the order
                tables.insert(0, self._table(grams, counts))
            longer = grams
        self._tables = tables
        return self

    def nats(self, tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """-ln p of every token but the first of each story, in order: (N - D,) float64."""
        keys = self._keys(tokens, documents)
        return -np.log(self._probabilities(keys, len(keys[0][0])))

    def score(self, document: np.ndarray) -> np.ndarray:
        """-ln p of each token of one story (n,) after its EOT: (n - 1,) float64."""
        return self.nats(document, np.array([0, len(document)]))

    def distribution(self, context: Sequence[int] | np.ndarray) -> np.ndarray:
        """p(. | context) over the whole vocabulary, (V,) float64; context starts with EOT where the story does."""
        context = [int(token) for token in context][max(0, len(context) - self.order + 1) :]
        self._check_ids(np.array(context, dtype=np.int64))
        words = np.arange(self.vocab_size, dtype=np.uint64)
        keys: Keys = [(words, np.arange(self.vocab_size))]
        before = 0
        for distance, token in enumerate(reversed(context), start=1):
            before |= token << self._bits * distance
            keys.append((words | np.uint64(before), keys[0][1]))
        return self._probabilities(keys, self.vocab_size)

    def _check_ids(self, tokens: np.ndarray) -> None:
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise ValueError(f"tokens={tokens.min()} to {tokens.max()}: must be 0 to {self.vocab_size - 1}")

    def _keys(self, tokens: np.ndarray, documents: np.ndarray) -> Keys:
        """The n-gram that ends in each predicted token, for each order, if it lies within the story."""
        documents = np.asarray(documents, dtype=np.int64)
        if documents.ndim != 1 or len(documents) < 1 or documents[0] != 0 or documents[-1] != len(tokens):
            raise ValueError(f"documents: must start with 0 and end with len(tokens) = {len(tokens)}")
        self._check_ids(tokens)
        tokens = np.asarray(tokens).astype(np.uint64)
        depth = np.arange(len(tokens)) - np.repeat(documents[:-1], np.diff(documents))
        predicted = np.flatnonzero(depth > 0)
        depth = depth[predicted]
        keys: Keys = [(tokens[predicted], np.arange(len(predicted)))]
        for m in range(2, self.order + 1):
            key, which = keys[-1]
            inside = depth[which] >= m - 1
            which = which[inside]
            first = tokens[predicted[which] - (m - 1)] << np.uint64(self._bits * (m - 1))
            keys.append((key[inside] | first, which))
        return keys

    def _table(self, grams: np.ndarray, counts: np.ndarray) -> _Table:
        contexts = grams >> np.uint64(self._bits)
        starts = np.flatnonzero(np.r_[True, contexts[1:] != contexts[:-1]])
        discount = np.array([0.0, *_discounts(counts)])[np.minimum(counts, 3)]
        total = np.add.reduceat(counts, starts)
        gamma = np.add.reduceat(discount, starts) / total
        size = np.diff(np.r_[starts, len(grams)])
        return _Table(grams, (counts - discount) / np.repeat(total, size), contexts[starts], gamma)

    def _probabilities(self, keys: Keys, n: int) -> np.ndarray:
        if not self._tables:
            raise ValueError("model: has counted nothing yet; call fit(tokens, documents) first")
        p = np.full(n, 1 / self.vocab_size)
        for table, (key, which) in zip(self._tables, keys, strict=False):
            context, known = _find(table.contexts, key >> np.uint64(self._bits))
            key, which, context = key[known], which[known], context[known]
            gram, seen = _find(table.grams, key)
            p[which] = np.where(seen, table.share[gram], 0.0) + table.gamma[context] * p[which]
        return p


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each key stands in a sorted table, and whether it does (where it does not, the place means nothing)."""
    places = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return places, table[places] == keys


def _discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """What is taken from an n-gram with count 1, 2, and 3 or more, from how many have count 1, 2, 3 and 4."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return FALLBACK_DISCOUNTS
    y = n1 / (n1 + 2 * n2)
    discounts = (1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
    return discounts if all(0 < d <= c for c, d in enumerate(discounts, start=1)) else FALLBACK_DISCOUNTS
