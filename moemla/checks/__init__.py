"""What a chapter's class goes through: the same checks for the library's, the book's and a reader's own.

A check is a function of something to call, sizes and a `seed`. It returns None or a few figures, and raises
`CheckFailed` with one line that names the input, the smallest first. Inputs are float64: give it float64 layers. One
module an idea: `tokens` (chapter 1), `attention` (2 and 3), `rope` (4), `model` and `training` (5), `experts` (6 and
7), `balancing` (8); `compare` holds what all use, the comparison with an oracle among it.

`chapters` is the table: what each chapter builds and the checks that it goes through. `moemla check` runs it on a file
(`child`), in which `finding` looks for what fits, `weights` tells which weight is which of the library's, and
`building` makes the `subjects` that checks are run on.
"""

from moemla.checks.compare import CheckFailed, equals_oracle, time_ratio

__all__ = ["CheckFailed", "equals_oracle", "time_ratio"]
