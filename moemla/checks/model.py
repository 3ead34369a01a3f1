"""Chapter 5: a language model sees no later token, begins by knowing nothing, and writes the same with a cache."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moemla.checks.attention import SPLITS, no_later_slope
from moemla.checks.compare import SIZES, check, normal, require, same


@check
def tokens_causal(model: nn.Module, vocab_size: int, rows: int = 3, tokens: int = 9) -> None:
    """No logits depend on a later token's vector, and each row gives what it gives alone.

    The vectors are what `model.embedding` gives.
    """
    vectors = []
    for steps in range(1, tokens + 1):
        ids = torch.randint(vocab_size, (rows, steps))
        hook = model.embedding.register_forward_hook(lambda module, args, out: vectors.append(out))
        try:
            logits = model(ids)
        finally:
            hook.remove()
        no_later_slope(logits, vectors[-1])
        alone = torch.cat([model(row[None]) for row in ids])
        same(logits, alone, f"tokens {ids.tolist()} against their rows one by one")


@check
@torch.no_grad()
def tokens_in_steps(model: Callable, start: Callable, vocab_size: int, rows: int = 2) -> None:
    """A prompt and then steps give the logits of one pass; start(rows, max_len) gives (step, cache) as in `attention`.

    A cache that says its length says the right one.
    """
    for split in SPLITS:
        tokens, (step, cache) = torch.randint(vocab_size, (rows, sum(split))), start(rows, sum(split))
        actual = torch.cat([step(part) for part in tokens.split(split, dim=1)], dim=1)
        same(actual, model(tokens), f"logits of tokens {tokens.tolist()} in steps {list(split)}")
        length = getattr(cache, "length", sum(split))
        require(length == sum(split), f"steps {list(split)}: the cache says that it holds {length} tokens")


@check
@torch.no_grad()
def begins_knowing_nothing(model: nn.Module, vocab_size: int, n_layers: int, parameters: int) -> None:
    """As many parameters as are counted, a first loss of ln V, and what writes to the stream begins small.

    The matrices that write are called `*out_proj.weight` and `*ward.down.weight`; their size is 0.02 / sqrt(2 L).
    """
    held = sum(p.numel() for p in model.parameters())
    require(held == parameters, f"{held} parameters, {parameters} counted")
    tokens = torch.randint(vocab_size, (8, 13))
    loss = F.cross_entropy(model(tokens[:, :-1]).mT, tokens[:, 1:]).item()
    nothing = math.log(vocab_size)
    require(abs(loss - nothing) < 0.05, f"first loss {loss:.3f} on random tokens, not ln {vocab_size} = {nothing:.3f}")
    writers = {n: p for n, p in model.named_parameters() if n.endswith(("out_proj.weight", "ward.down.weight"))}
    require(len(writers) == 2 * n_layers, f"{len(writers)} matrices write to the stream of {n_layers} layers")
    small = 0.02 / (2 * n_layers) ** 0.5
    for name, weight in writers.items():
        std = weight.std().item()
        require(abs(std / small - 1) < 0.15, f"{name} begins with standard deviation {std:.3g}, not {small:.3g}")


@check
def tokens_apart(layer: Callable[[Tensor], Tensor], width: int) -> None:
    """A layer (B, T, D) -> (B, T, D) sees each token alone, as a feed-forward layer and routed experts do."""
    for rows, tokens in SIZES:
        x = normal(rows, tokens, width)
        alone = torch.cat([torch.cat([layer(token[None, None]) for token in row], dim=1) for row in x])
        same(layer(x), alone, f"x {(rows, tokens, width)} against its tokens one by one")


@check
@torch.no_grad()
def bends(layer: Callable[[Tensor], Tensor], width: int) -> None:
    """A feed-forward layer is no straight map: without a bend two matrices are one."""
    x = normal(2, 5, width)
    bent = (layer(2 * x) - 2 * layer(x) + layer(0 * x)).abs().max()
    require(bent > 1e-3, f"x {tuple(x.shape)} twice as large gives twice the output: nothing bends")
