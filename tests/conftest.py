"""Before anything imports moemla: one thread, and the shapes in its signatures checked at run time."""

import os
import sys

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import jaxtyping
import numpy
import pytest

import tools.typecheck  # noqa: F401  (the hook takes it by its name)

assert "moemla" not in sys.modules, "moemla was imported before the hook that checks its signatures"
jaxtyping.install_import_hook("moemla", "tools.typecheck.check")

import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)
    numpy.random.seed(0)  # noqa: NPY002  (for code that draws from the global generator)
