"""Each kernel is measured beside the plain function, and only where the two are equal."""

import pytest
import torch

from moemla import kernel_bench, kernels
from moemla.config import ModelConfig
from moemla.experts import BACKENDS
from moemla.kernel_bench import affordable, bench_kernels, captured
from moemla.measuring import Limits, Row, Work, operations

GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="needs Triton's interpreter")
CASES = [
    "rope forward n=1",
    "router forward n=1",
    "experts forward n=1",
    "layer forward n=1",
    "dense forward n=1",
    "rope forward n=16",
    "rope forward+backward n=16",
    "router forward n=16",
    "router forward+backward n=16",
    "experts forward n=16",
    "experts forward+backward n=16",
    "layer forward n=16",
    "layer forward+backward n=16",
    "dense forward n=16",
    "dense forward+backward n=16",
    "latent decode length=5",
    "joint decode length=5",
]


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    monkeypatch.setattr(kernel_bench, "limits", lambda device, dtype: Limits(str(device), str(dtype), 1e11, 1e-6))


@pytest.fixture
def untimed(monkeypatch):
    """Cases and programs as they come to be measured: the interpreter's time says nothing."""
    seen = {}

    def note(case, programs, work, tokens, machine, seconds, replayed):
        seen[case] = programs, work
        return [Row(case, name, tokens, 1.0, 0.0, 1) for name in programs]

    monkeypatch.setattr(kernel_bench, "measure", note)
    return seen


def small(**changes) -> ModelConfig:
    sizes = dict(vocab_size=64, max_seq_len=96, n_layers=1, d_model=16, n_heads=2, latent_dim=4, attention="mla")
    return ModelConfig(**sizes | dict(ffn="moe", n_experts=7, top_k=2, d_expert=8) | changes)


def measured(config=None, **changes) -> list[Row]:
    sizes = dict(tokens=(1, 16), lengths=(5,), batch_size=2, seconds=0.0)
    return bench_kernels(small() if config is None else config, **sizes | changes)


def test_without_kernels_plain_rows_remain(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    rows = measured(device="cpu")
    assert list(dict.fromkeys(row.case for row in rows)) == CASES
    assert {row.program for row in rows} == {"plain", "grouped", "masked"}
    for row in rows:
        assert row.seconds > 0 and row.limit > 0, row.case
        assert row.tokens == (2 if "decode" in row.case else int(row.case.rpartition("=")[2]))
    assert capsys.readouterr().err.startswith("no kernel rows: ")


@interpreted
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(bias=False, rope_layout="interleaved", activation="swiglu"),
        dict(scores="softmax", bias_in_gate=True, routed_scale=2.5),
    ],
    ids=["default", "interleaved, swiglu", "softmax"],
)
def test_every_kernel_stands_beside_its_plain_function(changes, untimed):
    rows = measured(small(**changes), tokens=(1, 16))
    assert list(untimed) == CASES
    for case, (programs, work) in untimed.items():
        plain = ["grouped", "masked"] if case.startswith(("experts", "layer")) else ["plain"]
        assert list(programs) == plain + ["kernel"] * (not case.startswith("dense")), case
        assert work.moved > 0 and (work.flops == 0) == case.startswith(("rope", "router"))
    assert len(rows) == sum(len(programs) for programs, _ in untimed.values())


WRONG = {
    "rope": "moemla.kernels.rope.rope",
    "router": "moemla.kernels.routing.route",
    "experts": "moemla.kernels.experts.routed_experts",
    "latent decode": "moemla.kernels.decode.latent_decode",
    "joint decode": "moemla.kernels.decode.joint_decode",
}


@interpreted
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("off", [1.25, float("nan")])
def test_a_kernel_that_gives_something_else_is_not_timed(name, off, untimed, monkeypatch):
    right = pytest.importorskip(WRONG[name].rpartition(".")[0]).__dict__[WRONG[name].rpartition(".")[2]]

    def wrong(*arguments):
        out = right(*arguments)
        return out * off if isinstance(out, torch.Tensor) else (out[0] * off, *out[1:])

    monkeypatch.setattr(WRONG[name], wrong)
    with pytest.raises(ArithmeticError, match=f"^{name}.*kernel computes something else"):
        measured(tokens=(16,))


@interpreted
def test_a_layer_is_asked_too(untimed, monkeypatch):
    right = BACKENDS["triton"]
    monkeypatch.setitem(BACKENDS, "triton", lambda *arguments: 1.25 * right(*arguments))
    with pytest.raises(ArithmeticError, match=r"^layer forward n=16: kernel"):
        measured(tokens=(16,))


