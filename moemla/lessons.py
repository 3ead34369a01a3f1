"""What chapters share: a table, small data, chapter 5's training loop at its shortest, a function on several ranks.

Built in chapter 6.
"""

import ast
import inspect
import linecache
import os
import re
import signal
import subprocess
import symtable
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from moemla.config import require, require_count
from moemla.devices import undisturbed
from moemla.optim import learning_rate, make_optimizers
from moemla.routing import Routing, record_routing
from moemla.stories import stories as tell
from moemla.tokenizer import Tokenizer

TOKENIZER_STORIES = 1000  # more of the same teller add no merges worth the wait
_NUMBER = re.compile(r"[-+±]?\d.*|[-–]?")

Cell = str | int | float


def show_table(rows: Sequence[Sequence[Cell]], header: Sequence[str], digits: int = 3) -> None:
    """A table under the cell: text to the left, numbers to the right.

    Floats have `digits` decimals, whole numbers commas; text is Markdown, so that `$R$` and `name` look as in prose.
    Where nothing draws Markdown it is printed in columns. ValueError for a row that is not as long as the header.
    """
    shown = [[str(name) for name in header]]
    for row in rows:
        require(len(row) == len(header), "rows", list(row), f"each must have {len(header)} cells, as the header has")
        shown.append([_written(cell, digits) for cell in row])
    columns = list(zip(*shown, strict=True))
    right = [all(_NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    plain = [
        "  ".join(
            cell.rjust(n) if to_right else cell.ljust(n) for cell, n, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in shown
    ]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in shown]
    lines.insert(1, "|" + "|".join("---:" if to_right else ":---" for to_right in right) + "|")
    shell = sys.modules.get("IPython")  # a notebook has it loaded
    if shell is None or shell.get_ipython() is None:
        print("\n".join(plain))
    else:
        shell.display.display({"text/markdown": "\n".join(lines), "text/plain": "\n".join(plain)}, raw=True)


def _written(cell: Cell, digits: int) -> str:
    if isinstance(cell, float):
        return f"{cell:,.{digits}f}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


@dataclass(frozen=True)
class SmallData:
    """Built-in stories as two streams of tokens, each story behind its start token; `texts` are the validation ones."""

    tokenizer: Tokenizer
    train: Int[Tensor, "n"]
    valid: Int[Tensor, "m"]
    texts: tuple[str, ...]

    def batch(
        self, generator: torch.Generator, rows: int = 16, length: int = 64
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
        """Random windows of the training stream: tokens, and what follows each, (rows, length) both."""
        starts = torch.randint(len(self.train) - length, (rows, 1), generator=generator)
        here = starts + torch.arange(length)
        return self.train[here], self.train[here + 1]


@cache
def small_data(stories: int = 3000, vocab_size: int = 512, valid: int = 60, seed: int = 0) -> SmallData:
    """`stories` built-in stories to train on and `valid` others, in tokens; made once for the same arguments."""
    require_count("stories", stories)
    require_count("valid", valid)
    texts = [story.text for story in tell(stories + valid, seed=seed)]
    tokenizer = Tokenizer.train(texts[: min(stories, TOKENIZER_STORIES)], vocab_size)
    rows = [torch.tensor([tokenizer.eot, *ids]) for ids in tokenizer.encode_batch(texts)]
    return SmallData(tokenizer, torch.cat(rows[:stories]), torch.cat(rows[stories:]), tuple(texts[stories:]))


def train_small(
    model: nn.Module,
    data: SmallData,
    steps: int,
    lr: float = 3e-3,
    *,
    rows: int = 16,
    length: int = 64,
    seed: int = 0,
    balancer: object = None,
    penalty: Callable[[list[Routing]], Tensor] | None = None,
    after_step: Callable[[int, float], object] | None = None,
) -> list[float]:
    """The loss of each step, in nats per token; `model(tokens)` gives the logits, (B, T) -> (B, T, V).

    AdamW for all weights, clipped at 1; the rate climbs over a tenth of the steps and falls to a thirtieth, as the
    paper's. `penalty(routings)`, of what each router did in the pass, is added to the loss and not to what is recorded.
    Then come `balancer.step()` and `after_step(step, loss)`, with the number of steps done. The same model, data and
    `seed` give the same losses: one thread, on the CPU; the caller's random state stays as it is.
    """
    require_count("steps", steps)
    generator, losses, threads = torch.Generator().manual_seed(seed), [], torch.get_num_threads()
    (optimizer,) = make_optimizers(model.train(), "adamw", lr)
    try:
        torch.set_num_threads(1)
        with undisturbed("cpu"):
            torch.set_flush_denormal(True)
            torch.manual_seed(seed)  # for dropout
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, lr=lr, min_lr=lr / 30, warmup=steps // 10, steps=steps)
                tokens, targets = data.batch(generator, rows, length)
                with record_routing(model) if penalty else nullcontext() as routings:
                    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
                losses.append(loss.item())
                (loss + penalty(routings) if penalty else loss).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if balancer is not None:
                    balancer.step()
                if after_step is not None:
                    after_step(step + 1, losses[-1])
    finally:
        torch.set_num_threads(threads)
    return losses


# --- several processes ----------------------------------------------------------------------------

PROGRAM = """import sys, traceback
import torch
from moemla.distributed import World

torch.set_num_threads(1)
globals().update(torch.load("values.pt", weights_only=False))
{definitions}

world = World.current()
sys.stdout = open(f"said-{{world.rank}}", "w", buffering=1)
try:
    answer = {main}(world)
except Exception as error:
    with open("failed", "a") as file:  # the first line counts: others lose the rank that has written it
        print(f"rank {{world.rank}}:", traceback.format_exception_only(error)[-1].strip(), file=file)
    raise
if world.main:
    torch.save(answer, "answer.pt")
world.wait()
world.leave()
"""


def ranks(main: Callable[..., object], size: int = 2, seconds: float = 300.0) -> object:
    """What `main(world)` returns on rank 0 of `size` processes of this machine, which torchrun starts. One thread each.

    `main` is a function of a notebook. Its source goes into a file of its own, with whatever it names: functions and
    classes as source, imports as imports, other values as they are now. What ranks print is printed here, rank by rank.
    Built in chapter 13.

    RuntimeError with the error of the rank that failed first, or where no answer has come within so many `seconds`;
    ValueError for what cannot be sent.
    """
    require_count("size", size)
    definitions, values = _needed(main)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "ranks.py").write_text(PROGRAM.format(definitions="\n\n".join(definitions), main=main.__name__))
        torch.save(values, place / "values.pt")
        here = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={size}",
            "ranks.py",
        ]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
        environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=here)
        process = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
        try:
            _, said = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"no answer of {size} ranks within {seconds:g} seconds") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for path in sorted(place.glob("said-*"), key=lambda path: int(path.name[5:])):
            print(path.read_text(), end="")
        if process.returncode:
            failed = place / "failed"
            raise RuntimeError((failed.read_text() if failed.exists() else said.strip() or "no word").splitlines()[0])
        return torch.load(place / "answer.pt", weights_only=False)


