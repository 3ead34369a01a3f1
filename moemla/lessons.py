"""What chapters share: a table, small data, and chapter 5's training loop at its shortest. Built in chapter 6."""

import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache

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
