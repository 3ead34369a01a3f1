"""`moemla judge`: another language model compares the stories of two runs. Built in chapter 18."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moemla.commands.terminal import Flag, device_of, print_json
from moemla.config import require, require_count
from moemla.errors import DataError, MoemlaError, optional
from moemla.judge import CRITERIA, ChatJudge, Comparison, Match, compare


@dataclass
class Judge:
    """Asks a language model behind an OpenAI-compatible server which of two runs tells better stories.

    Run A and run B continue the same prompts with the same seeds; each pair is shown in both orders, two requests.
    """

    runs: tuple[Path, Path]
    """Folders of two runs, or of saved models with their tokenizers (pretrained/NAME too)."""
    model: str
    """The judge's name on its server."""
    base_url: str | None = None
    """The server's address, http://localhost:8080/v1; default: OpenAI's. OPENAI_API_KEY is sent where it is set."""
    criterion: Literal[tuple(CRITERIA)] = "overall"
    max_tokens: int = 16
    """Of an answer of the judge; more for one that reasons first."""
    count: int = 20
    """Stories of each run, with seeds from --seed on."""
    prompts: Path | None = None
    """A file with a prompt a line, taken in turn; default: five beginnings."""
    max_new_tokens: int = 200
    temperature: float = 0.8
    """Of the stories; 0 is greedy."""
    top_k: int | None = 50
    seed: int = 0
    device: str | None = None
    """cpu, cuda, cuda:1; default: the GPU if there is one."""
    json: Flag[bool] = False
    """Print one JSON object, with the stories and the answers."""
    out: Path | None = None
    """Write that object to this file, also where the judge fails half-way; one that is there is replaced."""

    def __call__(self) -> None:
        from moemla.checkpoint import load
        from moemla.files import write_json
        from moemla.generation import check_sampling

        require_count("count", self.count)
        require_count("max_new_tokens", self.max_new_tokens)
        right = "must be between -2**63 and 2**64 - 1, for every story"
        require(-(2**63) <= self.seed <= 2**64 - self.count, "seed", self.seed, right)
        check_sampling(self.temperature, self.top_k)
        lines = self._lines()
        prompts = [lines[number % len(lines)] for number in range(self.count)]
        if self.temperature == 0 or self.top_k == 1:
            n = len(set(prompts))
            require(self.count == n, "count", self.count, f"greedy stories differ by prompt alone, and there are {n}")
        if self.out is not None and not self.out.parent.is_dir():
            raise MoemlaError(f"cannot write {self.out}: {self.out.parent} is no folder")
        judge = ChatJudge(self.model, self.base_url, criterion=self.criterion, max_tokens=self.max_tokens)
        optional("scipy", "stats")  # before anything is paid for
        tellers = [load(run, device_of(self.device)) for run in self.runs]
        for run, (_, tokenizer) in zip(self.runs, tellers, strict=True):
            if tokenizer is None:
                raise MoemlaError(f"{run} has no tokenizer.json")
        told = [self._continued(*teller, prompts) for teller in tellers]
        names = ("model", "base_url", "criterion", "max_new_tokens", "temperature", "top_k", "seed")
        settings = dict(runs=[str(run) for run in self.runs]) | {name: getattr(self, name) for name in names}
        matches: list[Match] = []
        try:
            compare(judge, prompts, *told, on_match=matches.append)
        finally:  # what was answered, and paid for, is kept if a request fails or somebody interrupts
            if matches:
                result = Comparison(tuple(matches))
                report = settings | dict(asked=self.count) | result.to_dict()
                if self.out is not None:
                    write_json(self.out, report)
        if self.json:
            print_json(report)
        else:
            self._show(result)

    def _lines(self) -> list[str]:
        """The prompts; DataError for a file without any, or that is no UTF-8."""
        from moemla.experiments.one_run import PROMPTS

        if self.prompts is None:
            return list(PROMPTS)
        try:
            text = self.prompts.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.prompts} is not UTF-8: convert it") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise DataError(f"{self.prompts} is empty: it needs a prompt a line")
        return lines

    def _continued(self, model, tokenizer, prompts: list[str]) -> list[str]:
        """What the model writes behind each prompt, without it."""
        from moemla.generation import generate

        begun = [[tokenizer.eot, *ids] for ids in tokenizer.encode_batch(prompts)]
        seeds = [self.seed + number for number in range(self.count)]
        sampling = dict(temperature=self.temperature, top_k=self.top_k, seed=seeds)
        told = generate(model, begun, self.max_new_tokens, stop=tokenizer.eot, **sampling)
        return [tokenizer.decode(story[len(ids) :]) for story, ids in zip(told, begun, strict=True)]

    def _show(self, result: Comparison) -> None:
        a, b = self.runs
        print(f"{self.count} stories of {a} (a) and of {b} (b), both orders judged by {self.model}: {self.criterion}")
        print(f"a won {result.wins}, lost {result.losses}, tied {result.ties}: win rate {result.win_rate:.3f}")
        if result.decided:
            low, high = result.interval()
            share = f"{result.wins / result.decided:.3f}, 95 % {low:.3f} to {high:.3f}"
            print(f"of {result.decided} decided a won {share}; sign test p {result.p:.2g}")
        else:
            print("no match was decided; sign test p 1")
        print(f"both orders said the same of {result.consistency:.3f} of the pairs")
        if result.first_share is not None:
            print(f"of the answers that chose, {result.first_share:.3f} chose the text shown first (0.5: no bias)")
        if result.longer_share is not None:
            print(f"of the decided matches of unequal length the longer text won {result.longer_share:.3f}")
        print("p is of stories of these two models; what is to hold of architectures needs several seeds of each.")
