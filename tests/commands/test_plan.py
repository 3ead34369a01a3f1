"""`moemla plan`: what it prints adds up, and says what is assumed."""

import json
import re
import subprocess
import sys

import pytest

from moemla.cli import main
from moemla.config import ModelConfig
from moemla.planning import Job, plan
from tests.commands.shell import failed

XL = ["plan", "--size", "XL", "--variant", "mha", "--batch-size", "2048", "--price", "2"]


def said(capsys, *arguments) -> str:
    assert main(list(arguments)) == 0
    return capsys.readouterr().out


def test_the_parts_add_up_and_the_change_is_there(capsys):
    out = said(capsys, *XL)
    parts = {name: float(size) for name, size in re.findall(r"^  (\w+) +([\d.]+)(?:$|  of)", out, re.M)}
    assert sum(parts.values()) - parts["sum"] == pytest.approx(parts["sum"], abs=0.05) and parts["sum"] > 36
    assert set(parts) == {"weights", "gradients", "optimizer", "activations", "loss", "working", "sum"}
    config = ModelConfig.preset("XL", "mha", vocab_size=50257, dropout=0.1)
    answer = plan(config, Job(batch_size=2048, price=2.0))
    assert f"{answer.parameters['total']:,} parameters" in out and "does not fit" in out and answer.change in out
    assert f"{answer.tokens_per_second:,.0f} tokens/s" in out and f"cost {answer.cost:,.2f} at 2.00" in out
    assert "assumed, not measured: 30% of 312 TFLOP/s" in out


def test_without_a_price_nothing_is_said_of_money(capsys):
    out = said(capsys, "plan", "--variant", "mha")
    assert "cost" not in out and "fits" in out and "does not fit" not in out and "times these FLOPs" not in out


def test_what_is_run_beyond_the_models_flops_is_said(capsys):
    out = said(capsys, "plan", "--recompute")
    assert "every token passes every expert (back end masked) and blocks run forward twice (--recompute)" in out
    assert "times these FLOPs" not in said(capsys, "plan", "--set", "backend=grouped")


def test_json_is_the_whole_plan(capsys):
    whole = json.loads(said(capsys, *XL, "--json", "--set", "n_layers=3"))
    assert whole["model"]["n_layers"] == 3 and whole["model"]["dropout"] == 0.1 and whole["job"]["gpus"] == 8
    config = ModelConfig.from_dict(whole["model"])
    answer = plan(config, Job(**whole["job"]))
    assert whole["plan"]["peak"] == answer.peak and whole["plan"]["cost"] == answer.cost


def test_longer_sequences_make_a_longer_model(capsys):
    whole = json.loads(said(capsys, "plan", "--seq-len", "1024", "--variant", "mha", "--json"))
    assert whole["model"]["max_seq_len"] == 1024


def test_this_machine_is_measured(capsys):
    out = said(capsys, "plan", "--size", "tiny", "--gpu", "cpu", "--gpus", "1", "--batch-size", "4", "--steps", "10")
    assert "1 x cpu, fp16" in out and "of one" in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpus", "7"], "--batch-size 128: must be a multiple of gpus x micro_batches = 7\n"),
        (["--mfu", "0"], "--mfu 0.0: must be above 0 and at most 1"),
        (["--price", "-1"], "--price -1.0: must be 0 or more"),
        (["--gpu", "cpu"], "--gpus 8: must be 1 for --gpu 'cpu'"),
        (["--expert-parallel", "2", "--variant", "mha"], "--expert-parallel 2: the model has no experts"),
        (["--steps", "many"], "--steps many: must be a whole number\n"),
        (["--dropout", "2"], "--dropout 2.0: must be"),
        (["--set", "backend=loop"], "backend='loop': memory is known for 'masked' and 'grouped'"),
        (["--set", "frob=1"], "--set 'frob=1': FIELD=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_one_line(arguments, named, capsys):
    line = failed(capsys, "plan", *arguments)
    assert line.startswith("2") and named in line and "job" not in line


def test_the_help_comes_without_torch():
    code = "import sys; from moemla.commands import plan; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_vocabulary_can_be_set_as_any_field(capsys):
    by_option = said(capsys, "plan", "--vocab-size", "1000", "--json")
    assert json.loads(said(capsys, "plan", "--set", "vocab_size=1000", "--json")) == json.loads(by_option)
