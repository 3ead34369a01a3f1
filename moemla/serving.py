"""Many stories, one model: what a step has to read, and whose tokens it computes.

A step computes one token for each story that is there. It reads the weights once for all of them, and each one's cache
for itself. A story that has ended leaves at once, and the next takes its place: nobody waits for another's end.
Built in chapter 14.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from operator import index as whole_number
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla import complexity
from moemla.cache import Cache
from moemla.config import require, require_count
from moemla.errors import MoemlaError
from moemla.generation import UNUSABLE, _draw, check_sampling, eval_mode, whole

# ---- what a step reads and multiplies


def experts_read(n_experts: int, top_k: int, rows: int) -> float:
    """How many of E experts the tokens of B rows read together, on average: E (1 - (1 - k/E)^B).

    If every token chooses k of them evenly, and for itself. ValueError for negative counts, or more than E chosen.
    """
    require(0 <= top_k <= n_experts, "top_k", top_k, f"must be between 0 and n_experts={n_experts}")
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
    """What a step reads, a token for each of `rows` rows behind `held` others, of a model of this config.

    Of the tables of tokens and learned positions a row reads one line, which is not counted; the head is read whole,
    routers and learnable frequencies in four bytes a number at least. Nothing is read twice here. ValueError for counts
    that are none.
    """
    require_count("rows", rows)
    require_count("dtype_bytes", dtype_bytes)
    require(held >= 0, "held", held, "must be 0 or more")
    count = complexity.parameters(config)
    learned = config.positions == "learned"
    looked_up = (0 if config.tie_embeddings else count.token_embedding) + learned * count.position_embedding
    wide = count.router + (not learned) * count.position_embedding  # which stay in 32 bits
    share = experts_read(config.n_experts, config.top_k, rows) / config.n_experts if count.routed else 0.0
    return StepBytes(
        weights=dtype_bytes * (count.total - count.routed - looked_up) + max(0, 4 - dtype_bytes) * wide,
        experts=dtype_bytes * count.routed * share,
        cache=rows * held * complexity.cache_bytes_per_token(config, dtype_bytes),
    )


def step_flops(config: Any, rows: int, held: int) -> int:
    """Two for each multiply-add that such a step needs.

    Beside the weights each of the `held` tokens costs its scores and its share of the mix; in the paper's form its keys
    are made anew for every head, in the decoupled form neither keys nor values are.
    """
    c, h, k, r = config, config.n_heads, config.d_head, config.latent_dim
    each = {
        "kv": 2 * h * k,
        "latent": h * ((r + 1) * k + r),
        "hybrid": h * (k + r),
        "joint": h * (2 * r + c.d_rope),
    }[c.cache]
    return rows * (complexity.flops_per_token(c, 0) + 2 * c.n_layers * held * each)


# ---- a server


class Written(NamedTuple):
    """A token that a step wrote. `end`: None, or "stop" or "length" where the story ends with it."""

    token: int
    end: str | None


@dataclass
class _Story:
    """One that waits, or is being written: `text` so far, `full` tokens at most."""

    ticket: int
    text: list[int]
    full: int
    sampling: tuple[float, int | None, float | None]
    stop: int | None
    generator: torch.Generator = field(repr=False)


class Server:
    """Writes many stories with one model, at most `slots` at a time; each the one that `generate` writes alone.

    `submit` takes a prompt and gives a ticket; each `step` computes one token for every story that is being written;
    `take` hands out a story that has ended. The cache has room for `slots` rows of `max_len` tokens (default: the
    model's max_seq_len), in `dtype` (default: the model's), made once. Slots without an owner are not computed; the
    others are read as far as the longest of them, and a prompt is computed at once, while the others wait. Equal to
    `generate` but for rounding, which in 16 bits decides words. Threads may call it, one waits for the other. An error
    in the model or in drawing leaves all stories as they were before the step. The model stays as it is meanwhile.
    ValueError for no slots, or a max_len below 2 or above the model's.
    """

    def __init__(self, model: nn.Module, slots: int, max_len: int | None = None, dtype: torch.dtype | None = None):
        self.model = whole(model)
        limit = self.model.config.max_seq_len
        self.max_len = limit if max_len is None else max_len
        require_count("slots", slots)
        require_count("max_len", self.max_len)
        require(2 <= self.max_len <= limit, "max_len", self.max_len, f"must be between 2 and max_seq_len={limit}")
        self.slots = slots
        self.cache = self.model.new_cache(slots, self.max_len, dtype)
        self._waiting: deque[_Story] = deque()
        self._rows: list[_Story] = []  # row b of the cache is that of story b
        self._ended: dict[int, list[int]] = {}
        self._tickets, self._stepping, self._lock = 0, False, threading.RLock()

    def __repr__(self) -> str:
        counts = f"{len(self._rows)} of {self.slots} slots taken, {len(self._waiting)} waiting"
        return f"Server({counts}, {len(self._ended)} to be taken)"

    @property
    def busy(self) -> bool:
        """Whether a story is being written, or waits."""
        return bool(self._rows or self._waiting)

    def submit(
        self,
        prompt: Int[Tensor, "_"] | Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float | None = None,
        seed: int | None = None,
        stop: int | None = None,
    ) -> int:
        """A prompt to go on with, 1-D ids; returns its ticket. Tickets count from 0, and are served in that order.

        The settings are those of `generate`; the default seed is the ticket. The story has `max_new_tokens` more
        tokens, or fewer where it meets `stop` or max_len. ValueError for an empty prompt, one that leaves no room, a
        token outside the vocabulary, no new token, what is no seed or no way to sample.
        """
        last = self.model.config.vocab_size - 1
        ids = _whole(prompt, "prompt", "give ids, one list of them")
        require(bool(ids), "prompt", prompt, "needs at least one token (the start token, for example)")
        if not 0 <= min(ids) <= max(ids) <= last:
            raise ValueError(f"prompt: holds {min(ids)} to {max(ids)}; ids must be between 0 and {last}")
        if len(ids) >= self.max_len:
            raise ValueError(f"prompt: of {len(ids)} tokens leaves no room for more in max_len={self.max_len}")
        require_count("max_new_tokens", max_new_tokens)
        check_sampling(temperature, top_k, top_p)
        if top_k is not None:
            require_count("top_k", top_k)
        require(stop is None or stop in range(last + 1), "stop", stop, f"one token, between 0 and {last}")
        full = min(len(ids) + max_new_tokens, self.max_len)
        with self._lock:
            (number,) = _whole([self._tickets if seed is None else seed], "seed", "must be a whole number")
            require(-(2**63) <= number < 2**64, "seed", seed, "must be between -2**63 and 2**64 - 1")
            draws = torch.Generator().manual_seed(number)
            story = _Story(self._tickets, ids, full, (temperature, top_k, top_p), stop, draws)
            self._waiting.append(story)
            self._tickets += 1
            return story.ticket

    def take(self, ticket: int) -> Int[Tensor, "_"]:
        """Prompt and continuation of a story that has ended, which is then forgotten. KeyError for any other."""
        with self._lock:
            if ticket not in self._ended:
                raise KeyError(f"ticket={ticket}: no story with it has ended and was not taken")
            return self._told(self._ended.pop(ticket))

    def cancel(self, ticket: int) -> Int[Tensor, "_"]:
        """Ends a story that waits or is being written, and hands out what there is of it. KeyError for any other."""
        with self._alone():
            for place, story in enumerate(self._rows):
                if story.ticket == ticket:
                    self._leave(place)
                    return self.take(ticket)
            for story in self._waiting:
                if story.ticket == ticket:
                    self._waiting.remove(story)
                    return self._told(story.text)
        raise KeyError(f"ticket={ticket}: no story with it waits or is being written")

    @torch.inference_mode()
    def step(self) -> dict[int, Written]:
        """One token more for each story, those that can begin now included: {ticket: (token, end)}.

        Empty where none is here. MoemlaError, and no token for anybody, where logits are not finite: it names the
        tickets, which can be cancelled.
        """
        with self._alone(), eval_mode(self.model):
            self._admit()
            if not self._rows:
                return {}
            n = len(self._rows)
            rows = _rows(self.cache, 0, n)
            last = torch.tensor([story.text[-1:] for story in self._rows], device=rows.tokens.device)
            drawn = self._drawn(self.model.next_logits(last, rows))
            self.cache.lengths[:n] = rows.lengths
            new = {}
            for place in reversed(range(n)):  # who moves into a gap comes from the end, and has had its turn
                story, token = self._rows[place], drawn[place]
                story.text.append(token)
                end = "stop" if token == story.stop else "length" if len(story.text) == story.full else None
                new[story.ticket] = Written(token, end)
                if end is not None:
                    self._leave(place)
            return dict(sorted(new.items()))

    def run(self) -> dict[int, Int[Tensor, "_"]]:
        """Steps until nobody is left, and takes all that have ended: {ticket: ids}, in order."""
        while self.busy:
            self.step()
        with self._lock:
            return {ticket: self.take(ticket) for ticket in sorted(self._ended)}

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time, and none twice: a hook of the model may not call what moves rows."""
        with self._lock:
            if self._stepping:
                raise RuntimeError("a step is under way: call this after it")
            self._stepping = True
            try:
                yield
            finally:
                self._stepping = False

    def _told(self, text: list[int]) -> Int[Tensor, "_"]:
        with torch.inference_mode(False):  # what is handed out may be trained on
            return torch.tensor(text, device=self.cache.tokens.device)

    def _admit(self) -> None:
        """Gives free slots to those who wait, each filled with its prompt but for the last token."""
        while self._waiting and len(self._rows) < self.slots:
            place, story = len(self._rows), self._waiting[0]
            if len(story.text) > 1:
                row = _rows(self.cache, place, place + 1)
                try:
                    self.model.features(torch.tensor([story.text[:-1]], device=row.tokens.device), cache=row)
                except BaseException:  # whoever comes next may be somebody else
                    self._wipe(place, 0, len(story.text))
                    raise
                self.cache.lengths[place] = row.lengths[0]
            self._rows.append(self._waiting.popleft())

    def _drawn(self, logits: Float[Tensor, "b v"]) -> list[int]:
        """A token for each row, by its own generator; all are as they were where that fails."""
        finite = logits.isfinite().all(1).tolist()
        if not all(finite):
            bad = [story.ticket for story, fine in zip(self._rows, finite, strict=True) if not fine]
            raise MoemlaError(f"the logits of tickets {bad} are not finite: {UNUSABLE}")
        before = [story.generator.get_state() for story in self._rows]
        try:
            drawn: dict[int, int] = {}
            for sampling in {story.sampling for story in self._rows}:  # those who are drawn alike, at once
                places = [place for place, story in enumerate(self._rows) if story.sampling == sampling]
                generators = [self._rows[place].generator for place in places]
                drawn |= zip(places, _draw(logits[places], *sampling, generators).tolist(), strict=True)
            return [drawn[place] for place in range(len(self._rows))]
        except BaseException:
            for story, state in zip(self._rows, before, strict=True):
                story.generator.set_state(state)
            raise

    def _leave(self, place: int) -> None:
        """Ends a row's story; the last row moves to its slot, so that rows stay without holes.

        What stood in the slot that falls free is wiped out.
        """
        story, last, lengths = self._rows[place], len(self._rows) - 1, self.cache.lengths
        self._ended[story.ticket] = story.text
        held = lengths[last]
        if place < last:
            with torch.inference_mode():
                for buffer in self._buffers():
                    buffer[:, place, :, :held] = buffer[:, last, :, :held]
            self._wipe(place, held, lengths[place] + 1)  # one more: a step that failed wrote there
        self._wipe(last, 0, held + 1)
        self._rows[place] = self._rows[last]
        lengths[place] = held
        lengths[last] = 0
        self._rows.pop()

    def _buffers(self) -> tuple[Tensor, ...]:
        """All that is kept for a place, each (layers, places, heads, slots, width)."""
        return *self.cache.buffers, self.cache.tokens[None, :, None, :, None]

    def _wipe(self, place: int, begin: int, end: int) -> None:
        """Zeros in these slots: a number that is not finite, left behind, would spoil sums over it."""
        with torch.inference_mode():
            for buffer in self._buffers():
                buffer[:, place, :, begin:end] = 0


def _whole(numbers: Any, name: str, right: str) -> list[int]:
    """Whole numbers as a list; ValueError for anything else."""
    try:
        return [whole_number(number) for number in (numbers.tolist() if isinstance(numbers, Tensor) else numbers)]
    except TypeError:
        raise ValueError(f"{name}={numbers!r}: {right}") from None


def _rows(cache: Cache, begin: int, end: int) -> Cache:
    """Some neighbouring rows, in the same storage; their lengths are a list of their own."""
    view = copy(cache)
    view.buffers = tuple(buffer[:, begin:end] for buffer in cache.buffers)
    view.tokens, view.lengths = cache.tokens[begin:end], cache.lengths[begin:end]
    return view
