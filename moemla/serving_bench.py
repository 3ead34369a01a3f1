"""A decoding step of the whole model with each form of attention, over rows and context, beside its limit.

Built in chapter 14.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moemla import complexity
from moemla.config import ModelConfig
from moemla.measuring import Row, Work, limits, measure
from moemla.model import LanguageModel
from moemla.serving import step_bytes

FORMS = ("mha-rope", "gqa-rope", "mla-rope", "mla-decoupled")


def form(config: ModelConfig, name: str) -> ModelConfig:
    """The same model with another attention and its cache; the rest, experts too, as it is. ValueError for a name."""
    if name not in FORMS:
        raise ValueError(f"name={name!r}: choose one of {', '.join(FORMS)}")
    kind = {"mla-rope": "mla", "mla-decoupled": "mla-decoupled"}.get(name, "mha")
    cache = {"mla-rope": "latent", "mla-decoupled": "joint"}.get(name, "kv")
    heads = max(1, config.n_heads // 4) if name == "gqa-rope" else config.n_heads
    changes = dict(attention=kind, cache=cache, n_kv_heads=heads, positions="rope")
    return ModelConfig.from_dict(config.to_dict() | changes)


def bench_serving(
    config: ModelConfig,
    lengths: tuple[int, ...] = (128, 1024, 4096),
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 0.5,
) -> list[Row]:
    """One token for each of `batch_size` rows, behind a cache of each length, for each of FORMS.

    Widths, layers and feed-forward are those of `config`; grouped-query attention has a quarter of the key heads. What
    the caches hold is random. The limit counts what `step_bytes` counts, and the products of the form as it is computed
    here: the paper's keys are rebuilt at every step. A step is started from Python, one operation after another.
    """
    machine, rows = limits(device, dtype), []
    longest = ModelConfig.from_dict(config.to_dict() | dict(max_seq_len=max(config.max_seq_len, max(lengths) + 1)))
    configs = {name: form(longest, name) for name in FORMS}
    models = {name: LanguageModel(c, device=device, dtype=dtype).eval() for name, c in configs.items()}
    tokens = torch.randint(0, config.vocab_size, (batch_size, 1), device=device)
    for held in lengths:
        programs: dict[str, Callable[[], Tensor]] = {}
        work = {}
        for name, model in models.items():
            cache = model.new_cache(batch_size, held + 1)
            for buffer in cache.buffers:
                buffer.normal_()
            programs[name] = partial(_step, model, tokens, cache, held)
            read = step_bytes(configs[name], batch_size, held, dtype.itemsize).total
            work[name] = Work(2 * batch_size * _macs(configs[name], held), read)
        rows += measure(f"serve rows={batch_size} held={held}", programs, work, batch_size, machine, seconds)
    return rows


def _step(model, tokens, cache, held) -> Tensor:
    cache.lengths = [held] * cache.batch_size
    with torch.inference_mode():
        return model.next_logits(tokens, cache)


def _macs(c: ModelConfig, held: int) -> int:
    """Multiply-adds of one token behind `held` others: its weights, and what its form does with each of these."""
    count = complexity.parameters(c)
    head = c.vocab_size * c.d_model
    h, k, r = c.n_heads, c.d_head, c.latent_dim
    each = {"kv": 2 * h * k, "latent": h * ((r + 1) * k + r), "joint": h * (2 * r + c.d_rope)}[c.cache]
    return count.active - count.embedding + head + c.n_layers * held * each
