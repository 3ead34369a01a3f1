"""Two small chapters on which every check of the book is tried: the frame of ten parts, and that of eleven.

Their class is compared with the library's RoPE.
"""

from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PROSE = "Each pair of dimensions turns by an angle that grows with the position of its token. " * 180

ROTATION = """
class Rotation(nn.Module):
    def __init__(self, width, theta=10000.0):
        super().__init__()
        evens = torch.arange(0, width, 2).double()
        self.angle = theta ** (-evens / width)

    def forward(self, x):  # (B, H, T, K)
        places = torch.arange(x.shape[2]).double()
        turn = places[:, None] * self.angle
        cos, sin = turn.cos(), turn.sin()
        a, b = x.double().chunk(2, dim=-1)
        both = (a * cos - b * sin, b * cos + a * sin)
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


TURNS = {  # what the reader writes, and its check
    "def turns(width):\n    return width // 2": "assert turns(WIDTH) == 4",
    "def halves(x):\n    return x.chunk(2, dim=-1)": "assert len(halves(torch.ones(8))) == 2",
    "def theta_of(width):\n    return 10000.0": "assert theta_of(WIDTH) > 1",
}


def eleven():
    """A whole chapter of the new frame: eleven parts, *Your turn* three times, exercises with numbers in the fold."""
    imports = "import torch\nfrom torch import nn\n\nfrom moemla.rope import RotaryEmbedding\n\nWIDTH = 2 * 4"
    cells = [
        markdown("# Turning\n\nYou build a rotation, in about 60 minutes (an estimate).", "frame-1"),
        code(FIGURE, "frame-1", "hide-input", mystnb={"image": {"alt": "A straight line through three points."}}),
        markdown("## By hand\n\n" + PROSE, "frame-2"),
        markdown("## The problem", "frame-3"),
        code(imports, "frame-3"),
        markdown("## Build", "frame-4"),
    ]
    for written, check in TURNS.items():
        signature, name = written.partition("\n")[0], written[4:].partition("(")[0]
        cells += [
            markdown(f"Next.\n\n**Your turn.** Write {name}.", "frame-4"),
            code(
                f"{signature}\n    raise NotImplementedError\n\n\n{name}(WIDTH)",
                "frame-4",
                "your-turn",
                "raises-exception",
            ),
            code(written, "frame-4", "solution", "hide-input"),
            code(check, "frame-4", "check"),
        ]
    cells += [
        code(ROTATION.replace("width, 2)", "2 * turns(width), 2)"), "frame-4"),
        markdown("## Checkpoint", "frame-5"),
        code("x = torch.ones(1, 1, 3, WIDTH)\nprint(Rotation(WIDTH)(x).shape)", "frame-5"),
        markdown("## Properties", "frame-6"),
        code("turned = Rotation(WIDTH)(x)\nassert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))", "frame-6"),
        markdown("## Against the library", "frame-7"),
        code(LIBRARY, "frame-7"),
        markdown("## Break it", "frame-8"),
        code("assert not torch.equal(Rotation(WIDTH, 1.0)(x), turned)", "frame-8"),
        markdown("## Experiment", "frame-9"),
        markdown("## Beside the paper", "frame-10"),
        markdown("## From an empty file", "frame-11"),
        markdown("### Exercises", "frame-11"),
    ]
    for number in range(4):
        cells += [
            exercise(f"ex-plain-{number}"),
            *folded(f"ex-plain-{number}", code("print(2 * WIDTH)", "solution")),
        ]
    for number in range(2):
        stub = "def pairs(width):\n    raise NotImplementedError\n\n\npairs(WIDTH)"
        cells += [
            exercise(f"ex-code-{number}"),
            code(stub, "exercise", "raises-exception"),
            *folded(f"ex-code-{number}", code("def pairs(width):\n    return turns(width)", "solution")),
            code("assert pairs(WIDTH) == 4", "check"),
        ]
    cells += [markdown("## Summary"), code("print(WIDTH)")]
    for cell in cells:
        if not any(tag.startswith("frame-") for tag in cell.metadata["tags"]):
            cell.metadata["tags"].append("frame-11")
    return new_notebook(cells=cells)


def folded(label, cell):
    start = markdown(f"```{{solution-start}} {label}\n:class: dropdown\n```")
    return start, cell, markdown("```{solution-end}\n```")
