"""What a reader gets wrong is seen: the check of every Your turn and exercise fails on the wrong versions kept here.

wrong/chNN.py holds chapter NN's as WRONG: by what the stub defines, two or more (what goes wrong, the solution's text,
found once, what stands there instead). A wrong version has to run: one that raises a NameError tests nothing.
"""

from importlib import import_module
from pathlib import Path

import nbformat
import pytest

from tests.book.small_chapters import eleven
from tests.book.test_notebooks import needs_interpreter
from tools.book import plan
from tools.turns import let_pass, name_of, triples

KEPT = sorted(int(path.stem[2:]) for path in (Path(__file__).parent / "wrong").glob("ch*.py"))
FEWEST = 2


def wrong_of(number):
    return import_module(f"tests.book.wrong.ch{number:02d}").WRONG


def asked(notebook):
    """(stub, solution, check) of all that the reader writes, by what it is called."""
    found = [triple for kind in ("your-turn", "exercise") for triple in triples(notebook, kind)[0]]
    return {name_of(stub): (stub, solution, check) for stub, solution, check in found}


def chapter(number):
    path = next(chapter.notebook for chapter in plan() if chapter.number == number)
    return nbformat.read(path, as_version=4)


CASES = [(number, name) for number in KEPT for name in wrong_of(number)]


@pytest.mark.parametrize(("number", "name"), CASES, ids=[f"{number}-{name}" for number, name in CASES])
def test_the_check_fails_on_each_wrong_version(number, name):
    notebook = chapter(number)
    needs_interpreter(notebook)
    assert let_pass(notebook, asked(notebook)[name], wrong_of(number)[name]) == []


@pytest.mark.parametrize("number", KEPT)
def test_nothing_that_is_asked_is_left_out(number):
    wrong = wrong_of(number)
    assert set(wrong) == set(asked(chapter(number)))
    for name, versions in wrong.items():
        changes = {(old, new) for _, old, new in versions}
        assert len(changes) >= FEWEST, f"{name}: {len(changes)} wrong versions, at least {FEWEST} are asked for"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (("another word", "width // 2", "width / 2"), "turns, another word: the check passes"),
        (("no such text", "width // 3", "width"), "stands 0 times"),
        (("a misspelt name", "width // 2", "widht // 2"), "does not even run: NameError"),
        (("wrong", "width // 2", "width // 4"), None),
    ],
)
def test_a_wrong_version_that_is_none_is_said(version, said):
    notebook = eleven()
    problems = let_pass(notebook, asked(notebook)["turns"], [version])
    assert problems == [] if said is None else said in problems[0]
