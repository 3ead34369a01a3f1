"""Table 3's question: at equal forward FLOPs, who wins, and by which clock?

The width of each model is such that its forward FLOPs are those of dense attention; its processor seconds stand beside
its loss. Built in chapter 15.
"""

from moemla.experiments.comparison import Arm, Comparison, synergy, versus
from moemla.experiments.one_run import Scale, scales
from moemla.experiments.synergy import FOUR


def arms(size: Scale) -> list[Arm]:
    """The square, matched by FLOPs."""
    return [Arm(name, name, dict(matched="flops")) for name in FOUR]


ASKED = (
    versus("moe-mla-rope", "mha-rope"),
    versus("moe-mha-rope", "mha-rope"),
    versus("mla-rope", "mha-rope"),
    synergy("experts x latents, equal FLOPs", "mha-rope", "moe-mha-rope", "mla-rope", "moe-mla-rope"),
)

EXPERIMENT = Comparison("flops", scales(), arms, ASKED, ("variant", "model.d_model", "model.d_head"))
