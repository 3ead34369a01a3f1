"""tools/train.slurm with a SLURM of three scripts: what it starts, and when it asks for another turn."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from moemla.cli import _parsed
from tests.runs import wait_for

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="a bash script")


@pytest.fixture
def job(tmp_path):
    """(start, log): starts the script, whose `srun` is what `work` says; `log` holds what was called."""
    log = tmp_path / "log"
    programs = tmp_path / "bin"
    programs.mkdir()

    def program(name, text):
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)

    program("scontrol", f'echo scontrol "$@" >> {log}; [ "$1" = show ] && echo node7; true')

    def start(work: str) -> subprocess.Popen:
        program("srun", f'echo srun "$@" >> {log}\n{work}')
        names = dict(SLURM_JOB_NODELIST="node[7-8]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8", SLURM_JOB_ID="31")
        path = dict(PATH=f"{programs}:{os.environ['PATH']}")
        command = ["bash", str(ROOT / "tools/train.slurm"), "DATA", "RUN", "--lr", "1e-3"]
        return subprocess.Popen(command, env=os.environ | names | path)

    return start, log


def test_the_command_is_one_that_moemla_takes(job):
    start, log = job
    assert start("true").wait(30) == 0
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("srun")]
    launcher, _, arguments = line.partition(" -m moemla ")
    assert "--nnodes=2 --nproc-per-node=8 --rdzv-id=31 --rdzv-backend=c10d --rdzv-endpoint=node7:29500" in launcher
    command = _parsed(arguments.split())
    assert command.resume and command.size == "M" and command.train_config.lr == 1e-3
    assert command.train_config.steps == 50_000 and command.dropout == 0.1


def test_a_job_that_fails_is_not_started_again(job):
    start, log = job
    assert start("exit 3").wait(30) == 3
    assert "requeue" not in log.read_text()


def test_a_job_whose_time_is_over_saves_and_is_started_again(job):
    start, log = job
    script = start(f"trap 'echo saved >> {log}; exit 130' TERM; sleep 60 & wait")
    wait_for(lambda: log.exists() and "srun" in log.read_text(), seconds=30)
    script.send_signal(signal.SIGTERM)
    script.wait(30)
    assert log.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 31"]
