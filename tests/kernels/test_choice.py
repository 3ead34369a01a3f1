"""When kernels are used, what is said when they cannot be, and that a compiler keeps whole graphs with them."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from moemla import kernels
from moemla.config import ModelConfig
from moemla.experts import experts
from moemla.model import LanguageModel
from moemla.rope import RotaryEmbedding
from moemla.routing import route
from tests.helpers import close, shake
from tests.kernels.ways import GPU

interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled here, not interpreted")


@pytest.fixture(autouse=True)
def new_warnings():
    kernels._warn.cache_clear()
    yield
    kernels._warn.cache_clear()


def tensor(device: str, dtype=torch.float32):
    """What `why_not` looks at, on a device that is not here."""
    return SimpleNamespace(device=torch.device(device), dtype=dtype, is_floating_point=lambda: dtype.is_floating_point)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, w_in, w_out = (torch.randn(s, generator=generator).to(dtype) for s in ((9, 8), (4, 8, 6), (4, 6, 8)))
    index = torch.rand(9, 4, generator=generator).topk(2).indices
    return x, w_in, w_out, index, torch.rand(9, 2, generator=generator).to(dtype)


def test_off_until_asked_for():
    code = "import moemla.kernels as k, sys; print(k._enabled, 'triton' in sys.modules)"
    for setting, wanted in ((None, "False False"), ("1", "True False"), ("0", "False False")):
        environment = {} if setting is None else {"MOEMLA_KERNELS": setting}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == wanted, done.stderr


@pytest.mark.parametrize(
    "device, dtype, capability, reason",
    [
        ("mps", torch.float32, None, "these tensors are on mps"),
        ("cuda", torch.float32, (7, 5), "compute capability 7.5, they need 8.0"),
        ("cuda", torch.bfloat16, (7, 0), "compute capability 7.0"),
        ("cuda", torch.float64, (8, 0), "float64"),
        ("cuda", torch.bfloat16, (8, 0), None),
        ("cuda", torch.float16, (9, 0), None),
        ("cuda", torch.int64, (12, 0), None),
    ],
)
def test_reasons(device, dtype, capability, reason, monkeypatch):
    monkeypatch.setattr(kernels, "_no_triton", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    major, minor = capability or (0, 0)
    gpu = SimpleNamespace(name="Some GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = kernels.why_not(tensor(device, dtype))
    assert found is None if reason is None else reason in found


def test_amd_and_a_cpu_that_does_not_interpret(monkeypatch):
    monkeypatch.setattr(kernels, "_no_triton", lambda: None)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "AMD" in kernels.why_not(tensor("cuda"))
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert "these tensors are on cpu" in kernels.why_not(tensor("cpu"))


def test_without_triton_the_plain_path_with_one_warning(monkeypatch):
    """As on a Mac or on Windows: `backend="triton"` still computes, says why once, and then no more."""
    monkeypatch.setattr(kernels, "_no_triton", lambda: "Triton is not installed")
    arguments = inputs()
    with pytest.warns(UserWarning, match="Triton is not installed. The plain functions run instead"):
        out = experts(*arguments, backend="triton")
    close(out, experts(*arguments, backend="loop"), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        experts(*arguments, backend="triton")


def test_float64_takes_the_plain_path():
    arguments = inputs(torch.float64)
    with pytest.warns(UserWarning, match=r"torch\.float64|on cpu"):
        out = experts(*arguments, backend="triton")
    close(out, experts(*arguments, backend="loop"), 1e-12)


def test_mixed_devices_are_an_error():
    x, w_in, w_out, index, gate = inputs()
    with pytest.raises(ValueError, match="device=cpu, meta: move the tensors to one device"):
        experts(x, w_in, w_out, index.to("meta"), gate, backend="triton")


@interpreted
def test_autocast_narrows_the_kernels_too():
    arguments = inputs()
    with torch.autocast("cpu", torch.float16):
        out = experts(*arguments, backend="triton")
    assert out.dtype == torch.float16
    close(out.float(), experts(*arguments, backend="loop"), 5e-3)


def test_a_reason_that_auto_does_not_see_ends_on_a_plain_back_end(monkeypatch):
    """`choose` looks at two of the five tensors; where it still says "triton", that must not go round in a circle."""
    from moemla import experts as module

    arguments = inputs()
    monkeypatch.setattr(kernels, "usable", lambda *tensors: False)
    monkeypatch.setattr(module, "choose", lambda *how: "triton")
    close(experts(*arguments, backend="triton"), experts(*arguments, backend="loop"), 1e-5)


@interpreted
def test_the_interpreter_is_not_trusted_with_bfloat16():
    arguments = inputs(torch.bfloat16)
    with pytest.warns(UserWarning, match="interpreter multiplies bfloat16 wrongly"):
        out = experts(*arguments, backend="triton")
    close(out, experts(*arguments, backend="loop"), 0.03)


@interpreted
def test_operators_keep_their_promises():
    """Schemas, shapes without data, gradients: torch's own check of custom operators."""
    from moemla.kernels.decode import joint_decode, latent_decode
    from moemla.kernels.experts import routed_experts
    from moemla.kernels.rope import rope
    from moemla.kernels.routing import route as in_one_pass

    x, w_in, w_out, index, gate = (t.requires_grad_() if t.is_floating_point() else t for t in inputs())
    torch.library.opcheck(routed_experts, (x, w_in, w_out, index, gate, "gelu"))
    torch.library.opcheck(
        in_one_pass, (torch.randn(9, 5, requires_grad=True), torch.zeros(5), None, 2, True, False, True, 1.0)
    )
    table = RotaryEmbedding(8, 20)
    torch.library.opcheck(
        rope, (torch.randn(2, 3, 9, 8, requires_grad=True), table.cos, table.sin, None, 4, True, False)
    )
    latent = torch.randn(2, 9, 5)
    torch.library.opcheck(
        latent_decode,
        (torch.randn(2, 3, 8), latent, latent, torch.randn(24, 5), None, table.cos, table.sin, None, False, 0.3),
    )
    torch.library.opcheck(joint_decode, (torch.randn(2, 3, 7), torch.randn(2, 9, 7), None, 5, 0.3))


