"""Files as a reader would write them, one a chapter, and wrong versions of them that still run.

A wrong version: chapter, what goes wrong, the text that goes (found once) and the one that comes, how the line that
must fail begins, and what it says.
"""

HEAD = """
import math

import torch
import torch.nn.functional as F
from torch import nn


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x):
    return x.transpose(1, 2).flatten(2)


def attend(q, k, v):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k.shape[-2] - q.shape[-2])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


class Cache:
    def __init__(self, batch_size, max_len, widths, heads=None):
        shape = (batch_size, max_len) if heads is None else (batch_size, heads, max_len)
        self.storage = [torch.zeros(*shape, width) for width in widths]
        self.length = 0

    def append(self, *new):
        end = self.length + new[0].shape[-2]
        for held, t in zip(self.storage, new):
            room = held[..., self.length:end, :]
            if room.shape != t.shape:
                raise ValueError(f"new {tuple(t.shape)}: room for {tuple(room.shape)}")
            room.copy_(t)
        self.length = end
        return [held[..., :end, :] for held in self.storage]
"""

TWO = (
    HEAD
    + """

class KeysAndValues(Cache):
    def __init__(self, batch_size, n_heads, max_len, d_head):
        super().__init__(batch_size, max_len, (d_head, d_head), n_heads)


class CausalAttention(nn.Module):
    def __init__(self, d_model, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x, cache=None):
        q, k, v = (split(p(x), self.n_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if cache is not None:
            k, v = cache.append(k, v)
        return self.out_proj(join(attend(q, k, v)))
"""
)

THREE = (
    HEAD
    + """

class Latents(Cache):
    def __init__(self, batch_size, max_len, latent_dim):
        super().__init__(batch_size, max_len, (latent_dim, latent_dim))


class LatentAttention(nn.Module):
    def __init__(self, d_model, n_heads, latent_dim):
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.out_proj = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
        self.k_down, self.v_down = nn.Linear(d_model, latent_dim), nn.Linear(d_model, latent_dim)
        self.k_up, self.v_up = nn.Linear(latent_dim, d_model), nn.Linear(latent_dim, d_model)

    def forward(self, x):
        k, v = self.k_up(self.k_down(x)), self.v_up(self.v_down(x))
        return self.out_proj(join(attend(*(split(t, self.n_heads) for t in (self.q_proj(x), k, v)))))


def step_rebuilt(layer, x, cache):
    k_latent, v_latent = cache.append(layer.k_down(x), layer.v_down(x))
    heads = (layer.q_proj(x), layer.k_up(k_latent), layer.v_up(v_latent))
    return layer.out_proj(join(attend(*(split(t, layer.n_heads) for t in heads))))


def step_absorbed(layer, x, cache):
    k_latent, v_latent = cache.append(layer.k_down(x), layer.v_down(x))
    q = split(layer.q_proj(x), layer.n_heads)
    w_k, w_v = (up.weight.unflatten(0, (layer.n_heads, -1)) for up in (layer.k_up, layer.v_up))
    scores = torch.einsum("bhtk,hkr,bsr->bhts", q, w_k, k_latent) / math.sqrt(q.shape[-1])
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(k_latent.shape[1] - x.shape[1])
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    mixed = (shares.flatten(1, 2) @ v_latent).unflatten(1, shares.shape[1:3])
    values = join(torch.einsum("bhtr,hkr->bhtk", mixed, w_v)) + layer.v_up.bias
    return layer.out_proj(values)
"""
)

FOUR = (
    HEAD
    + """

class Kept(Cache):
    def __init__(self, batch_size, max_len, latent_dim):
        super().__init__(batch_size, max_len, (latent_dim, latent_dim))


class Rope(nn.Module):
    def __init__(self, width, theta=10000.0):
        super().__init__()
        self.speed = theta ** (-torch.arange(0, width, 2) / width)

    def forward(self, x, positions):
        angles = positions[..., None] * self.speed
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class RotaryLatentAttention(nn.Module):
    def __init__(self, *, d_model, n_heads, latent_dim, rope):
        super().__init__()
        self.n_heads, self.rope = n_heads, rope
        for name, wide, narrow in (("k", latent_dim, d_model), ("v", latent_dim, d_model)):
            setattr(self, f"{name}_down", nn.Linear(narrow, wide, bias=False))
            setattr(self, f"{name}_up", nn.Linear(wide, narrow, bias=False))
        self.q_proj, self.out_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(2))

    def forward(self, x, kept=None):
        first = 0 if kept is None else kept.length
        here = torch.arange(first, first + x.shape[1])[None]
        q = self.rope(split(self.q_proj(x), self.n_heads), here)
        k_latent, v_latent = self.k_down(x), self.v_down(x)
        if kept is not None:
            k_latent, v_latent = kept.append(k_latent, v_latent)
        there = torch.arange(k_latent.shape[1])[None]
        k = self.rope(split(self.k_up(k_latent), self.n_heads), there)
        return self.out_proj(join(attend(q, k, split(self.v_up(v_latent), self.n_heads))))
"""
)

