"""The frame from chapter 6 on: on a sound chapter no check complains, on a broken copy exactly the one that should."""

import copy
import re

import nbformat
import pytest

from tests.book.small_chapters import PROSE, eleven
from tools.book import plan
from tools.book_checks import CHAPTER_CHECKS, FRAME_CHECKS, PAGE_CHECKS, check_fresh, checks_for
from tools.chapter_code import load_definitions
from tools.execute import execute
from tools.measures import main, measures, said_minutes


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
    ).source = "theirs = RotaryEmbedding(WIDTH, 16)\ntorch.testing.assert_close(Rotation(WIDTH)(x), theirs(x))"


def break_short(notebook):
    find(notebook, "## By hand").source = PROSE[: len(PROSE) * 4 // 5]


def break_long(notebook):
    find(notebook, "## By hand").source += PROSE[:4_000]


def break_much_code(notebook):
    """Thirteen more cells of 28 lines: none is too long, all are too much; in a fold they would do no harm."""
    place = notebook.cells.index(find(notebook, "## Beside the paper"))
    for _ in range(13):
        cell = nbformat.v4.new_code_cell("\n".join(["WIDTH"] * 28), metadata={"tags": ["frame-9"]})
        notebook.cells.insert(place, cell)
    find(notebook, "an estimate").source = "# Turning\n\nAn estimate: 85 minutes"
    renumber(notebook)


def break_long_cell(notebook):
    find(notebook, "torch.ones(1").source += "\nWIDTH" * 29


def break_wide_code(notebook):
    find(notebook, "torch.ones(1").source += "\n" + "# " + "x" * 67


def break_wide_output(notebook):
    find(notebook, "torch.ones(1").outputs[0]["text"] = "x" * 69


def break_wide_solution(notebook):
    find(notebook, "return 10000.0").source += "  # " + "x" * 60


def break_needless_reason(notebook):
    notebook.metadata["moemla"]["reasons"] = {"lines": "it has many"}


def break_box(notebook):
    find(notebook, "an estimate").source = "# Turning\n\nAbout 40 minutes (an estimate)."


def break_no_estimate(notebook):
    find(notebook, "an estimate").source = "# Turning\n\nAbout 60 minutes."


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
    (break_short, "measures", "2,500 to 3,500"),
    (break_long, "measures", "2,500 to 3,500"),
    (break_much_code, "measures", "visible lines of code, the guide has at most 350"),
    (break_long_cell, "measures", "31 lines in the longest cell"),
    (break_wide_code, "measures", "1 wide lines"),
    (break_wide_output, "measures", "1 wide lines"),
    (break_wide_solution, "measures", "1 wide lines"),
    (break_needless_reason, "measures", "reasons.lines excuses"),
    (break_box, "minutes", "about 60 minutes"),
    (break_no_estimate, "minutes", "an estimate"),
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


@pytest.mark.parametrize(
    ("damage", "name"), [(break_long, "words"), (break_long_cell, "cell"), (break_wide_output, "width")]
)
def test_a_reason_excuses_a_measure(notebook, damage, name):
    damage(notebook)
    notebook.metadata["moemla"]["reasons"] = {name: "the table of all runs stands here"}
    assert complaints(notebook) == {}


def test_every_chapter_is_measured(capsys):
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    written = [chapter.page for chapter in plan() if chapter.written]
    assert [line.split()[0] for line in lines[1:-1]] == written
    assert re.fullmatch(r"05-small-language-model +[\d,]+\*? +1,\d\d\d\* +\d+\* +\d+\* +\d+ ", lines[5])


def test_text_beside_a_figure_counts_and_a_table_does_not(notebook):
    cell, wide = find(notebook, "plt.subplots"), "x" * 69
    cell.outputs.append(nbformat.v4.new_output("stream", text=wide))
    assert measures(notebook)["width"] == 1
    cell.outputs[-1] = nbformat.v4.new_output("display_data", {"text/markdown": wide, "text/plain": wide})
    assert measures(notebook)["width"] == 0


def test_what_is_folded_is_not_in_sight(notebook):
    before = measures(notebook)
    cell = find(notebook, "torch.ones(1")
    cell.source += "\n" + "x" * 100
    cell.metadata["tags"].append("hide-input")
    assert measures(notebook) == before | {"lines": before["lines"] - 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("An estimate: 17 minutes to read, 40 minutes for your turns.", [17, 40, 57]),
        ("An estimate: 1 hour and 20 minutes.", [80, 80]),
        ("An estimate: 2 hours.", [120, 120]),
        ("An estimate: long.", []),
        ("50 minutes.", []),
    ],
)
def test_minutes_that_a_box_names(notebook, text, said):
    find(notebook, "an estimate").source = text
    assert said_minutes(notebook) == said
