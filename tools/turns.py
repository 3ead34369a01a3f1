"""What the reader writes: stub, solution, check. Found by their tags, and tried: the stub fails, the solution passes.

An exercise with code stands at the end of a chapter (stub tagged `exercise`), a *Your turn* where the chapter builds
(`your-turn`). A stub raises NotImplementedError; the check is the first code cell after the cell tagged `solution`.
`let_pass` tries wrong versions of a solution: the check has to fail on them too.
"""

from __future__ import annotations

import ast

from tools.cells import asserts, at, code_cells, parse, tags
from tools.chapter_code import STUBS, run_definitions
from tools.freshness import SHELL


def triples(notebook, kind: str) -> tuple[list[tuple], list[str]]:
    """(stub, solution, check) cells of each stub tagged `kind`, and what is wrong with the others."""
    found, problems = [], []
    cells = code_cells(notebook)
    for number, stub in enumerate(cells):
        if kind not in tags(stub):
            continue
        after = cells[number + 1 :]
        stop = next((i for i, cell in enumerate(after) if tags(cell) & STUBS), len(after))
        stop = min(stop, 2) if kind == "your-turn" else stop  # nothing stands between
        solution = next((i for i, cell in enumerate(after[:stop]) if "solution" in tags(cell)), None)
        if "raises-exception" not in tags(stub):
            problems.append(f"{at(notebook, stub)} is tagged {kind} and not raises-exception")
        elif solution is None:
            problems.append(f"{at(notebook, stub)} has no cell tagged solution")
        elif solution + 1 >= stop or not asserts(after[solution + 1]):
            problems.append(f"{at(notebook, after[solution])} is followed by no check (a cell with an assert)")
        else:
            found.append((stub, after[solution], after[solution + 1]))
    return found, problems


def tried(notebook, found: list[tuple]) -> list[str]:
    """What is wrong with each: a check that passes on the stub, or fails on the solution.

    Both run with the definitions of the cells before them (imports, functions, classes, constants) and nothing else.
    """
    problems = []
    for stub, solution, check in found:
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


UNFAIR = (SyntaxError, NameError, TypeError, AttributeError, NotImplementedError)  # any check would see these
Wrong = tuple[str, str, str]  # what goes wrong; the solution's text, found once; what stands there instead


def name_of(stub) -> str:
    """What a stub asks for: the first function or class that it defines."""
    return next(node.name for node in parse(stub).body if isinstance(node, (ast.FunctionDef, ast.ClassDef)))


def let_pass(notebook, triple: tuple, wrong: list[Wrong]) -> list[str]:
    """The wrong versions of a solution that its check does not see, and those that are none."""
    stub, solution, check = triple
    problems, before = [], notebook.cells[: notebook.cells.index(stub)]
    definitions = run_definitions(before, {"__name__": "chapter"}, "chapter")
    for why, old, new in wrong:
        said = f"{name_of(stub)}, {why}"
        if solution.source.count(old) != 1:
            problems.append(f"{said}: {old!r} stands {solution.source.count(old)} times in the solution, not once")
            continue
        changed = solution.copy()
        changed["source"] = solution.source.replace(old, new)
        failure, unfinished = _run([changed, check], dict(definitions))
        cause = failure.__cause__ or failure if failure is not None else None  # Triton wraps what a kernel raises
        if failure is None:
            problems.append(f"{said}: the check passes")
        elif unfinished or isinstance(cause, UNFAIR):
            problems.append(f"{said}: does not even run: {cause!r}")
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
