"""Sampling: one token after another, with a cache or without; the same tokens either way.

Notable: each row draws from a generator of its own, so a story does not depend on its neighbours; prompts of any
lengths go together; a cache may hold their beginning, and is looked at before it is believed. Built in chapter 5.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from operator import index

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla.cache import Cache
from moemla.config import require
from moemla.errors import MoemlaError
from moemla.model import LanguageModel, unwrapped

UNUSABLE = "the weights are damaged, or their training diverged"


def whole(model: nn.Module) -> LanguageModel:
    """The LanguageModel, taken out of DDP or torch.compile; ValueError for one that FSDP2 has sharded."""
    model = unwrapped(model)
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError("model: sharded by FSDP2; call model.save(folder) on every rank and moemla.load(folder) it")
    return model


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside the block every module is in eval mode; behind it each is in its own again. Built in chapter 13."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_sampling(temperature: float, top_k: int | None = None, top_p: float | None = None) -> None:
    """ValueError for what is no way to sample, before anything is written. Built in chapter 13."""
    require(0 <= temperature < torch.inf, "temperature", temperature, "must be a number, 0 (greedy) or more")
    require(top_k is None or top_k >= 1, "top_k", top_k, "must be at least 1")
    require(top_p is None or 0 < top_p <= 1, "top_p", top_p, "must be above 0 and at most 1")


def filter_logits(
    logits: Float[Tensor, "b v"], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "b v"]:
    """Log-probabilities (B, V) to sample from, in float64.

    Divided by the temperature; then all but the `top_k` likeliest are ruled out, then all but the smallest set that
    holds `top_p` of the probability. ValueError for a temperature that is not above 0, top_k below 1 or top_p outside
    (0, 1].
    """
    check_sampling(temperature, top_k, top_p)
    require(temperature > 0, "temperature", temperature, "must be above 0 (0 is greedy in `generate`)")
    logits = logits.double()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        best = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    if top_p is not None:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= (top_p if top_p < 1 else torch.inf)  # the mass before it suffices
        logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
    return logits.log_softmax(-1)


def _draw(logits, temperature, top_k, top_p, generators) -> Int[Tensor, "b"]:
    if temperature == 0:
        return logits.argmax(-1)
    places = None
    if top_k is not None:  # the others cannot be drawn: they need no probability
        logits, places = logits.topk(max(0, min(top_k, logits.shape[-1])))
    probabilities = filter_logits(logits.cpu(), temperature, top_k, top_p).exp()
    pairs = zip(probabilities, generators, strict=True)
    drawn = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in pairs])
    return drawn.squeeze(1) if places is None else places.gather(1, drawn.to(places.device)).squeeze(1)


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokens: Int[Tensor, "b t"] | Sequence[Int[Tensor, "_"]] | Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = None,
    seed: int | Sequence[int] = 0,
    use_cache: bool = True,
    stop: int | None = None,
    cache: Cache | None = None,
    on_token: Callable[[list[int | None]], None] | None = None,
    compiled: bool = False,
) -> Int[Tensor, "b n"] | list[Int[Tensor, "_"]]:
    """Continues prompts with a LanguageModel, wrapped or not: a tensor (B, T), or a list of prompts of any lengths.

    A prompt of a list is a 1-D tensor or a list of ids, as `Tokenizer.encode` returns it; models trained here expect
    `tokenizer.eot` before it. Returns prompt and continuation, a tensor or a list of tensors. temperature 0 is greedy.
    Row b draws from its own generator, seeded with seed + b or with seed[b], whatever its neighbours draw. `stop` ends
    a row (the token is kept; a tensor is filled up with it). `on_token` is called at each step with a token for each
    row, None for a row that has ended. A row ends early at max_seq_len.
    `cache` holds the beginning of the prompts, a row for each or one row for all: only the rest is computed (and the
    first token again, to see whether the cache is this model's), and the cache stays as it was, for the next call.
    `compiled` runs single tokens through torch.compile: a few times faster on small models, after up to a minute at the
    first call; rows that have ended are computed along, for a graph of one size. ValueError for an empty prompt, one
    with no room left, a token outside the vocabulary, or a cache that holds more than a prompt's beginning, another
    text, or another model's numbers; MoemlaError for logits that are not finite.
    """
    model = whole(model)
    given_tensor = isinstance(tokens, Tensor)
    if given_tensor and tokens.dim() != 2:
        raise ValueError(f"tokens.shape={tuple(tokens.shape)}: give (B, T), or a list of prompts")
    prompts = [_as_prompt(prompt, model.embedding.weight.device) for prompt in tokens]
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("tokens: each prompt needs at least one token (the start token, for example)")
    require(max_new_tokens >= 0, "max_new_tokens", max_new_tokens, "must be 0 or more")
    check_sampling(temperature, top_k, top_p)
    last, limit, longest = model.config.vocab_size - 1, model.config.max_seq_len, max(map(len, prompts))
    low, high = min(int(p.min()) for p in prompts), max(int(p.max()) for p in prompts)
    if not 0 <= low <= high <= last:
        raise ValueError(f"tokens={low} to {high}: must be between 0 and {last}")
    require(stop is None or stop in range(last + 1), "stop", stop, f"one token, between 0 and {last}")
    check_room(longest, max_new_tokens, limit)
    single = hasattr(seed, "__index__")
    seeds = [int(seed) + row for row in range(len(prompts))] if single else [int(number) for number in seed]
    require(len(seeds) == len(prompts), "seed", seeds, f"one number, or one for each of the {len(prompts)} prompts")
    right = f"must be between -2**63 and 2**64 - 1, for each of the {len(seeds)} rows"
    require(all(-(2**63) <= number < 2**64 for number in seeds), "seed", seed, right)
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    texts = [prompt.tolist() for prompt in prompts]
    ends = [min(len(text) + max_new_tokens, limit) for text in texts]
    with eval_mode(model):
        if cache is not None:
            cache = _own(cache, texts, max(ends), model)
        elif use_cache and max_new_tokens:
            cache = model.new_cache(len(texts), max(ends))
        active = list(range(len(texts))) if max_new_tokens else []  # the rows that still write
        computed = active  # the rows that are computed and cached: these, or all, for code is compiled for a batch size
        shrinks = not compiled or cache is None
        while active:
            ended = set(computed) - set(active)
            if ended:
                _turn_back(cache, ended)
            logits = _next_logits(model, [texts[row] for row in computed], cache, compiled, ended)
            logits = logits[active] if ended else logits
            if not logits.isfinite().all():
                raise MoemlaError(f"the model's logits are not finite: {UNUSABLE}")
            drawn = _draw(logits, temperature, top_k, top_p, [generators[row] for row in active]).tolist()
            for row, token in zip(active, drawn, strict=True):
                texts[row].append(token)
            if on_token is not None:
                new = dict(zip(active, drawn, strict=True))
                on_token([new.get(row) for row in range(len(texts))])
            pairs = enumerate(zip(active, drawn, strict=True))
            kept = [place for place, (row, token) in pairs if token != stop and len(texts[row]) < ends[row]]
            if shrinks and cache is not None and 0 < len(kept) < len(active):
                cache.select(kept)
            active = [active[place] for place in kept]
            computed = active if shrinks else computed
    with torch.inference_mode(False):  # what is returned may be trained on
        out = [torch.tensor(text, device=prompt.device) for text, prompt in zip(texts, prompts, strict=True)]
        return torch.nn.utils.rnn.pad_sequence(out, batch_first=True, padding_value=stop or 0) if given_tensor else out


def check_room(longest: int, max_new_tokens: int, max_seq_len: int) -> None:
    """ValueError for a prompt of so many tokens that none can be added. Built in chapter 13."""
    if longest + (max_new_tokens > 0) > max_seq_len:
        raise ValueError(f"tokens: a prompt of {longest} tokens leaves no room for more in max_seq_len={max_seq_len}")


def _as_prompt(prompt: Int[Tensor, "_"] | Sequence[int], device: torch.device) -> Int[Tensor, "_"]:
    """Ids as a tensor; ValueError for what is no list of whole numbers."""
    try:
        ids = prompt if isinstance(prompt, Tensor) else torch.tensor([index(token) for token in prompt], device=device)
    except TypeError:
        raise ValueError(f"tokens: {prompt!r} is no prompt; give a list of prompts, each a list of ids") from None
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"tokens: a prompt of {ids.dtype} {tuple(ids.shape)}; give 1-D ids")
    return ids


def _own(cache: Cache, texts: list[list[int]], max_len: int, model: LanguageModel) -> Cache:
    """A copy of the given cache with a row for each text and room for what comes; ValueError where it does not fit."""
    if cache.batch_size not in (1, len(texts)):
        raise ValueError(f"cache: has {cache.batch_size} rows for {len(texts)} prompts; it needs one for each, or one")
    rows = range(len(texts)) if cache.batch_size == len(texts) else [0] * len(texts)
    kept = cache.tokens.tolist()
    for number, (text, row) in enumerate(zip(texts, rows, strict=True)):
        length = cache.lengths[row]
        if length >= len(text):
            raise ValueError(f"cache: holds {length} tokens, and the prompt must go on behind them")
        if kept[row][:length] != text[:length]:
            raise ValueError(
                f"cache: row {row} holds other tokens than prompt {number} begins with; fill it with these"
            )
    if not _filled_by(model, cache):
        raise ValueError("cache: filled by another model, or by this one before its weights changed; fill it again")
    cache = cache.copy(max(max_len, cache.length))
    cache.select(list(rows))
    news = [len(text) - held for text, held in zip(texts, cache.lengths, strict=True)]
    if cache.length + max(news) > cache.max_len:  # the longest prefix and the longest rest stand in different rows
        cache.crop(min(cache.lengths))
    return cache


SAME = 1e-3  # of the largest number: rounding in 32 bits stays far below, another model's numbers far above


def _filled_by(model: LanguageModel, cache: Cache) -> bool:
    """Whether the cache holds of each row's first token what this model, as it is now, makes of it."""
    rows = [row for row, length in enumerate(cache.lengths) if length]
    if not rows or cache.n_layers != len(model.blocks):
        return not rows
    again = copy(cache)
    again.reset()
    again = again.copy(1)
    again.select(rows)
    eps = max(torch.finfo(tensor.dtype).eps for tensor in (*cache.buffers, model.embedding.weight))
    kind = model.embedding.weight.device.type
    if torch.is_autocast_enabled(kind):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)
    elif torch.get_float32_matmul_precision() != "highest":
        eps = max(eps, 2**-10)  # TF32's
    narrow = eps > 1e-4  # then compare the first layer alone: below it a rounding may turn a router's choice
    try:
        model.features(cache.tokens[rows, :1], cache=again)
        for held, made in zip(cache.buffers, again.buffers, strict=True):
            held, made = (part[: 1 if narrow else None].double() for part in (held[:, rows, :, :1], made))
            largest, apart = (part.abs().amax((1, 2, 3, 4)) for part in (made, held - made))
            if not (apart <= max(SAME, 4 * eps) * largest).all():
                return False
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError):  # other widths, heads or layers
        return False
    return True


