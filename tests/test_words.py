"""The words of the code: docstrings that begin with a line, names that say what they hold, errors that name a field."""

import ast
import re

import pytest

from tools.freshness import module_files

MODULES = {module or "moemla": ast.parse(path.read_text(encoding="utf-8")) for module, path in module_files().items()}
BAGS = {"how", "like", "found", "given"}
BUILT = re.compile(r"Built in chapters? \d[^.]*\.")
FIELD = re.compile(r"[\w.]+(\[\w+\])?(=.*)?: ")
LONG: set[str] = set()
VAGUE: set[str] = set()
NAMELESS: set[str] = set()


def documented(tree):
    """(name, docstring) of the module and of every class and function in it, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            yield getattr(node, "name", "the module"), ast.get_docstring(node)


def unless(module, waiting):
    """The parameter of a module, an expected failure while it is `waiting`."""
    marks = [pytest.mark.xfail(reason="still to be mended", strict=True)] if module in waiting else []
    return pytest.param(module, marks=marks)


@pytest.mark.parametrize("module", [unless(module, LONG) for module in MODULES])
def test_a_docstring_begins_with_a_whole_sentence_on_one_line(module):
    for name, text in documented(MODULES[module]):
        first = text.split("\n\n")[0].strip()
        assert "\n" not in first, f"{module}.{name}: {first!r} is not one line"
        assert first[-1] in ".:?" and first.count("(") == first.count(")"), f"{module}.{name}: {first!r} is cut off"


@pytest.mark.parametrize("module", MODULES)
def test_a_chapter_is_named_where_it_differs(module):
    """Once in the module, and again at a symbol whose chapter is another."""
    said = [(name, BUILT.findall(" ".join(text.split()))) for name, text in documented(MODULES[module])]
    general = [chapter for name, chapters in said if name == "the module" for chapter in chapters]
    repeated = [name for name, chapters in said if name != "the module" and set(chapters) & set(general)]
    assert len(general) <= 1 and repeated == [], f"{module} says {general} already"


@pytest.mark.parametrize("module", [unless(module, VAGUE) for module in MODULES])
def test_names_say_what_they_hold(module):
    tree = MODULES[module]
    set_here = [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]
    names = {node.id for node in set_here if isinstance(node, ast.Name)}
    names |= {node.attr for node in set_here if isinstance(node, ast.Attribute)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    fields = {"given"} if module == "paper.claims" else set()  # a key of the ledger
    assert names & BAGS <= fields, f"{module}: {sorted(names & BAGS - fields)}"


def message(error):
    """The text of a wrong value's exception as it is written, X for what is put in; None for others."""
    if not isinstance(error, ast.Call) or getattr(error.func, "id", "") not in ("ValueError", "IndexError"):
        return None
    (said,) = error.args
    if not isinstance(said, (ast.JoinedStr, ast.Constant)):
        return None
    parts = said.values if isinstance(said, ast.JoinedStr) else [said]
    return "".join(part.value if isinstance(part, ast.Constant) else "X" for part in parts)


@pytest.mark.parametrize("module", [unless(module, NAMELESS) for module in MODULES])
def test_an_error_begins_with_field_and_value(module):
    """`field=value: what is right`, or `field: ` where the value is no number and no word."""
    raised = [node.exc for node in ast.walk(MODULES[module]) if isinstance(node, ast.Raise)]
    texts = [text for text in map(message, raised) if text is not None and not FIELD.match(text)]
    assert texts == []
