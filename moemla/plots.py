"""Pictures: one style for the book and for curves of runs. The same colour means the same thing in every chapter.

Built in chapter 1.
"""

from contextlib import contextmanager

from moemla.errors import optional

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
