"""The command `moemla`: from text to a trained model and back to text.

Exit codes: 0 done, 1 the work failed (one line says why; `--debug` shows the traceback), 2 wrong usage, 130
interrupted.
"""

import io
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from moemla import __version__
from moemla.config import CHOICES, MATCHES, SIZES, VARIANTS, TrainConfig, require, require_count
from moemla.errors import MoemlaError

Flat = tyro.conf.OmitArgPrefixes
Flag = tyro.conf.FlagCreatePairsOff


@dataclass
class Prepare:
    """Text to token shards. Built in chapter 1.

    Remembers what it has done: the same call again returns at once.
    """

    out: Path
    """Folder for tokenizer.json, train.bin, valid.bin, valid.txt and data.json."""
    source: Literal["builtin", "hub", "files"] = "builtin"
    """builtin: generated stories; hub: roneneldan/TinyStories; files: --train and --valid."""
    train: Path | None = None
    """Text with a line <|endoftext|> between stories (source files)."""
    valid: Path | None = None
    """The same, for validation (source files)."""
    tokenizer: Literal["bpe", "gpt2"] = "bpe"
    """bpe: byte-level, trained on the training text; gpt2: GPT-2's 50,257 tokens."""
    vocab_size: int | None = None
    """Tokens of a bpe vocabulary, 257 to 65,536. Default 4,096."""
    stories: int | None = None
    """Stories to train on. Default 20,000; of files all."""
    seed: int = 0
    """Of the built-in stories."""

    def __call__(self) -> None:
        import warnings

        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from moemla.data import prepare

        columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns) as bars, warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            tasks: dict[str, int] = {}

            def show(label: str, done: int, total: int | None) -> None:
                if label not in tasks:
                    tasks[label] = bars.add_task(label, total=total)
                bars.update(tasks[label], completed=done, total=total)

            chosen = {
                name: getattr(self, name)
                for name in ("source", "train", "valid", "tokenizer", "vocab_size", "stories", "seed")
            }
            record = prepare(self.out, progress=show, **chosen)
        for text in dict.fromkeys(str(note.message) for note in noted):  # once, though a file is read thrice
            print(f"moemla: warning: {text}", file=sys.stderr)
        for split, facts in record["splits"].items():
            counts = (f"{facts[unit]:,} {unit}" for unit in ("stories", "tokens", "bytes"))
            print(f"{split}: {', '.join(counts)} ({facts['bytes'] / facts['tokens']:.2f} bytes a token)")
        print(f"data {record['hash'][:12]} in {self.out}")


