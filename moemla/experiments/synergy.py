"""Table 2's question: do experts and latents do more together than apart, at equal totals?

{MHA, MLA} x {dense, experts} x {learned, rotary positions}, grouped queries and decoupled rotation beside them; experts
at equal total parameters and, with rotary positions, at equal active ones too. Built in chapter 15.
"""

from dataclasses import replace

from moemla.config import ATTENTIONS
from moemla.experiments.comparison import Arm, Comparison, synergy, versus
from moemla.experiments.one_run import Scale, scales

ROTARY = tuple(name for name in ATTENTIONS if name.endswith(("rope", "decoupled")))
SEEDS_OF_FOUR = 10  # the interaction has twice a difference's variance
FOUR = ("mha-rope", "mla-rope", "moe-mha-rope", "moe-mla-rope")


def arms(size: Scale) -> list[Arm]:
    """Twelve at equal total, four more at equal active size."""
    names = [name for attention in ATTENTIONS for name in (attention, f"moe-{attention}")]
    total = [Arm(name, name, seeds=SEEDS_OF_FOUR if name in FOUR else None) for name in names]
    active = [Arm(f"moe-{name}-active", f"moe-{name}", dict(matched="active")) for name in ROTARY]
    return total + active


def four(size: Scale) -> list[Arm]:
    """The square of the question, with rotary positions, at equal total."""
    return [Arm(name, name) for name in FOUR]


INTERACTION = synergy("experts x latents, rotary, equal total", "mha-rope", "moe-mha-rope", "mla-rope", "moe-mla-rope")
ASKED = (
    INTERACTION,
    synergy("experts x latents, learned, equal total", "mha", "moe-mha", "mla", "moe-mla"),
    synergy(
        "experts x latents, rotary, equal active", "mha-rope", "moe-mha-rope-active", "mla-rope", "moe-mla-rope-active"
    ),
    synergy("rotary x latents, dense", "mha", "mha-rope", "mla", "mla-rope"),
    versus("moe-mla-rope", "mha-rope"),
    versus("moe-mla-rope", "mla-rope"),
    versus("moe-mla-rope-active", "mla-rope"),
    versus("moe-mha-rope", "mha-rope"),
    versus("mla-rope", "mha-rope"),
    versus("gqa-rope", "mla-rope"),
    versus("mla-decoupled", "mla-rope"),
    versus("mha-rope", "mha"),
)

SQUARE = replace(INTERACTION, margin=0.02)  # by the first amendment of its registration

EXPERIMENT = Comparison("synergy", scales(pilot=("moe-mla-rope",)), arms, (SQUARE, *ASKED[1:]))
