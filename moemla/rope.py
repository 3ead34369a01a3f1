"""Rotary position embedding: turn pairs of dimensions by an angle that grows with the position (eqs. 9-10).

Notable: the tables are float32 or wider in a model of any type, shared by all layers and no part of a checkpoint; both
layouts of the pairs; learnable frequencies, as the text above eq. 9 has them, on request. Built in chapter 4.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moemla import kernels
from moemla.config import CHOICES, require, require_count
from moemla.devices import at_least_float32


def frequencies(width: int, theta: float = 10000.0) -> Float[Tensor, "half"]:
    """Angle per position of each of the width/2 pairs, theta ** (-2 i / width), in float64.

    ValueError for a width that is not even, or a theta that is not a finite number above 1.
    """
    require_count("width", width)
    require(width % 2 == 0, "width", width, "RoPE turns pairs of dimensions, the width must be even and at least 2")
    require(1 < theta < torch.inf, "theta", theta, "must be a finite number above 1 (10000 is usual)")
    return theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)


def apply_rope(
    x: Float[Tensor, "b h t k"], cos: Float[Tensor, "c t half"], sin: Float[Tensor, "c t half"], layout: str = "halves"
) -> Float[Tensor, "b h t k"]:
    """R_{Theta, m} x_m of eq. 9: turns each pair of x by the angle whose cosine and sine are given.

    x (B, H, T, K), and so is the result, in x's dtype; cos and sin (B or 1, T, K/2). layout "halves" pairs dimension i
    with i + K/2, "interleaved" 2i with 2i + 1; the two differ by a fixed permutation of the dimensions, so weights made
    for one are wrong for the other.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if layout == "halves":
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    elif layout == "interleaved":
        first, second = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    else:
        raise ValueError(f"layout={layout!r}: choose 'halves' or 'interleaved'")
    return turned.to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions 0 .. max_seq_len - 1, shared by every layer.

    The tables stay in float32 (float64 in a float64 model): in bfloat16 the positions 256 and 257 would be one. They
    are computed again when the module moves, and are no part of a checkpoint. With `learnable` the frequencies are a
    parameter `inv_freq` (K/2,), as the paper says of eq. 9, and the angles are computed at each pass. ValueError for an
    odd width, a length below 1, a theta that is not a finite number above 1, or an unknown layout.
    """

    def __init__(
        self,
        width: int,
        max_seq_len: int,
        theta: float = 10000.0,
        layout: str = "halves",
        learnable: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.width, self.max_seq_len, self.theta, self.layout = width, max_seq_len, theta, layout
        self.inv_freq = None
        if learnable:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            device = torch.get_default_device() if device is None else device
            self.inv_freq = nn.Parameter(frequencies(width, theta).to(device, wide))
        else:
            self._fill(device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The frequencies that the constructor gives; tables of fixed ones are never anything else."""
        if self.inv_freq is not None:
            self.inv_freq.copy_(frequencies(self.width, self.theta))

    @torch.inference_mode(False)  # tables that are made during inference serve training afterwards
    def _fill(self, device, dtype) -> None:
        angles = torch.arange(self.max_seq_len, dtype=torch.float64, device="cpu").outer(
            frequencies(self.width, self.theta)
        )
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        device = torch.get_default_device() if device is None else device
        self.register_buffer("cos", angles.cos().to(dtype).to(device), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype).to(device), persistent=False)
        # The same for x * stay + swapped(x) * swap, which takes three operations in place of eight.
        self.register_buffer("stay", _widen(self.cos, self.cos, self.layout), persistent=False)
        self.register_buffer("swap", _widen(-self.sin, self.sin, self.layout), persistent=False)

    def __setattr__(self, name, value):  # tables follow their settings
        if name == "layout":
            require(value in CHOICES["rope_layout"], name, value, "choose 'halves' or 'interleaved'")
        if name == "max_seq_len":
            require_count(name, value)
        super().__setattr__(name, value)
        if name in ("theta", "layout", "max_seq_len") and "cos" in self._buffers:
            self._fill(self.cos.device, self.cos.dtype)

    def _apply(self, fn, recurse=True):
        fn = at_least_float32(fn)
        if self.inv_freq is not None:
            return super()._apply(fn, recurse)
        try:
            moved = fn(self.cos[:1])
        except NotImplementedError:  # weights came to a meta model by load_state_dict(assign=True), tables did not
            moved = fn(torch.empty(1, dtype=self.cos.dtype, device="cpu"))
        self._fill(moved.device, moved.dtype)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        name = f"{prefix}inv_freq"
        if name in state_dict and state_dict[name].element_size() < 4:  # assigned, it would take the wide one's place
            state_dict[name] = state_dict[name].float()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _turns(self, where: tuple[int, int] | Int[Tensor, "c t"], device) -> tuple[Tensor, Tensor]:
        """Cosines and sines (C, T, K/2) from learnable frequencies."""
        if isinstance(where, tuple):
            where = torch.arange(*where, device=device)[None]
        angles = where[..., None] * self.inv_freq
        return angles.cos(), angles.sin()

    def forward(
        self, x: Float[Tensor, "b h t k"], positions: tuple[int, int] | Int[Tensor, "c t"] | None = None
    ) -> Float[Tensor, "b h t k"]:
        """Turns x (B, H, T, K) by its positions: (B or 1, T), or (first, behind the last); default 0 .. T-1.

        ValueError for more than max_seq_len of them; IndexError for a position in a tensor that is outside the table
        (learnable frequencies have none; a negative one is seen on the CPU only; a kernel answers with NaN).
        """
        where = (0, x.shape[2]) if positions is None else positions
        if isinstance(where, tuple) and where[1] > self.max_seq_len:
            raise ValueError(f"length={where[1]}: must be at most max_seq_len={self.max_seq_len}")
        if isinstance(where, tuple) and (where[0] < 0 or where[1] - where[0] != x.shape[2]):
            raise ValueError(f"positions={where}: {x.shape[2]} of them are needed")
        if self.inv_freq is not None:
            return apply_rope(x, *self._turns(where, x.device), self.layout)
        on_host = not isinstance(where, tuple) and where.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and where.numel() and int(where.min()) < 0:
            raise IndexError(f"positions={int(where.min())}: must be 0 or more")
        if self.cos.device.type == "meta" != x.device.type:  # load_state_dict(assign=True) brings no tables
            self._fill(x.device, x.dtype)
        if kernels.enabled(x, self.cos):
            from moemla.kernels.rope import rope

            table, first = (None, where[0]) if isinstance(where, tuple) else (where.to(x.device), 0)
            return rope(x, self.cos, self.sin, table, first, self.layout == "interleaved", False)
        taken = slice(*where) if isinstance(where, tuple) else where
        stay, swap = self.stay[taken], self.swap[taken]  # (T, K), or (C, T, K)
        if stay.dim() == 3:
            stay, swap = stay.unsqueeze(1), swap.unsqueeze(1)
        turned = torch.addcmul(x * stay, _swapped(x, self.layout), swap)
        return turned.to(x.dtype)


def _widen(first: Float[Tensor, "s half"], second: Float[Tensor, "s half"], layout: str) -> Float[Tensor, "s k"]:
    """Numbers of the pairs' first and second dimensions, each at its dimension's place."""
    return torch.stack((first, second), dim=1 if layout == "halves" else 2).flatten(1)


def _swapped(x: Float[Tensor, "b h t k"], layout: str) -> Float[Tensor, "b h t k"]:
    """x with the two dimensions of each pair exchanged."""
    half = x.shape[-1] // 2
    if layout == "halves":
        return x.unflatten(-1, (2, half)).flip(-2).flatten(-2)
    return x.unflatten(-1, (half, 2)).flip(-1).flatten(-2)