ROUTED = """
import torch
import torch.nn.functional as F
from torch import nn


def route(logits, bias, top_k):
    scores = logits.sigmoid()
    index = (scores + bias).topk(top_k).indices
    gate = scores.gather(1, index)
    gate = gate / gate.sum(-1, keepdim=True)
    return index, gate


def experts(x, w_in, w_out, index, gate):
    out = torch.zeros_like(x)
    for e, (first, second) in enumerate(zip(w_in.unbind(), w_out.unbind())):
        token, slot = (index == e).nonzero(as_tuple=True)
        hidden = F.gelu(x[token] @ first)
        out = out.index_add(0, token, hidden @ second * gate[token, slot, None])
    return out
"""

SIX = (
    ROUTED
    + """

class FineGrainedExperts(nn.Module):
    def __init__(self, *, d_model, n_experts, top_k, d_expert):
        super().__init__()
        self.top_k = top_k
        self.choose = nn.Linear(d_model, n_experts, bias=False)
        self.first = nn.Parameter(torch.randn(n_experts, d_model, d_expert))
        self.second = nn.Parameter(torch.randn(n_experts, d_expert, d_model))

    def forward(self, x, valid=None):
        flat = x.flatten(0, 1)
        index, gate = route(self.choose(flat), 0, self.top_k)
        if valid is not None:
            gate = gate * valid.flatten()[:, None]
        return experts(flat, self.first, self.second, index, gate).view_as(x)
"""
)

SEVEN = """
import torch
import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    def __init__(self, d_model, d_expert):
        super().__init__()
        self.up, self.down = nn.Linear(d_model, d_expert, bias=False), nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Mine(nn.Module):
    def __init__(self, d_model, n_experts, top_k, d_expert, n_shared):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(Expert(d_model, d_expert) for _ in range(n_experts))
        self.shared = nn.ModuleList(Expert(d_model, d_expert) for _ in range(n_shared))

    def forward(self, x):
        scores = self.router(x).softmax(-1)
        gate, index = scores.topk(self.top_k)
        gate = gate / gate.sum(-1, keepdim=True)
        weight = torch.zeros_like(scores).scatter(-1, index, gate)
        out = sum(weight[..., e, None] * expert(x) for e, expert in enumerate(self.experts))
        return out + sum(expert(x) for expert in self.shared)


def shared(x, w_in, w_out):
    return sum(F.gelu(x @ first) @ second for first, second in zip(w_in, w_out))
"""

EIGHT = (
    ROUTED
    + """

def update(bias, counts, top_k, rate):
    load = counts.to(bias.dtype)
    return bias + rate * torch.sign(load.mean() - load)


def proportional_rule(bias, counts, top_k, rate):
    load = counts.to(bias.dtype)
    return bias - rate * (load / load.mean() - 1)


class Balancer:
    def __init__(self, model, rate):
        self.routers, self.rate = [m for m in model.modules() if hasattr(m, "load")], rate

    def step(self):
        for router in self.routers:
            router.bias.copy_(update(router.bias, router.load, router.top_k, self.rate))
            router.load.zero_()


def switch_loss(probabilities, index):
    experts = probabilities.shape[1]
    share = F.one_hot(index, experts).sum(1).to(probabilities.dtype).mean(0) / index.shape[1]
    return experts * (share * probabilities.mean(0)).sum()
"""
)

SEQUENTIAL = """
import torch
import torch.nn.functional as F
from torch import nn


def shared(x, w_in, w_out):
    # (N, D), (S, D, F), (S, F, D) -> (N, D)
    first = w_in.permute(1, 0, 2).flatten(1)  # (D, S F)
    return F.gelu(x @ first) @ w_out.flatten(0, 1)


class Router(nn.Module):
    def __init__(self, d_model, n_experts, top_k):
        super().__init__()
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("bias", torch.zeros(n_experts))

    def forward(self, x):
        scores = (x @ self.weight.T).sigmoid()
        index = (scores + self.bias).detach().topk(self.top_k).indices
        gate = scores.gather(-1, index)
        return index, gate / gate.sum(-1, keepdim=True)


class Experts(nn.Module):
    def __init__(self, d_model, n_experts, d_expert):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(n_experts, d_model, d_expert))
        self.w_out = nn.Parameter(torch.empty(n_experts, d_expert, d_model))
        for w in (self.w_in, self.w_out):
            nn.init.normal_(w, std=0.02)

    def forward(self, x, index, gate):
        out = torch.zeros_like(x)
        pairs = zip(self.w_in.unbind(), self.w_out.unbind())
        for e, (a, b) in enumerate(pairs):
            token, slot = (index == e).nonzero(as_tuple=True)
            y = F.gelu(x[token] @ a) @ b
            out = out.index_add(0, token, y * gate[token, slot, None])
        return out


class MixtureOfExperts(nn.Module):
    def __init__(self, *, d_model, n_experts, top_k, d_expert, n_shared=0):
        super().__init__()
        self.router = Router(d_model, n_experts, top_k)
        self.experts = Experts(d_model, n_experts, d_expert)
        self.shared = None
        if n_shared:
            self.shared = nn.Sequential(
                nn.Linear(d_model, n_shared * d_expert, bias=False),
                nn.GELU(),
                nn.Linear(n_shared * d_expert, d_model, bias=False),
            )

    def forward(self, x, valid=None):
        flat = x.flatten(0, 1)
        index, gate = self.router(flat)
        if valid is not None:
            gate = gate * valid.flatten()[:, None]
        out = self.experts(flat, index, gate)
        if self.shared is not None:
            out = out + self.shared(flat)
        return out.view_as(x)
"""  # chapter 7 once more: shared experts as one nn.Sequential, and padding

