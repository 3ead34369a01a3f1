"""Many requests, one model: what a step has to read, and whose tokens it computes.

A step computes one token for each row that is there. It reads the weights once for all of them, and each row's cache
for itself. A row that has ended leaves at once, and the next request takes its place: no story waits for another's end.
Built in chapter 14.
"""

from collections import deque
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from operator import index as whole_number
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from moemla import complexity
from moemla.cache import Cache
from moemla.config import require, require_count
from moemla.errors import MoemlaError
from moemla.generation import UNUSABLE, _draw, check_room, check_sampling, eval_mode, whole


def experts_read(n_experts: int, top_k: int, rows: int) -> float:
    """How many of E experts the tokens of B rows read together, on average: E (1 - (1 - k/E)^B).

    If every token chooses k of them evenly, and for itself. ValueError for fewer than no rows.
    """
    require(rows >= 0, "rows", rows, "must be 0 or more")
    return n_experts * (1 - (1 - top_k / n_experts) ** rows) if n_experts else 0.0


@dataclass(frozen=True)
class StepBytes:
    """The least that one decoding step reads, in bytes."""

    weights: float  # of every layer, once for all rows; routed experts apart
    experts: float  # the routed experts that one of the rows chose, on average
    cache: float  # of all rows

    @property
    def total(self) -> float:
        """All three."""
        return self.weights + self.experts + self.cache


def step_bytes(config: Any, rows: int, held: int, dtype_bytes: int = 2) -> StepBytes:
    """What a step of `rows` tokens, each behind `held` ones, reads of a model of this config.

    Of the tables of tokens and positions a row reads one line, which is not counted; the head is read whole. Nothing
    is read twice here. ValueError for negative counts.
    """
    require(rows >= 0 and held >= 0, "rows, held", (rows, held), "must be 0 or more")
    count = complexity.parameters(config)
    lookup = count.position_embedding + (0 if config.tie_embeddings else count.token_embedding)
    share = experts_read(config.n_experts, config.top_k, rows) / config.n_experts if count.routed else 0.0
    return StepBytes(
        weights=dtype_bytes * (count.total - count.routed - lookup),
        experts=dtype_bytes * count.routed * share,
        cache=rows * held * complexity.cache_bytes_per_token(config, dtype_bytes),
    )


@dataclass
class _Request:
    """A story that is being written."""

    ticket: int
    text: list[int]
    end: int  # tokens at which it is full
    generator: torch.Generator = field(repr=False)


