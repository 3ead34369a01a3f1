"""Draws book/_static/architecture.svg: one block of MoE-MLA-RoPE, widths to scale at size M.

python -m tools.draw_architecture [FILE]
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from moemla.config import ModelConfig
from moemla.plots import COLOURS, style
from tools.book import BOOK

INK, PALE, CACHE_INK = "#333333", "#f6f6f6", "#7a4f00"
UNIT = 3.0 / 512  # drawing units for one number of a token's vector
DEFAULT = BOOK / "_static" / "architecture.svg"
CHOSEN = (4, 13, 22, 37, 45, 58)  # which six experts are lit: any six would do


def bar(ax, x, y, width, colour, label, fill=True, height=0.26):
    ax.add_patch(Rectangle((x, y), width * UNIT, height, fc=colour if fill else "none", ec=colour, lw=1.2))
    ax.text(x + width * UNIT + 0.1, y + height / 2, label, va="center", ha="left", fontsize=10, color=INK)


def arrow(ax, start, end, colour=INK, bend=0.0, lw=1.3):
    style_ = f"arc3,rad={bend}"
    patch = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=10, color=colour, lw=lw, connectionstyle=style_
    )
    ax.add_patch(patch)


def panel(ax, x, y, width, height, colour, title):
    box = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=PALE, ec=colour, lw=1.6)
    ax.add_patch(box)
    ax.text(x + 0.2, y + height - 0.2, title, va="top", ha="left", fontsize=12, weight="bold", color=colour)


def attention(ax, c, x, y):
    panel(ax, x, y, 5.3, 3.2, COLOURS["attention"], "Latent attention")
    left, middle = x + 0.25, x + 1.0
    bar(ax, left, y + 2.3, c.d_model, COLOURS["dense"], f"a token: {c.d_model} numbers")
    bar(ax, left, y + 1.62, c.latent_dim, COLOURS["latent"], "")
    bar(ax, left, y + 1.28, c.latent_dim, COLOURS["latent"], "")
    for number, name in ((1.62, "keys"), (1.28, "values")):
        where = dict(va="center", ha="center", fontsize=9.2, color="black")
        ax.text(left + c.latent_dim * UNIT / 2, y + number + 0.13, f"latent for {name}: {c.latent_dim}", **where)
    right = left + c.latent_dim * UNIT + 0.1
    ax.plot([right, right + 0.1, right + 0.1, right], [y + 1.28, y + 1.28, y + 1.88, y + 1.88], color=CACHE_INK, lw=1.3)
    note = f"all that the cache keeps: {2 * c.latent_dim};\nordinary attention keeps {2 * c.d_model}"
    where = dict(va="center", fontsize=10.5, color=CACHE_INK, linespacing=1.35)
    ax.text(right + 0.22, y + 1.58, note, **where)
    for number, label in ((0.58, "keys: rebuilt, rotated"), (0.24, "values: rebuilt")):
        bar(ax, left, y + number, c.d_model, COLOURS["attention"], label, fill=False)
        for head in range(1, c.n_heads):
            ax.plot(
                [left + head * c.d_head * UNIT] * 2, [y + number, y + number + 0.26], color=COLOURS["attention"], lw=0.8
            )
    arrow(ax, (middle, y + 2.27), (middle, y + 1.91))
    arrow(ax, (middle, y + 1.25), (middle, y + 0.87))


def mixture(ax, c, x, y):
    panel(ax, x, y, 5.3, 2.65, COLOURS["routed"], "Mixture of experts")
    size, gap, columns = 0.2, 0.055, 16
    left, top = x + 0.95, y + 1.72
    for number in range(c.n_experts):
        row, column = divmod(number, columns)
        lit = number in CHOSEN
        place = (left + column * (size + gap), top - row * (size + gap))
        ax.add_patch(Rectangle(place, size, size, fc=COLOURS["routed"] if lit else "white", ec="#9db8ae", lw=0.8))
    for number in range(c.n_shared):
        ax.add_patch(
            Rectangle((x + 0.3, top - number * (size + gap)), size, size, fc=COLOURS["shared"], ec="#a05a82", lw=0.8)
        )
    note = (
        f"the router picks {c.top_k} of {c.n_experts} for each token;\n"
        "a bias, moved after each step, keeps them equally busy"
    )
    ax.text(left, y + 0.68, note, va="top", fontsize=10, color=INK, linespacing=1.3)
    ax.text(x + 0.4, y + 1.36, f"{c.n_shared}\nshared", va="top", ha="center", fontsize=9.5, color="#8c3f6d")


def main(target: Path) -> None:
    config = ModelConfig.preset("M", "moe-mla-rope")
    with style(), plt.rc_context({"figure.constrained_layout.use": False}):
        figure, ax = plt.subplots(figsize=(6.4, 7.0))
        figure.subplots_adjust(0, 0, 1, 1)
        ax.set(xlim=(0, 6.4), ylim=(0, 7.0))
        ax.axis("off")
        stream = 0.42
        arrow(ax, (stream, 0.42), (stream, 6.66), COLOURS["dense"], lw=2.2)
        ax.text(stream, 0.36, "tokens", ha="center", va="top", fontsize=10, color=INK)
        ax.text(stream, 6.72, "next token", ha="left", va="bottom", fontsize=10, color=INK)
        for bottom, height, draw in ((0.5, 3.2, attention), (3.95, 2.65, mixture)):
            draw(ax, config, 0.95, bottom)
            arrow(ax, (stream, bottom + 0.2), (0.93, bottom + 0.45), COLOURS["dense"])
            arrow(ax, (0.93, bottom + height - 0.5), (stream, bottom + height - 0.2), COLOURS["dense"])
            ax.text(stream - 0.02, bottom + height - 0.16, "+", ha="right", va="center", fontsize=13, color=INK)
        ax.text(6.25, 6.72, f"one of {config.n_layers} blocks, size M", ha="right", va="bottom", fontsize=10, color=INK)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT)