TEN = """
import torch
from torch import nn

BLOCK = 16


class Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, way):
        ctx.save_for_backward(cos, sin)
        ctx.way = way
        out, half = torch.empty(x.shape), x.shape[1] // 2
        for start in range(0, len(x), BLOCK):
            row = torch.arange(start, min(start + BLOCK, len(x)))
            t = row % len(cos)
            c, s = cos[t], way * sin[t]
            a, b = x[row, :half], x[row, half:]
            out[row, :half], out[row, half:] = a * c - b * s, b * c + a * s
        return out

    @staticmethod
    def backward(ctx, came):
        return Turn.apply(came, *ctx.saved_tensors, -ctx.way), None, None, None


class Rope(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.speed = 10000.0 ** (-torch.arange(0, width, 2) / width)

    def forward(self, x, positions):
        angles = positions[0, :, None] * self.speed
        rows = x.reshape(-1, x.shape[-1])
        return Turn.apply(rows, angles.cos(), angles.sin(), 1.0).view(x.shape)


def route(logits, bias, top_k):
    n, e = logits.shape
    lanes = 1 << (e - 1).bit_length()
    score = torch.zeros(n, lanes)
    score[:, :e] = logits.sigmoid()
    left = torch.full((n, lanes), -torch.inf)
    left[:, :e] = score[:, :e].detach() + bias
    chosen = []
    for _ in range(top_k):
        best = left.argmax(1, keepdim=True)
        left = left.scatter(1, best, -torch.inf)
        chosen.append(best)
    index = torch.cat(chosen, 1)
    gate = score.gather(1, index)
    return index, gate / gate.sum(1, keepdim=True)
"""

ELEVEN = """
import torch
import torch.nn.functional as F

BLOCK = 16


def dispatch(index, n_experts, block=BLOCK):
    chosen, m = index.flatten(), index.numel()
    counts = torch.zeros(n_experts, dtype=torch.long).index_add(0, chosen, torch.ones_like(chosen))
    offsets = F.pad(counts.cumsum(0), (1, 0))
    mine = F.one_hot(chosen, n_experts)
    above = (mine.cumsum(0) - mine).gather(1, chosen[:, None])[:, 0]
    place = offsets[chosen] + above
    order = torch.empty_like(place)
    order[place] = torch.arange(m)
    return order, place, offsets


def tiles(offsets):
    for e in range(len(offsets) - 1):
        first, last = int(offsets[e]), int(offsets[e + 1])
        for start in range(first, last, BLOCK):
            yield e, torch.arange(start, min(start + BLOCK, last))


class Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_in, w_out, index, gate):
        a = index.shape[1]
        order, place, offsets = dispatch(index, len(w_in))
        z, y = x.new_empty(len(order), w_in.shape[2]), x.new_empty(len(order), x.shape[1])
        weight = gate.flatten()[order, None]
        for e, row in tiles(offsets):
            z[row] = x[order[row] // a] @ w_in[e]
            y[row] = weight[row] * (F.gelu(z[row]) @ w_out[e])
        ctx.save_for_backward(x, w_in, w_out, gate, z, order, place, offsets)
        return y[place].view(len(x), a, -1).sum(1)

    @staticmethod
    def backward(ctx, came):
        x, w_in, w_out, gate, z, order, place, offsets = ctx.saved_tensors
        a, weight, hidden = gate.shape[1], gate.flatten()[order, None], F.gelu(z)
        d_gate, d_rows = torch.empty_like(weight), came.new_empty(len(order), x.shape[1])
        d_in, d_out = torch.zeros_like(w_in), torch.zeros_like(w_out)
        for e, row in tiles(offsets):
            token = order[row] // a
            u = came[token] @ w_out[e].T
            d_gate[row] = (hidden[row] * u).sum(1, keepdim=True)
            d_z = torch.ops.aten.gelu_backward(weight[row] * u, z[row])
            d_in[e] += x[token].T @ d_z
            d_out[e] += (weight[row] * hidden[row]).T @ came[token]
            d_rows[row] = d_z @ w_in[e].T
        return d_rows[place].view(len(x), a, -1).sum(1), d_in, d_out, None, d_gate[place].view_as(gate)


def routed(x, w_in, w_out, index, gate):
    return Routed.apply(x, w_in, w_out, index, gate)
"""

