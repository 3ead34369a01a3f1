"""A world of one asks nothing of torch.distributed; what several do together is in test_ranks.py."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moemla.balancing import Balancer
from moemla.distributed import ALONE, World
from moemla.parallel import wrap


def test_alone():
    model, numbers = nn.Linear(2, 2), torch.tensor([3, 4])
    assert World.current() == ALONE == World(0, 1) and ALONE.main
    assert ALONE.mesh is None and wrap(model, ALONE) is model
    assert ALONE.sum(numbers) is numbers and numbers.tolist() == [3, 4]
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.alike(3)
    ALONE.wait()
    assert not dist.is_initialized()


def test_one_of_several_is_a_value():
    assert [World(rank, 3).main for rank in range(3)] == [True, False, False]
    assert World(2, 3) == World(rank=2, size=3) != World(1, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(rank=2, size=2), "rank=2: must be 0 to size - 1 = 1"),
        (dict(rank=-1), "rank=-1: must be 0 to size - 1 = 0"),
        (dict(size=0), "size=0: must be at least 1"),
    ],
)
def test_ranks_that_cannot_be_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        World(**wrong)


def test_a_balancer_has_one_answer_to_who_shares_its_routers():
    with pytest.raises(ValueError, match=r"group=7: world=World.* names the ranks already"):
        Balancer(nn.Linear(2, 2), world=ALONE, group=7)


def test_a_process_of_torchrun_joins_the_others(monkeypatch):
    torchrun = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=0, TORCHELASTIC_RUN_ID="x")
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    try:
        assert World.current() == ALONE and dist.is_initialized()
        assert World.current() == ALONE  # which is there already
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_of_torchrun(tmp_path):
    code = (
        "import torch; from moemla.distributed import World; world = World.current()\n"
        "total = world.sum(torch.tensor([world.rank + 1]))\n"
        "open(f'{world.rank} of {world.size}', 'w').write(str(total.item()))\n"
    )
    (tmp_path / "work.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "work.py"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert {path.name: path.read_text() for path in tmp_path.glob("* of *")} == {"0 of 2": "3", "1 of 2": "3"}
