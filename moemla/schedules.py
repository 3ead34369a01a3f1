"""The course of the learning rate over a run. Built in chapter 13."""

from moemla.config import TrainConfig
from moemla.optim import learning_rate


def rate_at(step: int, settings: TrainConfig) -> float:
    """The learning rate of step `step`, counted from 0.

    Linear from 0 to `lr` over `warmup` steps. Then by `schedule`: "cosine", half a cosine to `min_lr` at `steps`
    (section 3.3); "constant", `lr`; "wsd" (warm-up, stable, decay: arXiv 2404.06395), `lr`, and over the last `decay`
    of the steps a line to `min_lr` at `steps`. A constant run can be ended by another that begins from it.
    """
    lr, least, warmup, steps = settings.lr, settings.min_lr, settings.warmup, settings.steps
    if settings.schedule == "cosine" or step < warmup:
        return learning_rate(step, lr=lr, min_lr=least, warmup=warmup, steps=steps)
    begin = max(warmup, steps - round(settings.decay * steps))
    if settings.schedule == "constant" or step <= begin:
        return lr
    return lr + (least - lr) * min(1.0, (step - begin) / max(1, steps - begin))
