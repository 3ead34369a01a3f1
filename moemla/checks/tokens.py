"""Chapter 1: no text is lost in tokens, merging pays, and what is counted is a distribution."""

from collections.abc import Callable, Sequence

import numpy as np

from moemla.checks.compare import CheckFailed, check, require

STRANGE = ("", "naïve café", "😊 漢字", "tabs\tand\n\nlines  ", "<|endoftext|>", "\x00\x7f", "Don't! 12 34?")
SHOWN = 8  # characters of a failing text up to which a smaller one is looked for


@check
def nothing_is_lost(tokenizer, texts: Sequence[str] = (), end: int = 0) -> None:
    """decode(encode(text)) is the text, and no text makes the token that ends a story. Strange texts come first."""

    def kept(text):
        return tokenizer.decode(tokenizer.encode(text)) == text

    for text in (*STRANGE, *texts):
        if not kept(text):
            parts = (text[i : i + n] for n in range(SHOWN + 1) for i in range(len(text) - n + 1))
            text = next((part for part in parts if not kept(part)), text)
            raise CheckFailed(f"{text!r} comes back as {tokenizer.decode(tokenizer.encode(text))!r}")
        require(end not in tokenizer.encode(text), f"{text!r} makes token {end}, which ends a story")


@check
def shortens(tokenizer, texts: Sequence[str], share: float = 0.6) -> dict[str, float]:
    """Tokens are fewer than `share` of the bytes; returns {"tokens per byte": it}."""
    rate = sum(len(tokenizer.encode(text)) for text in texts) / sum(len(text.encode()) for text in texts)
    require(rate < share, f"{rate:.2f} tokens a byte in {len(texts)} texts, not below {share}")
    return {"tokens per byte": rate}


@check
def sums_to_one(distribution: Callable, vocab_size: int, contexts: Sequence[Sequence[int]]) -> None:
    """distribution(context) is vocab_size probabilities, in contexts that were seen and in others."""
    for context in sorted(contexts, key=len):
        p = np.asarray(distribution(context))
        require(p.shape == (vocab_size,), f"context {list(context)}: shape {p.shape}, wanted ({vocab_size},)")
        require(bool((p >= 0).all()), f"context {list(context)}: probability {p.min():.2g} of token {p.argmin()}")
        require(bool(abs(p.sum() - 1) < 1e-9), f"context {list(context)}: probabilities sum to {p.sum():.9g}")
