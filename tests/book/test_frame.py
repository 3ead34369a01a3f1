"""The frame from chapter 6 on: on a sound chapter no check complains, on a broken copy exactly the one that should."""

import copy

import nbformat
import pytest

from tests.book.small_chapters import eleven
from tools.book_checks import CHAPTER_CHECKS, FRAME_CHECKS, PAGE_CHECKS, check_fresh, checks_for
from tools.chapter_code import load_definitions
from tools.execute import execute


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "06-turning.ipynb"
    nbformat.write(eleven(), path)
    execute(path)
    return path


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def complaints(notebook):
    """The problems by check; checks without one are left out. Changed cells would all be stale: that is not asked."""
    checks = [check for check in PAGE_CHECKS + FRAME_CHECKS if check is not check_fresh]
    found = {check.__name__.removeprefix("check_"): check(notebook) for check in checks}
    return {name: problems for name, problems in found.items() if problems}


def find(notebook, text, number=0):
    return [cell for cell in notebook.cells if text in cell.source][number]


def retag(cell, tag, new=None):
    cell.metadata["tags"] = [new if old == tag else old for old in cell.metadata["tags"] if old != tag or new]


def renumber(notebook):
    """Execution counts as if the remaining cells had run."""
    for number, cell in enumerate((cell for cell in notebook.cells if cell.cell_type == "code"), 1):
        cell.execution_count = number


def test_the_frame_begins_with_chapter_6(path):
    assert checks_for(path) == PAGE_CHECKS + FRAME_CHECKS
    assert checks_for(path.with_name("05-turning.ipynb")) == PAGE_CHECKS + CHAPTER_CHECKS
    assert checks_for(path.with_name("turning.ipynb")) == PAGE_CHECKS


def test_a_sound_chapter_has_no_problem(notebook):
    assert complaints(notebook) == {}


def test_what_the_reader_built_belongs_to_the_chapter(path):
    """Solutions of *Your turn* are the chapter's own code; stubs, exercises and their solutions are not."""
    taken = load_definitions(path)
    assert taken.turns(8) == 4 and taken.Rotation(8).angle.shape == (4,)
    assert not hasattr(taken, "pairs")


# ---- broken copies


def break_untagged(notebook):
    retag(find(notebook, "torch.ones(1"), "frame-5")


def break_two_parts(notebook):
    find(notebook, "torch.ones(1").metadata["tags"].append("frame-6")


def break_part_12(notebook):
    retag(notebook.cells[-1], "frame-11", "frame-12")


def break_order(notebook):
    retag(find(notebook, "## Beside the paper"), "frame-10", "frame-8")


def break_missing_part(notebook):
    retag(find(notebook, "## Experiment"), "frame-9", "frame-8")


def break_assert(notebook):
    cell = find(notebook, "assert not torch.equal")
    cell.source = cell.source.replace("assert not ", "")


def break_twin(notebook):
    cell = find(notebook, "theirs = ")
    cell.source = cell.source.replace("Rotation(WIDTH)", "RotaryEmbedding(WIDTH, 16)")


def break_library(notebook):
    cell = find(notebook, "theirs = ")
    cell.source = cell.source.replace("RotaryEmbedding(WIDTH, 16)", "Rotation(WIDTH)")


def break_gradients(notebook):
    find(
        notebook, "theirs = "
    ).source = (
        "x = torch.ones(1, 1, 3, WIDTH)\ntorch.testing.assert_close(Rotation(WIDTH)(x), RotaryEmbedding(WIDTH, 16)(x))"
    )


def break_words(notebook):
    find(notebook, "## By hand").source = "## By hand\n\nShort."


def break_picture(notebook):
    find(notebook, "plt.subplots").outputs = []


def break_two_turns(notebook):
    for cell in [find(notebook, "theta_of", number) for number in range(1, 4)]:
        notebook.cells.remove(cell)
    renumber(notebook)


def break_turn_without_text(notebook):
    cell = find(notebook, "Write turns")
    cell.source = cell.source.replace("**Your turn.** ", "")


