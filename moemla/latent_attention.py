"""Attention through a latent: keys and values are rebuilt from R numbers a token, and only those are kept.

Two forms. The paper's (`MultiHeadLatentAttention`) has one latent for K and one for V, shared by the heads, and turns
the rebuilt keys: the turn stands between query and W^Kr, so K has to be rebuilt at every step; V does not (sum the
latents first, then W^Vr). DeepSeek-V2's (`DecoupledLatentAttention`) has one latent for both and a small rotated key
beside it, so that neither is rebuilt. Built in chapter 3.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moemla import kernels
from moemla.attention import attend, attend_shared, head_width, merge_heads, split_heads
from moemla.cache import HybridCache, LatentCache, LayerCache
from moemla.config import require, require_count
from moemla.devices import Layer
from moemla.linear import Linear
from moemla.rope import RotaryEmbedding


def absorbed_output(context: Float[Tensor, "b h t r"], v_up: nn.Linear, out_proj: nn.Linear) -> Float[Tensor, "b t d"]:
    """From attention-weighted latents to the layer's output: W^Vr of each head, then W^O.

    Exact because attention weights sum to one, so that v_up's bias passes through. Dropped weights do not sum to one:
    with a bias it is then wrong.
    """
    weight = v_up.weight.unflatten(0, (context.shape[1], -1)).mT  # (H, R, K)
    value = merge_heads(context @ weight)
    return out_proj(value if v_up.bias is None else value + v_up.bias)


def use_absorbed(absorb: bool | None, steps: int, module: nn.Module) -> bool:
    """Whether to absorb: as asked, else for a single new token.

    ValueError for training with dropout, and where `k_up` and `v_up` are not read by their weights alone (adapters).
    """
    lossy = module.training and module.dropout > 0
    plain = all(isinstance(up, nn.Linear) and up.weight.is_floating_point() for up in (module.k_up, module.v_up))
    if absorb and not plain:
        raise ValueError("absorb=True: k_up and v_up are read by their weights, and another kind of layer is there")
    if absorb and lossy:
        raise ValueError(
            "absorb=True: dropout on attention weights makes the absorbed form wrong; use eval() or dropout=0"
        )
    return (steps == 1 and not lossy and plain) if absorb is None else absorb


class MultiHeadLatentAttention(Layer):
    """The paper's latent attention (eqs. 13-14), (B, T, D) -> (B, T, D). Built in chapter 3; RoPE in chapter 4.

    K_h = RoPE((x W^Kc) W^Kr_h), V_h = (x W^Vc) W^Vr_h; W^Kc and W^Vc are D x R and shared by the heads. With a layer of
    a `LatentCache` 2 R numbers a token are kept, with one of a `HybridCache` the rotated keys and the V latent.
    `absorb` says whether cached V is used without being rebuilt (default: for a single new token). ValueError for what
    `head_width` refuses, or a latent_dim below 1.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        latent_dim: int,
        d_head: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        rope: RotaryEmbedding | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        d_head = head_width(d_model, n_heads, d_head, dropout, rope)
        require_count("latent_dim", latent_dim)
        self.n_heads, self.dropout, self.rope = n_heads, dropout, rope
        projection = dict(bias=bias, device=device, dtype=dtype)
        self.q_proj = Linear(d_model, n_heads * d_head, **projection)
        self.k_down = Linear(d_model, latent_dim, **projection)
        self.k_up = Linear(latent_dim, n_heads * d_head, **projection)
        self.v_down = Linear(d_model, latent_dim, **projection)
        self.v_up = Linear(latent_dim, n_heads * d_head, **projection)
        self.out_proj = Linear(n_heads * d_head, d_model, **projection)

    def _rotate(
        self, x: Float[Tensor, "b h t k"], where: tuple[int, int] | Tensor | None = None
    ) -> Float[Tensor, "b h t k"]:
        return x if self.rope is None else self.rope(x, where)

    def _in_one_kernel(self, q: Tensor, cache: LayerCache, absorb: bool | None) -> bool:
        """Whether a single new token goes through the decode kernel, which has tables of angles and latents only."""
        fits = q.shape[2] == 1 and isinstance(cache.cache, LatentCache) and q.shape[3] % 2 == 0
        fits = fits and (self.rope is None or self.rope.inv_freq is None) and use_absorbed(absorb, 1, self)
        return fits and kernels.decodes(q, self.k_up.weight, self.k_up.in_features, joint=False)

    def _decode(self, q, k_latent, v_latent, held) -> Float[Tensor, "b 1 d"]:
        from moemla.kernels.decode import latent_decode

        angles = (None, None) if self.rope is None else (self.rope.cos, self.rope.sin)
        interleaved = self.rope is not None and self.rope.layout == "interleaved"
        weights = (self.k_up.weight.to(q.dtype), None if self.k_up.bias is None else self.k_up.bias.to(q.dtype))
        scale = q.shape[-1] ** -0.5
        context = latent_decode(q[:, :, 0], k_latent, v_latent, *weights, *angles, held, interleaved, scale)
        return absorbed_output(context[:, :, None], self.v_up, self.out_proj)

    def forward(
        self, x: Float[Tensor, "b t d"], cache: LayerCache | None = None, absorb: bool | None = None
    ) -> Float[Tensor, "b t d"]:
        """x (B, T, D) -> (B, T, D). cache: `cache[i]` of a `LatentCache` or `HybridCache`; the T tokens are appended.

        absorb: whether a pass with a cache rebuilds no keys and values; None: where that is cheaper.
        """
        LayerCache.required(cache)
        steps, mask = x.shape[1], None
        k_latent, v_latent = self.k_down(x), self.v_down(x)  # C^K, C^V (B, T, R), eq. 13
        where = None if cache is None else cache.where(steps, x.device)
        q = self._rotate(split_heads(self.q_proj(x), self.n_heads), where)
        if cache is None:
            k = self._rotate(split_heads(self.k_up(k_latent), self.n_heads))
        elif self._in_one_kernel(q, cache, absorb):
            k_latent, v_latent = cache.append(k_latent.unsqueeze(1), v_latent.unsqueeze(1))
            return self._decode(q, k_latent.squeeze(1), v_latent.squeeze(1), cache.held(steps, x.device))
        else:
            mask = cache.mask(steps, x.device)
            if isinstance(cache.cache, HybridCache):
                k = self._rotate(split_heads(self.k_up(k_latent), self.n_heads), where)
                k, v_latent = cache.append(k, v_latent.unsqueeze(1))
            else:
                k_latent, v_latent = cache.append(k_latent.unsqueeze(1), v_latent.unsqueeze(1))
                k = self._rotate(split_heads(self.k_up(k_latent.squeeze(1)), self.n_heads))  # slot s holds position s
            v_latent = v_latent.squeeze(1)
        if cache is not None and use_absorbed(absorb, steps, self):
            return absorbed_output(attend_shared(q, k, v_latent, mask), self.v_up, self.out_proj)
        out = attend(q, k, split_heads(self.v_up(v_latent), self.n_heads), mask, self.dropout if self.training else 0.0)
        return self.out_proj(merge_heads(out))


