"""The sweep of tiles: what it tries is what the kernels take, and nothing of it stays."""

import pytest
import torch

from moemla import kernels
from tools import tune

pytestmark = pytest.mark.skipif(kernels._no_triton() is not None, reason="needs Triton")
X = torch.empty(4, dtype=torch.bfloat16)
SIZES = {  # what tiling's functions are asked
    "route": (),
    "latent_decode": (X, 8, 32, 256),
    "joint_decode": (X, 8, 256, 64),
    "narrow": (X, 64, 32, 512),
    "sum_slots": (X, 512),
    "hidden_backward": (X, 128, 1024, 1024),
    "product": (X, 128, 1024, 1024),
    "weight_gradient": (X, 512, 32),
}


@pytest.mark.parametrize("case", tune.CHOICES)
def test_each_choice_changes_what_the_kernel_takes(case):
    from moemla.kernels import tiling

    name, choices = tune.CHOICES[case]
    plain, rows, programs = getattr(tiling, name)(*SIZES[name]), tiling.rows(10_000, 62, 512), tiling.PROGRAMS
    assert len(choices) == len({tuple(choice.items()) for choice in choices}) > 5
    for choice in choices:
        with tune.changed(name, choice):
            tile = getattr(tiling, name)(*SIZES[name])
            assert tile.keys() <= plain.keys() | {"num_warps", "num_stages"}, choice
            assert all(tile[key] == value for key, value in choice.items() if key in tile)
            assert tiling.rows(10_000, 62, 512) == choice.get("rows", rows)
            assert choice.get("programs", programs) == tiling.PROGRAMS
            if "wider" in choice:
                assert tile["BLOCK_A"] == choice["wider"]  # 512 of (512, 32)
    assert (getattr(tiling, name)(*SIZES[name]), tiling.PROGRAMS) == (plain, programs)


@pytest.mark.skipif(not kernels.INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize("case", dict.fromkeys(case.partition(":")[0] for case in tune.CHOICES))
def test_each_case_calls_its_operator(case, monkeypatch):
    """Small, in the interpreter: backward once lacked an argument that the operator had been given since."""
    monkeypatch.setattr(tune, "FACTORY", dict(device="cpu", dtype=torch.float32))
    monkeypatch.setattr(tune, "WIDTHS", {"narrow": (32, 16), "wide": (32, 32)})
    monkeypatch.setattr(tune, "TOKENS", {"narrow": 5, "wide": 5})
    monkeypatch.setattr(tune, "SLOTS", 3)
    made = tune.program(case)()
    for tensor in (made,) if isinstance(made, torch.Tensor) else made:
        assert not tensor.is_floating_point() or tensor.isfinite().all()


def test_without_a_gpu_one_line_says_so(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main() == 1
    assert capsys.readouterr().err == "there is no GPU here\n"