ONE_GRAPH = """
import torch
from moemla import ModelConfig, LanguageModel, kernels
from tests.helpers import close, shake

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
config = ModelConfig.preset("tiny", "moe-mla-rope", vocab_size=64, n_layers=1, backend="triton")
model = shake(LanguageModel(config), std=0.1).to(device)
tokens = torch.randint(0, 64, (2, 12), device=device)
wanted = model(tokens, tokens)
wanted.backward()
plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
model.zero_grad()
kernels.enable()
loss = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens, tokens)
loss.backward()
close(loss, wanted, 1e-5)
for name, parameter in model.named_parameters():
    close(parameter.grad, plain[name], 1e-4)
print("one graph")
"""


@pytest.mark.skipif(not (kernels.INTERPRETED or GPU), reason="nothing here can run a kernel")
def test_a_compiler_keeps_one_graph():
    """A whole MoE-MLA-RoPE model with all kernels, forward and backward, without a break; and it is the same model."""
    done = subprocess.run([sys.executable, "-c", ONE_GRAPH], capture_output=True, text=True)
    assert done.stdout.strip() == "one graph", done.stderr[-3000:]


@interpreted
def test_the_whole_model_with_and_without(monkeypatch):
    """Dense or not, learning with kernels is learning without them."""
    for variant in ("mla-rope", "moe-mha-rope", "moe-mla-decoupled"):
        config = ModelConfig.preset("tiny", variant, vocab_size=64, n_layers=1, d_model=32, n_heads=2)
        model = shake(LanguageModel(config), std=0.1)
        tokens, losses = torch.randint(0, 64, (2, 12)), []
        for on in (False, True):
            monkeypatch.setattr(kernels, "_enabled", on)
            model.zero_grad()
            loss = model(tokens, tokens)
            loss.backward()
            losses.append((loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())))
        for off, on in zip(*losses, strict=True):
            close(on, off, 1e-4)


@interpreted
def test_routing_is_the_same_object(monkeypatch):
    logits, bias = torch.randn(9, 5), torch.zeros(5)
    plain = route(logits, bias, 2)
    monkeypatch.setattr(kernels, "_enabled", True)
    kernel = route(logits, bias, 2)
    assert torch.equal(plain.index, kernel.index) and torch.equal(plain.counts, kernel.counts)
    assert plain.counted is None and kernel.counted is not None


def test_an_exported_program_has_no_kernels(monkeypatch):
    monkeypatch.setattr(kernels, "_enabled", True)
    monkeypatch.setattr(kernels, "why_not", lambda *tensors: None)
    assert kernels.enabled(torch.zeros(1))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not kernels.enabled(torch.zeros(1))


@interpreted
def test_positions_may_lie_on_the_host_and_beyond_the_table_there_is_no_number():
    rope, x = RotaryEmbedding(4, 8), torch.randn(1, 2, 3, 4)
    where = torch.tensor([[0, 7, 8]])
    before = kernels.enable()
    try:
        turned = rope(x, where)
    finally:
        kernels.enable(before)
    close(turned[:, :, :2], rope(x[:, :, :2], where[:, :2]), 1e-6)
    assert turned[:, :, 2].isnan().all()
