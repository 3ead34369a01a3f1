"""Is a notebook's output still what its code and the library would give? A fingerprint of both tells.

It covers the notebook's code cells, every moemla module that they use, directly or through other modules, and the
measured results and the rows of the ledger that they read: of results those of complete experiments only.
Comments and docstrings of the library do not count; neither does the Python version that computes it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from pathlib import Path

import yaml

from tools.book import PACKAGE

SHELL = re.compile(r"^\s*[!%].*$", re.MULTILINE)


def parse_cells(notebook) -> list[ast.Module]:
    """The syntax trees of the code cells, shell and magic lines blanked; what is no Python gives an empty tree."""
    trees = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            try:
                trees.append(ast.parse(SHELL.sub("", cell.source)))
            except SyntaxError:
                trees.append(ast.Module(body=[], type_ignores=[]))
    return trees


def module_files(package: Path = PACKAGE) -> dict[str, Path]:
    """Dotted names below the package ("config", "paper.claims", "" for the package itself) and their files."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


class Library:
    """The package as text: which module defines a name, and which modules a module uses."""

    def __init__(self, package: Path = PACKAGE):
        self.name, self.package = package.name, package
        self.files = module_files(package)
        self.trees = {name: ast.parse(path.read_text()) for name, path in self.files.items()}
        self.definers: dict[str, set[str]] = {}
        for module, tree in self.trees.items():
            if module:  # the package's own file only passes names on
                for name in _defined(tree):
                    self.definers.setdefault(name, set()).add(module)

    def resolve(self, dotted: str) -> set[str]:
        """Modules meant by "config", "config.ModelConfig", "LanguageModel": the longest module, else the definers."""
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            module = ".".join(parts[:length])
            if module not in self.files:
                continue
            below = parts[length] if length < len(parts) else None
            if below and self.files[module].name == "__init__.py" and below not in _defined(self.trees[module]):
                # A subpackage that passes a name on: the module that defines it counts too.
                inside = {m for m in self.definers.get(below, ()) if m.startswith(module + ".")}
                return inside | {module}
            return {module}
        return self.definers.get(parts[0], set())

    def used_by(self, tree: ast.AST, inside: str | None = None) -> set[str]:
        """Modules that a tree imports or reaches through `moemla.`; `inside` is the module that the tree is."""
        aliases, used = set(), set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for name in node.names:
                    if name.name == self.name:
                        aliases.add(name.asname or name.name)
                    elif name.name.startswith(self.name + "."):
                        used |= self.resolve(name.name.removeprefix(self.name + "."))
                        if not name.asname:
                            aliases.add(self.name)
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node, inside)
                if base is not None:
                    for name in node.names:
                        used |= self.resolve(f"{base}.{name.name}".strip("."))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                dotted = _dotted(node)
                if dotted and dotted.split(".")[0] in aliases:
                    used |= self.resolve(dotted.split(".", 1)[1])
        return used

    def _base(self, node: ast.ImportFrom, inside: str | None) -> str | None:
        """The module of a `from ... import`, below the package; None when it is not of the package."""
        if node.level == 0:
            module = node.module or ""
            if module == self.name:
                return ""
            return module.removeprefix(self.name + ".") if module.startswith(self.name + ".") else None
        if inside is None:
            return None
        parts = inside.split(".") if inside else []
        if self.files[inside].name != "__init__.py":
            parts = parts[:-1]
        parts = parts[: len(parts) - (node.level - 1)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def closure(self, modules: set[str]) -> set[str]:
        """The modules and all that they use, directly or not."""
        done: set[str] = set()
        todo = set(modules)
        while todo:
            module = todo.pop()
            done.add(module)
            todo |= self.used_by(self.trees[module], inside=module) - done
        return done


def modules_of(notebook, library: Library) -> set[str]:
    """The library's modules that a notebook's outputs depend on."""
    used: set[str] = set()
    for tree in parse_cells(notebook):
        used |= library.used_by(tree)
    for cell in notebook.cells:
        if cell.cell_type == "code" and re.search(rf"^\s*[!%].*\b{library.name}\b", cell.source, re.MULTILINE):
            used |= {"cli"} & set(library.files)  # the command, called from a shell line
    return library.closure(used)


def _code(notebook) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def rows_of(notebook, library: Library) -> dict[str, dict]:
    """The rows of the ledger that a notebook reads: those that its code names, and what these are computed from.

    As in `moemla claims`, A2 names A2 and all of A2-*; so does f"A2-{...}". A notebook with the ledger that names no
    row reads all, and so does one that counts statuses (`claims.summary`, `claims.counts`).
    """
    ledger = library.package / "paper" / "claims.yml"
    used = set().union(*map(library.used_by, parse_cells(notebook)))
    if "paper.claims" not in used or not ledger.exists():
        return {}
    rows = {row["id"]: row for row in yaml.safe_load(ledger.read_text(encoding="utf-8"))}
    if re.search(r"\bclaims\.(?:summary|counts)\(", _code(notebook)):
        return rows
    words = {word.rstrip("-") for word in re.findall(r"\w+(?:-\w+)*-?", _code(notebook))}
    todo = [name for name in rows if any("-".join(name.split("-")[:n]) in words for n in range(1, name.count("-") + 2))]
    read: dict[str, dict] = {}
    while todo:
        name = todo.pop().removesuffix(".sd")
        if name in rows and name not in read:
            read[name] = rows[name]
            todo += rows[name].get("of", [])
    return read or rows


def files_of(notebook, library: Library) -> list[Path]:
    """The files in results/ that a notebook may show: of the experiments that it names, those that are complete.

    Its code names them, or the rows of the ledger that it reads; one that reads results and names no experiment, all.
    What is not complete yet is no part of a chapter: a run that ends in the night makes no page stale.
    """
    from moemla import results
    from moemla.experiments.runner import finished

    used, rows = set().union(*map(library.used_by, parse_cells(notebook))), rows_of(notebook, library)
    if "results" not in used and not any("result" in row for row in rows.values()):
        return []
    folder = library.package.parent / results.FOLDER
    text = "\n".join([_code(notebook), *(row["result"]["experiment"] for row in rows.values() if "result" in row)])
    there = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())
    named = [name for name in there if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text)]
    runs = [run for name in named or there for run in results.load(folder, name, missing_ok=True)]
    return [results.path_of(run, folder) for run in finished(runs)]


