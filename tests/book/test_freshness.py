"""The fingerprint changes with what an output depends on, and with nothing else."""

import ast
import re
from dataclasses import replace

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from moemla.experiments import ten_minutes
from moemla.experiments.runner import Text
from moemla.results import write
from tests.test_results import cell, result
from tools.book import ROOT
from tools.execute import main
from tools.freshness import Library, dump, files_of, fingerprint, is_fresh, modules_of, rows_of

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
    "paper/claims.yml": (
        "- {id: A1, printed: 1, of: [A1-of, B2.sd], result: {experiment: table2}}\n"
        "- {id: A1-of, printed: 1}\n- {id: B2, printed: 1, of: [C3]}\n- {id: C3, printed: 1}\n- {id: D4, printed: 1}\n"
    ),
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


def measured(folder, experiment, nats=1.25, **changes):
    """A result of an experiment that nobody registered: complete as it stands."""
    return write(result(cell(experiment=experiment, **changes), {"nats_per_token": nats}), folder)


@pytest.mark.parametrize(
    ("source", "experiment", "stale"),
    [
        (RESULTS, "sweep", True),
        (RESULTS, "table2", False),
        (RESULTS.replace(", 'sweep'", ""), "table2", True),  # it names none: it reads all
        (LEDGER, "table2", True),  # the ledger names it
        (LEDGER, "sweep", False),
        (LEDGER + "\n" + RESULTS, "sweep", True),
        (LEDGER + "('A1')", "table2", True),
        (LEDGER + "('B2')", "table2", False),  # another row
        (OTHER, "sweep", False),
    ],
)
def test_a_digit_of_a_result(package, source, experiment, stale):
    folder = package.parent / "results"
    for name in ("sweep", "table2", "sweep-long"):
        measured(folder, name)
    page = notebook(source)
    before = fingerprint(page, package)
    measured(folder, experiment, 1.26)
    assert (fingerprint(page, package) != before) == stale
    measured(folder, experiment)
    assert fingerprint(page, package) == before
    measured(folder, experiment, seed=1)  # a result that is new
    assert (fingerprint(page, package) != before) == stale


@pytest.mark.parametrize(
    ("code", "rows"),
    [
        ("'A1'", "A1 A1-of B2 C3"),  # with what it is computed from
        ("'A1-of'", "A1-of"),
        ("'C3'", "C3"),
        ("f'A1-{name}'", "A1 A1-of B2 C3"),
        ("", "A1 A1-of B2 C3 D4"),  # none is named: all are read
        ("1, 'A12', 'A', 'a1'", "A1 A1-of B2 C3 D4"),
        ("'C3'); claims.summary(rows", "A1 A1-of B2 C3 D4"),
    ],
)
def test_a_row_of_the_ledger(package, code, rows):
    page = notebook(f"from moemla.paper import claims\nclaims.evaluate({code})")
    library = Library(package)
    assert sorted(rows_of(page, library)) == rows.split()
    before, ledger = fingerprint(page, package), package / "paper" / "claims.yml"
    text = ledger.read_text()
    for line in text.splitlines():
        ledger.write_text(text.replace(line, line.replace("printed: 1", "printed: 2")))
        changed = re.search(r"id: ([\w-]+)", line)[1] in rows.split()
        assert (fingerprint(page, package) != before) == changed, line
    assert fingerprint(notebook(OTHER), package) == fingerprint(notebook(OTHER), package)
    assert rows_of(notebook(RESULTS), library) == rows_of(notebook(OTHER), library) == {}


def test_a_run_of_an_unfinished_experiment_makes_nothing_stale(package, monkeypatch):
    """Its last one does: then the chapter may show it."""
    folder, text = package.parent / "results", Text("builtin", "aa" * 32)
    page = notebook("from moemla import results\nresults.load('../results', 'ten-minutes')")
    runs = ten_minutes.cells("cpu", text)
    more = [replace(runs[0], train=replace(runs[0].train, seed=seed)) for seed in (1, 2)]
    monkeypatch.setattr(ten_minutes, "cells", lambda scale, text: [*runs, *more])
    prints = [fingerprint(page, package)]
    for one in (*runs, *more):
        write(result(one), folder)
        prints.append(fingerprint(page, package))
    assert prints[0] == prints[1] == prints[2] != prints[3]


def test_the_books_own_notebooks_read_what_they_show():
    """Chapter 5 rows of the ledger and its experiment, chapters 1 and 2 the ten minutes, 3 and 4 nothing measured."""
    read, rows = {}, {}
    for path in sorted((ROOT / "book").glob("0[1-5]-*.ipynb")):
        page, library = nbformat.read(path, as_version=4), Library()
        read[path.name[:2]] = {file.parts[-3] for file in files_of(page, library)}
        rows[path.name[:2]] = rows_of(page, library)
    assert read["01"] == read["02"] == {"ten-minutes"} and read["03"] == read["04"] == set()
    assert read["05"] == {"latent-cost"}
    assert not rows["01"] and {"A25-batch", "T2-mha"} < set(rows["05"]) and len(rows["05"]) < 60


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
