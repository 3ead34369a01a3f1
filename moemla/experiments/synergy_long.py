"""The square of Table 2 after four times as many steps: does the interaction keep its sign?

Each arm at the rate that the sweep of `synergy` chose. Built in chapter 15.
"""

from dataclasses import replace

from moemla.experiments import synergy
from moemla.experiments.comparison import Arm, Comparison, versus
from moemla.experiments.one_run import CPU, Scale, scales


def arms(size: Scale) -> list[Arm]:
    """The four, four times as long."""
    return [replace(arm, steps=4) for arm in synergy.four(size)]


EXPERIMENT = Comparison(
    "synergy-long",
    scales(replace(CPU, seeds=3)),
    arms,
    (synergy.INTERACTION,),
    beside=(versus("moe-mla-rope", "mha-rope"),),
    sweep_of=synergy.EXPERIMENT,
)
