"""Table 5's question: 8, 16 or 64 experts, of which every token passes 8?

At a fixed total the experts become narrower as they become more; at a fixed active size they keep their width, and the
total grows. Two of the eight are shared. Built in chapter 15.
"""

from moemla.config import SIZES
from moemla.experiments.comparison import Arm, Comparison, versus
from moemla.experiments.one_run import Scale, scales

SHARED, ACTIVE = 2, 8
COUNTS = (8, 16, 64)


def arms(size: Scale) -> list[Arm]:
    """Three numbers of experts two ways; with 8 of them both ways are one."""
    wide = SIZES[size.size]["d_model"] // 2  # 8 active experts of this width: the dense feed-forward's

    def arm(name: str, count: int, width: int) -> Arm:
        split = dict(n_shared=SHARED, n_experts=count - SHARED, top_k=ACTIVE - SHARED, d_expert=width)
        return Arm(name, "moe-mla-rope", split)

    total = [arm(f"total-{count}", count, wide * COUNTS[0] // count) for count in COUNTS[1:]]
    active = [arm(f"active-{count}", count, wide) for count in COUNTS[1:]]
    return [arm("all-8", COUNTS[0], wide), *total, *active]


ASKED = (
    versus("total-64", "all-8"),
    versus("total-16", "all-8"),
    versus("active-64", "all-8"),
    versus("active-16", "all-8"),
    versus("active-64", "active-16"),
)

EXPERIMENT = Comparison("granularity", scales(), arms, ASKED)
