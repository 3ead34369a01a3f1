"""Table 2's question on real stories: the arms with rotary positions, at equal total. Built in chapter 15."""

from dataclasses import replace

from moemla.experiments.comparison import Arm, Comparison, synergy, versus
from moemla.experiments.one_run import CPU, Scale, scales
from moemla.experiments.synergy import INTERACTION, ROTARY


def arms(size: Scale) -> list[Arm]:
    """Four kinds of attention, dense and with experts."""
    return [Arm(name, name) for attention in ROTARY for name in (attention, f"moe-{attention}")]


ASKED = (
    INTERACTION,
    synergy("experts x decoupled", "mha-rope", "moe-mha-rope", "mla-decoupled", "moe-mla-decoupled"),
    versus("moe-mla-rope", "mha-rope"),
    versus("moe-mla-rope", "mla-rope"),
    versus("mla-rope", "mha-rope"),
    versus("gqa-rope", "mla-rope"),
)

EXPERIMENT = Comparison("real", scales(replace(CPU, steps=800)), arms, ASKED, FILES=True)