@interpreted
def test_a_wrong_gradient_is_noticed(untimed, monkeypatch):
    from moemla.kernels import rope

    right = rope.rope
    monkeypatch.setattr(rope, "rope", lambda x, *rest: right(1.5 * x - 0.5 * x.detach(), *rest))
    with pytest.raises(ArithmeticError, match=r"^rope forward\+backward n=16: kernel"):
        measured(tokens=(16,))


@interpreted
def test_a_plain_decode_that_takes_too_much_is_left_out_and_still_asked(untimed, monkeypatch):
    monkeypatch.setattr(kernel_bench, "MOST_BYTES", 10)
    measured(tokens=())
    assert [list(programs) for programs, _ in untimed.values()] == [["kernel"], ["kernel"]]
    from moemla.kernels import decode

    right = decode.joint_decode
    monkeypatch.setattr(decode, "joint_decode", lambda *arguments: right(*arguments) + 1)
    with pytest.raises(ArithmeticError, match="joint decode: kernel"):
        measured(tokens=())


@interpreted
def test_plain_is_plain_where_kernels_are_on(untimed, monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", True)
    measured(tokens=(16,), lengths=())
    plain, kernel = (untimed["router forward n=16"][0][name] for name in ("plain", "kernel"))
    assert operations(plain) > operations(kernel) > 0
    assert kernels.enabled(torch.zeros(1))


def test_the_limit_reads_once_and_writes_once(untimed, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    measured(small(d_head=8, bias=False), tokens=(1024,), lengths=(100,))
    rope = 4 * (2 * 1024 * 2 * 8 + 512 * 8)  # x, out; two tables of 512 positions by 4 pairs
    assert untimed["rope forward n=1024"][1] == Work(0, rope)
    assert untimed["rope forward+backward n=1024"][1] == Work(0, 2 * rope)
    assert untimed["router forward n=1024"][1] == Work(0, 1024 * (2 * 7 * 4 + 2 * (4 + 8)) + 7 * (4 + 8))
    routed = 2 * 1024 * 2 * (2 * 16 * 8)
    assert untimed["experts forward n=1024"][1].flops == routed
    assert untimed["layer forward n=1024"][1].flops == routed + 2 * 1024 * (7 * 16 + 2 * 2 * 16 * 8)  # router, shared
    assert untimed["dense forward n=1024"][1].flops == 2 * 1024 * (2 * 16 * 64)
    latent = untimed["latent decode length=100"][1]
    assert latent.moved == 4 * (2 * 2 * 100 * 4 + 100 * 8 + 2 * 8 * 4 + 2 * 2 * (8 + 4))


def test_an_expert_back_end_that_takes_too_long_is_left_out():
    slow = Limits("cpu", "float32", products=1e6, operation=1e-6)
    w_in = torch.empty(8, 16, 8)
    assert not affordable("masked", 10_000, w_in, 2, slow)
    assert affordable("masked", 10, w_in, 2, slow)
    assert not affordable("gather", 10**6, w_in, 2, slow)
    assert affordable("grouped", 10**6, w_in, 2, slow)


def test_on_a_cpu_nothing_is_captured():
    program = lambda: None  # noqa: E731
    assert captured(program, "cpu") is program


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_gpu_replays_what_does_not_wait():
    x, out = torch.ones(4, device="cuda"), torch.zeros(4, device="cuda")
    replay = captured(lambda: out.copy_(2 * x), "cuda")
    x.fill_(3)
    replay()
    assert out.tolist() == [6.0] * 4
    waiting = lambda: (x > 0).nonzero()  # noqa: E731
    assert captured(waiting, "cuda") is waiting
    assert torch.rand(3, device="cuda").shape == (3,)  # random numbers survive


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_gpu_measures_every_kernel(dtype):
    config = small(d_model=64, d_head=32, latent_dim=32, n_experts=14, d_expert=32)
    rows = measured(config, tokens=(1, 1024), lengths=(600,), device="cuda", dtype=dtype)
    dense = {row.case for row in rows if row.case.startswith("dense")}
    assert {row.case for row in rows if row.program == "kernel"} == {row.case for row in rows} - dense
    assert all(row.limit > 0 and row.peak_bytes > 0 for row in rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_gradient_of_a_narrow_layer_is_compared_as_narrow(dtype):
    """A router's weight is float32, and its gradient goes through the 16 bits of the layer."""
    whole = torch.linspace(-1, 1, 64)
    near, far = (whole * (1 + part * kernel_bench.TOLERANCE[dtype]) for part in (0.5, 2))
    kernel_bench._require_equal("case", (whole.to(dtype), near), (whole.to(dtype), whole))
    for narrow in (whole.to(dtype), whole):  # too far; far in a case that is wide throughout
        with pytest.raises(ArithmeticError, match="result 1"):
            kernel_bench._require_equal("case", (narrow, near if narrow is whole else far), (narrow, whole))
