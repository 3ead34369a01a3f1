"""How good is a model of stories: nats per token, perplexity, bits per byte; and whether it minds order and agreement.

Perplexities of models with different tokenizers cannot be compared; bits per byte can. A story is scored alone from its
start token; the end token is not scored, and bytes are those of the stories without separators. Built in chapter 5.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla.balancing import coefficient_of_variation, dead_experts, max_violation, noise_floor
from moemla.config import require
from moemla.errors import DataError, MoemlaError, optional
from moemla.generation import UNUSABLE, eval_mode, whole
from moemla.losses import CHUNK
from moemla.model import LanguageModel
from moemla.stories import Story
from moemla.tokenizer import Tokenizer

TOKENS_AT_ONCE = 8192


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Nats of all tokens of a text, over ln 2, over its UTF-8 bytes. Built in chapter 1."""
    return nats / math.log(2) / n_bytes


def perplexity(nats_per_token: float) -> float:
    """e to the nats per token; inf where that is more than a float holds (709.8 nats and more)."""
    try:
        return math.exp(nats_per_token)
    except OverflowError:
        return math.inf


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean of independent runs, and half the width of its interval by Student's t.

    4.3 standard errors for three runs, 2.8 for five. For two variants run with the same seeds, give the differences by
    seed. ValueError for fewer than two values.
    """
    require(len(values) >= 2, "values", values, "an interval needs two values or more")
    student_t = optional("scipy", "stats").stats.t  # a second to import
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(student_t.ppf((1 + level) / 2, len(values) - 1) * spread)


@torch.inference_mode()
def document_nats(
    model: nn.Module, documents: Sequence[Sequence[int]], context: int | None = None
) -> Float[Tensor, "n"]:
    """Summed nats of each document (N,), float64.

    A document is its start token and the story's tokens; the start token is given, the others are scored. One longer
    than `context` (default max_seq_len) is scored in strides of the context: a stride begins with the last token of the
    one before. The (B, T, V) logits never exist as a whole. MoemlaError where the nats are not finite, naming the first
    such document.
    """
    model = whole(model)
    longest = model.config.max_seq_len
    context = longest if context is None else context
    require(1 <= context <= longest, "context", context, f"must be 1 to max_seq_len={longest}")
    device = model.embedding.weight.device
    pieces = []  # (document, its tokens from some place on): T scored tokens need T + 1
    for number, document in enumerate(documents):
        for start in range(0, len(document) - 1, context):
            pieces.append((number, np.asarray(document[start : start + context + 1], dtype=np.int64)))
    pieces.sort(key=lambda piece: len(piece[1]))
    total = torch.zeros(len(documents), dtype=torch.float64, device="cpu")
    with eval_mode(model):
        while pieces:
            longest = len(pieces[-1][1])
            batch = [pieces.pop() for _ in range(min(len(pieces), max(1, TOKENS_AT_ONCE // longest)))]
            tokens = torch.full((len(batch), longest), -1, dtype=torch.long)
            for row, (_, piece) in enumerate(batch):
                tokens[row, : len(piece)] = torch.from_numpy(piece)
            tokens = tokens.to(device)
            targets, lengths = tokens[:, 1:], torch.tensor([len(piece) - 1 for _, piece in batch])
            x = model.features(tokens[:, :-1].clamp(min=0), lengths=lengths)
            nats = _token_nats(model, x.flatten(0, 1), targets.flatten()).view(targets.shape).double()
            owners = torch.tensor([number for number, _ in batch], device="cpu")
            total.index_add_(0, owners, nats.sum(1).cpu())
    wrong = (~total.isfinite()).nonzero()
    if len(wrong):
        number = int(wrong[0])
        raise MoemlaError(f"story {number + 1} of {len(total)} has {total[number].item()} nats: {UNUSABLE}")
    return total


def _token_nats(model: LanguageModel, x: Float[Tensor, "n d"], targets: Int[Tensor, "n"]) -> Float[Tensor, "n"]:
    """-ln p of each target (N,), 0 for a negative one; the logits of CHUNK rows exist at once."""
    parts = zip(x.split(CHUNK), targets.split(CHUNK), strict=True)
    each = dict(ignore_index=-1, reduction="none")
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([F.cross_entropy(model.head(rows).to(wide), scored, **each) for rows, scored in parts])


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured.

    The perplexity is inf above 709.8 nats. The load figures are over all scored tokens, one window; None without
    experts.
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    stories: int
    tokens: int
    bytes: int
    load_cv: float | None = None
    load_cv_floor: float | None = None
    load_max_violation: float | None = None
    dead_experts: int | None = None

    def to_dict(self) -> dict:
        """Plain values for JSON, which has no inf: such a perplexity is None."""
        return asdict(self) | dict(perplexity=self.perplexity if math.isfinite(self.perplexity) else None)


def evaluate(model: nn.Module, tokenizer: Tokenizer, stories: Iterable[str], context: int | None = None) -> Evaluation:
    """Scores each story alone from its start token, the end token not scored.

    The model may be inside DDP or torch.compile. DataError without stories; MoemlaError for a model whose nats are not
    finite.
    """
    model = whole(model)
    texts = [text for text in stories if text]
    if not texts:
        raise DataError("there is no story to evaluate")
    documents = [[tokenizer.eot, *ids] for ids in tokenizer.encode_batch(texts)]
    load = _LoadCounter(model)
    with load:
        nats = document_nats(model, documents, context).sum().item()
    tokens, n_bytes = sum(map(len, documents)) - len(documents), sum(len(text.encode()) for text in texts)
    figures = dict(stories=len(texts), tokens=tokens, bytes=n_bytes)
    per_token = nats / tokens
    return Evaluation(per_token, perplexity(per_token), bits_per_byte(nats, n_bytes), **figures, **load.figures())


class _LoadCounter:
    """Sums the counts of every router over the forward passes made inside the block."""

    def __init__(self, model: LanguageModel):
        self.model, self.counts, self.hook = model, None, None

    def __enter__(self):
        def add(module, inputs, output):
            if self.model.routing():
                new = torch.stack([routing.counts for routing in self.model.routing()]).cpu()
                self.counts = new if self.counts is None else self.counts + new

        self.hook = self.model.norm.register_forward_hook(add)  # behind the last block
        return self

    def __exit__(self, *error):
        self.hook.remove()

    def figures(self) -> dict:
        if self.counts is None:
            return {}
        config = self.model.config
        tokens = int(self.counts[0].sum()) // config.top_k
        return dict(
            load_cv=float(np.mean([coefficient_of_variation(layer) for layer in self.counts])),
            load_cv_floor=noise_floor(config.n_experts, config.top_k, tokens),
            load_max_violation=max(max_violation(layer) for layer in self.counts),
            dead_experts=sum(dead_experts(layer) for layer in self.counts),
        )


@torch.inference_mode()
def load_profile(model: nn.Module, tokens: Int[Tensor, "n t"], rows: int) -> dict:
    """How evenly the experts of each layer are used: over all tokens, over a batch of `rows` windows, within a window.

    `counts` is (L, E), over all windows. "batch" and "sequence" hold `tokens`, the size of the window, `cv` and
    `max_violation`, means over windows and layers, and `cv_floor`, which uniform random routing would show. A router
    may be balanced over a batch and not within a sequence. Built in chapter 8.
    """
    model = whole(model)
    config, device = model.config, model.embedding.weight.device
    n, context = tokens.shape
    each = []  # (L, rows, E) of each batch
    with eval_mode(model):
        for batch in tokens.split(rows):
            model.features(batch.to(device))
            slots = torch.stack([routing.index.view(len(batch), -1) for routing in model.routing()])
            counts = torch.zeros(*slots.shape[:2], config.n_experts, dtype=torch.int64, device=device)
            each.append(counts.scatter_add(2, slots, torch.ones_like(slots)).cpu())

    def window(counts: Tensor, size: int) -> dict:
        load = counts.double()
        mean = load.mean(-1)
        return dict(
            tokens=size,
            cv=(load.std(-1, correction=0) / mean).mean().item(),
            max_violation=(load.amax(-1) / mean - 1).mean().item(),
            cv_floor=noise_floor(config.n_experts, config.top_k, size),
        )

    full = [counts.sum(1) for counts in each if counts.shape[1] == rows] or [each[0].sum(1)]
    return dict(
        counts=torch.stack([counts.sum(1) for counts in each]).sum(0).tolist(),
        batch=window(torch.stack(full), min(rows, n) * context),
        sequence=window(torch.cat(each, 1), context),
    )


def shuffle_sentences(text: str, seed: int = 0) -> str:
    """The same sentences in another order: what a model loses on it is what it knew of the order. Built in chapter 1.

    A sentence ends with . ! or ? and a closing quote, if there is one, before a capital letter or an opening quote (so
    that '"Why?" asked Mia.' is one); line breaks stay where they were, counted in sentences.
    """
    pieces = re.split(r"(?:(?<=[.!?])|(?<=[.!?]\"))(\s+)(?=[\"A-Z])", text)
    sentences, gaps = pieces[::2], pieces[1::2]
    order = np.random.default_rng(seed).permutation(len(sentences))
    shuffled = [sentences[i] for i in order]
    return "".join(s + g for s, g in zip(shuffled, [*gaps, ""], strict=True))


def agreement_accuracy(
    model: nn.Module, tokenizer: Tokenizer, stories: Sequence[Story], context: int | None = None
) -> dict[str, float]:
    """Share of marked words that the model finds likelier than their distractor, for each kind, and "all".

    A word counts with what stands before it and the one character behind it, so that "Tom" does not win as the start of
    "Tommy".
    """
    pairs, kinds = [], []
    for story in stories:
        for mark in story.agreements:
            before, after = story.text[: mark.start], story.text[mark.end : mark.end + 1]
            right, wrong = (before + word + after for word in (story.text[mark.start : mark.end], mark.distractor))
            pairs += [right, wrong]
            kinds.append(mark.kind)
    documents = [[tokenizer.eot, *ids] for ids in tokenizer.encode_batch(pairs)]
    right, wrong = document_nats(model, documents, context).view(-1, 2).unbind(1)
    won = (right < wrong).double().numpy()
    kinds = np.array(kinds)
    return {kind: float(won[kinds == kind].mean()) for kind in sorted(set(kinds))} | {"all": float(won.mean())}
