"""Chapter 7's question: of eight active experts, how many should every token pass?

0, 1, 2 or 4 shared experts among 64, the active size the same: that of the dense feed-forward beside them.
Built in chapter 15.
"""

from moemla.experiments.comparison import Arm, Comparison, versus
from moemla.experiments.one_run import Scale, scales

EXPERTS, ACTIVE = 64, 8


def arms(size: Scale) -> list[Arm]:
    """Four splits of 64 experts, and the dense model of as many active parameters."""
    splits = [
        Arm(
            f"shared-{shared}",
            "moe-mla-rope",
            dict(matched="active", n_shared=shared, n_experts=EXPERTS - shared, top_k=ACTIVE - shared),
        )
        for shared in (0, 1, 2, 4)
    ]
    return [*splits, Arm("dense", "mla-rope")]


ASKED = (
    versus("shared-2", "shared-0", margin=0.01),
    versus("shared-1", "shared-0", margin=0.01),
    versus("shared-4", "shared-0", margin=0.01),
    versus("shared-2", "dense"),
)

EXPERIMENT = Comparison("shared-experts", scales(), arms, ASKED)
