"""Each check of the book bites: on a sound chapter none complains, on a broken copy exactly the one that should.

The chapter is a small one made here and really executed; its class is compared with the library's RoPE.
"""

import copy

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tools.book_checks import CHAPTER_CHECKS, PAGE_CHECKS
from tools.chapter_code import load_definitions
from tools.execute import execute
from tools.freshness import fingerprint

PROSE = "Each pair of dimensions turns by an angle that grows with the position of its token. " * 180

ROTATION = """
class Rotation(nn.Module):
    def __init__(self, width, theta=10000.0):
        super().__init__()
        self.angle = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, x):  # (B, H, T, K)
        turn = torch.arange(x.shape[2]).double()[:, None] * self.angle
        first, second = x.double().chunk(2, dim=-1)
        both = (first * turn.cos() - second * turn.sin(), second * turn.cos() + first * turn.sin())
        return torch.cat(both, dim=-1).float()
"""

LIBRARY = """
theirs = RotaryEmbedding(WIDTH, 16)
a = torch.randn(2, 3, 5, WIDTH, requires_grad=True)
b = a.detach().clone().requires_grad_()
ours = Rotation(WIDTH)
torch.testing.assert_close(ours(a), theirs(b))
ours(a).square().sum().backward()
theirs(b).square().sum().backward()
torch.testing.assert_close(a.grad, b.grad)
"""

FIGURE = """
import matplotlib.pyplot as plt
figure, axes = plt.subplots(figsize=(2, 1))
axes.plot(range(3));
"""


def markdown(source, *tags):
    return new_markdown_cell(source, metadata={"tags": list(tags)})


def code(source, *tags, **metadata):
    return new_code_cell(source.strip(), metadata={"tags": list(tags), **metadata})


def exercise(label):
    return markdown(f"```{{exercise-start}}\n:label: {label}\n```\nHow much?\n```{{exercise-end}}\n```")


def solution(label, text="As much as before."):
    return markdown(f"````{{solution}} {label}\n:class: dropdown\n{text}\n````")


def chapter():
    """A whole chapter: ten parts, a class, its comparison with the library, exercises."""
    cells = [
        markdown("# Turning\n\nYou build a rotation.", "frame-1"),
        code(FIGURE, "hide-input", mystnb={"image": {"alt": "A straight line through three points."}}),
        markdown("## What the paper says", "frame-2"),
        markdown("## The problem", "frame-3"),
        code("import torch\nfrom torch import nn\n\nfrom moemla.rope import RotaryEmbedding\n\nWIDTH = 2 * 4"),
        markdown("## Naive\n\n" + PROSE, "frame-4"),
        code(ROTATION),
        markdown("## Checkpoint", "frame-5"),
        code("x = torch.ones(1, 1, 3, WIDTH)\nprint(Rotation(WIDTH)(x).shape)"),
        markdown("## Properties", "frame-6"),
        code("assert torch.allclose(Rotation(WIDTH)(x).norm(dim=-1), x.norm(dim=-1))"),
        markdown("## Against the library", "frame-7"),
        code(LIBRARY),
        markdown("## Break it", "frame-8"),
        code("for theta in (1.0, 10.0):\n    assert not torch.equal(Rotation(WIDTH, theta)(x), Rotation(WIDTH)(x))"),
        markdown("## Experiment", "frame-9"),
        code("import time\n\nstart = time.perf_counter()\nprint(time.perf_counter() - start)", "timing"),
        markdown("## Exercises", "frame-10"),
    ]
    for number in range(4):
        cells += [exercise(f"ex-plain-{number}"), solution(f"ex-plain-{number}")]
    for number in range(2):
        cells += [
            exercise(f"ex-code-{number}"),
            code(
                "def pairs(width):\n    raise NotImplementedError('yours')\n\n\npairs(WIDTH)",
                "exercise",
                "raises-exception",
            ),
            markdown(f"```{{solution-start}} ex-code-{number}\n:class: dropdown\n```"),
            code("def pairs(width):\n    return width // 2", "solution"),
            markdown("```{solution-end}\n```"),
            code("assert pairs(WIDTH) == 4", "check"),
        ]
    return new_notebook(cells=cells)


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
    find(notebook, "## Naive").source += "\n\n" + PROSE


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
