"""Multi-head attention (eqs. 5-6), with fewer key heads than query heads as an option (grouped-query).

Notable: torch's own product does the work, and keys or values that heads share are not copied for each of them (torch
does it itself on a GPU in float32, or with a mask). Built in chapter 2.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from moemla.cache import LayerCache
from moemla.config import require, require_count
from moemla.devices import Layer
from moemla.linear import Linear
from moemla.rope import RotaryEmbedding


def split_heads(x: Float[Tensor, "b t hk"], heads: int) -> Float[Tensor, "b h t k"]:
    """(B, T, H K) -> (B, H, T, K), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "b h t k"]) -> Float[Tensor, "b t hk"]:
    """(B, H, T, K) -> (B, T, H K)."""
    return x.transpose(1, 2).flatten(2)


def attend(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g s k"],
    v: Float[Tensor, "b g s w"],
    mask: Bool[Tensor, "c 1 t s"] | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Float[Tensor, "b h t w"]:
    """softmax(q k^T / sqrt(K)) v of eq. 5.

    q (B, H, T, K), k (B, G, S, K), v (B, G, S, W) with H a multiple of G. mask (B or 1, 1, T, S) is True where a query
    may look. Without a mask T > 1 queries are causal over as many keys, and a single query sees them all. `scale`
    replaces 1/sqrt(K).
    """
    causal = mask is None
    if q.shape[2] == 1:  # no `and`: in torch.export a length is no int, and a comparison with it no bool
        causal = False
    grouped, width = q.shape[1] != k.shape[1], v.shape[-1]
    if width < q.shape[-1] and q.shape[2] > 1:  # torch's fast kernels want values as wide as keys
        v = F.pad(v, (0, q.shape[-1] - width))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return out[..., :width]


def attend_shared(
    q: Float[Tensor, "b h t k"],
    k: Float[Tensor, "b g s k"],
    v: Float[Tensor, "b s w"],
    mask: Bool[Tensor, "c 1 t s"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "b h t w"]:
    """`attend` with values (B, S, W) that all heads share, without a copy of them for each head. Built in chapter 3.

    k (B, G, S, K) with G = H, or 1 where the heads share their keys too. The scores exist as a whole: for decode.
    """
    heads, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[1] == 1 and q.shape[2] == 1:  # heads are further queries, and nothing stands behind them
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v.unsqueeze(1), mask, scale=scale).transpose(1, 2)
    if k.shape[1] == 1:
        scores = rearrange(q * scale, "b h t k -> b (h t) k") @ k.squeeze(1).mT
        scores = rearrange(scores, "b (h t) s -> b h t s", h=heads)
    else:
        scores = (q * scale) @ k.mT
    if mask is None and q.shape[2] > 1:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return rearrange(rearrange(weights, "b h t s -> b (h t) s") @ v, "b (h t) w -> b h t w", h=heads)


def head_width(d_model: int, n_heads: int, d_head: int | None, dropout: float, rope: RotaryEmbedding | None) -> int:
    """The width K of a head, d_model / n_heads where d_head is None. Built in chapter 9.

    ValueError for counts that are no whole numbers of at least 1, heads that do not divide d_model, a dropout outside
    [0, 1), or a rope of another width.
    """
    for name, value in (("d_model", d_model), ("n_heads", n_heads), ("d_head", 1 if d_head is None else d_head)):
        require_count(name, value)
    require(0 <= dropout < 1, "dropout", dropout, "must be at least 0 and below 1")
    right = f"must divide d_model={d_model}, or d_head must be given"
    require(d_head is not None or d_model % n_heads == 0, "n_heads", n_heads, right)
    width = d_model // n_heads if d_head is None else d_head
    turned = width if rope is None else rope.width
    require(turned == width, "rope.width", turned, f"must equal the heads' width, {width}")
    return width


class MultiHeadAttention(Layer):
    """Causal self-attention (B, T, D) -> (B, T, D). Built in chapter 2; RoPE in chapter 4.

    n_kv_heads < n_heads shares each key and value head among n_heads / n_kv_heads query heads. With a `KVCache` layer
    the new tokens are appended and see all that came before; cached keys are already rotated. ValueError for what
    `head_width` refuses, or key heads that do not divide the heads.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        rope: RotaryEmbedding | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        d_head = head_width(d_model, n_heads, d_head, dropout, rope)
        require_count("n_kv_heads", n_kv_heads)
        require(n_heads % n_kv_heads == 0, "n_kv_heads", n_kv_heads, f"must divide n_heads={n_heads}")
        self.n_heads, self.n_kv_heads, self.dropout, self.rope = n_heads, n_kv_heads, dropout, rope
        projection = dict(bias=bias, device=device, dtype=dtype)
        self.q_proj = Linear(d_model, n_heads * d_head, **projection)
        self.k_proj = Linear(d_model, n_kv_heads * d_head, **projection)
        self.v_proj = Linear(d_model, n_kv_heads * d_head, **projection)
        self.out_proj = Linear(n_heads * d_head, d_model, **projection)

    def forward(self, x: Float[Tensor, "b t d"], cache: LayerCache | None = None) -> Float[Tensor, "b t d"]:
        """x (B, T, D) -> (B, T, D). cache: `cache[i]` of a `KVCache`; the T tokens are appended."""
        LayerCache.required(cache)
        q = split_heads(self.q_proj(x), self.n_heads)
        k = split_heads(self.k_proj(x), self.n_kv_heads)
        v = split_heads(self.v_proj(x), self.n_kv_heads)
        steps, mask = x.shape[1], None
        if self.rope is not None:
            where = None if cache is None else cache.where(steps, x.device)
            q, k = self.rope(q, where), self.rope(k, where)
        if cache is not None:
            mask = cache.mask(steps, x.device)
            k, v = cache.append(k, v)
        out = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.out_proj(merge_heads(out))
