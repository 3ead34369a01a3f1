"""torch.export with any batch and any length: the program gives the logits of the model at other sizes too."""

import subprocess
import sys

import pytest

from tests.helpers import FORMS

# In a process of its own: the compiler cannot look through the run-time checks of shapes that the tests install.
EXPORTED = """
import io, sys
import torch
from torch.export import Dim, export, load, save
from moemla.model import LanguageModel
from tests.helpers import config_of, shake, tokens_of
torch.set_num_threads(1)
how = dict(backend=sys.argv[1], strict=sys.argv[2] == "strict")
for name in sys.argv[3:]:
    form, ffn = name.split(":")
    model = shake(LanguageModel(config_of(form, ffn=ffn, backend=how["backend"]))).eval()
    sizes = {0: Dim("batch", max=64), 1: Dim("length", max=model.config.max_seq_len)}
    program = export(model, (tokens_of(2, 6),), dynamic_shapes=(sizes,), strict=how["strict"])
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    program = load(file).module()
    for batch, length in ((2, 6), (3, 11), (1, 24), (4, 1), (1, 1)):
        text = tokens_of(batch, length, seed=batch)
        ours, theirs = model(text), program(text)
        assert ours.shape == theirs.shape, (name, ours.shape, theirs.shape)
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max(), (name, batch, length)
    print("done", name)
"""


def run(names, backend="auto", strict="traced"):
    command = [sys.executable, "-c", EXPORTED, backend, strict, *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [word for name in names for word in ("done", name)]


def test_exports_with_any_batch_and_length():
    run(["mla-rope:moe"])


@pytest.mark.slow
@pytest.mark.parametrize("strict", ["traced", "strict"])
@pytest.mark.parametrize("ffn", ["moe", "dense"])
def test_every_form_exports(ffn, strict):
    run([f"{form}:{ffn}" for form in FORMS], strict=strict)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["masked", "loop", "grouped", "gather", "triton"])
def test_every_back_end_exports(backend):
    run(["mla-rope:moe"], backend)
