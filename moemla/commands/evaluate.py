"""`moemla evaluate`: scores a run on stories. Built in chapter 5."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from moemla.commands.terminal import Flag, device_of, print_json, say
from moemla.errors import MoemlaError


@dataclass
class Evaluate:
    """Nats per token, perplexity and bits per byte of a run on stories; load of its experts."""

    run: Path
    """Folder of a run, or of a saved model with its tokenizer."""
    text: Path | None = None
    """Stories with a line <|endoftext|> between them; default: the validation text of the run's data."""
    context: int | None = None
    """Tokens a story is scored in at a time; default: the training's sequence length, a saved model's max_seq_len."""
    json: Flag[bool] = False
    """Print one JSON object."""
    device: str | None = None
    """cpu, cuda, cuda:1; default: the GPU if there is one."""

    def __call__(self) -> None:
        from moemla.checkpoint import load
        from moemla.evaluation import evaluate
        from moemla.files import read_json
        from moemla.runs import data_folder
        from moemla.text import read_stories

        model, tokenizer = load(self.run, device_of(self.device))
        if tokenizer is None:
            raise MoemlaError(f"{self.run} has no tokenizer.json")
        text, context = self.text, self.context
        run = next((place for place in (self.run, self.run.parent) if (place / "train.json").is_file()), None)  # best/
        if run is not None:
            text = text or data_folder(run) / "valid.txt"
            context = read_json(run / "train.json")["train"]["seq_len"] if context is None else context
        context = model.config.max_seq_len if context is None else context
        if text is None or not text.is_file():
            missing = "" if text is None else f"{text} is not there from here; "
            raise MoemlaError(f"{missing}name the stories to score with --text FILE")
        score = evaluate(model, tokenizer, read_stories(text), context)
        if self.json:
            print_json(score.to_dict())
            if math.isinf(score.perplexity):
                say("moemla: the perplexity is more than a float holds: null", sys.stderr)
            return
        print(f"{score.stories:,} stories, {score.tokens:,} tokens, {score.bytes:,} bytes, {context} tokens at a time")
        print(f"{score.nats_per_token:.4f} nats per token, perplexity {score.perplexity:.3f}")
        print(f"{score.bits_per_byte:.4f} bits per byte")
        if score.load_cv is not None:
            print(
                f"load of the experts over {score.tokens:,} tokens: CV {score.load_cv:.3f} (uniform routing shows "
                f"{score.load_cv_floor:.3f}), MaxVio {score.load_max_violation:.2f}, dead experts {score.dead_experts}"
            )
