"""What a notebook of the book must be, as functions from a notebook to a list of problems (empty: all is well).

`PAGE_CHECKS` hold for every notebook, `CHAPTER_CHECKS` for the chapters (book/NN-slug.ipynb) too.
"""

from __future__ import annotations

import ast
import re
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
from tools.chapter_code import run_definitions
from tools.freshness import SHELL, is_fresh

MAX_BYTES = 300_000
WORDS = (2_500, 4_000)
EXERCISES = 6
EXERCISES_WITH_CODE = 2
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
        if MACHINE_PATH.search(text):
            problems.append(f"{at(notebook, cell)} shows a path of this machine: {MACHINE_PATH.search(text)[0]}")
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


# ---- chapters


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
    triples, incomplete = exercises_with_code(notebook)
    problems += incomplete
    if len(triples) + len(incomplete) < EXERCISES_WITH_CODE:
        problems.append(f"{len(triples)} exercises with code; a chapter has at least {EXERCISES_WITH_CODE}")
    return problems


def exercises_with_code(notebook) -> tuple[list[tuple], list[str]]:
    """(stub, solution, check) cells of each exercise with code, and what is wrong with the others.

    The check is the first code cell after the solution.
    """
    triples, problems = [], []
    cells = code_cells(notebook)
    for number, stub in enumerate(cells):
        if "exercise" not in tags(stub):
            continue
        after = cells[number + 1 :]
        stop = next((i for i, cell in enumerate(after) if "exercise" in tags(cell)), len(after))
        solution = next((i for i, cell in enumerate(after[:stop]) if "solution" in tags(cell)), None)
        if "raises-exception" not in tags(stub):
            problems.append(f"{at(notebook, stub)} is an exercise without the tag raises-exception")
        elif solution is None:
            problems.append(f"{at(notebook, stub)} has no cell tagged solution")
        elif solution + 1 >= stop or not asserts(after[solution + 1]):
            problems.append(f"{at(notebook, after[solution])} is followed by no check (a cell with an assert)")
        else:
            triples.append((stub, after[solution], after[solution + 1]))
    return triples, problems


def check_solutions(notebook) -> list[str]:
    """Each check fails with NotImplementedError on the stub, and passes on the solution.

    Both run with the definitions of the cells before them (imports, functions, classes, constants) and nothing else.
    """
    problems = []
    for stub, solution, check in exercises_with_code(notebook)[0]:
        before = notebook.cells[: notebook.cells.index(stub)]
        try:
            definitions = run_definitions(before, {"__name__": "chapter"}, "chapter")
        except Exception as error:  # whatever the chapter raises is what is reported
            return [f"the definitions before {at(notebook, stub)} fail: {error!r}"]
        failure, unfinished = _run([stub, check], dict(definitions))
        if failure is None:
            problems.append(f"{at(notebook, check)} passes on the stub")
        elif not unfinished and not isinstance(failure, NotImplementedError):
            problems.append(f"{at(notebook, stub)}: the stub fails with {failure!r}, not with NotImplementedError")
        failure, unfinished = _run([solution, check], dict(definitions))
        if failure is not None or unfinished:
            problems.append(f"{at(notebook, solution)}: the solution fails its check with {failure!r}")
    return problems


def _run(cells, namespace: dict) -> tuple[Exception | None, bool]:
    """Run a stub or solution, then its check: what the check raised, and whether the first cell was unfinished."""
    first, check = cells
    unfinished = False
    try:
        exec(compile(SHELL.sub("", first.source), "<cell>", "exec"), namespace)
    except NotImplementedError:
        unfinished = True
    except Exception as error:
        return error, False
    try:
        exec(compile(SHELL.sub("", check.source), "<check>", "exec"), namespace)
    except Exception as error:
        return error, unfinished
    return None, unfinished


PAGE_CHECKS = (check_executed, check_errors, check_size, check_fresh, check_alt, check_stable)
CHAPTER_CHECKS = (
    check_frame,
    check_asserts,
    check_library,
    check_words,
    check_picture,
    check_exercises,
    check_solutions,
)


def checks_for(path: Path) -> tuple:
    """The checks that a notebook has to pass."""
    return PAGE_CHECKS + CHAPTER_CHECKS if is_chapter(path) else PAGE_CHECKS
