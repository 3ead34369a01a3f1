"""Pictures: one style for the book and for curves of runs. The same colour means the same thing in every chapter.

Built in chapter 1.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moemla.config import require
from moemla.errors import MoemlaError, optional
from moemla.files import replacing

# Okabe and Ito's palette, which the colour-blind can tell apart.
COLOURS = {
    "dense": "#555555",  # the plain transformer, and whatever is the baseline
    "attention": "#0072B2",
    "latent": "#E69F00",  # the latent, and what a cache holds
    "rope": "#56B4E9",
    "routed": "#009E73",
    "shared": "#CC79A7",
    "bias": "#D55E00",  # balancing, and whatever goes wrong
    "count": "#999999",  # what can be had by counting alone
}


@contextmanager
def style():
    """`with style():` matplotlib figures look like the book's: white ground, thin lines, no box."""
    mpl = optional("matplotlib", "plots")
    from cycler import cycler

    settings = {
        "figure.figsize": (6.4, 3.4),
        "figure.dpi": 100,
        "savefig.dpi": 100,
        "figure.facecolor": "white",
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "svg.hashsalt": "moemla",
        "svg.fonttype": "path",
        "axes.prop_cycle": cycler(color=list(COLOURS.values())),
    }
    with mpl.rc_context(settings):
        yield


# What a curve shows: the field of a row of the log, and the name of its axis with the unit.
CURVES = {
    "loss": ("loss", "loss, nats per token"),
    "lr": ("lr", "learning rate"),
    "load": ("load_cv", "CV of the experts' load"),
    "tokens-per-second": ("tokens_per_second", "tokens per second"),
}
PICTURES = {".png": b"\x89PNG\r\n", ".svg": b"<svg"}  # suffix -> what such a file has near its beginning
DASHES = ("-", "--", ":", "-.")  # one after the other when the colours are used up


def curves(runs: Mapping[str, Sequence[Any]], what: Sequence[str] = ("loss",)) -> Any:
    """A figure with one axis for each of `what` and a line for each run over its steps. Built in chapter 13.

    runs: rows of the log (`runs.read_metrics`) by name. "loss" has the scores on validation text as points; "load" the
    CV that uniform random routing would show, thin and dotted, and the layers, pale, where they are in the log; a run
    without experts has no line there. MoemlaError where no run has anything to show; ValueError for an unknown name.
    """
    for name in what:
        require(name in CURVES, "what", name, f"choose one of {', '.join(CURVES)}")
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 0.6 + 2.6 * len(what)))
        axes = list(figure.subplots(len(what), sharex=True, squeeze=False)[:, 0])
        for axis, name in zip(axes, what, strict=True):
            field, label = CURVES[name]
            for number, (run, rows) in enumerate(runs.items()):
                colours = list(COLOURS.values())
                colour, dash = colours[number % len(colours)], DASHES[number // len(colours) % len(DASHES)]
                line = dict(color=colour, linestyle=dash)
                known = _draw(axis, rows, field, label=run, gid=f"{name} {run}", **line)
                if name == "load" and known:
                    _draw(axis, rows, "load_cv_floor", color=colour, linestyle=":", linewidth=0.9)
                    _layers(axis, rows, color=colour)
                if name == "loss":
                    _draw(axis, rows, "valid_loss", color=colour, linestyle="none", marker="o", markersize=4)
            if not axis.lines:
                raise MoemlaError(f"{name}: nothing of it is in the log of {', '.join(runs)}")
            axis.set_ylabel(label)
        axes[-1].set_xlabel("step")
        lines = {line.get_label(): line for axis in axes for line in axis.lines}
        axes[0].legend(*zip(*[(lines[run], run) for run in runs if run in lines], strict=True))  # once for all axes
    return figure


def _draw(axis: Any, rows: Sequence[Any], field: str, **line: Any) -> bool:
    """Draws the field over the steps where it is known; whether there was any."""
    known = [(row.step, value) for row in rows if (value := getattr(row, field, None)) is not None]
    if known:
        axis.plot(*zip(*known, strict=True), **line)
    return bool(known)


def _layers(axis: Any, rows: Sequence[Any], **line: Any) -> None:
    known = [(row.step, layers) for row in rows if (layers := getattr(row, "load_cv_by_layer", None))]
    steps, by_row = [step for step, _ in known], [layers for _, layers in known]
    for layer in zip(*by_row, strict=True):
        axis.plot(steps, layer, linewidth=0.8, alpha=0.3, **line)


def save(figure: Any, path: Path) -> None:
    """Writes the figure as .png or .svg, whole or not at all, over a picture that is there. Built in chapter 13.

    ValueError for another suffix; MoemlaError where a file stands that is no picture of that kind.
    """
    require(path.suffix in PICTURES, "out", str(path), f"must end in {' or '.join(PICTURES)}")
    if path.exists():
        begin = b"" if path.is_dir() else path.read_bytes()[:2000]
        if PICTURES[path.suffix] not in begin:
            raise MoemlaError(f"{path} is there and no {path.suffix} picture: name another file")
    drawn = io.BytesIO()
    with style():
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(drawn, format=path.suffix.removeprefix("."), metadata=metadata)
    with replacing(path) as file:
        file.write(drawn.getvalue())