class Server:
    """Writes many stories with one model, at most `slots` at a time; each the one that `generate` writes alone.

    `submit` takes a prompt and gives a ticket; each `step` computes one token for every story that is being written.
    The cache has room for `slots` rows of `max_len` tokens (default: the model's max_seq_len), allocated once. Rows
    without an owner are at its end and are not computed; the others are read up to the longest of them. temperature,
    top_k, top_p and `stop` are those of `generate`. ValueError for a count below 1, a max_len above the model's, or
    what is no way to sample.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        max_len: int | None = None,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float | None = None,
        stop: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.model = whole(model)
        limit = self.model.config.max_seq_len
        self.max_len = limit if max_len is None else max_len
        require_count("slots", slots)
        require_count("max_len", self.max_len)
        require(self.max_len <= limit, "max_len", self.max_len, f"the model has max_seq_len={limit}")
        check_sampling(temperature, top_k, top_p)
        words = self.model.config.vocab_size
        require(stop is None or stop in range(words), "stop", stop, f"one token, between 0 and {words - 1}")
        self.slots, self.stop, self._sampling = slots, stop, (temperature, top_k, top_p)
        self.cache = self.model.new_cache(slots, self.max_len, dtype)
        self.waiting: deque[_Request] = deque()
        self.rows: list[_Request] = []  # row b of the cache is that of rows[b]
        self.finished: dict[int, Tensor] = {}  # ticket -> ids, 1-D
        self._tickets = 0

    def __repr__(self) -> str:
        counts = f"{len(self.rows)} of {self.slots} slots taken, {len(self.waiting)} waiting"
        return f"Server({counts}, {len(self.finished)} finished)"

    @property
    def busy(self) -> bool:
        """Whether a story is being written, or waits."""
        return bool(self.rows or self.waiting)

    def submit(self, prompt: Int[Tensor, "_"] | Sequence[int], max_new_tokens: int = 64, seed: int = 0) -> int:
        """A prompt to go on with, 1-D ids; returns its ticket. Tickets count from 0, and are served in that order.

        The story has `max_new_tokens` more tokens, or fewer where it meets `stop` or max_len. ValueError for an empty
        prompt, one that leaves no room, a token outside the vocabulary, or fewer than 1 new token.
        """
        try:
            ids = [whole_number(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]
        except TypeError:
            raise ValueError(f"prompt={prompt!r}: give ids, one list of them") from None
        last = self.model.config.vocab_size - 1
        require_count("max_new_tokens", max_new_tokens)
        require(bool(ids), "prompt", prompt, "needs at least one token (the start token, for example)")
        require(-(2**63) <= seed < 2**64, "seed", seed, "must be between -2**63 and 2**64 - 1")
        if not 0 <= min(ids) <= max(ids) <= last:
            raise ValueError(f"prompt: holds {min(ids)} to {max(ids)}; ids must be between 0 and {last}")
        check_room(len(ids), max_new_tokens, self.max_len)
        end = min(len(ids) + max_new_tokens, self.max_len)
        ticket, self._tickets = self._tickets, self._tickets + 1
        self.waiting.append(_Request(ticket, ids, end, torch.Generator().manual_seed(seed)))
        return ticket

    def cancel(self, ticket: int) -> Int[Tensor, "_"]:
        """Takes a story out, wherever it is; returns what there is of it. KeyError for a ticket that is not here."""
        if ticket in self.finished:
            return self.finished.pop(ticket)
        for place, request in enumerate(self.rows):
            if request.ticket == ticket:
                self._leave(place)
                return self.finished.pop(ticket)
        for request in self.waiting:
            if request.ticket == ticket:
                self.waiting.remove(request)
                return torch.tensor(request.text)
        raise KeyError(f"ticket={ticket}: not here")

    @torch.inference_mode()
    def step(self) -> dict[int, int]:
        """One token more for each story, those that can begin now included: {ticket: token}, empty where none is here.

        A story that ends goes to `finished`, ticket -> ids (prompt and continuation), from which the caller takes it.
        MoemlaError for logits that are not finite.
        """
        with eval_mode(self.model):
            self._admit()
            if not self.rows:
                return {}
            view = _rows(self.cache, 0, len(self.rows))
            last = torch.tensor([[request.text[-1]] for request in self.rows], device=view.tokens.device)
            logits = self.model.next_logits(last, view)
        if not logits.isfinite().all():
            raise MoemlaError(f"the model's logits are not finite: {UNUSABLE}")
        self.cache.lengths[: len(self.rows)] = view.lengths
        drawn = _draw(logits, *self._sampling, [request.generator for request in self.rows]).tolist()
        new = {request.ticket: token for request, token in zip(self.rows, drawn, strict=True)}
        for place in reversed(range(len(self.rows))):
            request = self.rows[place]
            request.text.append(drawn[place])
            if drawn[place] == self.stop or len(request.text) == request.end:
                self._leave(place)
        return new

    def run(self) -> dict[int, Int[Tensor, "_"]]:
        """Steps until nobody is left; returns and forgets all finished stories, ticket -> ids, in order."""
        while self.busy:
            self.step()
        finished, self.finished = dict(sorted(self.finished.items())), {}
        return finished

    def _admit(self) -> None:
        """Gives free slots to those who wait, and fills them with the prompts, all but the last token of each."""
        free = min(self.slots - len(self.rows), len(self.waiting))
        new = [self.waiting.popleft() for _ in range(free)]
        if not new:
            return
        begin = len(self.rows)
        self.rows += new
        self.cache.lengths[begin : begin + free] = [0] * free
        prompts = [torch.tensor(request.text[:-1], dtype=torch.long) for request in new]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        if lengths.max() == 0:
            return
        view = _rows(self.cache, begin, begin + free)
        padded = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(view.tokens.device)
        self.model.features(padded, cache=view, lengths=lengths)
        self.cache.lengths[begin : begin + free] = view.lengths

    def _leave(self, place: int) -> None:
        """Ends a row's story; the last row moves to its slot, so that rows stay without holes."""
        request, last = self.rows[place], self.rows.pop()
        with torch.inference_mode(False):  # what is returned may be trained on
            self.finished[request.ticket] = torch.tensor(request.text)
        if place < len(self.rows):
            self.rows[place] = last
            held = self.cache.lengths[len(self.rows)]
            for buffer in self.cache.buffers:
                buffer[:, place, :, :held] = buffer[:, len(self.rows), :, :held]
            self.cache.tokens[place, :held] = self.cache.tokens[len(self.rows), :held]
            self.cache.lengths[place] = held
        self.cache.lengths[len(self.rows)] = 0


def _rows(cache: Cache, begin: int, end: int) -> Cache:
    """Some neighbouring rows, in the same storage; their lengths are a list of their own."""
    view = copy(cache)
    view.buffers = tuple(buffer[:, begin:end] for buffer in cache.buffers)
    view.tokens, view.lengths = cache.tokens[begin:end], cache.lengths[begin:end]
    return view
