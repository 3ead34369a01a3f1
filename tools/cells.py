"""A notebook as its cells: what they are tagged with, to which part of the frame they belong, what they say and assert.

A chapter has the parts of the frame, ten up to chapter 5 and eleven after it: the cell that opens part N carries the
tag `frame-N`, and the cells after it belong to that part. From chapter 6 on every cell carries the tag of its part.
"""

from __future__ import annotations

import ast
import re

from tools.freshness import SHELL

DIRECTIVE = re.compile(r"^\s*(?:`{3,}|:{3,})\{([\w:-]+)\}[ \t]*(.*)$", re.MULTILINE)


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def code_cells(notebook, with_skipped: bool = False) -> list:
    """Code cells that hold code; those that are not run here (`skip-execution`) only when asked for."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return cells if with_skipped else [cell for cell in cells if "skip-execution" not in tags(cell)]


def parse(cell) -> ast.Module:
    try:
        return ast.parse(SHELL.sub("", cell.source))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def at(notebook, cell) -> str:
    """Where a cell is, for the person who mends it."""
    first = cell.source.strip().splitlines()[0][:60] if cell.source.strip() else "empty"
    return f"cell {notebook.cells.index(cell)} ({first})"


def parts(notebook) -> dict[int, list]:
    """The cells of each part of the frame."""
    found: dict[int, list] = {}
    current = None
    for cell in notebook.cells:
        numbers = [int(tag[6:]) for tag in tags(cell) if re.fullmatch(r"frame-\d+", tag)]
        current = min(numbers) if numbers else current
        if current is not None:
            found.setdefault(current, []).append(cell)
    return found


def output_text(cell) -> str:
    """All that a cell shows as text."""
    pieces = []
    for output in cell.get("outputs", []):
        pieces.append(output.get("text", ""))
        data = output.get("data", {})
        pieces += [data[kind] for kind in ("text/plain", "text/markdown", "text/html") if kind in data]
    return "\n".join(piece if isinstance(piece, str) else "".join(piece) for piece in pieces)


def words(notebook) -> int:
    """Words of prose: code, formulas, directives and their options are not read as prose."""
    text = "\n".join(line for c in notebook.cells if c.cell_type == "markdown" for line in _prose(c.source))
    text = re.sub(r"\$\$.*?\$\$|\$[^$\n]+\$", " x ", text, flags=re.DOTALL)
    text = re.sub(r"\{[\w:-]+\}|\]\([^)]*\)|<[^>]+>", " ", text)
    return len(re.findall(r"[^\W_][\w'’.,-]*", text))


def _prose(source: str) -> list[str]:
    """The lines of a markdown cell that are prose: not code, nor the fences, options and labels of directives."""
    kept = []
    fences: list[tuple[str, bool]] = []  # open fences, and whether what stands in them is prose
    for line in source.splitlines():
        fence = re.match(r"\s*(`{3,}|:{3,})(.*)", line)
        if fence:
            mark, info = fence[1], fence[2].strip()
            if fences and fences[-1][0] == mark and not info:
                fences.pop()
            elif not fences or fences[-1][1]:
                directive = re.match(r"\{([\w:-]+)\}", info)
                code = directive is None or directive[1] in ("math", "code", "code-block", "raw", "bibliography")
                fences.append((mark, not code))
        elif all(prose for _, prose in fences) and not re.match(r"\s*:[\w-]+:|\s*\([\w-]+\)=", line):
            kept.append(line)
    return kept


def has_run(cell) -> bool:
    return cell.cell_type == "code" and cell.get("execution_count") is not None


def asserts(cell) -> bool:
    """An assert (or torch's or numpy's assert_...) that runs when the cell does: one inside a function need not."""
    todo = list(parse(cell).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name.startswith("assert_"):
                return True
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            todo += ast.iter_child_nodes(node)
    return False


def library_names(notebook) -> set[str]:
    """Names that a notebook binds to moemla or to something in it."""
    names = set()
    for cell in code_cells(notebook, with_skipped=True):
        for node in ast.walk(parse(cell)):
            if isinstance(node, ast.Import):
                names |= {(n.asname or n.name.split(".")[0]) for n in node.names if n.name.split(".")[0] == "moemla"}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "moemla":
                names |= {n.asname or n.name for n in node.names}
    return names


def options_of(source: str, match: re.Match) -> str:
    """The lines `:name: value` under the opening line of a directive."""
    return re.match(r"(\s*:[\w-]+:.*\n?)*", source[match.end() + 1 :])[0]


def label_of(source: str, match: re.Match) -> str | None:
    """What other pages call a directive by."""
    found = re.search(r":label:\s*(\S+)", options_of(source, match))
    return found[1] if found else None