class DecoupledLatentAttention(Layer):
    """DeepSeek-V2's latent attention (arXiv 2405.04434, 2.1), (B, T, D) -> (B, T, D). Built in chapter 4.

    One latent c = RMSNorm(x W^DKV) of width R gives K and V; each head's key is [c W^UK_h ; k_rope] with one rotated
    k_rope of width d_rope for all heads, and its query [q_nope ; q_rope]. Softmax scale (d_nope + d_rope)^-1/2. A
    `JointLatentCache` layer keeps R + d_rope numbers a token. Absorbed: the query goes to the latent's space, q_nope
    W^UK_h^T, and no key is ever rebuilt; k_up's bias then adds one number to all of a query's scores, which softmax
    does not see. ValueError for a width below 1.
    """

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        latent_dim: int,
        d_nope: int,
        d_value: int,
        rope: RotaryEmbedding,
        bias: bool = True,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (("latent_dim", latent_dim), ("d_nope", d_nope), ("d_value", d_value)):
            require_count(name, value)
        head_width(d_model, n_heads, d_nope, dropout, None)
        require(isinstance(rope, RotaryEmbedding), "rope", rope, "the decoupled form needs a RotaryEmbedding")
        self.n_heads, self.dropout, self.rope = n_heads, dropout, rope
        self.d_nope, self.d_rope, self.latent_dim = d_nope, rope.width, latent_dim
        self.scale = (d_nope + rope.width) ** -0.5
        projection = dict(bias=bias, device=device, dtype=dtype)
        self.q_proj = Linear(d_model, n_heads * (d_nope + rope.width), **projection)
        self.kv_down = Linear(d_model, latent_dim + rope.width, **projection)
        self.kv_norm = nn.RMSNorm(latent_dim, eps=1e-6, device=device, dtype=dtype)
        self.k_up = Linear(latent_dim, n_heads * d_nope, **projection)
        self.v_up = Linear(latent_dim, n_heads * d_value, **projection)
        self.out_proj = Linear(n_heads * d_value, d_model, **projection)

    def forward(
        self, x: Float[Tensor, "b t d"], cache: LayerCache | None = None, absorb: bool | None = None
    ) -> Float[Tensor, "b t d"]:
        """x (B, T, D) -> (B, T, D). cache: `cache[i]` of a `JointLatentCache`; the T tokens are appended.

        absorb: whether a pass with a cache rebuilds no keys and values; None: where that is cheaper.
        """
        LayerCache.required(cache)
        steps, mask = x.shape[1], None
        q = split_heads(self.q_proj(x), self.n_heads)
        q_nope, q_rope = q.split((self.d_nope, self.d_rope), dim=-1)
        latent, k_rope = self.kv_down(x).split((self.latent_dim, self.d_rope), dim=-1)
        where = None if cache is None else cache.where(steps, x.device)
        turned = self.rope(torch.cat((q_rope, k_rope.unsqueeze(1)), dim=1), where)  # (B, H + 1, T, d_rope)
        q_rope, k_rope = turned[:, :-1], turned[:, -1:]
        joint = torch.cat((self.kv_norm(latent).unsqueeze(1), k_rope), dim=-1)  # (B, 1, T, R + d_rope)
        if cache is not None:
            mask = cache.mask(steps, x.device)
            (joint,) = cache.append(joint)  # (B, 1, S, R + d_rope)
        if cache is not None and use_absorbed(absorb, steps, self):
            weight = self.k_up.weight.unflatten(0, (self.n_heads, -1))  # (H, d_nope, R)
            q = torch.cat((q_nope @ weight, q_rope), dim=-1)
            if steps == 1 and kernels.decodes(q, joint, self.latent_dim, joint=True):
                from moemla.kernels.decode import joint_decode

                held = cache.held(steps, x.device)
                context = joint_decode(q[:, :, 0], joint[:, 0].to(q.dtype), held, self.latent_dim, self.scale)
                context = context[:, :, None]
            else:
                context = attend_shared(q, joint, joint[:, 0], mask, self.scale)[..., : self.latent_dim]
            return absorbed_output(context, self.v_up, self.out_proj)
        latent, k_rope = joint.split((self.latent_dim, self.d_rope), dim=-1)  # (B, 1, S, R), (B, 1, S, d_rope)
        latent, k_rope = latent.squeeze(1), k_rope.expand(-1, self.n_heads, -1, -1)
        k_nope = split_heads(self.k_up(latent), self.n_heads)
        v = split_heads(self.v_up(latent), self.n_heads)
        k = torch.cat((k_nope, k_rope), dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        out = attend(q, k, v, mask, self.dropout if self.training else 0.0, self.scale)
        return self.out_proj(merge_heads(out))
