"""Questions asked of trained models, one module a question; `runner` runs them.

An experiment is a module with NAME, SCALES and these functions:

    cells(scale, text)                    the runs, or those that come before a choice
    choose(results)                       what the first runs say, where there is a choice
    measure(scale, text, chosen, seeds)   then the runs that measure; before the choice, chosen=None: as many
    work(cell, text, scratch, progress)   one run: its measures
    table(results)                        what came out, as text

SCALES maps the name of a scale to how large it is: an object with `stories` to train on (None: all there are), `steps`
of a run and so on. ALONE is True where a run has the machine to itself.
"""

from importlib import import_module
from types import ModuleType

NAMES = ("ten-minutes", "latent-cost")


def find(name: str) -> ModuleType:
    """The experiment of that name; ValueError where there is none. Built in chapter 15."""
    if name not in NAMES:
        raise ValueError(f"name={name!r}: choose one of {', '.join(NAMES)}")
    return import_module(f"moemla.experiments.{name.replace('-', '_')}")
