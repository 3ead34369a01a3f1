"""The number types of a training: autocast to 16 bits, and the loss scale that float16 asks for.

Built in chapter 13.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from moemla.errors import Diverged

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GROW_AFTER = 2000  # steps without an overflow; this and the first scale are torch.amp.GradScaler's


def autocast(device_type: str, precision: str) -> torch.autocast:
    """torch.autocast for a precision of `TrainConfig`, on "cpu" or "cuda"; one that does nothing for float32."""
    narrow = precision != "float32"
    return torch.autocast(device_type, DTYPES[precision] if narrow else torch.bfloat16, enabled=narrow)


@dataclass
class LossScaler:
    """What the loss is multiplied by, and the gradients are divided by, so that small ones do not vanish in float16.

    Doubled after 2,000 steps without an overflow, halved at each: the rule of torch.amp.GradScaler, which looks at the
    gradients that one process holds. Here the norm of all gradients decides, which clipping computes anyway and which
    is one number over all ranks, whether gradients are sharded or not: either every rank makes the step or none does.
    """

    scale: float = 2.0**16
    good: int = 0  # steps since the scale was changed
    skipped: int = 0  # steps of the whole run

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divides the gradients of the scaled loss by the scale, in place."""
        gradients = list(gradients)
        if gradients:
            torch._foreach_mul_(gradients, 1 / self.scale)  # a power of two: nothing is rounded

    def update(self, finite: bool) -> bool:
        """Takes in whether the norm of a step's gradients is finite; returns it, as whether the step may be made.

        Diverged where a scale of 1 overflows too.
        """
        if finite:
            self.good += 1
            if self.good == GROW_AFTER:
                self.scale, self.good = 2 * self.scale, 0
            return True
        if self.scale < 2:
            raise Diverged("the gradients overflow float16 without any loss scale")
        self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        return False
