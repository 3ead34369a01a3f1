"""The fingerprint changes with what an output depends on, and with nothing else."""

import ast

import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tools.book import ROOT
from tools.execute import main
from tools.freshness import Library, dump, files_of, fingerprint, is_fresh, modules_of

FILES = {
    "__init__.py": "from .upper import Upper\nfrom . import lower\n",
    "lower.py": '"""Lower."""\n\ndef low(x):\n    """Docstring."""\n    return x  # comment\n',
    "upper.py": "class Upper:\n    def go(self):\n        from .lower import low\n        return low(1)\n",
    "aside.py": "ASIDE = 1\n",
    "cli.py": "from .aside import ASIDE\n\ndef main():\n    return ASIDE\n",
    "deep/__init__.py": "from .inner import thing\n",
    "deep/inner.py": "from ..lower import low\n\ndef thing():\n    return low(2)\n",
    "experiments/__init__.py": "",
    "paper/__init__.py": "",
    "results.py": "def load(folder):\n    return []\n",
    "paper/claims.py": "from .. import results\n\ndef evaluate():\n    return results.load('')\n",
    "paper/claims.yml": "- {id: A1, result: {experiment: table2}}\n",
    "experiments/sweep.py": "from ..results import load\n\ndef table():\n    return load('')\n",
}


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "moemla"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def notebook(*sources):
    return new_notebook(cells=[new_code_cell(source) for source in sources])


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import moemla\nmoemla.Upper()", {"upper", "lower"}),
        ("import moemla as m\nm.lower.low(1)", {"lower"}),
        ("from moemla import Upper", {"upper", "lower"}),
        ("from moemla.lower import low", {"lower"}),
        ("import moemla.aside", {"aside"}),
        ("from moemla.deep import thing", {"deep", "deep.inner", "lower"}),
        ("import moemla\nmoemla.deep.thing()", {"deep", "deep.inner", "lower"}),
        ("!moemla train --steps 3", {"cli", "aside"}),
        ("%matplotlib inline\nprint(1)", set()),
    ],
)
def test_which_modules_a_notebook_uses(package, source, modules):
    assert modules_of(notebook(source), Library(package)) == modules


@pytest.mark.parametrize(
    ("file", "old", "new", "stale"),
    [
        ("upper.py", "low(1)", "low(2)", True),
        ("lower.py", "return x", "return -x", True),
        ("lower.py", "Docstring.", "Another docstring.", False),
        ("lower.py", "# comment", "# another", False),
        ("lower.py", "\n\ndef", "\n\n\n\ndef", False),
        ("aside.py", "ASIDE = 1", "ASIDE = 2", False),
        ("deep/inner.py", "low(2)", "low(3)", False),
    ],
)
def test_a_change_of_the_library(package, file, old, new, stale):
    page = notebook("from moemla import Upper\nUpper().go()")
    before = fingerprint(page, package)
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new))
    assert (fingerprint(page, package) != before) == stale


RESULTS = "from moemla import results\nresults.load('../results', 'sweep')"
LEDGER = "from moemla.paper import claims\nclaims.evaluate()"
OTHER = "import moemla.aside\nprint('sweep table2')"


@pytest.mark.parametrize(
    ("source", "file", "stale"),
    [
        (RESULTS, "results/sweep.one.json", True),
        (RESULTS, "results/table2.one.json", False),
        (RESULTS, "moemla/paper/claims.yml", False),
        (RESULTS.replace(", 'sweep'", ""), "results/table2.one.json", True),  # it names none: it reads all
        (LEDGER, "results/table2.one.json", True),  # the ledger names it
        (LEDGER, "results/sweep.one.json", False),
        (LEDGER + "\n" + RESULTS, "results/sweep.one.json", True),
        (LEDGER, "moemla/paper/claims.yml", True),
        (OTHER, "results/sweep.one.json", False),
        (OTHER, "moemla/paper/claims.yml", False),
    ],
)
def test_a_byte_of_a_result_or_of_the_ledger(package, source, file, stale):
    folder = package.parent / "results"
    folder.mkdir()
    for name in ("sweep", "table2"):
        (folder / f"{name}.one.json").write_text('{"loss": 1.25}')
    page = notebook(source)
    before = fingerprint(page, package)
    path = package.parent / file
    path.write_text(path.read_text().replace("1", "2", 1))
    assert (fingerprint(page, package) != before) == stale


def test_a_result_that_is_new(package):
    folder = package.parent / "results"
    folder.mkdir()
    page = notebook(RESULTS)
    before = fingerprint(page, package)
    (folder / "sweep.one.json").write_text("{}")
    assert fingerprint(page, package) != before


def test_the_books_own_notebooks_read_what_they_show():
    """Chapter 5 the ledger and its experiment, chapters 1 and 2 the ten minutes, chapters 3 and 4 nothing measured."""
    import nbformat

    read = {}
    for path in sorted((ROOT / "book").glob("0[1-5]-*.ipynb")):
        files = files_of(nbformat.read(path, as_version=4), Library())
        read[path.name[:2]] = {file.name.partition(".")[0] for file in files}
    assert read["01"] == read["02"] == {"ten-minutes"} and read["03"] == read["04"] == set()
    assert {"claims", "chapter05"} <= read["05"]


def test_a_change_of_a_cell_or_its_tags():
    page = notebook("x = 1")
    before = fingerprint(page)
    page.cells[0].source = "x = 2"
    assert fingerprint(page) != before
    page.cells[0].source = "x = 1"
    assert fingerprint(page) == before
    page.cells[0].metadata["tags"] = ["timing"]
    assert fingerprint(page) != before


def test_the_dump_keeps_what_matters():
    assert dump(ast.parse("def f(x=1): return x")) != dump(ast.parse("def f(x=2): return x"))
    assert dump(ast.parse("x = 1")) != dump(ast.parse("x = '1'"))
    assert dump(ast.parse("class A:\n    'doc'\n    x = 1")) == dump(ast.parse("class A:\n    x = 1"))
    # The same text in every Python version, or a book made with one would be stale in the next.
    text = "Module(body=[FunctionDef(name='f',args=arguments(args=[arg(arg='x')]),body=[Return(value=Name(id='x'))])])"
    assert dump(ast.parse("def f(x):\n    return x")) == text


def test_only_stale_notebooks_are_executed(tmp_path, capsys):
    import json

    import nbformat

    for name in ("one", "two"):
        nbformat.write(notebook(f"print('{name}')"), tmp_path / f"{name}.ipynb")
    assert main([], book=tmp_path) == 0
    assert set(json.loads((tmp_path / "timings.json").read_text())) == {"one", "two"}
    page = nbformat.read(tmp_path / "one.ipynb", as_version=4)
    assert is_fresh(page) and page.cells[0].execution_count == 1
    page.cells[0].source = "print('three')"
    nbformat.write(page, tmp_path / "one.ipynb")
    capsys.readouterr()
    assert main([], book=tmp_path) == 0
    said = capsys.readouterr().out
    assert "one.ipynb: running" in said and "two.ipynb: fresh" in said
    page.cells[0].source = "1 / 0"
    nbformat.write(page, tmp_path / "one.ipynb")
    assert main([], book=tmp_path) == 1
    assert "FAILED" in capsys.readouterr().err
