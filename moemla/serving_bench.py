"""A decoding step of the whole model with each form of attention, over rows and context, beside its limit.

Built in chapter 14.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moemla.cache import Cache
from moemla.config import ModelConfig, require
from moemla.measuring import Row, Work, limits, measure
from moemla.model import LanguageModel
from moemla.serving import step_bytes, step_flops

FORMS = {"mha-rope": ("mha", "kv"), "gqa-rope": ("mha", "kv"), "mla-rope": ("mla", "latent")}
FORMS |= {"mla-decoupled": ("mla-decoupled", "joint")}


def form(config: ModelConfig, name: str) -> ModelConfig:
    """The same model with another attention and its usual cache; the rest, experts too, as it is.

    Grouped-query attention has a quarter of the key heads, or the next number below that divides; values are as wide as
    a head. ValueError for a name that is none of FORMS.
    """
    require(name in FORMS, "name", name, f"choose one of {', '.join(FORMS)}")
    attention, cache = FORMS[name]
    heads = config.n_heads
    if name == "gqa-rope":
        heads = max(n for n in range(1, max(1, heads // 4) + 1) if heads % n == 0)
    changes = dict(attention=attention, cache=cache, n_kv_heads=heads, positions="rope")
    return ModelConfig.from_dict(config.to_dict() | changes | dict(d_value=config.d_head))


def bench_serving(
    config: ModelConfig,
    lengths: tuple[int, ...] = (128, 1024, 4096),
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seconds: float = 0.5,
) -> list[Row]:
    """One token for each of `batch_size` rows, behind a cache of each length, for each of FORMS.

    Widths, layers and feed-forward are those of `config`. What the caches hold is random, and as long in every row; no
    token is drawn, and nobody comes or goes. The limit is that of `step_bytes` and `step_flops`. A step is started from
    Python, one operation after another. ValueError for no length.
    """
    require(bool(lengths), "lengths", lengths, "name at least one")
    machine, rows = limits(device, dtype), []
    longest = dict(max_seq_len=max(config.max_seq_len, max(lengths) + 1))
    configs = {name: ModelConfig.from_dict(form(config, name).to_dict() | longest) for name in FORMS}
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
            moved = step_bytes(configs[name], batch_size, held, dtype.itemsize).total
            work[name] = Work(step_flops(configs[name], batch_size, held), moved)
        rows += measure(f"serve rows={batch_size} held={held}", programs, work, batch_size, machine, seconds)
    return rows


def _step(model: LanguageModel, tokens: Tensor, cache: Cache, held: int) -> Tensor:
    cache.lengths = [held] * cache.batch_size
    with torch.inference_mode():
        return model.next_logits(tokens, cache)
