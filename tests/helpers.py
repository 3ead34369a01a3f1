"""Small models that hide nothing: odd sizes, every weight random, and the attention forms by name."""

from pathlib import Path

import torch

from moemla.config import ModelConfig
from moemla.model import LanguageModel

SMALL = dict(vocab_size=37, max_seq_len=24, n_layers=2, d_model=16, n_heads=4, n_experts=7, n_shared=2, top_k=3)

# Every attention form with every cache it can keep; widths differ from each other wherever they may.
FORMS = {
    "mha-none": dict(attention="mha", positions="none"),
    "mha-learned": dict(attention="mha", positions="learned"),
    "mha-rope": dict(attention="mha", positions="rope"),
    "mha-rope-wide": dict(attention="mha", positions="rope", d_head=6, rope_layout="interleaved"),
    "gqa-rope": dict(attention="mha", positions="rope", n_kv_heads=2),
    "mqa-learned": dict(attention="mha", positions="learned", n_kv_heads=1),
    "mla-learned": dict(attention="mla", positions="learned", latent_dim=5),
    "mla-rope": dict(attention="mla", positions="rope", latent_dim=8),
    "mla-rope-wide": dict(attention="mla", positions="rope", latent_dim=20, d_head=6, rope_layout="interleaved"),
    "mla-rope-learnable": dict(attention="mla", positions="rope", latent_dim=8, rope_learnable=True),
    "mla-hybrid": dict(attention="mla", positions="rope", latent_dim=8, cache="hybrid"),
    "mla-hybrid-learned": dict(attention="mla", positions="learned", latent_dim=5, cache="hybrid"),
    "decoupled": dict(attention="mla-decoupled", positions="rope", latent_dim=8),
    "decoupled-odd": dict(
        attention="mla-decoupled", latent_dim=7, d_nope=3, d_rope=6, d_value=5, rope_layout="interleaved"
    ),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def config_of(form: str = "mla-rope", **changes) -> ModelConfig:
    return ModelConfig(**SMALL | FORMS[form] | changes)


@torch.no_grad()
def shake(module: torch.nn.Module, std: float = 0.3, seed: int = 1) -> torch.nn.Module:
    """Every parameter random, biases and norms included: nothing that should matter is zero or one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    for name, parameter in module.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return module


def model_of(form: str = "mla-rope", dtype=torch.float64, **changes) -> LanguageModel:
    return shake(LanguageModel(config_of(form, **changes), dtype=dtype)).eval()


def tokens_of(batch: int, steps: int, seed: int = 2, vocab: int = SMALL["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, steps), generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance: float, scale: float = 1.0) -> None:
    """Largest difference, against the larger of `scale` and the largest number of b."""
    assert a.shape == b.shape, (a.shape, b.shape)
    if a.numel():
        limit = tolerance * max(scale, b.detach().abs().max().item())
        worst = (a.detach() - b.detach()).abs().max().item()
        assert worst <= limit, f"they differ by {worst:.2e}, allowed {limit:.2e}"


def assert_causal(layer, width, steps, place, seed):
    """Outputs before `place` neither change with what stands there nor have a slope to it; the others do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, steps, width, generator=generator, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    other = x.detach().clone()
    other[:, place:] = torch.randn(1, steps - place, width, generator=generator, dtype=torch.float64) * 100
    changed = layer(other)
    assert torch.equal(changed[:, :place], out[:, :place])
    assert not torch.equal(changed[:, place], out[:, place])
    (slope,) = torch.autograd.grad(out[:, place - 1].square().sum(), x)
    assert slope[:, place:].abs().max() == 0
    assert (slope[:, :place].abs().amax(-1) > 0).all()


def peak_memory() -> float:
    """Bytes that this process has held at most. Linux's ru_maxrss begins with that of the process that started it."""
    try:
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024.0
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
