"""The square of Table 2 with the paper's optimizer: does the interaction keep its sign? Built in chapter 15."""

from dataclasses import replace

from moemla.experiments.comparison import Arm, Comparison
from moemla.experiments.one_run import CPU, Scale, scales
from moemla.experiments.synergy import INTERACTION, four

RATES = (1.25e-3, 2.5e-3, 5e-3, 1e-2)


def arms(size: Scale) -> list[Arm]:
    """The four, by AdamW."""
    return [replace(arm, train=dict(optimizer="adamw")) for arm in four(size)]


EXPERIMENT = Comparison("synergy-adamw", scales(replace(CPU, rates=RATES)), arms, (INTERACTION,))
