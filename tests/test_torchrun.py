"""`moemla train` under torchrun: the same command, two processes; and what is said when one of them is gone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from moemla.checkpoint import checkpoints
from tests.runs import make_data, wait_for

RUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
TINY = "--set d_model=16 n_layers=2 n_heads=2 n_experts=4 n_shared=1 top_k=2 d_expert=8 --batch-size 4 --seq-len 16"


def start(data, out, *options, where=("--standalone",), steps=8):
    """A training in two processes; they write into pipes."""
    command = [*RUN, *where, "-m", "moemla", "train", "--data", data, "--out", out, "--steps", steps, "--warmup", 2]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return subprocess.Popen([*map(str, command), *TINY.split(), *map(str, options)], **pipes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("torchrun"))


def children(process: int) -> list[int]:
    path = f"/proc/{process}/task/{process}/children"
    return [int(child) for child in open(path).read().split()]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="asks Linux for the children of a process")
def test_a_rank_that_is_killed_ends_all_in_one_line_and_the_run_goes_on(data, tmp_path):
    """Within a minute, with a line of each other rank's, and what was saved is there."""
    run = start(data, tmp_path / "run", "--checkpoint-every", 5, "--expert-parallel", 2, steps=100_000)
    wait_for(lambda: checkpoints(tmp_path / "run"), seconds=120)
    os.kill(children(run.pid)[-1], signal.SIGKILL)
    begin = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert run.returncode != 0 and time.monotonic() - begin < 60
    (line,) = [line for line in said.splitlines() if "moemla:" in line]
    assert re.search(r"rank \d has lost the others: one has ended .* --resume goes on from the last checkpoint$", line)
    assert "Traceback" not in said.partition("ChildFailedError")[0].partition("torch/distributed")[0]
    last = int(checkpoints(tmp_path / "run")[-1].name.removeprefix("step-"))
    again = start(data, tmp_path / "run", "--checkpoint-every", 5, "--expert-parallel", 2, "--resume", steps=100_000)
    wait_for(lambda: int(checkpoints(tmp_path / "run")[-1].name.removeprefix("step-")) > last, seconds=120)
    for child in children(again.pid):
        os.kill(child, signal.SIGINT)
    again.communicate(timeout=60)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


def test_a_rank_that_torchrun_ends_says_first_what_it_has_to_say(data, tmp_path):
    """torchrun looks ten times a second whether one has ended, and then ends the others, whatever they are at."""
    code = """
import os, signal, sys
from types import SimpleNamespace
from moemla.cli import main
from moemla.commands.train import Train
from moemla.distributed import World
from moemla.errors import MoemlaError

def lost(self, world):
    raise MoemlaError("rank 1 has lost the others")

Train._train = lost
leave = lambda: os.kill(os.getpid(), signal.SIGTERM)
World.current = lambda *_: SimpleNamespace(size=2, leave=leave)
sys.exit(main(["train", "--data", sys.argv[1], "--out", sys.argv[2]]))
"""
    command = [sys.executable, "-c", code, str(data), str(tmp_path / "run")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "moemla: rank 1 has lost the others\n")


def test_one_process_prints_and_a_folder_in_use_is_one_line(data, tmp_path):
    run = start(data, tmp_path / "run", "--parallel", "fsdp")
    out, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert out.count("parameters,") == out.count("done in") == 1
    assert out.count("step 8/8") == 1 and "moemla:" not in said
    assert list(checkpoints(tmp_path / "run")[-1].glob("shard-*"))


def test_a_port_in_use_ends_torchrun(data, tmp_path):
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = start(data, tmp_path / "run", where=("--master-addr=localhost", f"--master-port={port}"))
        _, said = run.communicate(timeout=120)
    assert run.returncode != 0 and "EADDRINUSE" in said
    assert not (tmp_path / "run").exists()
