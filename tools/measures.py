"""How long a chapter is: words, code in sight, lines that scroll, minutes. `make lint` prints it for every chapter.

python -m tools.measures    one line a chapter; what is over the guide has a star

Chapters from 6 on keep to the guide, or give a reason in the notebook's metadata: `moemla.reasons`, by the measure.
Seconds of a reader cannot be measured here, so the minutes are an estimate and the box of a chapter says so.
"""

from __future__ import annotations

import re

import nbformat

from tools.book import plan
from tools.cells import code_cells, parts, tags, words
from tools.chapter_code import STUBS

LINE = 68  # characters that fit beside the menus at 1,280 pixels, in the fold of a solution too, where it is narrowest
GUIDE = {"words": (2_500, 3_500), "lines": (0, 350), "cell": (0, 30), "width": (0, 0)}
SHORT_FROM, SHORT = 15, 1_800  # chapters that only read results may be shorter
WORDS_A_MINUTE, MINUTES_A_LISTING, MINUTES_A_TURN, APART = 200, 2, 10, 10
FOLDED = {"solution", "hide-input", "hide-cell", "remove-input", "remove-cell"}
UNSEEN = {"hide-output", "hide-cell", "remove-output", "remove-cell"}
SAYS = {"words": "words", "lines": "visible lines of code", "cell": "lines in the longest cell", "width": "wide lines"}


def in_sight(notebook) -> list:
    """Code cells that a reader sees without a click."""
    return [cell for cell in code_cells(notebook, with_skipped=True) if not tags(cell) & FOLDED]


def wide_lines(notebook) -> list[str]:
    """Lines of code, in sight or in a solution, and of printed text for which the page is too narrow."""
    cells = code_cells(notebook, with_skipped=True)
    read = [cell for cell in cells if "solution" in tags(cell) or not tags(cell) & FOLDED]
    lines = [line for cell in read for line in cell.source.splitlines()]
    lines += [line for cell in cells if not tags(cell) & (UNSEEN | STUBS) for line in _printed(cell)]
    return [line for line in lines if len(line) > LINE]


def measures(notebook) -> dict[str, int]:
    """Words of prose, visible lines of code, those of the longest cell, and lines that are wider than the page."""
    lengths = [len(cell.source.strip().splitlines()) for cell in in_sight(notebook)]
    longest, wide = max(lengths, default=0), len(wide_lines(notebook))
    return {"words": words(notebook), "lines": sum(lengths), "cell": longest, "width": wide}


def _printed(cell) -> list[str]:
    """Lines of text as they stand on the page; what is drawn or set as a table wraps by itself."""
    texts = [output.get("text", "") for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    texts += [kinds["text/plain"] for kinds in data if set(kinds) == {"text/plain"}]
    return [line for text in texts for line in text.splitlines()]


def over(notebook) -> dict[str, str]:
    """The measures outside of the guide, and what is wrong with each."""
    found, problems = measures(notebook), {}
    for name, (least, most) in GUIDE.items():
        least = SHORT if name == "words" and number_of(notebook) >= SHORT_FROM else least
        if not least <= found[name] <= most:
            limits = f"{least:,} to {most:,}" if least else f"at most {most}"
            problems[name] = f"{found[name]:,} {SAYS[name]}, the guide has {limits}"
    if "width" in problems:
        problems["width"] += f" ({wide_lines(notebook)[0].strip()[:40]} ...)"
    return problems


def number_of(notebook) -> int:
    """The chapter's number, by its title; 0 where the plan has none of that title."""
    title = notebook.cells[0].source.partition("\n")[0].removeprefix("# ").strip()
    return next((chapter.number for chapter in plan() if chapter.title == title), 0)


def minutes(notebook) -> int:
    """An estimate of reading and working: prose, two minutes a listing, ten a *Your turn*; in steps of five."""
    turns = sum("your-turn" in tags(cell) for cell in code_cells(notebook))
    listings = sum(not tags(cell) & (STUBS | {"check"}) for cell in in_sight(notebook))
    total = words(notebook) / WORDS_A_MINUTE + MINUTES_A_LISTING * listings + MINUTES_A_TURN * turns
    return 5 * round(total / 5)


def said_minutes(notebook) -> list[int]:
    """The minutes that the box of part 1 names where it speaks of an estimate: each, and their sum."""
    for cell in parts(notebook).get(1, []):
        if cell.cell_type == "markdown" and re.search(r"\bestimate", cell.source):
            found = [
                60 * int(match[1] or 0) + int(match[2] or 0)
                for match in re.finditer(r"(?:\b(\d+) hours?(?:,? and)? ?)?(?:\b(\d+) min)?", cell.source)
                if match[0].strip()
            ]
            return [*found, sum(found)] if found else []
    return []


def main() -> int:
    columns = [*GUIDE, "minutes"]
    print(f"{'chapter':30}" + "".join(f"{name:>9}" for name in columns))
    for chapter in plan():
        if chapter.written:
            notebook = nbformat.read(chapter.notebook, as_version=4)
            beyond, reasons = over(notebook), notebook.metadata.get("moemla", {}).get("reasons", {})
            marks = {name: ("r" if name in reasons else "*") if name in beyond else " " for name in GUIDE}
            shown = "".join(f"{value:8,}{marks[name]}" for name, value in measures(notebook).items())
            print(f"{chapter.page:30}{shown}{minutes(notebook):8} ")
    print("* over the guide (r: with a reason). Lines in sight, of the longest cell, too wide; minutes are an estimate")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