@dataclass
class Train:
    """Trains a model on prepared data; --resume goes on after an interruption. Built in chapter 5.

    The defaults (tiny, moe-mla-rope) take less than ten minutes on two CPU cores.
    """

    data: Path
    """Folder that `moemla prepare` made."""
    out: Path
    """Folder of the run: config, tokenizer, log and checkpoints."""
    train_config: Flat[TrainConfig]
    size: Literal[tuple(SIZES)] = "tiny"
    variant: Literal[VARIANTS] = "moe-mla-rope"
    matched: Literal[MATCHES] = "parameters"
    reading: Literal["working", "literal"] = "working"
    norm: Literal[CHOICES["norm"]] = "layernorm"
    activation: Literal[CHOICES["activation"]] = "gelu"
    no_bias: Flag[bool] = False
    """No bias terms. With rmsnorm, swiglu and a decoupled variant `moemla export` makes a DeepseekV3."""
    dropout: float = 0.0
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end."""
    validate_every: int = 0
    """Steps between scores on validation text; the best model is kept in OUT/best. 0: none."""
    resume: Flag[bool] = False
    """Go on from the last checkpoint in --out, or start if there is none."""
    device: str | None = None
    """cpu, cuda, cuda:1; default: the GPU if there is one."""

    def __call__(self) -> None:
        from moemla import complexity
        from moemla.config import ModelConfig
        from moemla.tokenizer import Tokenizer
        from moemla.training import train

        vocab_size = Tokenizer.load(self.data / "tokenizer.json").vocab_size
        length = max(512, self.train_config.seq_len)
        changes = dict(reading=self.reading, dropout=self.dropout, max_seq_len=length)
        changes |= dict(norm=self.norm, activation=self.activation, bias=not self.no_bias)
        config = ModelConfig.preset(self.size, self.variant, matched=self.matched, vocab_size=vocab_size, **changes)
        mine, dense = complexity.parameters(config), complexity.parameters(config.reference())
        apart = mine.total / dense.total - 1
        say(
            f"{self.size} {self.variant}: {mine.total:,} parameters, {mine.active / mine.total:.0%} active, "
            f"{apart:+.1%} against dense multi-head attention"
        )
        begin = time.perf_counter()
        line = LiveLine(self.train_config.steps)
        try:
            how = dict(resume=self.resume, checkpoint_every=self.checkpoint_every, device=self.device)
            how |= dict(validate_every=self.validate_every)
            train(config, self.train_config, self.data, self.out, on_progress=line, **how)
        finally:
            line.close()
        say(f"done in {clock(time.perf_counter() - begin)}; `moemla evaluate --run {self.out}` scores it")


@dataclass
class Evaluate:
    """Nats per token, perplexity and bits per byte of a run on stories; load of its experts. Built in chapter 5."""

    run: Path
    """Folder of a run, or of a saved model with its tokenizer."""
    text: Path | None = None
    """Stories with a line <|endoftext|> between them; default: the validation text of the run's data."""
    context: int | None = None
    """Tokens a story is scored in at a time; default: the sequence length of the training."""
    json: Flag[bool] = False
    """Print one JSON object."""
    device: str | None = None
    """cpu, cuda, cuda:1; default: the GPU if there is one."""

    def __call__(self) -> None:
        from moemla.checkpoint import data_folder, load
        from moemla.evaluation import evaluate
        from moemla.files import read_json
        from moemla.text import read_stories

        model, tokenizer = load(self.run, device_of(self.device))
        if tokenizer is None:
            raise MoemlaError(f"{self.run} has no tokenizer.json")
        facts, text, context = self.run / "train.json", self.text, self.context
        if facts.is_file():
            settings = read_json(facts)
            text = text or data_folder(self.run) / "valid.txt"
            context = settings["train"]["seq_len"] if context is None else context
        if text is None or not text.is_file():
            missing = "" if text is None else f"{text} is not there from here; "
            raise MoemlaError(f"{missing}name the stories to score with --text FILE")
        found = evaluate(model, tokenizer, read_stories(text), context)
        if self.json:
            print_json(found.to_dict())
            if math.isinf(found.perplexity):
                print("moemla: the perplexity is more than a float holds: null", file=sys.stderr)
            return
        print(f"{found.stories:,} stories, {found.tokens:,} tokens, {found.bytes:,} bytes")
        print(f"{found.nats_per_token:.4f} nats per token, perplexity {found.perplexity:.3f}")
        print(f"{found.bits_per_byte:.4f} bits per byte")
        if found.load_cv is not None:
            print(
                f"load of the experts over {found.tokens:,} tokens: CV {found.load_cv:.3f} (uniform routing shows "
                f"{found.load_cv_floor:.3f}), MaxVio {found.load_max_violation:.2f}, dead experts {found.dead_experts}"
            )


@dataclass
class Generate:
    """Writes a story, word by word. Built in chapter 5."""

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
        from moemla.generation import check_sampling, generate
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


