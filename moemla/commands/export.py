"""`moemla export`: a run as a folder to give away. Built in chapter 14."""

from dataclasses import dataclass
from pathlib import Path


@dataclass
class Export:
    """Weights, config and tokenizer of a run as a folder to give away.

    For the decoupled form with RMSNorm, SwiGLU, sigmoid scores and no biases one that `transformers` loads as
    DeepseekV3, without this package; for others one that `moemla.load` reads.
    """

    run: Path
    """Folder of a run, or of a saved model."""
    out: Path
    """Folder to make; it must be empty or not there."""

    def __call__(self) -> None:
        from moemla.checkpoint import load
        from moemla.interop import export

        model, tokenizer = load(self.run)
        reason = export(model, tokenizer, self.out)
        count = sum(parameter.numel() for parameter in model.parameters())
        if reason is None:
            form = "a DeepseekV3 for transformers' AutoModelForCausalLM and AutoTokenizer"
            form += "; its tokenizer puts <|endoftext|> (BOS) before a text, as training did"
        else:
            form = f"in moemla's own format, for moemla.load; no DeepseekV3, since {reason}"
        print(f"{self.out}: {count:,} parameters, {form}")
