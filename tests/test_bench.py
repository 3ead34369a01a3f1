"""The bench measures what it says: every program computes the same, and results can be kept."""

import json

import pytest
import torch

from moemla import bench, experts, kernels, results
from moemla.cli import _parsed, main
from moemla.config import ModelConfig
from moemla.measuring import Limits
from moemla.model import LanguageModel
from tools import on_gpu
from tools.book import ROOT


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    monkeypatch.setattr(bench, "limits", lambda device, dtype: Limits(str(device), str(dtype), 1e11, 1e-6))


def small(**changes) -> ModelConfig:
    given = dict(vocab_size=64, max_seq_len=96, n_layers=1, d_model=16, n_heads=4, n_experts=8, top_k=2, d_expert=8)
    return ModelConfig(**given | changes)


def by_case(rows):
    found = {}
    for row in rows:
        found.setdefault(row.case, {})[row.program] = row
    return found


def test_moe_measures_every_back_end_the_layer_and_the_dense_one():
    found = by_case(bench.bench_moe(small(), tokens=(1, 20), seconds=0.0))
    assert set(found["routed forward n=1"]) == set(experts.BACKENDS) - {"triton"}  # interpreted it would say nothing
    assert set(found["layer forward+backward n=20"]) == set(found["dense forward n=20"]) == {"ours"}
    assert "routed forward+backward n=1" not in found  # nobody trains on one token
    assert "routed forward+backward n=20" in found
    for case, programs in found.items():
        for row in programs.values():
            assert row.seconds > 0 and row.limit > 0, case
            assert row.binds in ("products", "bytes", "operations")


def test_attention_measures_every_form_at_every_length():
    found = by_case(bench.bench_attention(small(), lengths=(3, 9), batch_size=2, seconds=0.0))
    assert list(found) == ["decode length=3 batch=2", "decode length=9 batch=2"]
    for programs in found.values():
        assert set(programs) == {"mha", "gqa-1", "mla latent", "mla hybrid", "decoupled"}


def test_train_takes_real_steps_and_restores_nothing(monkeypatch):
    seen = []
    original = bench._step

    def spy(loss, *rest):
        run = original(loss, *rest)

        def noted():
            seen.append(loss().item())
            run()

        return noted

    monkeypatch.setattr(bench, "_step", spy)
    rows = bench.bench_train(small(), batch_size=2, seq_len=8, seconds=0.0, backends=("masked", "loop"))
    assert [row.program for row in rows] == ["ours masked", "ours loop"]
    assert rows[0].tokens == 16
    assert len(set(seen)) > 3  # the weights move


def test_a_compiled_model_is_what_is_measured():
    """It has no length, and what torch.compile makes of it says that it has one."""
    model = LanguageModel(small())
    graph = torch.compile(model)
    assert bench._use(model, "loop", graph) is graph and bench._use(model, "masked") is model
    assert model.blocks[0].feedforward.experts.backend == "masked"


def test_a_training_step_on_a_gpu_says_what_it_allocates():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    (row,) = bench.bench_train(small(), batch_size=2, seq_len=8, device="cuda", seconds=0.0)
    assert row.peak_bytes > 1000


def test_what_waits_for_a_gpu_are_commands_with_results_of_their_own():
    """Each bench parses, and no two would be one file."""
    names = set()
    for command in on_gpu.commands():
        if "bench" not in command:
            continue
        chosen = dict(vars(_parsed(command[command.index("bench") :])))
        dropped = {name: chosen.pop(name) for name in ("what", "json", "folder", "device", "seconds")}
        names.add(bench.cell_of(dropped["what"], "cuda", bench._config(chosen), chosen).name)
    assert len(names) == sum("bench" in command for command in on_gpu.commands()) >= 28


def test_decode_writes_the_greedy_tokens_each_time():
    (row,) = bench.bench_decode(small(), held=5, new=4, seconds=0.0)
    assert (row.program, row.tokens) == ("ours", 4)


def test_without_a_compiler_the_compiled_row_is_left_out(monkeypatch, capsys):
    def failing(*a, **k):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", lambda function: failing)
    rows = bench.bench_decode(small(), held=5, new=4, seconds=0.0, compiled=True)
    assert [row.program for row in rows] == ["ours"]
    assert capsys.readouterr().err == "no compiled row: No working C++ compiler found\n"


@pytest.mark.parametrize("what", ["train", "decode"])
def test_a_peer_that_computes_something_else_is_noticed(what, monkeypatch):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, **how):
        return type("Out", (), {"loss": self.weight.sum() + 5.0})

    Other.forward = forward
    monkeypatch.setattr(bench, "_peer", lambda model: Other())
    monkeypatch.setattr(bench, "_peer_decode", lambda *a: lambda: torch.full((1, 4), -1))
    measure = dict(train=bench.bench_train, decode=bench.bench_decode)[what]
    sizes = dict(batch_size=2, seq_len=8) if what == "train" else dict(held=5, new=4)
    with pytest.raises(ArithmeticError, match="the peer"):
        measure(small(), against="transformers", seconds=0.0, **sizes)