@dataclass
class Export:
    """Weights, config and tokenizer of a run as a folder to give away. Built in chapter 14.

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
            how = "a DeepseekV3 for transformers' AutoModelForCausalLM and AutoTokenizer"
            how += "; its tokenizer puts <|endoftext|> (BOS) before a text, as training did"
        else:
            how = f"in moemla's own format, for moemla.load; no DeepseekV3, since {reason}"
        print(f"{self.out}: {count:,} parameters, {how}")


@dataclass
class Experiment:
    """One of the book's or the paper's experiments; stops and goes on at any point. Built in chapter 15.

    A finished part is a file in --folder; the same call again repeats only what is missing.
    """

    name: tyro.conf.Positional[Literal["ten-minutes", "chapter05"]]
    scale: Literal["smoke", "cpu"] = "smoke"
    """How much of it: smoke takes seconds; cpu is meant for two cores."""
    folder: Path | None = None
    """Where results are kept, one JSON file each. Default: results; of smoke a new temporary folder."""
    train: Path | None = None
    """Text files instead of the built-in stories, with a line <|endoftext|> between stories."""
    valid: Path | None = None
    seeds: int | None = None
    """chapter05: seeds of each variant; default: the scale's."""

    def __call__(self) -> None:
        from moemla.experiments import chapter05, ten_minutes
        from moemla.results import folder_for

        folder = folder_for(self.scale, self.folder)
        print(f"results go to {folder}", file=sys.stderr)
        if self.name == "chapter05":
            chapter05.run(self.scale, folder, self.train, self.valid, self.seeds, report=_one_run)
            return
        line = LiveLine(ten_minutes.SCALES[self.scale]["steps"])
        try:
            found = ten_minutes.run(self.scale, folder, self.train, self.valid, on_progress=line)
        finally:
            line.close()
        for result in found:
            shown = {key: value for key, value in result.measures.items() if key not in ("samples", "training")}
            print_json({"settings": result.settings, "measures": shown}, indent=1)


def _one_run(done: int, total: int, result) -> None:
    """A line for a finished run of an experiment."""
    what = " ".join(
        f"{result.settings[key]}" for key in ("part", "data", "variant", "lr", "seed") if key in result.settings
    )
    loss = result.measures.get("nats_per_token")
    print(f"{done}/{total}  {what}" + (f"  {loss:.4f} nats" if loss else ""), flush=True)


@dataclass
class Bench:
    """Measures this machine: training, decoding, experts or attention, beside a peer and a limit. Built in chapter 14.

    Each row has the limit that binds: matrix products, bytes, or the number of operations.
    """

    what: tyro.conf.Positional[Literal["train", "decode", "moe", "attention"]]
    size: Literal[tuple(SIZES)] = "tiny"
    variant: Literal[VARIANTS] = "moe-mla-decoupled"
    matched: Literal[MATCHES] = "parameters"
    d_expert: int | None = None
    """Width of an expert; default: as --matched says."""
    vocab_size: int = 4096
    against: Literal["transformers"] | None = None
    """Measure DeepseekV3 of transformers with the same weights too; takes SwiGLU, RMSNorm and no biases for both."""
    device: str | None = None
    """cpu, cuda; default: the GPU if there is one."""
    dtype: Literal["float32", "bf16", "fp16"] = "float32"
    batch_size: int | None = None
    """Sequences; default 8 in training, else 1."""
    seq_len: int = 256
    """Tokens of a sequence (train), or held in the cache before the first new one (decode)."""
    tokens: tuple[int, ...] = ()
    """moe: tokens at once (default 1 16 256 4096); attention: cache lengths (default 128 512 2048)."""
    backends: tuple[Literal["auto", "masked", "loop", "grouped", "gather", "triton"], ...] = ("auto",)
    """train: back ends of the experts, each measured."""
    compiled: bool | None = None
    """train, decode: a row under torch.compile too. Default: in decode, which it makes several times faster."""
    seconds: float = 2.0
    """For each program measured."""
    json: Flag[bool] = False
    """Print the result as one JSON object."""
    folder: Path | None = None
    """Keep the result in this folder, one JSON file with where it comes from."""

    def __call__(self) -> None:
        from moemla import bench

        require(
            0 <= self.seconds < math.inf, "seconds", self.seconds, "must be a number, 0 (the fewest passes) or more"
        )
        result = bench.run(**{name: value for name, value in vars(self).items() if name not in ("json", "folder")})
        if self.folder is not None:
            from moemla import results

            print(f"kept in {results.write(result, self.folder)}", file=sys.stderr)
        if self.json:
            print_json({"settings": result.settings, "measures": result.measures})
            return
        table(result.measures["rows"])