def fingerprint(notebook, package: Path = PACKAGE) -> str:
    """The hash that `make notebooks` stores as metadata `moemla.fresh`."""
    library = Library(package)
    digest = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            digest.update(json.dumps([cell.source, sorted(cell.metadata.get("tags", []))]).encode())
    for module in sorted(modules_of(notebook, library)):
        digest.update(f"{module}\n{dump(library.trees[module])}\n".encode())
    for _, row in sorted(rows_of(notebook, library).items()):
        digest.update(json.dumps(row, sort_keys=True).encode())
    for path in files_of(notebook, library):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_fresh(notebook, package: Path = PACKAGE) -> bool:
    return notebook.metadata.get("moemla", {}).get("fresh") == fingerprint(notebook, package)


def dump(node) -> str:
    """`ast.dump` without docstrings, and without the empty fields in which Python versions differ."""
    if isinstance(node, list):
        return "[" + ",".join(map(dump, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            value = value[1:] if ast.get_docstring(node, clean=False) is not None else value
        if value is not None and value != [] and name not in ("ctx", "kind", "type_comment", "type_ignores"):
            fields.append(f"{name}={dump(value)}")
    return f"{type(node).__name__}({','.join(fields)})"


def _defined(tree: ast.Module) -> set[str]:
    """Names that a module defines itself at its top level (imports are not definitions)."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def _dotted(node: ast.Attribute) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None
