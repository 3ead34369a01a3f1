"""Chapter 8's question: what does each way to balance cost in loss, and how even are the loads that it buys?

One model and one learning rate; the rules differ. `algorithm-1` and `equation-4` are as the paper prints them: softmax
scores, the bias inside the gate; `none-softmax` is their baseline. Built in chapter 15.
"""

from dataclasses import replace

from moemla.experiments.comparison import Arm, Comparison, versus
from moemla.experiments.one_run import CPU, Scale, scales

VARIANT = "moe-mla-rope"
PRINTED = dict(scores="softmax", bias_in_gate=True)
SWITCH = 1e-2  # weight of the auxiliary loss, that of arXiv 2101.03961


def arms(size: Scale) -> list[Arm]:
    """Nine ways to balance, at one rate."""

    def arm(name: str, rule: str = "none", rate: float | None = None, model: dict | None = None, **train) -> Arm:
        recipe = dict(balance_rule=rule, balance_rate=rate, **train)
        return Arm(name, VARIANT, model or {}, recipe, rates=(1e-2,))

    return [
        arm("none"),
        arm("switch", switch_loss=SWITCH),
        arm("sign", "sign", 1e-3),
        arm("proportional", "proportional", 1e-3),
        arm("quantile", "quantile", 1.0),
        arm("none-softmax", model=dict(scores="softmax", bias_in_gate=False)),
        arm("algorithm-1", "algorithm-1", 1e-2, PRINTED),
        arm("algorithm-1-fast", "algorithm-1", 1e-1, PRINTED),
        arm("equation-4", "equation-4", 1e-2, PRINTED),
    ]


ASKED = (
    versus("sign", "none"),
    versus("switch", "none"),
    versus("sign", "switch"),
    versus("proportional", "sign"),
    versus("quantile", "sign"),
    versus("algorithm-1", "none-softmax"),
    versus("algorithm-1-fast", "none-softmax"),
    versus("equation-4", "none-softmax"),
)
DIFFER = ("train.balance_rule", "train.balance_rate", "train.switch_loss", "model.scores", "model.bias_in_gate")

EXPERIMENT = Comparison("balancing", scales(replace(CPU, seeds=3)), arms, ASKED, DIFFER)
