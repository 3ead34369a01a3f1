"""What is kept of past tokens: four caches, one shape.

Every cache is a few buffers of shape (L, B, heads, S, width), allocated once; only heads and width differ:

    KVCache           keys, values              H_kv x K each     2 H_kv K numbers per token and layer
    LatentCache       k latent, v latent        1 x R each        2 R             (the paper's, eq. 13)
    HybridCache       rotated keys, v latent    H x K and 1 x R   H K + R
    JointLatentCache  latent and rotated key    1 x (R + d_rope)  R + d_rope      (DeepSeek-V2)

A slot holds the token of that position, so row b sees slot s exactly when s <= its own position. Rows may have
different lengths: a prompt shorter than the batch leaves its row's spare slots to be overwritten. Built in chapter 2.
"""

from collections.abc import Iterable
from copy import copy
from operator import index as whole_number

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moemla.config import require, require_count


def _require_counts(**counts: int) -> None:
    for name, value in counts.items():
        require_count(name, value)


class Cache:
    """Preallocated buffers for `max_len` tokens of `batch_size` rows in `n_layers` layers.

    An attention layer calls `cache[i].append(...)`; whoever runs the layers calls `advance` once after the last of
    them.
    """

    def __init__(
        self, n_layers: int, batch_size: int, max_len: int, widths: tuple[tuple[int, int], ...], dtype=None, device=None
    ):
        _require_counts(n_layers=n_layers, batch_size=batch_size, max_len=max_len)
        require(dtype is None or dtype.is_floating_point, "dtype", dtype, "must be a floating type")
        self.n_layers, self.max_len = n_layers, max_len
        with torch.inference_mode(False):  # what is made inside of it could not be written to outside
            self.buffers = tuple(
                torch.zeros(n_layers, batch_size, heads, max_len, width, dtype=dtype, device=device)
                for heads, width in widths
            )
            self.tokens = torch.full((batch_size, max_len), -1, device=device)  # whose they are; -1: not told
        self.lengths = [0] * batch_size  # on the host: a step must not wait for the device to learn where it is

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Tokens held by the longest row."""
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """True while every row holds the same number of tokens."""
        return all(length == self.lengths[0] for length in self.lengths[1:])

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers, {self.batch_size} rows, {self.bytes_per_token()} bytes a token"
        held = self.lengths[0] if self.uniform else self.lengths
        return f"{type(self).__name__}({shape}, holds {held} of {self.max_len})"

    def __getitem__(self, layer: int) -> "LayerCache":
        if not 0 <= layer < self.n_layers:
            raise IndexError(f"layer={layer}: this cache has layers 0 .. {self.n_layers - 1}")
        return LayerCache(self, layer)

    def positions(self, steps: int, device=None) -> Int[Tensor, "b t"]:
        """Positions of the next `steps` tokens of each row, (B, steps), or (1, steps) while the rows are equal."""
        rows = self.lengths[:1] if self.uniform else self.lengths
        return _sent(rows, device)[:, None] + torch.arange(steps, device=device)

    def where(self, steps: int, device=None) -> tuple[int, int] | Tensor:
        """The same for a table of positions: (first, behind the last) while the rows are equal, which takes a view."""
        if self.uniform:
            return self.lengths[0], self.lengths[0] + steps
        return self.positions(steps, device)

    def require_room(self, steps: int) -> None:
        """ValueError when `steps` more tokens do not fit."""
        if self.length + steps > self.max_len:
            raise ValueError(f"steps={steps}: with {self.length} tokens held they exceed max_len={self.max_len}")

    def remember(self, tokens: Int[Tensor, "b t"]) -> None:
        """Notes which tokens (B, T) are being appended, before `advance`: a model does. Built in chapter 14."""
        if self.uniform:
            self.tokens[:, self.length : self.length + tokens.shape[1]] = tokens
        else:
            rows = torch.arange(self.batch_size, device=tokens.device)[:, None]
            self.tokens[rows, self.positions(tokens.shape[1], tokens.device)] = tokens.long()

    def advance(self, steps: int | Iterable[int]) -> None:
        """Counts the tokens just appended: `steps` in every row, or a list with a number for each row.

        A row that was given padding on its right takes the number of its own tokens. ValueError for a number that is
        negative, not whole, or more than there is room for.
        """
        each = self._for_each_row("steps", steps)
        if min(each) < 0:
            raise ValueError(f"steps={min(each)}: must be 0 or more")
        lengths = [length + step for length, step in zip(self.lengths, each, strict=True)]
        if max(lengths) > self.max_len:
            raise ValueError(f"steps={steps}: with {self.lengths} tokens held they exceed max_len={self.max_len}")
        self.lengths = lengths

    def _for_each_row(self, name: str, numbers: int | Iterable[int]) -> list[int]:
        """One whole number for all rows, or one for each."""
        if isinstance(numbers, int):
            return [numbers] * self.batch_size
        several = hasattr(numbers, "__iter__")
        try:
            each = [whole_number(number) for number in (numbers if several else [numbers])]
        except TypeError:  # of a fraction; and a tensor without dimensions cannot be walked through
            raise ValueError(f"{name}={numbers}: give whole numbers") from None
        each = each if several else each * self.batch_size
        if len(each) != self.batch_size:
            raise ValueError(f"{name}={each}: one number, or one for each of the {self.batch_size} rows")
        return each

    def reset(self) -> None:
        """Forgets everything; the storage stays."""
        self.lengths = [0] * self.batch_size

    def crop(self, length: int | Iterable[int]) -> None:
        """Forgets the tokens from position `length` on, in every row, or a list with a number for each row."""
        each = self._for_each_row("length", length)
        if min(each) < 0:
            raise ValueError(f"length={min(each)}: must be 0 or more")
        self.lengths = [min(length, held) for length, held in zip(each, self.lengths, strict=True)]

    def select(self, rows: Int[Tensor, "n"] | list[int]) -> None:
        """Keeps these rows, in this order; a row may be named more than once (beam search, shared prompts).

        ValueError for none or what is no whole number, IndexError for a row that is not there.
        """
        index = torch.as_tensor(rows, device=self.buffers[0].device)
        if index.dtype == torch.bool or index.is_floating_point() or not len(index):
            raise ValueError(f"rows={rows}: name at least one row, by its number")
        named = index.tolist()
        if not 0 <= min(named) <= max(named) < self.batch_size:  # on a GPU it would be an assertion
            raise IndexError(f"rows={named}: this cache has rows 0 .. {self.batch_size - 1}")
        with torch.inference_mode(False):
            index = index.long()
            self.buffers = tuple(buffer.index_select(1, index) for buffer in self.buffers)
            self.tokens = self.tokens.index_select(0, index)
        self.lengths = [self.lengths[row] for row in named]

    def copy(self, max_len: int | None = None) -> "Cache":
        """The same tokens in a storage of their own, with room for `max_len`: a prefix to go on from more than once."""
        twin = copy(self)
        twin.max_len = self.max_len if max_len is None else max_len
        twin.require_room(0)
        twin.lengths = list(self.lengths)
        held = self.length
        with torch.inference_mode(False):
            twin.tokens = self.tokens.new_full((self.batch_size, twin.max_len), -1)
            twin.tokens[:, :held] = self.tokens[:, :held]
            twin.buffers = tuple(b.new_zeros(*b.shape[:3], twin.max_len, b.shape[4]) for b in self.buffers)
            for ours, theirs in zip(twin.buffers, self.buffers, strict=True):
                ours[:, :, :, :held] = theirs[:, :, :, :held]
        return twin

    def bytes_per_token(self) -> int:
        """Bytes that one token takes in all layers, counted from the storage."""
        return self.nbytes // (self.batch_size * self.max_len)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole storage."""
        return sum(buffer.nbytes for buffer in self.buffers)


