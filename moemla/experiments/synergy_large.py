"""The square of Table 2 in models of sixteen times the parameters, on eight times the text: does the answer hold there?

For a GPU. Built in chapter 15.
"""

from dataclasses import replace

from moemla.experiments import synergy
from moemla.experiments.comparison import Comparison, versus
from moemla.experiments.one_run import CPU, scales

_LARGE = dict(size="S", batch_size=32, seq_len=512, stories=50_000, precision="bf16")
_CPU = replace(CPU, rates=(2.5e-3, 5e-3, 1e-2))
SCALES = dict(smoke=scales(_CPU)["smoke"], gpu=replace(_CPU, **_LARGE))

EXPERIMENT = Comparison(
    "synergy-large",
    SCALES,
    synergy.four,
    (replace(synergy.INTERACTION, margin=0.03),),
    beside=(
        versus("moe-mla-rope", "mha-rope"),
        versus("moe-mla-rope", "mla-rope"),
        versus("mla-rope", "mha-rope"),
    ),
)
