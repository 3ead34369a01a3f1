"""Each check of the book bites: on a sound chapter none complains, on a broken copy exactly the one that should.

Small chapters (`small_chapters.py`), really executed. The frame of chapters 1 to 5 is tried here, that of the
others in `test_frame.py`.
"""

import copy

import nbformat
import pytest

from tests.book.small_chapters import PROSE, chapter
from tools.book_checks import CHAPTER_CHECKS, PAGE_CHECKS, check_stable
from tools.chapter_code import load_definitions
from tools.execute import execute, shorten
from tools.freshness import fingerprint


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "04-turning.ipynb"
    nbformat.write(chapter(), path)
    execute(path)
    return path


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def complaints(notebook, checks=PAGE_CHECKS + CHAPTER_CHECKS):
    """The problems by check; checks without one are left out."""
    found = {check.__name__.removeprefix("check_"): check(notebook) for check in checks}
    return {name: problems for name, problems in found.items() if problems}


def find(notebook, text):
    return next(cell for cell in notebook.cells if text in cell.source)


def refresh(notebook):
    """Forget that the code was changed, so that only what the change broke is reported."""
    notebook.metadata["moemla"]["fresh"] = fingerprint(notebook)


def test_a_sound_chapter_has_no_problem(notebook):
    assert complaints(notebook) == {}


def test_execution_gives_the_same_bytes_again(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    cell = find(notebook, "perf_counter")
    cell.source = "print('no clock')"
    again = tmp_path / path.name
    nbformat.write(notebook, again)
    execute(again)
    once = again.read_bytes()
    execute(again)
    assert again.read_bytes() == once


def test_a_failing_cell_leaves_the_file_as_it_was(path, tmp_path):
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    find(notebook, "assert torch.allclose").source = "assert False"
    broken = tmp_path / path.name
    nbformat.write(notebook, broken)
    before = broken.read_bytes()
    with pytest.raises(CellExecutionError):
        execute(broken)
    assert broken.read_bytes() == before and list(tmp_path.iterdir()) == [broken]


def test_a_chapters_class_can_be_taken_out(path):
    taken = load_definitions(path)
    assert taken.WIDTH == 8
    assert taken.Rotation(8).angle.shape == (4,)
    assert not hasattr(taken, "x") and not hasattr(taken, "pairs"), "computed values and exercises stay behind"


# ---- broken copies: a function that breaks a sound chapter, the check that must see it, and a word of its message


def break_unexecuted(notebook):
    find(notebook, "torch.ones")["execution_count"] = None


def break_order(notebook):
    find(notebook, "torch.ones")["execution_count"] = 40


def break_error(notebook):
    cell = find(notebook, "torch.ones")
    cell.outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]


def break_silent_stub(notebook):
    find(notebook, "NotImplementedError").outputs = []


def break_size(notebook):
    find(notebook, "torch.ones").outputs[0]["text"] = "number " * 50_000


def break_stale(notebook):
    find(notebook, "torch.ones").source += "  # changed"


def break_alt(notebook):
    del find(notebook, "plt.subplots").metadata["mystnb"]


def break_markdown_alt(notebook):
    find(notebook, "What the paper says").source += "\n\n![](_static/picture.png)"


def break_figure_alt(notebook):
    find(notebook, "What the paper says").source += "\n\n```{figure} _static/picture.png\n:name: fig-x\nWhat.\n```"


def break_twice(notebook):
    notebook.cells[0].source += 2 * "\n\nA line of prose that an edit left twice."


def break_untagged_clock(notebook):
    find(notebook, "perf_counter").metadata["tags"] = []
    refresh(notebook)


def break_hidden_clock(notebook):
    """A clock behind a function of the chapter's own."""
    find(notebook, "class Rotation").source += "\n\ndef seconds():\n    import time\n    return time.time()"
    find(notebook, "torch.ones").source += "\nprint(seconds())"
    refresh(notebook)


def break_rate(notebook):
    find(notebook, "torch.ones").outputs[0]["text"] = "1,234 tokens/s"


def break_address(notebook):
    find(notebook, "torch.ones").outputs[0]["text"] = "<Rotation at 0x7f3a52d0>"


def break_path(notebook):
    find(notebook, "torch.ones").outputs[0]["text"] = "saved to /home/ada/run/checkpoint"


def break_frame(notebook):
    find(notebook, "## The problem").metadata["tags"] = []


def break_frame_order(notebook):
    first, second = find(notebook, "## What the paper"), find(notebook, "## The problem")
    first.metadata["tags"], second.metadata["tags"] = ["frame-3"], ["frame-2"]


def break_assert(notebook):
    cell = find(notebook, "assert torch.allclose")
    cell.source = cell.source.replace("assert ", "_ = ")
    refresh(notebook)


def break_assert_in_function(notebook):
    """An assert in a function that nobody calls is none."""
    cell = find(notebook, "assert torch.allclose")
    cell.source = "def check():\n    " + cell.source
    refresh(notebook)


def break_no_gradients(notebook):
    cell = find(notebook, "RotaryEmbedding(WIDTH, 16)")
    cell.source = "\n".join(line for line in cell.source.splitlines() if "grad" not in line and "backward" not in line)
    cell.source += "\nb = a\ntorch.testing.assert_close(ours(a), theirs(b))"
    refresh(notebook)