def table(rows: list[dict]) -> None:
    """Prints the rows of a bench, a block for each case; * marks its fastest program. Built in chapter 14."""
    best: dict[str, float] = {}
    for row in rows:
        best[row["case"]] = min(best.get(row["case"], math.inf), row["seconds"])
    shown = None
    for row in rows:
        seconds, limit = row["seconds"], row["limit"]
        if row["case"] != shown:
            shown = row["case"]
            print(f"{shown:32}        ms  spread    tokens/s  limit, ms  binds")
        mark = "*" if seconds == best[shown] else " "
        print(
            f"  {mark} {row['program']:28} {1e3 * seconds:9.3f}  {row['spread']:6.0%}  {row['tokens'] / seconds:10,.0f}"
            f"  {1e3 * limit:9.3f}  {row['binds']}"
        )


@dataclass
class Claims:
    """The ledger: claims of the paper, what this project finds, and the status. Built in chapter 19.


    With ids these entries are printed whole.
    """

    id: tyro.conf.Positional[tuple[str, ...]] = ()
    """Only these entries: an id (A2-mla), or the start of some (A2)."""
    json: Flag[bool] = False
    """Print a JSON list."""

    def __call__(self) -> int:
        from difflib import get_close_matches

        from moemla.paper import claims

        known = claims.load_claims()
        starts = {claim.id.partition("-")[0] for claim in known}
        names = {name.lower(): name for name in starts | {claim.id for claim in known}}
        for name in self.id:
            if name.lower() not in names and not any(one.startswith(f"{name.lower()}-") for one in names):
                near = [names[one] for one in get_close_matches(name.lower(), names, n=5, cutoff=0.5)]
                raise MoemlaError(
                    f"no claim {name!r}; " + (f"near: {', '.join(near)}" if near else "see moemla claims")
                )
        if self.json or not self.id:
            return claims.main(list(self.id), as_json=self.json)
        for claim in claims.select(known, self.id):
            outcome = claims.evaluate(claim)
            parts = dict(where=claim.where, printed=claim.printed, ours=claims.show(claim, outcome))
            parts |= dict(status=outcome.status, how=outcome.detail, note=claim.note, source=claim.source)
            print(claim.id)
            for name, value in (parts | dict(chapter=claim.chapter)).items():
                if value:
                    lead = f"  {name:9}"
                    print(textwrap.fill(str(value), 100, initial_indent=lead, subsequent_indent=" " * len(lead)))
        return 0


class LiveLine:
    """One line that is written over on a terminal; elsewhere a line for each twentieth of the run.

    Built in chapter 13.
    """

    def __init__(self, steps: int, stream=None):
        self.stream = stream or sys.stdout
        self.steps, self.terminal, self.open = steps, self.stream.isatty(), False
        self.part = 0  # twentieths of the run that have had their line
        self.valid = ""  # the last score on validation text

    def __call__(self, row) -> None:
        load = ""
        if row.load_cv is not None:
            load = f"  load CV {row.load_cv:.2f} over {row.load_window} steps (uniform {row.load_cv_floor:.2f})"
        if row.valid_loss is not None:
            self.valid = f"  valid {row.valid_loss:.3f}"
        text = (
            f"step {row.step}/{self.steps}  {clock(row.seconds_left)} left  loss {row.loss:.3f}{self.valid}  "
            f"{row.tokens_per_second:,.0f} tokens/s  {row.utilisation:.0%} of matmul{load}"
        )
        part = 20 * row.step // self.steps
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be written over
            say(f"\r\x1b[2K{text[:width]}", self.stream, end="")
            self.open = True
        elif part > self.part:
            say(text, self.stream)
            self.part = part

    def close(self) -> None:
        """Ends the line."""
        if self.open:
            say("", self.stream)


