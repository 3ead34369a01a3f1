"""Table 4's question: does an expert make up for a narrow latent?

r/d of 1, 1/2, 1/4 and 1/8, dense and with experts. A narrow latent also saves parameters: in the arms called `equal`
these are given back, to the dense feed-forward as width and to the experts as more of them, so that compression can be
told from size. Built in chapter 15.
"""

from moemla.config import SIZES, fine_width
from moemla.experiments.comparison import Arm, Comparison, synergy, versus
from moemla.experiments.one_run import Scale, scales

SHARES = {1: "1-2", 2: "1-2", 4: "1-8", 8: "1-8"}  # d over r: whose rate it takes
EXPERTS = 62


def arms(size: Scale) -> list[Arm]:
    """Four widths of the latent, two feed-forwards, as they come and at the parameters of r/d = 1/2."""
    d = SIZES[size.size]["d_model"]
    out = []
    for kind, variant in (("dense", "mla-rope"), ("moe", "moe-mla-rope")):
        for part, tuned in SHARES.items():
            name, latent = f"{kind}-1-{part}", d // part
            rate_of = "" if part in (2, 8) else f"{kind}-{tuned}"
            plain = dict(d_ff=4 * d) if kind == "dense" else {}
            out.append(Arm(name, variant, dict(latent_dim=latent, **plain), rate_of=rate_of))
            if part != 2:
                freed = 4 * d * (d // 2 - latent)  # two projections down and two up
                width = fine_width(d)
                equal = (
                    dict(d_ff=4 * d + freed // (2 * d))
                    if kind == "dense"
                    else dict(n_experts=EXPERTS + freed // (2 * d * width + d))
                )
                out.append(Arm(f"{name}-equal", variant, dict(latent_dim=latent, **equal), rate_of=f"{kind}-{tuned}"))
    return out


ASKED = (
    synergy("experts x narrow latent (1/8 against 1/2)", "dense-1-2", "moe-1-2", "dense-1-8", "moe-1-8"),
    synergy("the same at equal parameters", "dense-1-2", "moe-1-2", "dense-1-8-equal", "moe-1-8-equal"),
    versus("dense-1-8", "dense-1-2"),
    versus("moe-1-8", "moe-1-2"),
    versus("dense-1-1", "dense-1-2"),
    versus("moe-1-1", "moe-1-2"),
    versus("dense-1-8-equal", "dense-1-2"),
    versus("moe-1-8-equal", "moe-1-2"),
)

EXPERIMENT = Comparison("compression", scales(), arms, ASKED)