def break_turn_passes(notebook):
    find(notebook, "assert turns(WIDTH)").source = "assert WIDTH == 8"


def break_turn_fails(notebook):
    cell = find(notebook, "return 10000.0")
    cell.source = cell.source.replace("10000.0", "0.5")


def break_turn_unfolded(notebook):
    retag(find(notebook, "return 10000.0"), "hide-input")


def break_turn_without_solution(notebook):
    retag(find(notebook, "return 10000.0"), "solution")


def break_turn_quiet(notebook):
    """A stub that is not expected to fail."""
    retag(find(notebook, "def theta_of"), "raises-exception", "hide-output")
    find(notebook, "def theta_of").outputs = []


def break_check_out_of_sight(notebook):
    retag(find(notebook, "assert theta_of"), "check", "hide-input")


def break_five_exercises(notebook):
    label = "ex-plain-0"
    start = notebook.cells.index(find(notebook, label))
    del notebook.cells[start : start + 4]
    renumber(notebook)


def break_solution(notebook):
    cell = find(notebook, "return turns(width)")
    cell.source = cell.source.replace("turns(width)", "3")


def break_answer_in_the_open(notebook):
    cell = find(notebook, "print(2 * WIDTH)")
    place = notebook.cells.index(cell)
    notebook.cells[place], notebook.cells[place + 1] = notebook.cells[place + 1], cell
    retag(cell, "solution", "hide-input")


def break_talking_check(notebook):
    cell = find(notebook, "assert pairs(WIDTH)")
    cell.outputs = [nbformat.v4.new_output("stream", text="4 pairs")]


def break_untagged_in_fold(notebook):
    retag(find(notebook, "print(2 * WIDTH)"), "solution")


def break_solution_without_a_run(notebook):
    notebook.cells.remove(find(notebook, "print(2 * WIDTH)"))
    renumber(notebook)


BROKEN = [
    (break_untagged, "parts", "not one tag"),
    (break_two_parts, "parts", "[5, 6]"),
    (break_part_12, "parts", "[12]"),
    (break_order, "parts", "behind part 9"),
    (break_missing_part, "parts", "part 9"),
    (break_assert, "asserts", "part 8"),
    (break_twin, "twin", "defined before it"),
    (break_library, "twin", "nothing of moemla"),
    (break_gradients, "twin", "gradients"),
    (break_words, "words", "words"),
    (break_picture, "picture", "no picture"),
    (break_two_turns, "turns", "2 cells tagged your-turn"),
    (break_turn_without_text, "turns", "**Your turn.**"),
    (break_turn_passes, "turns", "passes on the stub"),
    (break_turn_fails, "turns", "the solution fails"),
    (break_turn_unfolded, "turns", "not folded"),
    (break_turn_without_solution, "turns", "no cell tagged solution"),
    (break_turn_quiet, "turns", "not raises-exception"),
    (break_check_out_of_sight, "turns", "no check in sight"),
    (break_five_exercises, "exercises", "5 exercises"),
    (break_solution, "solutions", "the solution fails"),
    (break_answer_in_the_open, "answers", "outside of its folded"),
    (break_talking_check, "answers", "shows something"),
    (break_untagged_in_fold, "answers", "has no tag"),
    (break_solution_without_a_run, "answers", "runs no cell"),
]


@pytest.mark.parametrize(("damage", "check", "word"), BROKEN, ids=[damage.__name__[6:] for damage, *_ in BROKEN])
def test_a_broken_copy_fails_its_check_and_no_other(notebook, damage, check, word):
    broken = copy.deepcopy(notebook)
    damage(broken)
    found = complaints(broken)
    assert list(found) == [check], found
    assert word in " ".join(found[check]), found


def test_every_check_of_the_frame_is_shown_to_bite():
    assert {check for _, check, _ in BROKEN} == {check.__name__[6:] for check in FRAME_CHECKS}


def test_a_reason_excuses_gradients(notebook):
    break_gradients(notebook)
    notebook.metadata["moemla"]["without_gradients"] = "counts have none"
    assert complaints(notebook) == {}
