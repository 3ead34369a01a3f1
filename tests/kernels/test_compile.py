"""Every kernel becomes machine code for an A100 and an H100 on a machine that has neither."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moemla import kernels

ROOT = Path(__file__).parent.parent.parent
# Compute capability, type, bytes of shared memory for a program: 99 KiB on GPUs of 8.6, 8.9 and 12.0, which count as
# 8.0 here; 163 on an A100; 227 on 9.0.
GPUS = [
    (80, "bfloat16", 101_376),
    (80, "float32", 101_376),
    (80, "bfloat16", 166_912),
    (90, "float16", 232_448),
    (90, "bfloat16", 232_448),
]
KERNELS = re.findall(
    r"@triton\.jit.*\ndef (_\w+)\(", "".join(p.read_text() for p in sorted((ROOT / "moemla/kernels").glob("*.py")))
)
CALLED = {"_score", "_silu", "_gelu", "_gelu_slope", "_hidden", "_attend_tile", "_store_piece"}  # parts of others

# A program's gates, or its interleaved pairs; whole tiles one number at a time would be hundreds.
SINGLE = {"_rope": 16, "_latent_decode": 32, "_narrow": 4, "_hidden_backward": 8, "_activate": 8}


def old_triton() -> bool:
    try:
        import triton
    except ImportError:
        return True
    return tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 6)


@pytest.mark.skipif(old_triton(), reason="needs triton 3.6 or later")
@pytest.mark.parametrize("capability, dtype, room", GPUS)
def test_to_machine_code(capability, dtype, room, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= dict(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path))
    command = [sys.executable, "-m", "tests.kernels.compile_only", str(capability), dtype, str(room)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    made, decodes = json.loads(done.stdout)
    assert {name for name, *_ in made} == set(KERNELS) - CALLED
    for name, size, shared, *_ in made:
        assert size > 1000 and shared <= room, (name, size, shared)
    # A new length is no reason to compile again: each kernel as often as it has kinds here, not lengths.
    times = {name: count for name, _, _, count, _ in made}
    assert times["_rope"] == 2 and {name: times[name] for name in decodes} == decodes
    assert all(2 <= count < 4 for count in decodes.values())  # sizes M and XL, and never the widest
    assert times["_route"] == times["_route_backward"] == 2 and times["_narrow"] == 2
    # Rows are loaded 16 bytes at a time: one number at a time come only gates, and pairs and queries that interleave.
    for name, *_, narrow in made:
        assert narrow <= SINGLE.get(name, 0), (name, narrow)


def test_the_list_of_kernels_is_whole():
    assert kernels.INTERPRETED or len(KERNELS) > 10
    assert len(KERNELS) == len(set(KERNELS)) and set(KERNELS) > CALLED