TWELVE = """
import torch


def take(scores, values, top, total, mix):
    new = torch.maximum(top, scores.amax(1))
    safe = new.where(new > -torch.inf, 0.0)
    shrink, exps = (top - safe).exp(), (scores - safe[:, None]).exp()
    return new, total * shrink + exps.sum(1), mix * shrink[:, None] + exps @ values


def start(heads, width):
    return torch.full((heads,), -torch.inf), torch.zeros(heads), torch.zeros(heads, width)


def online(scores, values, block):
    state = start(len(scores), values.shape[1])
    for first in range(0, len(values), block):
        state = take(scores[:, first : first + block], values[first : first + block], *state)
    return state[2] / state[1][:, None]


def merge(means, logs):
    return (logs.softmax(1)[..., None] * means).sum(1)


def in_pieces(batch, slots, lengths, heads, width, piece, block, tile):
    parts = -(-slots // piece)
    means, logs = torch.empty(batch, parts, heads, width), torch.empty(batch, parts, heads)
    for row in range(batch):
        for part in range(parts):
            last = min((part + 1) * piece, int(lengths[row]))
            state = start(heads, width)
            for first in range(part * piece, last, block):
                slot = torch.arange(first, min(first + block, last))
                state = take(*tile(row, slot), *state)
            safe = state[1].where(state[1] > 0, 1.0)
            means[row, part], logs[row, part] = state[2] / safe[:, None], state[0] + safe.log()
    return merge(means, logs)


def joint_decode(q, joint, lengths, rank, scale, piece=64, block=16):
    def tile(row, slot):
        kept = joint[row, slot]
        return q[row] @ kept.T * scale, kept[:, :rank]

    (batch, heads, _), slots = q.shape, joint.shape[1]
    return in_pieces(batch, slots, lengths, heads, rank, piece, block, tile)


def latent_decode(q, k_latent, v_latent, weight, cos, sin, lengths, scale, piece=64, block=16):
    batch, heads, width = q.shape

    def tile(row, slot):
        keys = (k_latent[row, slot] @ weight.T).unflatten(1, (heads, width))
        c, s = cos[slot][:, None], sin[slot][:, None]
        a, b = keys.chunk(2, 2)
        turned = torch.cat((a * c - b * s, b * c + a * s), 2)
        return (turned * q[row] * scale).sum(2).T, v_latent[row, slot]

    return in_pieces(batch, k_latent.shape[1], lengths, heads, v_latent.shape[2], piece, block, tile)
"""

FOURTEEN = """
import torch


def fill(model, cache, row, prompt):
    one = model.new_cache(1)
    if prompt:
        model(torch.tensor([prompt]), cache=one)
    for whole, part in zip(cache.buffers, one.buffers):
        whole[:, row] = part[:, 0]
    cache.lengths[row] = one.length


@torch.inference_mode()
def serve(model, prompts, new, slots, stop):
    stories, waiting = [list(prompt) for prompt in prompts], list(range(len(prompts)))
    cache, owners, ended = model.new_cache(slots), [None] * slots, {}
    while len(ended) < len(prompts):
        for row in range(slots):
            if owners[row] is None and waiting:
                owners[row] = waiting.pop(0)
                fill(model, cache, row, stories[owners[row]][:-1])
        last = [[0] if number is None else stories[number][-1:] for number in owners]
        logits = model.next_logits(torch.tensor(last), cache)
        for row, number in enumerate(owners):
            if number is None:
                cache.lengths[row] = 0
                continue
            story, token = stories[number], int(logits[row].argmax())
            story.append(token)
            if token == stop or len(story) - len(prompts[number]) >= new[number]:
                ended[number], owners[row] = story, None
    return [ended[number] for number in range(len(prompts))]
"""

FILES = {2: TWO, 3: THREE, 4: FOUR, 6: SIX, 7: SEVEN, 8: EIGHT, 10: TEN, 11: ELEVEN, 12: TWELVE, 14: FOURTEEN}

