"""Questions asked of trained models, one module a question; `runner` runs them, `queue` one after another.

An experiment is a module, or the EXPERIMENT in it (a `comparison.Comparison`), with NAME, SCALES and these functions:

    cells(scale, text)                    the runs, or those that come before a choice
    choose(results)                       what the first runs say, where there is a choice
    measure(scale, text, chosen, seeds)   then the runs that measure; before the choice, chosen=None: as many
    work(cell, text, scratch, progress)   one run: its measures
    table(results)                        what came out, as text

SCALES maps the name of a scale to how large it is: an object with `stories` to train on (None: all there are), `steps`
of a run and so on. ALONE is True where a run has the machine to itself, FILES where the question is about text files.
"""

from importlib import import_module
from typing import Any

UNREGISTERED = ("ten-minutes", "latent-cost")  # were run before registrations began
QUEUE = (  # registered: most valuable first
    "balancing",
    "shared-experts",
    "synergy",
    "synergy-adamw",
    "synergy-long",
    "synergy-rate",
    "granularity",
    "real",
    "compression",
    "scaling",
    "flops",
)
ON_A_GPU = ("synergy-large",)  # registered too, and in no queue of a CPU
REGISTERED = (*QUEUE, *ON_A_GPU)
NAMES = (*UNREGISTERED, *REGISTERED)
SCALES = ("smoke", "pilot", "cpu", "gpu", "paper")


def home(name: str) -> str:
    """The scale at which a registered experiment is answered. Built in chapter 15."""
    return "gpu" if name in ON_A_GPU else "cpu"


def find(name: str) -> Any:
    """The experiment of that name; ValueError where there is none. Built in chapter 15."""
    if name not in NAMES:
        raise ValueError(f"name={name!r}: choose one of {', '.join(NAMES)}")
    module = import_module(f"moemla.experiments.{name.replace('-', '_')}")
    return getattr(module, "EXPERIMENT", module)
