"""`moemla export`: what `transformers` reads, and what only moemla does."""

import sys

import pytest
import torch

from moemla import generation
from moemla.checkpoint import load
from moemla.cli import main
from tests.commands.shell import SMALL, failed


def test_export_of_a_form_that_only_moemla_has(run, tmp_path, capsys):
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "moemla.load" in out and "attention='mla'" in out
    (model, tokenizer), (exported, words) = load(run), load(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), exported.parameters(), strict=True))
    assert words.hash == tokenizer.hash
    line = failed(capsys, "export", "--run", run, "--out", tmp_path / "out")
    assert line.startswith("1") and "not empty" in line
    line = failed(capsys, "export", "--run", tmp_path / "nowhere", "--out", tmp_path / "new")
    assert line.startswith("1") and "holds no model" in line and not (tmp_path / "new").exists()


def test_export_of_a_run_that_transformers_reads(data, tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    how = ["--variant", "moe-mla-decoupled", "--norm", "rmsnorm", "--activation", "swiglu", "--no-bias"]
    how += ["--steps", "2", "--dropout", "0.1", *SMALL]  # dropout is of the training: it stays behind
    assert main(["train", "--data", str(data), "--out", str(tmp_path / "run"), *how]) == 0
    capsys.readouterr()
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "DeepseekV3" in out and "since" not in out
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, tokenizer = load(tmp_path / "run")
    assert model.blocks[0].feedforward.router.bias.any()
    prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode("Tom saw")]])
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("Tom saw").input_ids == prompt[0].tolist()
    expected = generation.generate(model, prompt, 20, temperature=0.0, stop=tokenizer.eot)
    assert torch.equal(theirs.generate(prompt, max_new_tokens=20, do_sample=False), expected)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "transformers", None)
    line = failed(capsys, "export", "--run", tmp_path / "run", "--out", tmp_path / "new")
    assert line.startswith("1") and "moemla[interop]" in line and not (tmp_path / "new").exists()
