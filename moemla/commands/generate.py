"""`moemla generate`: writes stories. Built in chapter 5."""

from dataclasses import dataclass
from pathlib import Path

from moemla.commands.terminal import Flag, device_of
from moemla.config import require, require_count
from moemla.errors import MoemlaError


@dataclass
class Generate:
    """Writes a story, word by word."""

    run: Path
    """Folder of a run, or of a saved model with its tokenizer."""
    prompt: str = "Once upon a time"
    max_new_tokens: int = 400
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = 50
    top_p: float | None = None
    seed: int = 0
    count: int = 1
    """Stories, with seeds from --seed on."""
    no_cache: Flag[bool] = False
    """Compute every token from the start: slower, the same text."""
    device: str | None = None
    """cpu, cuda, cuda:1; default: the GPU if there is one."""

    def __call__(self) -> None:
        import torch

        from moemla.checkpoint import load
        from moemla.generation import check_room, check_sampling, generate
        from moemla.tokenizer import StreamDecoder

        require_count("count", self.count)
        require(self.max_new_tokens >= 0, "max_new_tokens", self.max_new_tokens, "must be 0 or more")
        right = "must be between -2**63 and 2**64 - 1, for every story"
        require(-(2**63) <= self.seed <= 2**64 - self.count, "seed", self.seed, right)
        check_sampling(self.temperature, self.top_k, self.top_p)
        model, tokenizer = load(self.run, device_of(self.device))
        if tokenizer is None:
            raise MoemlaError(f"{self.run} has no tokenizer.json")
        prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode(self.prompt)]])
        check_room(prompt.shape[1], self.max_new_tokens, model.config.max_seq_len)
        sampling = dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, use_cache=not self.no_cache)
        for number in range(self.count):
            stream = StreamDecoder(tokenizer)
            print(self.prompt, end="", flush=True)

            def show(tokens, stream=stream):
                if tokens[0] is not None:
                    print(stream.push(tokens[0]), end="", flush=True)

            generate(
                model,
                prompt,
                self.max_new_tokens,
                seed=self.seed + number,
                stop=tokenizer.eot,
                on_token=show,
                **sampling,
            )
            print(stream.finish(), end="\n" if number + 1 == self.count else "\n\n---\n\n")
