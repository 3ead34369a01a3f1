"""Three ways to compute the same: the plain function, the kernel read by Triton's interpreter, the kernel compiled.

The oracle is the plain function in float64. Without a GPU the kernels are interpreted (tests/conftest.py asks for it
before anything imports Triton), in float32: the interpreter's 16-bit products are not to be trusted.
"""

from dataclasses import dataclass

import pytest
import torch

from moemla import kernels

GPU = torch.cuda.is_available()
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Way:
    name: str
    dtype: torch.dtype

    @property
    def device(self) -> str:
        return "cuda" if self.name == "compiled" else "cpu"

    @property
    def kernel(self) -> bool:
        return self.name != "plain"

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]

    def normal(self, *shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
        """Random numbers that are exact in this way's type, on its device, with a gradient."""
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
        return numbers.to(self.dtype).to(self.device).requires_grad_()


def _ways():
    interpreted = pytest.mark.skipif(not kernels.INTERPRETED, reason="kernels are compiled here, not interpreted")
    compiled = pytest.mark.skipif(not GPU, reason="needs a GPU")
    yield pytest.param(Way("plain", torch.float32), id="plain")
    yield pytest.param(Way("interpreted", torch.float32), id="interpreted", marks=interpreted)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield pytest.param(Way("compiled", dtype), id=f"compiled-{str(dtype)[6:]}", marks=compiled)


each_way = pytest.mark.parametrize("way", list(_ways()))


def exact(tensor):
    """The same numbers in float64 on the CPU, with a gradient of their own."""
    return (
        tensor.detach().double().cpu().requires_grad_(tensor.requires_grad)
        if tensor.is_floating_point()
        else tensor.cpu()
    )


def near(ours, oracle, tolerance: float) -> None:
    """Every number, against the largest of the oracle's."""
    ours, oracle = ours.detach().double().cpu(), oracle.detach()
    assert ours.shape == oracle.shape, (ours.shape, oracle.shape)
    if ours.numel():
        assert torch.isfinite(ours).all()
        worst, largest = (ours - oracle).abs().max().item(), max(oracle.abs().max().item(), 1e-3)
        assert worst <= tolerance * largest, f"they differ by {worst:.2e}, allowed {tolerance * largest:.2e}"


def gradients(outputs, leaves, seed: int = 5):
    """Gradients of the leaves for upstream gradients drawn from a seed, the same in every way and for the oracle."""
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(out.shape, generator=generator, dtype=torch.float64) for out in outputs]
    upstream = [u.to(torch.bfloat16).to(out.dtype).to(out.device) for u, out in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, leaves, upstream)