def _sent(numbers: list[int], device) -> Tensor:
    """The numbers on the device, which is not waited for."""
    if device is None or torch.device(device).type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    return torch.tensor(numbers, device="cpu").pin_memory().to(device, non_blocking=True)


class LayerCache:
    """One layer's view of a cache: what an attention layer is given."""

    def __init__(self, cache: Cache, layer: int):
        self.cache, self.layer = cache, layer

    @staticmethod
    def required(cache: "LayerCache | None") -> None:
        """TypeError where an attention layer is given the cache of all layers."""
        if isinstance(cache, Cache):
            raise TypeError(f"cache: is a {type(cache).__name__} of all layers; give one layer's view of it, cache[i]")

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Writes new tensors (B, heads, T, width) behind the tokens held and returns all that is held.

        (B, heads, length + T, width) each: views, or copies in the new tensors' dtype where the cache has another.
        """
        cache, steps = self.cache, new[0].shape[2]
        cache.require_room(steps)
        kept, offered = ([(t.shape[-3], t.shape[-1]) for t in tensors] for tensors in (cache.buffers, new))
        if kept != offered:  # else a single head would be copied to all of them
            right = f"keeps (heads, width) {kept}, this layer has {offered}: take the cache of this form"
            raise ValueError(f"cache={type(cache).__name__}: {right}")
        if any(tensor.requires_grad for tensor in new):
            raise RuntimeError(
                "a cache keeps no gradients: call the model under torch.no_grad() or torch.inference_mode()"
            )
        seen = []
        for buffer, tensor in zip(cache.buffers, new, strict=True):
            layer = buffer[self.layer]
            if tensor.shape[0] != cache.batch_size:
                raise ValueError(f"rows={tensor.shape[0]}: this cache has {cache.batch_size}")
            if cache.uniform:
                layer[:, :, cache.length : cache.length + steps] = tensor
            else:
                slots = cache.positions(steps, layer.device)
                rows = torch.arange(cache.batch_size, device=layer.device)[:, None]
                layer[rows, :, slots] = tensor.transpose(1, 2).to(layer.dtype)
            seen.append(layer[:, :, : cache.length + steps].to(tensor.dtype))
        return tuple(seen)

    def where(self, steps: int, device=None) -> tuple[int, int] | Tensor:
        """Where the next tokens stand, as `Cache.where`."""
        return self.cache.where(steps, device)

    def held(self, steps: int, device=None) -> Int[Tensor, "b"] | None:
        """How many slots each row holds with the next tokens, (B,) int32; None while the rows are equal."""
        if self.cache.uniform:
            return None
        return self.cache.positions(steps, device)[:, -1].int() + 1

    def mask(self, steps: int, device=None) -> Bool[Tensor, "b 1 t s"] | None:
        """Which slots each new token may see, (B or 1, 1, T, S).

        None where `attend` needs none: one new token a row, or an empty cache.
        """
        if self.cache.length == 0 or (steps == 1 and self.cache.uniform):
            return None
        slots = torch.arange(self.cache.length + steps, device=device)
        return (slots <= self.cache.positions(steps, device)[..., None])[:, None]


class KVCache(Cache):
    """Keys and values of every key head: 2 H_kv K numbers per token and layer."""

    def __init__(
        self, *, n_layers: int = 1, batch_size: int, max_len: int, n_kv_heads: int, d_head: int, dtype=None, device=None
    ):
        _require_counts(n_kv_heads=n_kv_heads, d_head=d_head)
        super().__init__(n_layers, batch_size, max_len, ((n_kv_heads, d_head),) * 2, dtype, device)


class LatentCache(Cache):
    """The paper's cache: the K latent and the V latent of eq. 13, before their heads are rebuilt: 2 R numbers.

    Built in chapter 3.
    """

    def __init__(self, *, n_layers: int = 1, batch_size: int, max_len: int, latent_dim: int, dtype=None, device=None):
        _require_counts(latent_dim=latent_dim)
        super().__init__(n_layers, batch_size, max_len, ((1, latent_dim),) * 2, dtype, device)


class HybridCache(Cache):
    """Rotated keys of every head beside the V latent: H K + R numbers, nothing to rebuild for the scores.

    Built in chapter 4.
    """

    def __init__(
        self,
        *,
        n_layers: int = 1,
        batch_size: int,
        max_len: int,
        n_heads: int,
        d_head: int,
        latent_dim: int,
        dtype=None,
        device=None,
    ):
        _require_counts(n_heads=n_heads, d_head=d_head, latent_dim=latent_dim)
        super().__init__(n_layers, batch_size, max_len, ((n_heads, d_head), (1, latent_dim)), dtype, device)


class JointLatentCache(Cache):
    """DeepSeek-V2's cache: one latent for K and V, and behind it one rotated key for all heads: R + d_rope numbers.

    Both stand in one array: together they are the keys of the absorbed form. Built in chapter 4.
    """

    def __init__(
        self, *, n_layers: int = 1, batch_size: int, max_len: int, latent_dim: int, d_rope: int, dtype=None, device=None
    ):
        _require_counts(latent_dim=latent_dim, d_rope=d_rope)
        super().__init__(n_layers, batch_size, max_len, ((1, latent_dim + d_rope),), dtype, device)