def break_no_library(notebook):
    cell = find(notebook, "RotaryEmbedding(WIDTH, 16)")
    cell.source = cell.source.replace("RotaryEmbedding(WIDTH, 16)", "Rotation(WIDTH)")
    refresh(notebook)


def break_no_class(notebook):
    cell = find(notebook, "RotaryEmbedding(WIDTH, 16)")
    cell.source = cell.source.replace("Rotation(WIDTH)", "RotaryEmbedding(WIDTH, 16)")
    refresh(notebook)


def break_short(notebook):
    cell = find(notebook, "## Naive")
    cell.source = cell.source[:9000]


def break_long(notebook):
    find(notebook, "## Naive").source += " " + PROSE


def break_picture(notebook):
    find(notebook, "plt.subplots").outputs = []


def break_missing_exercise(notebook):
    label = "ex-plain-0"
    notebook.cells = [cell for cell in notebook.cells if label not in cell.source]


def break_unsolved(notebook):
    find(notebook, "{solution} ex-plain-1").source = "The answer is left out."


def break_unfolded(notebook):
    cell = find(notebook, "{solution} ex-plain-1")
    cell.source = cell.source.replace(":class: dropdown\n", "")


def break_unchecked(notebook):
    cell = find(notebook, "assert pairs(WIDTH) == 4")
    cell.source = "print(pairs(WIDTH))"
    refresh(notebook)


def break_solution(notebook):
    """A solution that does not solve."""
    cell = find(notebook, "return width // 2")
    cell.source = cell.source.replace("// 2", "// 3")
    refresh(notebook)


def break_stub(notebook):
    """A stub that solves: its check cannot fail."""
    cell = find(notebook, "NotImplementedError")
    cell.source = "def pairs(width):\n    return 4"
    refresh(notebook)


def break_check(notebook):
    """A check that passes on anything."""
    cell = find(notebook, "assert pairs(WIDTH) == 4")
    cell.source = "assert WIDTH == 8"
    refresh(notebook)


def break_dependent_check(notebook):
    """A check that needs a computed value cannot be run on its own."""
    cell = find(notebook, "return width // 2")
    cell.source = "def pairs(width):\n    return x.shape[-1] // 2"
    refresh(notebook)


BROKEN = [
    (break_unexecuted, "executed", "not executed"),
    (break_order, "executed", "execution counts"),
    (break_error, "errors", "ValueError"),
    (break_silent_stub, "errors", "raised nothing"),
    (break_size, "size", "bytes"),
    (break_stale, "fresh", "make notebooks"),
    (break_alt, "alt", "alt text"),
    (break_markdown_alt, "alt", "alt text"),
    (break_figure_alt, "alt", ":alt:"),
    (break_twice, "twice", "2 times: A line of prose"),
    (break_untagged_clock, "stable", "timing"),
    (break_hidden_clock, "stable", "timing"),
    (break_rate, "stable", "1,234 tokens/s"),
    (break_address, "stable", "memory address"),
    (break_path, "stable", "/home/ada"),
    (break_frame, "frame", "frame-3"),
    (break_frame_order, "frame", "order"),
    (break_assert, "asserts", "part 6"),
    (break_assert_in_function, "asserts", "part 6"),
    (break_no_gradients, "library", "gradients"),
    (break_no_library, "library", "nothing of moemla"),
    (break_no_class, "library", "no class"),
    (break_short, "words", "words"),
    (break_long, "words", "words"),
    (break_picture, "picture", "part 1"),
    (break_missing_exercise, "exercises", "5 exercises"),
    (break_unsolved, "exercises", "ex-plain-1"),
    (break_unfolded, "exercises", "not folded"),
    (break_unchecked, "exercises", "no check"),
    (break_solution, "solutions", "solution fails"),
    (break_stub, "solutions", "passes on the stub"),
    (break_check, "solutions", "passes on the stub"),
    (break_dependent_check, "solutions", "NameError"),
]


@pytest.mark.parametrize(("damage", "check", "word"), BROKEN, ids=[damage.__name__[6:] for damage, *_ in BROKEN])
def test_a_broken_copy_fails_its_check_and_no_other(notebook, damage, check, word):
    broken = copy.deepcopy(notebook)
    damage(broken)
    found = complaints(broken)
    assert list(found) == [check], found
    assert word in " ".join(found[check]), found


def test_every_check_is_shown_to_bite():
    assert {check for _, check, _ in BROKEN} == {check.__name__[6:] for check in PAGE_CHECKS + CHAPTER_CHECKS}


def test_a_traceback_shows_no_path_of_a_machine():
    """A stub that fails inside a library names the library's file: where that lies is cut off when it is executed."""
    cell = nbformat.v4.new_code_cell("f()", metadata={"tags": ["raises-exception"]})
    notebook = nbformat.v4.new_notebook(cells=[cell])
    place = "\x1b[36mFile \x1b[39m\x1b[32m{}torch/nn/modules/module.py:1\x1b[39m, in call"
    for before in ("/home/me/.venv/lib/python3.11/site-packages/", "/tmp/x/lib/python3.13/site-packages/"):
        error = nbformat.v4.new_output("error", ename="E", evalue="", traceback=[place.format(before)])
        notebook.cells[0].outputs = [error]
        assert any("path of this machine" in problem for problem in check_stable(notebook))
        shorten(notebook)
        assert notebook.cells[0].outputs[0].traceback == [place.format("")]
        assert check_stable(notebook) == []