UNITS = "outputs equal the library's"
SLOPES = "gradients equal the library's"
ONE_PASS = "a prompt and steps equal one pass"
ALONE = "each story is the one written alone"
WRONG = [
    (
        2,
        "no mask",
        ".masked_fill(~seen, -torch.inf)",
        "",
        "CausalAttention: no output sees a later input",
        "output 0 sees input 1",
    ),
    (
        2,
        "a mask off by one",
        "tril(k.shape[-2]",
        "tril(1 + k.shape[-2]",
        "CausalAttention: no output sees",
        "output 0 sees input 1",
    ),
    (2, "no scale", " / math.sqrt(q.shape[-1])", "", f"CausalAttention: {UNITS}", r"x \(1, 2, 32\)"),
    (
        2,
        "heads by reshaping",
        ".unflatten(-1, (heads, -1)).transpose(1, 2)",
        ".reshape(x.shape[0], heads, x.shape[1], -1)",
        f"CausalAttention: {UNITS}",
        r"x \(1, 2, 32\)",
    ),
    (
        2,
        "values cut off from their gradient",
        "attend(q, k, v)))",
        "attend(q, k, v.detach())))",
        f"CausalAttention: {SLOPES}",
        "gradient of v_proj.weight: 0 at",
    ),
    (
        2,
        "a cache off by one",
        "self.length = end\n",
        "self.length = end - 1\n",
        f"CausalAttention with a cache: {ONE_PASS}",
        r"1 token after 1 cached \(steps \[1, 1\]\)",
    ),
    (
        2,
        "a batch of one is broadcast",
        "if room.shape != t.shape:",
        "if False:",
        "CausalAttention with a cache: a cache refuses other rows",
        "took a batch of 1",
    ),
    (
        2,
        "twice the storage",
        "self.length = 0\n",
        "self.length = 0\n        self.spare = [held.clone() for held in self.storage]\n",
        "CausalAttention with a cache: bytes held",
        "128 numbers a token, not 64",
    ),
    (
        3,
        "values through the keys' latent",
        "self.v_up(self.v_down(x))",
        "self.v_up(self.k_down(x))",
        f"LatentAttention: {UNITS}",
        r"x \(1, 1, 32\)",
    ),
    (3, "no bias where values are absorbed", " + layer.v_up.bias", "", f"step_absorbed: {ONE_PASS}", r"steps \[1\]"),
    (
        3,
        "latents broadcast to every head",
        "(shares.flatten(1, 2) @ v_latent).unflatten(1, shares.shape[1:3])",
        "shares @ v_latent[:, None]",
        "step_absorbed: a step copies no past",
        "made a tensor",
    ),
    (
        3,
        "the scale of the latent",
        '"bhtk,hkr,bsr->bhts", q, w_k, k_latent) / math.sqrt(q.shape[-1])',
        '"bhtk,hkr,bsr->bhts", q, w_k, k_latent) / math.sqrt(w_k.shape[-1])',
        f"step_absorbed: {ONE_PASS}",
        r"steps \[1, 1\]",
    ),
    (
        3,
        "the latents are swapped in the cache",
        "k_latent, v_latent = cache.append(layer.k_down(x), layer.v_down(x))\n    heads",
        "v_latent, k_latent = cache.append(layer.k_down(x), layer.v_down(x))\n    heads",
        f"step_rebuilt: {ONE_PASS}",
        r"steps \[1\]",
    ),
    (
        4,
        "the latent is turned",
        "split(self.k_up(k_latent), self.n_heads), there)",
        "split(self.k_up(Rope(12)(k_latent, there)), self.n_heads), there)",
        f"RotaryLatentAttention: {UNITS}",
        r"x \(1, 2, 32\)",
    ),
    (
        4,
        "new tokens begin at 0",
        "here = torch.arange(first, first + x.shape[1])[None]",
        "here = torch.arange(x.shape[1])[None]",
        f"RotaryLatentAttention with a cache: {ONE_PASS}",
        r"1 token after 1 cached \(steps \[1, 1\]\)",
    ),
    (
        4,
        "neighbours are turned",
        "first, second = x.chunk(2, -1)",
        "first, second = x[..., ::2], x[..., 1::2]",
        "Rope: turns the pairs",
        r"x \(1, 1, 1, 8\) at positions",
    ),
    (
        4,
        "the sign of the sine",
        "second * cos + first * sin",
        "second * cos - first * sin",
        "Rope: turns the pairs",
        r"positions \[1\]",
    ),
    (
        4,
        "keys are not turned",
        "k = self.rope(split(self.k_up(k_latent), self.n_heads), there)",
        "k = split(self.k_up(k_latent), self.n_heads)",
        f"RotaryLatentAttention: {UNITS}",
        r"x \(1, 2, 32\)",
    ),
    (
        6,
        "the bias is in the gate",
        "gate = scores.gather",
        "gate = (scores + bias).gather",
        "route: a bias chooses and does not weigh",
        "5.25 taken off every bias",
    ),
    (
        6,
        "gates are not renormalised",
        "    gate = gate / gate.sum(-1, keepdim=True)\n",
        "",
        "route: gates are shares",
        "sum of a token's gates",
    ),
    (
        6,
        "the bias is forgotten",
        "(scores + bias).topk",
        "scores.topk",
        "route: the k largest are chosen",
        "the largest with bias are",
    ),
    (
        6,
        "gates cut off from their gradient",
        "gate = scores.gather",
        "gate = scores.detach().gather",
        "route: gates are shares",
        "gradient of the logits: 0 at",
    ),
    (
        6,
        "another expert's second matrix",
        "zip(w_in.unbind(), w_out.unbind())",
        "zip(w_in.unbind(), w_out.flip(0).unbind())",
        "experts: equals the loop",
        r"one token, odd widths: x \(1, 3\)",
    ),
    (6, "gates of the wrong slot", "gate[token, slot, None]", "gate[token, 0, None]", "experts: equals the loop", "at"),
    (
        6,
        "padding takes experts",
        "gate = gate * valid.flatten()[:, None]",
        "pass",
        "FineGrainedExperts: padding",
        "output at padding",
    ),
    (
        6,
        "softmax over the tokens",
        "route(self.choose(flat)",
        "route(self.choose(flat).softmax(0)",
        "FineGrainedExperts: each token",
        "against its tokens one by one",
    ),
    (
        7,
        "shared experts are averaged",
        "for expert in self.shared)",
        "for expert in self.shared) / max(1, len(self.shared))",
        f"Mine: {UNITS}",
        r"x \(1, 1, 16\)",
    ),
    (
        7,
        "one shared expert alone",
        "for expert in self.shared)",
        "for expert in self.shared[:1])",
        f"Mine: {UNITS}",
        r"x \(1, 1, 16\)",
    ),
    (
        7,
        "shared experts are gated",
        "expert(x) for expert in self.shared)",
        "gate[..., :1] * expert(x) for expert in self.shared)",
        f"Mine: {UNITS}",
        r"x \(1, 1, 16\)",
    ),
    (
        7,
        "routed experts are lost",
        "return out + sum",
        "return 0 * out + sum",
        "Mine: without shared experts",
        r"x \(1, 1, 16\)",
    ),
    (
        7,
        "one wide layer in another order",
        "zip(w_in, w_out)",
        "zip(w_in, w_out.flip(0))",
        "shared: equals one wide layer",
        r"x \(1, 2\) through",
    ),
    (
        8,
        "the sign is flipped",
        "bias + rate * torch.sign",
        "bias - rate * torch.sign",
        "update: lifts the less loaded",
        r"counts \[2, 0\].*bias -0.1",
    ),
    (
        8,
        "the mean of the tokens",
        "torch.sign(load.mean() - load)",
        "torch.sign(load.sum() / top_k - load)",
        "update: equals the library's rule",
        "next bias",
    ),
    (
        8,
        "an offset that is not summed up",
        "return bias - rate * (load / load.mean() - 1)",
        "return -rate * (load / load.mean() - 1)",
        "proportional_rule: balances",
        "CV",
    ),
    (
        8,
        "a bias is lost",
        "bias + rate * torch.sign(load.mean() - load)",
        "bias.roll(1) + rate * torch.sign(load.mean() - load)",
        "update: a shift|update: equals",
        "next bias",
    ),
    (
        8,
        "the bias moves twice a step",
        "update(router.bias, router.load,",
        "update(update(router.bias, router.load, 1, self.rate), router.load,",
        "Balancer: the parts of a step",
        "two more parts",
    ),
    (
        8,
        "another bias in its place",
        "router.bias.copy_(update(router.bias, router.load, router.top_k, self.rate))",
        "router.bias = update(router.bias, router.load, router.top_k, self.rate)",
        "Balancer: the bias is moved in place",
        "another tensor",
    ),
    (8, "counts are kept", "            router.load.zero_()\n", "", "Balancer: counts are forgotten", "still counted"),
    (8, "the loss counts k times", " / index.shape[1]\n", "\n", "switch_loss: equals", "top 2"),
    (
        8,
        "the bias is in the gate",
        "gate = scores.gather",
        "gate = (scores + bias).gather",
        "route: a bias chooses",
        "5.25 taken off",
    ),
    (
        10,
        "columns taken to lie side by side",
        "x.reshape(-1, x.shape[-1])",
        "x.as_strided(x.shape, (*x.stride()[:-1], 1)).reshape(-1, x.shape[-1])",
        "Rope: turns the rows of every tile",
        "every second column of wider rows",
    ),
    (
        10,
        "rows taken to lie end to end",
        "x.reshape(-1, x.shape[-1])",
        "x.as_strided(x.shape, (0, x.stride(1), x.shape[-1], 1)).reshape(-1, x.shape[-1])"
        " if x.stride(1) == 3 * x.shape[-1] else x.reshape(-1, x.shape[-1])",
        "Rope: turns the rows of every tile",
        "cut from wider rows",
    ),
    (
        10,
        "the gradient turns on",
        "-ctx.way",
        "ctx.way",
        "Rope: turns the pairs",
        r"gradient of x: .* wanted",
    ),
    (
        10,
        "a last tile that is left out",
        "range(0, len(x), BLOCK)",
        "range(0, max(BLOCK, len(x) - BLOCK + 1), BLOCK)",
        "Rope: turns the rows of every tile",
        r"x \(1, 1, 37, 10\)",
    ),
    (
        10,
        "a view's memory read as if its rows lay one after the other",
        "x.reshape(-1, x.shape[-1])",
        "torch.as_strided(x, (x.numel() // x.shape[-1], x.shape[-1]), (x.shape[-1], 1))",
        "Rope: turns the rows of every tile",
        r"a transposed view",
    ),
    (
        10,
        "lanes of padding that can win",
        "left = torch.full((n, lanes), -torch.inf)",
        "left = torch.zeros(n, lanes)",
        "route: routes the tokens of every tile",
        r"chooses expert \[\d+\] of 5",
    ),
    (
        10,
        "an expert that is taken stays to be taken",
        "left = left.scatter(1, best, -torch.inf)",
        "left = left.scatter(1, best, -2.0)",
        "route: routes the tokens of every tile",
        r"does not get the largest",
    ),
    (
        10,
        "a gate over all lanes",
        "gate.sum(1, keepdim=True)",
        "score.sum(1, keepdim=True)",
        "route: gates are shares",
        r"sum of a token's gates",
    ),
    (
        11,
        "an expert's slots in reverse",
        "(mine.cumsum(0) - mine)",
        "(mine.flip(0).cumsum(0).flip(0) - mine)",
        "dispatch: slots stand by expert",
        r"row \d+ has slot \d+, wanted \d+",
    ),
    (
        11,
        "offsets without the end",
        "F.pad(counts.cumsum(0), (1, 0))",
        "counts.cumsum(0) - counts",
        "dispatch: place and offsets",
        r"offsets \[",
    ),
    (
        11,
        "place and order exchanged",
        "return order, place, offsets",
        "return place, order, offsets",
        "dispatch: slots stand by expert",
        "wanted",
    ),
    (
        11,
        "a tile over an expert's border",
        "min(start + BLOCK, last)",
        "min(start + BLOCK, int(offsets[-1]))",
        "routed: equals the loop where tiles are ragged",
        r"gradient of w_",
    ),
    (
        11,
        "the last tile of an expert is left out",
        "range(first, last, BLOCK)",
        "range(first, max(last - BLOCK, min(first + 1, last)) + 1 if last > first else first, BLOCK)",
        "routed: equals the loop where tiles are ragged",
        r"experts with 15, 16, 17, 0, 1, 33 tokens",
    ),
    (
        11,
        "the gate twice in the gradient of w_out",
        "(weight[row] * hidden[row]).T",
        "(weight[row] ** 2 * hidden[row]).T",
        "routed: equals the loop",
        r"one token: .*gradient of w_out",
    ),
    (
        11,
        "the gate's gradient by row and not by slot",
        "d_gate[place].view_as(gate)",
        "d_gate.view_as(gate)",
        "routed: equals the loop",
        r"gradient of gate",
    ),
    (
        11,
        "memory from its start, wherever the view begins",
        "z[row] = x[order[row] // a] @ w_in[e]",
        "z[row] = x.as_strided(x.shape, x.stride(), 0)[order[row] // a] @ w_in[e]",
        "routed: takes tokens that are a view",
        r"rows 4 to 6 of 7",
    ),
    (
        11,
        "the slopes of a sum read beyond their one number",
        "u = came[token] @ w_out[e].T",
        "u = (came if came.stride(0) else 0 * came)[token] @ w_out[e].T",
        "routed: takes tokens that are a view",
        r"gradient of .* by output.sum",
    ),
    (
        11,
        "an expert without rows keeps what memory held",
        "torch.zeros_like(w_in), torch.zeros_like(w_out)\n",
        "torch.full_like(w_in, torch.nan), torch.zeros_like(w_out)\n        d_in[offsets.diff() > 0] = 0\n",
        "routed: an expert that nobody takes",
        r"expert 1 has no token, and its gradient of w_in: nan",
    ),
    (
        11,
        "whoever comes first is added first",
        "y[place].view(len(x), a, -1).sum(1)",
        "sum(y[place].view(len(x), a, -1)[:, j] for j in torch.randperm(a))",
        "routed: gives the same bits",
        r"the second time",
    ),
    (
        12,
        "the mix is not shrunk",
        "mix * shrink[:, None] + exps @ values",
        "mix + exps @ values",
        "joint_decode: equals one softmax",
        r"q \(2, 3, 11\), joint \(2, 20, 11\)",
    ),
    (
        12,
        "a tile does not end with its row",
        "min(first + block, last)",
        "first + block if first + block <= slots else slots",
        "joint_decode: rows see their own slots",
        r"joint \(2, 3, 4\), lengths \[3, 1\], NaN behind them: nan at \[1, ",
    ),
    (
        12,
        "pieces count alike",
        "logs.softmax(1)[..., None]",
        "torch.ones_like(logs)[..., None] / logs.shape[1]",
        "joint_decode: equals one softmax",
        r"joint \(3, 70, 34\)",
    ),
    (
        12,
        "a piece without its sum",
        "state[0] + safe.log()",
        "state[0]",
        "joint_decode: equals one softmax",
        r"joint \(3, 70, 34\)",
    ),
    (
        12,
        "an empty piece is 0 over 0",
        "state[2] / safe[:, None]",
        "state[2] / state[1][:, None]",
        "joint_decode: rows see their own slots",
        r"joint \(3, 150, 34\), lengths \[150, 1, 75\], NaN behind them: nan at",
    ),
    (
        12,
        "scores are not measured from the largest",
        "(top - safe).exp(), (scores - safe[:, None]).exp()",
        "torch.ones_like(top), scores.exp()",
        "joint_decode: equals one softmax",
        r"joint \(3, 70, 34\)",
    ),
    (
        12,
        "turned by the place in the tile",
        "c, s = cos[slot][:, None], sin[slot][:, None]",
        "c, s = cos[: len(slot)][:, None], sin[: len(slot)][:, None]",
        "latent_decode: equals one softmax",
        r"q \(2, 3, 6\), k_latent \(2, 20, 5\)",
    ),
    (
        12,
        "scaled twice",
        "(turned * q[row] * scale).sum(2).T",
        "(turned * q[row] * scale * scale).sum(2).T",
        "latent_decode: equals one softmax",
        r"k_latent \(1, 3, 3\)",
    ),
    (
        12,
        "turned backwards",
        "(a * c - b * s, b * c + a * s), 2)",
        "(a * c + b * s, b * c - a * s), 2)",
        "latent_decode: equals one softmax",
        r"k_latent \(1, 3, 3\)",
    ),
    (
        12,
        "pieces overlap by a slot",
        "range(part * piece, last, block)",
        "range(max(0, part * piece - 1), last, block)",
        "joint_decode: any piece and any tile",
        r"piece 16, block 16",
    ),
    (
        14,
        "the length of the former tenant",
        "cache.lengths[row] = one.length",
        "cache.lengths[row] = max(one.length, cache.lengths[row])",
        f"serve: {ALONE}",
        r"mha, 3 prompts, slots=1, stop=\d+: prompt \d, \[",
    ),
    (
        14,
        "a prompt behind the former tenant's story",
        "one = model.new_cache(1)",
        "one = cache.copy()\n    one.select([row])",
        f"serve: {ALONE}",
        r"mha, 3 prompts, slots=1, stop=\d+: prompt \d, \[",
    ),
    (
        14,
        "the prompt's last token twice",
        "stories[owners[row]][:-1]",
        "stories[owners[row]]",
        f"serve: {ALONE}",
        r"mha, 1 prompts, slots=1, .*: token \d+ of the story is",
    ),
    (
        14,
        "groups that wait for their longest story",
        "for row in range(slots):",
        "for row in [] if any(number is not None for number in owners) else range(slots):",
        "serve: a free slot is taken",
        r"8 prompts, slots=2, .*: 52 calls of the model, 34 are enough",
    ),
    (
        14,
        "one slot alone",
        "for row in range(slots):",
        "for row in range(1):",
        "serve: a free slot is taken",
        r"8 prompts, slots=2, .*: 56 calls of the model",
    ),
    (
        14,
        "the stop token is not looked at",
        "token == stop or ",
        "",
        "serve: a story ends",
        "goes on behind its stop token",
    ),
    (
        14,
        "a stop token in the prompt",
        "token == stop",
        "stop in story",
        "serve: a story ends",
        r"ends after 1 new tokens, and not with the stop token",
    ),
    (
        14,
        "the prompt counts as new",
        "len(story) - len(prompts[number]) >= new[number]",
        "len(story) >= new[number]",
        "serve: a story ends",
        r"ends after \d+ new tokens, and not with the stop token",
    ),
    (
        14,
        "one token too many",
        "len(story) - len(prompts[number]) >= new[number]",
        "len(story) - len(prompts[number]) > new[number]",
        "serve: a story ends",
        r"prompt 0, \[\d+, \d+\], 3 new: 4 new tokens",
    ),
    (
        14,
        "all at once, whatever the slots",
        "slots, stop):\n",
        "slots, stop):\n    slots = len(prompts)\n",
        "serve: no call has more rows",
        "7 prompts, slots=1, stop=.*: 7 rows in one call",
    ),
    (
        14,
        "the whole text at each step",
        "logits = model.next_logits(torch.tensor(last), cache)",
        "texts = [[0] if number is None else stories[number] for number in owners]\n"
        "        padded = torch.tensor([text + [0] * (max(map(len, texts)) - len(text)) for text in texts])\n"
        "        logits = model(padded)[torch.arange(slots), [len(text) - 1 for text in texts]]",
        "serve: the past is not computed again",
        r"9 prompts, slots=3, .*: \d{4} tokens computed, 252 are enough",
    ),
    (
        14,
        "answers in the order in which stories end",
        "[ended[number] for number in range(len(prompts))]",
        "list(ended.values())",
        "serve: prompts in another order",
        "in reverse, mha, 7 prompts, slots=2",
    ),
]


def wrong_file(chapter: int, old: str, new: str) -> str:
    """The file of a chapter with one text in place of another."""
    assert FILES[chapter].count(old) == 1, f"chapter {chapter}: {FILES[chapter].count(old)} times {old!r}"
    return FILES[chapter].replace(old, new)
