"""Table 7's question: does the gain of MoE-MLA-RoPE over dense attention grow with the model?

Three sizes, depth with width; experts at equal total and at equal active size. Built in chapter 15.
"""

from moemla.experiments.comparison import Arm, Asked, Comparison
from moemla.experiments.one_run import Scale, scales

SIZES = {  # size on two cores, and one for a GPU
    "tiny": {
        "64": dict(size="tiny", n_layers=2, d_model=64, n_heads=2),
        "128": dict(size="tiny"),
        "256": dict(size="XS"),
    },
    "S": {"256": dict(size="XS"), "512": dict(size="S"), "768": dict(size="L")},
    "M": {"256": dict(size="XS"), "512": dict(size="M"), "1024": dict(size="XL")},
}
RATES_OF_WIDE, SEEDS_OF_WIDE = (5e-3, 1e-2, 2e-2), 3  # at the largest width of two cores, where a run takes longest
KINDS = {"dense": ("mha-rope", {}), "total": ("moe-mla-rope", {}), "active": ("moe-mla-rope", dict(matched="active"))}


def arms(size: Scale) -> list[Arm]:
    """Three models at each of three widths."""
    out = []
    for width, settings in SIZES[size.size].items():
        wide = size.size == "tiny" and width == "256"
        limits = dict(rates=RATES_OF_WIDE, seeds=SEEDS_OF_WIDE) if wide else {}
        for kind, (variant, matched) in KINDS.items():
            fine = dict(d_expert=int(width) // 16) if kind == "total" else {}  # 4 at width 64: no row of 16 bytes
            out.append(Arm(f"{kind}-{width}", variant, settings | matched | fine, **limits))
    return out


def gain(kind: str, width: str) -> Asked:
    """Of experts and latents over dense attention at one width."""
    return Asked(f"{kind} - dense at {width}", {f"{kind}-{width}": 1, f"dense-{width}": -1})


def growth(kind: str, small: str, large: str) -> Asked:
    """By how much the gain grows: negative where it does."""
    weights = {f"{kind}-{large}": 1, f"dense-{large}": -1, f"{kind}-{small}": -1, f"dense-{small}": 1}
    return Asked(f"{kind}: gain at {large} over that at {small}", weights)


ASKED = (
    growth("total", "64", "256"),
    growth("active", "64", "256"),
    *(gain(kind, width) for kind in ("total", "active") for width in ("64", "128", "256", "512", "768", "1024")),
)

EXPERIMENT = Comparison(
    "scaling", scales(), arms, ASKED, ("variant", "model.n_layers", "model.d_model", "model.n_heads", "model.d_head")
)
