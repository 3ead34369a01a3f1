"""A chapter's own code without its training: `load_definitions` takes functions and classes out of a notebook.

The tests run a chapter's classes through the same property tests as the library's, and an exercise's check against
its stub and its solution; neither may have to train a model first.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import nbformat

from tools.freshness import SHELL

DEFINING = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
STUBS = {"exercise", "your-turn"}
SKIPPED_TAGS = {"raises-exception", "skip-execution", "solution", *STUBS}


def definitions(source: str) -> list[ast.stmt]:
    """The statements of a cell that only define: imports, functions, classes, constants written as literals."""
    kept = []
    for node in ast.parse(SHELL.sub("", source)).body:
        constant = isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and _simple(node)
        if constant or isinstance(node, DEFINING):
            kept.append(node)
    return kept


def run_definitions(cells, namespace: dict, name: str) -> dict:
    """Execute the definitions of code cells in a namespace, cell by cell; returns the namespace.

    The solution of a *Your turn* is the chapter's own code; that of an exercise is left out, as every stub is.
    """
    turn = False
    for number, cell in enumerate(cells):
        tags = set(cell.metadata.get("tags", []))
        own = turn and "solution" in tags
        turn = "your-turn" in tags or (turn and cell.cell_type != "code")
        if cell.cell_type == "code" and (own or not SKIPPED_TAGS & tags):
            for node in definitions(cell.source):
                code = compile(ast.Module(body=[node], type_ignores=[]), f"{name}[{number}]", "exec")
                try:
                    exec(code, namespace)
                except NameError:
                    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
                        raise  # a constant made of computed names is no constant; a class must stand on its own
    return namespace


def load_definitions(path: str | Path) -> SimpleNamespace:
    """Imports, functions, classes and simple constants of a notebook: `load_definitions(path).LatentAttention`.

    Stubs, exercises and their solutions are left out, and so is everything that computes.
    """
    notebook = nbformat.read(path, as_version=4)
    return SimpleNamespace(**run_definitions(notebook.cells, {"__name__": "chapter"}, Path(path).name))


def _simple(node: ast.Assign | ast.AnnAssign) -> bool:
    """Names on the left; on the right a literal, or arithmetic on literals and names in capitals."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = all(
        isinstance(part, (ast.Name, ast.Tuple, ast.expr_context)) for target in targets for part in ast.walk(target)
    )
    allowed = (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Set, ast.UnaryOp, ast.BinOp, ast.operator, ast.unaryop)
    return names and all(
        isinstance(part, allowed)
        or (isinstance(part, ast.Name) and part.id.isupper())
        or isinstance(part, ast.expr_context)
        for part in ast.walk(node.value)
    )
