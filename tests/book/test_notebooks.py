"""Every notebook of the book is executed, fresh, small and readable; every chapter has the frame."""

import nbformat
import pytest

from moemla.kernels import INTERPRETED
from tools import pages
from tools.book import BOOK, contents, is_chapter, notebooks
from tools.book_checks import checks_for
from tools.chapter_code import load_definitions

NOTEBOOKS = notebooks()
CHAPTERS = [path for path in NOTEBOOKS if is_chapter(path)]
CASES = [(path, check) for path in NOTEBOOKS for check in checks_for(path)]


def needs_interpreter(notebook, runs: bool = True) -> None:
    """Skips what would define a notebook's kernels where they would be compiled, or where there is no Triton."""
    if runs and not INTERPRETED and any("import triton" in cell.source for cell in notebook.cells):
        pytest.skip("kernels of a chapter are interpreted: needs Triton 3.7, and no GPU")


def test_the_book_has_notebooks():
    assert NOTEBOOKS, "book/ has no notebook: every check below would pass on nothing"


@pytest.mark.parametrize(("path", "check"), CASES, ids=[f"{p.stem}-{c.__name__[6:]}" for p, c in CASES])
def test_notebook(path, check):
    notebook = nbformat.read(path, as_version=4)
    needs_interpreter(notebook, check.__name__ in ("check_turns", "check_solutions"))
    problems = check(notebook)
    assert not problems, f"{path.name}: " + "; ".join(problems)


@pytest.mark.parametrize("path", CHAPTERS, ids=[path.stem for path in CHAPTERS])
def test_a_chapters_definitions_stand_on_their_own(path):
    needs_interpreter(nbformat.read(path, as_version=4))
    assert vars(load_definitions(path))


def test_no_other_page_begins_with_a_digit():
    for path in BOOK.iterdir():
        assert not path.name[0].isdigit() or is_chapter(path), f"{path.name} is no chapter (NN-slug.ipynb)"


def test_the_lists_are_up_to_date():
    assert pages.stale() == [], "run `make notebooks`"


def test_every_notebook_is_in_the_contents():
    listed = contents()
    assert [path.stem for path in NOTEBOOKS if f"book/{path.stem}" not in listed] == []
