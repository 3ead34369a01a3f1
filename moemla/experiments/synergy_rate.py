"""The square of Table 2 with all arms at twice the rate that suits them: how much of an interaction is the rate?

By results/synergy/amendment-2.md. Built in chapter 15.
"""

from dataclasses import replace

from moemla.experiments import synergy
from moemla.experiments.comparison import Comparison, versus
from moemla.experiments.one_run import CPU, scales

SCALES = scales(replace(CPU, rates=(2e-2,)))
SCALES["paper"] = replace(SCALES["paper"], rates=(3e-3,))

EXPERIMENT = Comparison(
    "synergy-rate",
    SCALES,
    synergy.four,
    (synergy.INTERACTION,),
    beside=(versus("moe-mla-rope", "mha-rope"),),
)
