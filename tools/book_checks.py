"""What a notebook of the book must be, as functions from a notebook to a list of problems (empty: all is well).

`PAGE_CHECKS` hold for every notebook, `CHAPTER_CHECKS` for chapters 1 to 5 (book/NN-slug.ipynb) too, `FRAME_CHECKS` for
those from 6 on.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import nbformat

from tools.book import PACKAGE, is_chapter
from tools.cells import (
    DIRECTIVE,
    asserts,
    at,
    code_cells,
    has_run,
    label_of,
    library_names,
    options_of,
    output_text,
    parse,
    parts,
    tags,
    words,
)
from tools.freshness import is_fresh
from tools.measures import APART, minutes, over, said_minutes
from tools.turns import tried, triples

MAX_BYTES = 300_000
WORDS = (2_500, 4_000)
TOLD_TWICE = 6  # words of a line that an edit has left twice
EXERCISES = 6
EXERCISES_WITH_CODE = 2
FRAME_FROM, PARTS, TURNS = 6, 11, 3
CLOCKS = {
    "time",
    "perf_counter",
    "perf_counter_ns",
    "monotonic",
    "process_time",
    "time_ns",
    "thread_time",
    "now",
    "timeit",
}
CLOCK_OUTPUT = re.compile(r"\b\d[\d,.]*k? ?(tokens?|tok|it|steps?)/s\b|\bs/it\b|\b\d\d:\d\d:\d\d\b")
ADDRESS = re.compile(r"\bat 0x[0-9a-f]{6,}")
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # the colours of a traceback
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users|tmp|work|private|var/folders)/\S*")


# ---- every notebook


def check_executed(notebook) -> list[str]:
    """Every code cell has run, once, from top to bottom."""
    counts = [cell.get("execution_count") for cell in code_cells(notebook)]
    if not counts:
        return ["no code cell: this is a page, write it as .md"]
    missing = [at(notebook, cell) for cell in code_cells(notebook) if cell.get("execution_count") is None]
    if missing:
        return [f"not executed: {place}" for place in missing]
    if counts != list(range(1, len(counts) + 1)):
        return [f"execution counts {counts} are not 1, 2, 3, ...: run `make notebooks`"]
    return []


def check_errors(notebook) -> list[str]:
    """No cell fails, but those that are there to fail, and these do."""
    problems = []
    for cell in code_cells(notebook):
        names = [output.ename for output in cell.get("outputs", []) if output.output_type == "error"]
        expected = "raises-exception" in tags(cell)
        if names and not expected:
            problems.append(f"{at(notebook, cell)} failed with {names[0]}")
        if expected and cell.get("execution_count") is not None and not names:
            problems.append(f"{at(notebook, cell)} is tagged raises-exception and raised nothing")
    return problems


def check_size(notebook) -> list[str]:
    """Small enough for a repository and a phone."""
    size = len(nbformat.writes(notebook).encode())
    return [] if size <= MAX_BYTES else [f"{size:,} bytes are more than {MAX_BYTES:,}: fewer or lighter figures"]


def check_fresh(notebook, package: Path = PACKAGE) -> list[str]:
    """The outputs are those of this code and this library."""
    return (
        [] if is_fresh(notebook, package) else ["outputs are older than the code or the library: run `make notebooks`"]
    )


def check_alt(notebook) -> list[str]:
    """Every picture says in words what it shows."""
    problems = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            drawn = any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {}))
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            if drawn and not alt.strip():
                problems.append(f"{at(notebook, cell)} draws a figure without alt text (metadata mystnb.image.alt)")
        elif cell.cell_type == "markdown":
            if re.search(r"!\[\s*\]\(", cell.source):
                problems.append(f"{at(notebook, cell)} has an image without alt text")
            for match in DIRECTIVE.finditer(cell.source):
                if match[1] in ("figure", "image"):
                    options = options_of(cell.source, match)
                    if not re.search(r":alt:\s*\S", options):
                        problems.append(f"{at(notebook, cell)} has a {match[1]} without :alt:")
    return problems


def check_twice(notebook) -> list[str]:
    """No line of prose stands on the page twice, as an edit may leave it."""
    lines = [
        line.strip()
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if len(line.split()) >= TOLD_TWICE and not line.startswith("|")
    ]
    return [f"stands {n} times: {line[:60]}" for line, n in Counter(lines).items() if n > 1]


def check_stable(notebook) -> list[str]:
    """Nothing in the outputs changes from run to run, but in cells tagged `timing`."""
    clocked: set[str] = set()  # the chapter's own functions that read a clock, and those that call them
    problems = []
    for cell in code_cells(notebook):
        reads = False
        for node in parse(cell).body:
            hit = _reads_clock(node, clocked)
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                clocked |= {node.name} if hit else set()
            elif not isinstance(node, (ast.Import, ast.ImportFrom)):
                reads = reads or hit
        reads = reads or re.search(r"^\s*%%?(time|timeit)\b", cell.source, re.MULTILINE) is not None
        text = output_text(cell)
        if "timing" not in tags(cell):
            if reads and cell.get("outputs"):
                problems.append(f"{at(notebook, cell)} reads a clock: tag it `timing`")
            elif CLOCK_OUTPUT.search(text):
                problems.append(f"{at(notebook, cell)} shows {CLOCK_OUTPUT.search(text)[0]!r}: tag it `timing`")
        if ADDRESS.search(text):
            problems.append(f"{at(notebook, cell)} shows a memory address, another one in each run")
        shown = "\n".join(
            [text, *(ANSI.sub("", line) for o in cell.get("outputs", ()) for line in o.get("traceback", ()))]
        )
        if MACHINE_PATH.search(shown):
            problems.append(f"{at(notebook, cell)} shows a path of this machine: {MACHINE_PATH.search(shown)[0]}")
    return problems


def _reads_clock(node: ast.AST, clocked: set[str]) -> bool:
    for part in ast.walk(node):
        if isinstance(part, ast.Call):
            name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", None)
            if name in CLOCKS:
                return True
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load) and part.id in clocked:
            return True
    return False


# ---- chapters: all, and those up to 5


def check_frame(notebook) -> list[str]:
    """The ten parts are there, in order."""
    found = parts(notebook)
    missing = [
        f"part {number} of the frame is missing (tag frame-{number})" for number in range(1, 11) if number not in found
    ]
    unknown = [f"there is no part {number}" for number in found if not 1 <= number <= 10]
    order = [number for number in found if 1 <= number <= 10]
    unordered = [] if order == sorted(order) else [f"parts stand in the order {order}"]
    return missing + unknown + unordered


def check_asserts(notebook) -> list[str]:
    """Parts 6, 7 and 8 (properties, library, break it) claim nothing that a cell does not assert."""
    found = parts(notebook)
    return [
        f"part {number} has no executed assert"
        for number in (6, 7, 8)
        if number in found and not any(asserts(cell) for cell in found[number] if has_run(cell))
    ]


def check_library(notebook) -> list[str]:
    """Part 7 compares a class of the chapter with the library's: outputs, and gradients too.

    A chapter whose classes have no gradients (a tokenizer) gives the reason as metadata `moemla.without_gradients`.
    """
    cells = [cell for cell in parts(notebook).get(7, []) if cell.cell_type == "code"]
    if not cells:
        return []  # check_frame and check_asserts say so
    trees = [parse(cell) for cell in cells]
    names = {node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name)}
    classes = {n.name for c in code_cells(notebook) for n in ast.walk(parse(c)) if isinstance(n, ast.ClassDef)}
    library = library_names(notebook)
    problems = []
    if not names & classes:
        problems.append("part 7 uses no class defined in this notebook")
    if not names & library:
        problems.append("part 7 uses nothing of moemla")
    attributes = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if not attributes & {"grad", "backward"} and not notebook.metadata.get("moemla", {}).get("without_gradients"):
        problems.append("part 7 compares no gradients")
    return problems


def check_words(notebook) -> list[str]:
    """Long enough to explain, short enough for one sitting."""
    count = words(notebook)
    return [] if WORDS[0] <= count <= WORDS[1] else [f"{count} words; a chapter has {WORDS[0]:,} to {WORDS[1]:,}"]


def check_picture(notebook) -> list[str]:
    """Part 1 has the picture that carries the idea."""
    for cell in parts(notebook).get(1, []):
        drawn = any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {}))
        if drawn or re.search(r"!\[|\{figure\}|\{image\}|<svg", cell.source if cell.cell_type == "markdown" else ""):
            return []
    return ["part 1 has no picture"] if 1 in parts(notebook) else []


def check_exercises(notebook) -> list[str]:
    """Six exercises or more, each with a folded solution; two or more with code and a check."""
    problems = []
    text = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    found = [(source, match) for source in text for match in DIRECTIVE.finditer(source)]
    asked = [label_of(source, match) for source, match in found if match[1] in ("exercise", "exercise-start")]
    answers = [(source, match) for source, match in found if match[1] in ("solution", "solution-start")]
    solved = {match[2].strip() for _, match in answers}
    if len(asked) < EXERCISES:
        problems.append(f"{len(asked)} exercises; a chapter has at least {EXERCISES}")
    problems += [f"exercise {label or '(without :label:)'} has no solution" for label in asked if label not in solved]
    problems += [
        f"solution {match[2].strip()} is not folded (:class: dropdown)"
        for source, match in answers
        if "dropdown" not in options_of(source, match)
    ]
    with_code, incomplete = triples(notebook, "exercise")
    problems += incomplete
    if len(with_code) + len(incomplete) < EXERCISES_WITH_CODE:
        problems.append(f"{len(with_code)} exercises with code; a chapter has at least {EXERCISES_WITH_CODE}")
    return problems


def check_solutions(notebook) -> list[str]:
    """Each check fails with NotImplementedError on the stub, and passes on the solution."""
    return tried(notebook, triples(notebook, "exercise")[0])


# ---- chapters from 6 on


def check_parts(notebook) -> list[str]:
    """Eleven parts in order, and every cell says in which it is."""
    problems, before, present = [], 0, set()
    for cell in notebook.cells:
        numbers = [int(tag[6:]) for tag in tags(cell) if re.fullmatch(r"frame-\d+", tag)]
        if len(numbers) != 1 or not 1 <= numbers[0] <= PARTS:
            problems.append(f"{at(notebook, cell)} has not one tag of frame-1 to frame-{PARTS}: {sorted(numbers)}")
            continue
        if numbers[0] < before:
            problems.append(f"{at(notebook, cell)} is of part {numbers[0]} and stands behind part {before}")
        before = max(before, numbers[0])
        present.add(numbers[0])
    missing = sorted(set(range(1, PARTS + 1)) - present)
    return problems + [f"part {number} of the frame is missing (tag frame-{number})" for number in missing]


def check_twin(notebook) -> list[str]:
    """Part 7 compares what the chapter built with the library's: outputs, and gradients too.

    What has no gradients (statistics, a cache's bytes) gives the reason as metadata `moemla.without_gradients`.
    """
    found = parts(notebook)
    cells = [cell for cell in found.get(7, []) if cell.cell_type == "code"]
    if not cells:
        return []  # check_parts and check_asserts say so
    earlier = [cell for number in range(1, 7) for cell in found.get(number, []) if cell.cell_type == "code"]
    kinds = (ast.ClassDef, ast.FunctionDef)
    built = {node.name for cell in earlier for node in parse(cell).body if isinstance(node, kinds)}
    nodes = [node for cell in cells for node in ast.walk(parse(cell))]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    slopes = {node.attr for node in nodes if isinstance(node, ast.Attribute)} | names
    problems = []
    if not names & built:
        problems.append("part 7 uses no class and no function defined before it")
    if not names & library_names(notebook):
        problems.append("part 7 uses nothing of moemla")
    excused = notebook.metadata.get("moemla", {}).get("without_gradients")
    if not slopes & {"grad", "backward", "equals_oracle", "same_with_gradients"} and not excused:
        problems.append("part 7 compares no gradients")
    return problems


def check_turns(notebook) -> list[str]:
    """Three or more times the reader builds first: a task, a stub that fails, a folded solution, a check in sight."""
    found, problems = triples(notebook, "your-turn")
    if len(found) + len(problems) < TURNS:
        problems.append(f"{len(found)} cells tagged your-turn with solution and check; a chapter has at least {TURNS}")
    for stub, solution, check in found:
        above = notebook.cells[notebook.cells.index(stub) - 1]
        if above.cell_type != "markdown" or not re.search(r"^\*\*Your turn\.\*\*", above.source, re.MULTILINE):
            problems.append(f"{at(notebook, stub)} stands under no text with a line that begins with **Your turn.**")
        if not tags(solution) & {"hide-input", "hide-cell"}:
            problems.append(f"{at(notebook, solution)} is not folded (tag hide-input or hide-cell)")
        if "check" not in tags(check) or any(tag.startswith(("hide-", "remove-")) for tag in tags(check)):
            problems.append(f"{at(notebook, check)} is no check in sight (tag check, and no hide- or remove-)")
    return problems + tried(notebook, found)


def check_answers(notebook) -> list[str]:
    """Answers lie in the fold: between an exercise and the next stand its stub, its solution and a silent check."""
    problems, asked, fold, runs = [], False, "", {}
    for cell in parts(notebook).get(PARTS, []):
        if cell.cell_type == "markdown":
            marks = [*DIRECTIVE.finditer(cell.source), *re.finditer(r"^##? ()(.*)", cell.source, re.MULTILINE)]
            for mark in sorted(marks, key=lambda mark: mark.start()):
                if mark[1] in ("", "exercise", "exercise-start"):
                    asked = mark[1] != ""  # a heading ends the exercises
                if mark[1] in ("solution-start", "solution-end"):
                    fold = mark[2].strip()
                if mark[1] in ("solution", "solution-start"):
                    runs[mark[2].strip()] = False
        elif fold:
            runs[fold] = True
            if not tags(cell) & {"solution", "hide-input", "hide-cell"}:
                problems.append(f"{at(notebook, cell)} lies in a fold and has no tag (solution, hide-input)")
        elif asked and not tags(cell) & {"exercise", "check"}:
            problems.append(f"{at(notebook, cell)} stands under an exercise, outside of its folded solution")
        elif asked and "check" in tags(cell) and output_text(cell).strip():
            problems.append(f"{at(notebook, cell)} is a check that shows something: numbers belong into the fold")
    return problems + [f"solution {label} runs no cell in its fold" for label, ran in runs.items() if not ran]


def check_measures(notebook) -> list[str]:
    """Not longer than the guide, or with a reason: metadata `moemla.reasons`, by the measure."""
    beyond, reasons = over(notebook), notebook.metadata.get("moemla", {}).get("reasons", {})
    long = [f"{said}; or say why: moemla.reasons.{name}" for name, said in beyond.items() if not reasons.get(name)]
    return long + [f"moemla.reasons.{name} excuses what is within the guide" for name in reasons if name not in beyond]


def check_minutes(notebook) -> list[str]:
    """The box of part 1 says how long the chapter takes, as an estimate, and does not flatter."""
    wanted = minutes(notebook)
    if any(abs(said - wanted) <= APART for said in said_minutes(notebook)):
        return []
    return [f"the box of part 1 must say that the chapter takes about {wanted} minutes, and that this is an estimate"]


PAGE_CHECKS = (check_executed, check_errors, check_size, check_fresh, check_alt, check_twice, check_stable)
CHAPTER_CHECKS = (
    check_frame,
    check_asserts,
    check_library,
    check_words,
    check_picture,
    check_exercises,
    check_solutions,
)
FRAME_CHECKS = (
    check_parts,
    check_asserts,
    check_twin,
    check_measures,
    check_minutes,
    check_picture,
    check_turns,
    check_exercises,
    check_solutions,
    check_answers,
)


def checks_for(path: Path) -> tuple:
    """The checks that a notebook has to pass: chapters from 6 on have the frame of eleven parts."""
    if not is_chapter(path):
        return PAGE_CHECKS
    return PAGE_CHECKS + (FRAME_CHECKS if int(path.name[:2]) >= FRAME_FROM else CHAPTER_CHECKS)