def say(text: str, stream=None, end: str = "\n") -> None:
    """Prints for who watches; when the reader (head, less) has gone, the work goes on and says nothing more.

    Built in chapter 13.
    """
    stream = stream or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def clock(seconds: float) -> str:
    """m:ss, or h:mm:ss. Built in chapter 13."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def device_of(name: str | None) -> Any:
    """The device of that name; None: the GPU if there is one, else the CPU. Built in chapter 13."""
    from moemla.devices import default_device, usable_device

    return default_device() if name is None else usable_device(name)


def print_json(value: Any, indent: int | None = None) -> None:
    """Prints JSON that every reader takes; MoemlaError for nan and inf, which it does not have. Built in chapter 13."""
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise MoemlaError("the result holds nan or inf, which JSON does not have") from error
    print(text)


COMMANDS = {
    "prepare": Prepare,
    "train": Train,
    "evaluate": Evaluate,
    "generate": Generate,
    "export": Export,
    "experiment": Experiment,
    "bench": Bench,
    "claims": Claims,
}


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print("moemla:", *str(message).split(), file=sys.stderr)
        yield


@_warnings_in_one_line()
def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code. Built in chapter 13."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        print(f"moemla {__version__}")
        return 0
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    command = None
    try:
        command = _parsed(arguments)
        code = command() or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(f"\nmoemla: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader (head, less) has gone; what is left to write, on leaving too, goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ValueError):
            text = _as_typed(str(error), type(command))
        elif isinstance(error, MoemlaError):
            text = str(error)
        elif isinstance(error, OSError):
            text = f"{error.filename or 'input/output'}: {error.strerror or error}"
        else:
            text = f"{type(error).__name__}: {error} (--debug shows where)"
        print("moemla:", " ".join(text.split()), file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def _parsed(arguments: list[str]) -> Any:
    """The command that the arguments ask for. A wrong value is said in one line, and without tyro's names of it."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="moemla", description=DESCRIPTION, args=arguments
            )
    except SystemExit:
        sys.stdout.flush()  # the help, for a reader who may have gone
        text = said.getvalue()
        flat = " ".join(re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]", " ", text).split())
        wrong = re.search(r"Error parsing (\S+): (.*?)(?: Argument helptext: \S+ (\S+).*)? For full helptext", flat)
        if wrong is None:
            sys.stderr.write(text)
            raise
        option, reason, kind = wrong.groups()
        if option.startswith("--") and kind:
            given = re.findall(r"'([^']*)'", reason)
            wanted = " or ".join(KINDS.get(part, part) for part in reversed(kind.split("|")))
            reason = f"{option} {given[0] if given else ''}: must be {wanted}"
        raise ValueError(reason) from None


def _as_typed(text: str, command: type) -> str:
    """`field=value` of a message as --field value, where the field is an option."""
    kinds = [command] if is_dataclass(command) else [*COMMANDS.values()]
    names = {field.name for kind in (*kinds, TrainConfig) for field in fields(kind)}
    return re.sub(r"\b([a-z_]+)=", lambda match: _option(match[1]) if match[1] in names else match[0], text)


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')} "


KINDS = {
    "INT": "a whole number",
    "[INT": "whole numbers",
    "FLOAT": "a number",
    "{None}": "None",
}  # tyro's words

DESCRIPTION = (
    "Mixture of experts, latent attention and rotary positions for small language models. --version prints the "
    "number of this one; --debug, anywhere, shows the traceback of an error."
)


if __name__ == "__main__":
    sys.exit(main())
