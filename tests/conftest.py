"""Before anything imports moemla: one thread, kernels interpreted without a GPU, signatures checked at run time."""

import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import torch

if not torch.cuda.is_available():  # Triton looks when it is imported: kernels are interpreted, whoever imports it first
    with suppress(PackageNotFoundError):
        # 3.6 stumbles over loops of unknown length
        if tuple(int(n) for n in version("triton").split(".")[:2]) >= (3, 7):
            os.environ.setdefault("TRITON_INTERPRET", "1")

import jaxtyping
import numpy
import pytest

import tools.typecheck  # noqa: F401  (the hook takes it by its name)

assert "moemla" not in sys.modules, "moemla was imported before the hook that checks its signatures"
# Every module and folder but the kernels: Triton compiles their source as it stands, without what the hook would add.
PARTS = [path.stem for path in (Path(__file__).parent.parent / "moemla").glob("[!_]*") if path.stem != "kernels"]
jaxtyping.install_import_hook([f"moemla.{part}" for part in PARTS], "tools.typecheck.check")

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers in every test, whatever ran before it."""
    torch.manual_seed(0)
    numpy.random.seed(0)  # noqa: NPY002  (for code that draws from the global generator)


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Files of the toy text, "train" and "valid"; to be read only, as `data` is."""
    from tests.runs import write_texts

    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def data(texts) -> Path:
    """Prepared data of the toy text, with a vocabulary of 300 tokens."""
    from moemla.data import prepare

    prepare(texts["train"].parent / "data", source="files", vocab_size=300, **texts)
    return texts["train"].parent / "data"


@pytest.fixture(scope="session")
def run(data) -> Path:
    """A run of three steps: it babbles, which is all that the tests of the commands need."""
    from moemla.cli import main
    from tests.commands.shell import SMALL

    out = data.parent / "run"
    assert main(["train", "--data", str(data), "--out", str(out), "--steps", "3", *SMALL]) == 0
    return out