def _needed(main: Callable[..., object]) -> tuple[list[str], dict[str, object]]:
    """(imports and sources, each behind what it needs; values by name) of all that a function names."""
    scope, definitions, values, seen = main.__globals__, [], {}, set()

    def add(name: str) -> None:
        if name in seen or name not in scope:
            return
        seen.add(name)
        value = scope[name]
        if isinstance(value, ModuleType):
            definitions.append(f"import {value.__name__} as {name}")
        elif isinstance(value, (FunctionType, type)) and value.__module__ == main.__module__:
            source = _source(value)
            for part in sorted(_globals(symtable.symtable(source, name, "exec"))):
                add(part)
            definitions.append(source)
        elif hasattr(value, "__module__") and hasattr(value, "__qualname__"):
            definitions.append(f"from {value.__module__} import {value.__qualname__} as {name}")
        else:
            right = "is an object of a class of the notebook; make it in `main`"
            require(type(value).__module__ != main.__module__, name, type(value).__name__, right)
            values[name] = value

    add(main.__name__)
    return definitions, values


def _globals(table: symtable.SymbolTable) -> set[str]:
    """The names that a source takes from outside of itself."""
    outside = table.get_type() == "module"
    names = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_referenced() and (outside or symbol.is_global())
    }
    return names.union(*map(_globals, table.get_children()))


def _source(value: FunctionType | type) -> str:
    """The source of a function or class, of a notebook too, where `inspect` does not look for classes."""
    parts = [value] if isinstance(value, FunctionType) else vars(value).values()
    for code in (inspect.unwrap(part).__code__ for part in parts if isinstance(part, FunctionType)):
        lines = linecache.getlines(code.co_filename)
        for node in ast.parse("".join(lines)).body if lines else ():
            if getattr(node, "name", None) == value.__name__:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if first <= code.co_firstlineno <= node.end_lineno:
                    return "".join(lines[first - 1 : node.end_lineno])
    raise ValueError(f"main={value.__name__}: no source; define it at the top of a cell or file, with a function in it")