def test_the_command_prints_and_keeps(tmp_path, capsys):
    call = ["bench", "attention", "--tokens", "8", "--seconds", "0", "--device", "cpu", "--folder", str(tmp_path)]
    assert main(call) == 0
    out = capsys.readouterr().out
    assert out.startswith("decode length=8 batch=1") and out.count("*") == 1
    (result,) = results.load(tmp_path, "bench")
    assert (tmp_path / "bench" / "cpu" / "table.csv").read_text() == results.table([result])
    assert "lengths" not in result.settings["tags"]  # those of kernels alone
    assert result.settings["model"]["d_model"] == 128 and result.name == "attention-tiny-8-float32"
    assert {row["program"] for row in result.measures["rows"]} >= {"mha", "decoupled"}
    assert main([*call, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["measures"]["rows"]


def test_kernels_have_lengths_and_a_result_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    call = [
        "bench",
        "kernels",
        "--variant",
        "moe-mla-rope",
        "--tokens",
        "4",
        "--lengths",
        "8",
        "16",
        "--batch-size",
        "3",
    ]
    assert main([*call, "--seconds", "0", "--device", "cpu", "--folder", str(tmp_path)]) == 0
    (result,) = results.load(tmp_path, "bench")
    assert result.name == "kernels-tiny-8-float32" and list(result.settings["tags"]["lengths"]) == [8, 16]
    tokens = {row["case"]: row["tokens"] for row in result.measures["rows"]}
    assert tokens["rope forward n=4"] == 4 and tokens["joint decode length=16"] == 3


def test_a_bench_of_other_settings_does_not_replace_the_one_that_is_there(tmp_path, capsys):
    call = ["bench", "attention", "--tokens", "8", "--seconds", "0", "--device", "cpu", "--folder", str(tmp_path)]
    assert main(call) == main(call) == 0
    (before,) = results.load(tmp_path, "bench")
    assert main([*call, "--batch-size", "2"]) == 1
    assert "tags.batch_size=None, this one with tags.batch_size=2" in capsys.readouterr().err
    assert results.load(tmp_path, "bench") == [before]


MEASURED = [pytest.param(result, id=result.name) for result in results.load(ROOT / "results", "bench", missing_ok=True)]


@pytest.mark.parametrize("result", [p for p in MEASURED if p.values[0].settings["tags"]["what"] == "moe"])
def test_auto_takes_what_was_measured_to_be_fast(result):
    """On the machine of results/bench.moe-*: never half as slow again as the best, near it on the whole."""
    config, lost = ModelConfig.from_dict(result.settings["model"]), []
    cases = {}
    for row in result.measures["rows"]:
        if row["case"].startswith("routed"):
            cases.setdefault(row["case"], {})[row["program"]] = row
    for case, programs in cases.items():
        n = next(iter(programs.values()))["tokens"]
        one = torch.zeros(1, device="cpu" if result.settings["scale"] == "cpu" else "meta")  # any device but a CPU
        x, w_out = one.expand(n, config.d_model), one
        w_out = w_out.expand(config.n_experts, config.d_expert, config.d_model)
        with torch.set_grad_enabled("backward" in case):
            chosen = programs[experts.choose(x, w_out, config.top_k)]
        best = min(row["seconds"] for name, row in programs.items() if name != "triton")  # taken when asked for
        lost.append(chosen["seconds"] / best)
        assert lost[-1] < 1.5, (case, chosen["program"], programs.keys())
    assert len(lost) >= (10 if result.settings["scale"] == "cpu" else 9)
    assert sum(lost) / len(lost) < 1.15


def test_the_readme_tells_what_was_measured():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = 0
    for param in MEASURED:
        result = param.values[0]
        tags = result.settings["tags"]
        if tags["what"] in ("train", "decode") and tags["against"]:
            rate = {row["program"]: f"{row['tokens'] / row['seconds']:,.0f}" for row in result.measures["rows"]}
            size, ours = tags["size"], rate.get("ours auto", rate.get("ours"))
            verb = "training" if tags["what"] == "train" else "decoding"
            line = next(line for line in text.splitlines() if line.startswith("|") and verb in line and size in line)
            cells = [cell.strip() for cell in line.split("|")[2:5]]
            assert cells == [ours, rate.get("ours compiled", ""), rate["transformers"]]
            told += 1
    assert told == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "moe", "--variant", "mha"], "--variant 'mha': has no experts"),
        (["bench", "kernels", "--variant", "mla"], "--variant 'mla': has no experts"),
        (["bench", "kernels", "--lengths", "0"], "--lengths 0"),
        (["bench", "kernels", "--against", "transformers"], "--against 'transformers'"),
        (["bench", "moe", "--device", "mps"], "--device 'mps'"),
        (["bench", "train", "--d-expert", "0"], "--d-expert 0"),
        (["bench", "train", "--batch-size", "0"], "--batch-size 0"),
        (["bench", "decode", "--seq-len", "0"], "--seq-len 0"),
        (["bench", "moe", "--tokens", "4", "-5"], "--tokens -5"),
        (["bench", "attention", "--against", "transformers"], "--against 'transformers'"),
        (["bench", "moe", "--device", "frob"], "--device 'frob'"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["decode", "--lengths", "8192"], "lengths"),
        (["moe", "--backends", "grouped"], "backends"),
        (["moe", "--batch-size", "8"], "batch_size"),
        (["kernels", "--variant", "moe-mla-rope", "--seq-len", "4096"], "seq_len"),
        (["attention", "--compiled", "True"], "compiled"),
    ],
)
def test_an_option_of_another_bench_is_refused(arguments, named):
    chosen = dict(vars(_parsed(["bench", *arguments, "--device", "cpu"])))
    for name in ("json", "folder"):
        del chosen[name]
    with pytest.raises(ValueError, match=rf"^{named}=.*: bench {arguments[0]} takes none"):
        bench.run(**chosen)