def _turn_back(cache: Cache, ended: set[int]) -> None:
    """Makes room for rows that are computed along: one that stands at the cache's end goes back.

    What it holds does not matter, but rows of unequal length must not become equal, for which other code would be
    compiled.
    """
    for row in ended:
        if cache.lengths[row] == cache.max_len:
            others = [length for other, length in enumerate(cache.lengths) if other not in ended]
            cache.lengths[row] = max(others) // 2


def _next_logits(
    model: LanguageModel, texts: list[list[int]], cache: Cache | None, compiled: bool, ended: set[int]
) -> Float[Tensor, "b v"]:
    """Logits (B, V) behind each text, and anything behind those that have ended: they repeat a token.

    With a cache only what it does not hold yet is computed.
    """
    held = cache.lengths if cache is not None else [0] * len(texts)
    new = [
        text[-1:] if row in ended else text[begin:] for row, (text, begin) in enumerate(zip(texts, held, strict=True))
    ]
    device = model.embedding.weight.device
    if len(set(map(len, new))) == 1:
        quick = compiled and cache is not None and len(new[0]) == 1
        return (model.compiled_next_logits if quick else model.next_logits)(torch.tensor(new, device=device), cache)
    lengths = torch.tensor([len(tokens) for tokens in new])
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens) for tokens in new], batch_first=True).to(device)
    x = model.features(padded, cache=cache, lengths=lengths)
    return model.head(x[torch.arange(len(new), device=device), (lengths - 1).to(device)])
