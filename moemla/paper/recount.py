"""What the paper's numbers come to when they are computed again: one function for each kind of question.

`claims.yml` names these functions. Their positional arguments are numbers that the paper prints elsewhere
(given there by id), their keywords the paper's settings; each returns the value in the unit that the claim
prints, and a line of detail. The ledger decides what agrees. Here everything is counted from
configs and from the library's own rules; `arithmetic` works on numbers that are printed. Built in chapter 19.
"""

import math
from itertools import product
from types import SimpleNamespace
from typing import Any

from moemla import complexity
from moemla.config import SIZES, ModelConfig
from moemla.paper import lemmas

N_ROUTED, N_SHARED, TOP_K = 62, 2, 6  # section 3.1
N_TOTAL = N_ROUTED + N_SHARED
LAYERS, WIDTH, HEADS = 9, 512, 8  # size M
RATIO = 1 / 2  # r/d in Tables 2, 3 and 6
SEQUENCE, BATCH = 512, 16  # section 3.3 and Table 6; the latter leaves its length open
FP16 = 2  # bytes
MILLION, MEBI = 10**6, 2**20
PAPER_SIZES = ("XS", "S", "M", "L", "XL")
Value = tuple[int | float, str]  # in the unit of the claim, and a line of detail


def preset(size: str = "M", variant: str = "mha-rope", matched: str = "parameters", **changes: Any) -> ModelConfig:
    """The paper's model of a size; 50,257 tokens. Dense cells keep the standard FFN of 4d."""
    if not variant.startswith("moe-"):
        changes.setdefault("d_ff", 4 * SIZES[size]["d_model"])
    return ModelConfig.preset(size, variant=variant, matched=matched, **changes)


# Parameters: abstract, section 3.1, Tables 1, 2, 4, 7.


def combinations(printed: float) -> Value:
    """Ways to choose 6 of 62."""
    other = next((n for n in range(TOP_K, 2 * N_TOTAL) if math.comb(n, TOP_K) == printed), None)
    detail = f"the printed number is C({other}, {TOP_K})" if other else ""
    return complexity.routing_combinations(N_ROUTED, TOP_K), detail


def dense_millions(size: str) -> Value:
    """Parameters of the plain dense model, tied head, biases, no position table; in millions."""
    total = complexity.parameters(preset(size)).total
    learned = complexity.parameters(preset(size, "mha")).total
    untied = complexity.parameters(preset(size, tie_embeddings=False)).total
    return (
        total / MILLION,
        f"learned positions {learned / MILLION:.2f} M, untied head {untied / MILLION:.2f} M",
    )


def sizes_of_one_convention(*printed: float) -> Value:
    """The most of Table 1's five sizes that any one convention gives to the printed digit."""
    best = (0, "")
    for bias, tied, positions in product((True, False), (True, False), ("mha", "mha-rope")):
        totals = [
            complexity.parameters(preset(s, positions, bias=bias, tie_embeddings=tied)).total for s in PAPER_SIZES
        ]
        bare = [12 * c["n_layers"] * c["d_model"] ** 2 for c in (SIZES[s] for s in PAPER_SIZES)]  # matrices alone
        alone = [
            [b + tokens * SIZES[s]["d_model"] * (1 if tied else 2) for b, s in zip(bare, PAPER_SIZES, strict=True)]
            for tokens in (50257, 50000)
        ]
        for counts in (totals, *alone):
            hits = sum(round(n / MILLION, 1) == p for n, p in zip(counts, printed, strict=True))
            best = max(best, (hits, f"{', '.join(f'{n / MILLION:.2f}' for n in counts)} M"))
    return best


def medium_millions(printed: float) -> Value:
    """Size M of Table 1, and the number of layers whose total lies nearest to what is printed."""
    totals = {n: complexity.parameters(preset("M", n_layers=n)).total / MILLION for n in range(1, 25)}
    nearest = min(totals, key=lambda n: abs(totals[n] - printed))
    return totals[LAYERS], f"{nearest} layers would give {totals[nearest]:.2f} M"


def total_millions(size: str = "M", variant: str = "moe-mla-rope", **settings: Any) -> Value:
    """All parameters, in millions."""
    count = complexity.parameters(preset(size, variant, **settings))
    return count.total / MILLION, f"{count.active / MILLION:.2f} M active"


def active_millions(size: str = "M", variant: str = "moe-mla-rope", **settings: Any) -> Value:
    """Active parameters, in millions."""
    count = complexity.parameters(preset(size, variant, **settings))
    floor = (count.embedding + count.attention) / MILLION
    return count.active / MILLION, f"embedding and attention alone are {floor:.2f} M"


def active_saving(variant: str = "moe-mla-rope", **settings: Any) -> Value:
    """Percent fewer active parameters than the dense model of size M."""
    active = complexity.parameters(preset("M", variant, **settings)).active
    dense = complexity.parameters(preset("M")).total
    return 100 * (1 - active / dense), f"{active / MILLION:.1f} M active against {dense / MILLION:.1f} M"


def expert_share_of_ffn(total: float) -> Value:
    """The expert's share of the standard FFN's width at which size M has a given total, in millions."""
    one, two = (complexity.parameters(preset("M", "moe-mla-rope", d_expert=f)).total for f in (8, 16))
    hidden = 8 + 8 * (total * MILLION - one) / (two - one)
    return hidden / (4 * WIDTH), f"hidden width {hidden:.1f}, 1/{4 * WIDTH / hidden:.1f} of the FFN"


def effective_capacity() -> Value:
    """Active experts in units of the standard FFN, when each is a quarter of it."""
    config = preset("M", "moe-mla-rope", matched="literal")
    active = (config.top_k + config.n_shared) * config.d_expert / (4 * config.d_model)
    layer = (4 + 8 * active) / 12
    return active, f"a layer's projections and FFN then cost {layer:.2f} times the dense layer's"


def scaled_width(power: float, active: int = TOP_K, total: int = N_TOTAL) -> Value:
    """512 scaled by a power of N/k (section 4.3)."""
    width = WIDTH * (total / active) ** power
    return width, f"2^(1/3) x {WIDTH} = {WIDTH * 2 ** (1 / 3):.1f}"


def relative_flops(variant: str, width: int = WIDTH, quarter: bool = False) -> Value:
    """FLOPs a token over those of dense MHA at M, head included; experts d/16 wide, or d for the quarter reading.

    Width 645 has no heads of whole width: one head of all of it stands for them, which costs the same.
    """
    config = preset("M", variant).to_dict()
    config |= dict(d_model=width, n_heads=1, n_kv_heads=1, d_head=width, d_value=width, latent_dim=width // 2)
    config |= dict(d_ff=4 * width, d_expert=width if quarter else round(width / 16))
    wide, dense = SimpleNamespace(**config), preset("M")
    full, causal = (
        complexity.flops_per_token(wide, n) / complexity.flops_per_token(dense, n) for n in (SEQUENCE, SEQUENCE // 2)
    )
    return full, f"{causal:.3f} when each token is counted against half of the keys"


def nearest_width_with_even_heads(printed: float) -> Value:
    """The width nearest to the printed one that splits into 8 heads of even width, as rotary pairs need."""
    printed = round(printed)
    factors = [f for f in range(2, printed) if printed % f == 0 and all(f % p for p in range(2, f))]
    counts = [h for h in range(1, printed + 1) if printed % (2 * h) == 0]
    detail = f"{printed} = {' x '.join(map(str, factors))}; {len(counts)} numbers of heads give it an even head"
    return 2 * HEADS * round(printed / (2 * HEADS)), detail


# The cache and memory: abstract, Theorem 3.4, Tables 4 and 6.


def cache_saving(size: str = "M", variant: str = "mla-rope", **changes: Any) -> Value:
    """Percent of MHA's cache that a form does without."""
    kept = complexity.cache_bytes_per_token(preset(size, variant, **changes))
    full = complexity.cache_bytes_per_token(preset(size))
    return 100 * (1 - kept / full), f"{kept} against {full} bytes a token"


def cache_mib(variant: str = "mha-rope") -> Value:
    """XL's cache for 16 sequences of 512 in fp16, in MiB."""
    size = BATCH * SEQUENCE * complexity.cache_bytes_per_token(preset("XL", variant), FP16)
    return size / MEBI, f"{size / MILLION:.1f} MB in millions of bytes"


def printed_cache_mib(per_head_latent: bool = False) -> Value:
    """Eq. 22's formulas at Table 6's setting, in MiB: standard (2nLHd), or with a latent for each head (2nLHr)."""
    config = preset("XL")
    width = round(RATIO * config.d_model) if per_head_latent else config.d_model
    elements = lemmas.printed_cache_elements(SEQUENCE, config.n_layers, config.n_heads, width)
    return BATCH * elements * FP16 / MEBI, f"{config.n_heads} times what is kept"


def printed_latent_over_true_mha() -> Value:
    """Percent saved when Theorem 3.4's 2nLHr is set against the 2nLd that MHA keeps, at M."""
    printed = lemmas.printed_cache_elements(SEQUENCE, LAYERS, HEADS, round(RATIO * WIDTH))
    kept = lemmas.corrected_cache_elements(SEQUENCE, LAYERS, WIDTH)
    return 100 * (1 - printed / kept), f"{printed / kept:.0f} times as much"


def latent_over_head() -> Value:
    """r over d_k at M."""
    return RATIO * WIDTH / (WIDTH / HEADS), f"r = {RATIO * WIDTH:.0f}, d_k = {WIDTH // HEADS}"


# Lemmas and theorems of section 3.2. The formulas are in `lemmas`; here they meet the paper's settings.


def lemma_3_1(form: str, n: int = SEQUENCE) -> Value:
    """MLA's multiply-adds over MHA's at M's width: `printed`, `proof`, `rebuilt` or `absorbed`."""
    ratios = lemmas.lemma_3_1(n, WIDTH, RATIO, HEADS)
    return ratios[form], ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())


def mha_macs(n: int = SEQUENCE, printed: bool = False) -> Value:
    """One MHA layer's multiply-adds, in millions: eq. 15, or counted from the layer's matrices."""
    if printed:
        return lemmas.printed_mha_macs(n, WIDTH) / MILLION, ""
    block = complexity.block_macs_per_token(preset("M"), n) - 8 * WIDTH**2
    return n * block / MILLION, ""


def moe_macs(form: str) -> Value:
    """A token's multiply-adds in the experts' layer at M: eq. 17, or counted for a reading of the expert's width."""
    if form == "printed":
        return lemmas.printed_moe_macs(WIDTH, N_TOTAL, N_SHARED, TOP_K) / MILLION, "million multiply-adds"
    width = {"quarter": WIDTH, "matched": WIDTH // 16}[form]
    macs = lemmas.corrected_moe_macs(WIDTH, width, N_ROUTED, N_SHARED, TOP_K)
    return macs / MILLION, f"million multiply-adds with experts {width} wide"


def lemma_expert_share() -> Value:
    """The expert's share of the FFN in the proof of Lemma 3.2, which spreads one layer over all N."""
    return 1 / N_TOTAL, f"1/{N_TOTAL}"


def active_term(equation: int) -> Value:
    """The experts' coefficient of d^2 in eq. 17, which multiplies k by N_s, and in eq. 18, which adds them."""
    value = {17: (TOP_K * N_SHARED + N_SHARED) / N_TOTAL, 18: (TOP_K + N_SHARED) / N_TOTAL}[equation]
    return value, f"{value * N_TOTAL:.0f}/{N_TOTAL}"


def routing_over_experts() -> Value:
    """Eq. 17's routing term, dropped in eq. 18, over the experts' term that eq. 18 keeps."""
    return N_TOTAL * WIDTH / ((TOP_K + N_SHARED) / N_TOTAL * WIDTH**2), f"N/d = {N_TOTAL / WIDTH}"


def block_coefficient(part: str) -> Value:
    """The coefficient of nd^2 in a standard block: its FFN, or all of it, in multiply-adds."""
    matrices = complexity.block_macs_per_token(preset("M"), 0) / WIDTH**2
    attention = sum(i * o for i, o in complexity.attention_matrices(preset("M"))) / WIDTH**2
    return {"ffn": matrices - attention, "all": matrices}[part], ""


def equation_20_coefficient() -> Value:
    """The coefficient of nd^2 in eq. 20's closed terms as n grows with d held, attention's n^2 and routing aside."""
    macs = [lemmas.printed_block_macs(n, WIDTH, round(RATIO * WIDTH), N_TOTAL, N_SHARED, TOP_K) for n in (1, 2)]
    per_token = macs[1] - macs[0] - 3 * 2 * RATIO * WIDTH  # the difference of 2 n^2 d rho between n = 2 and n = 1
    return per_token / WIDTH**2, ""


def speedup(form: str, n: int = SEQUENCE) -> Value:
    """Standard over MoE-MLA: Theorem 3.3's factor, or the true count for a reading of the expert's width."""
    if form == "printed":
        return lemmas.printed_speedup(RATIO, N_TOTAL, N_SHARED, TOP_K), ""
    matched = {"quarter": "literal", "matched": "parameters"}[form]
    config = preset("M", "moe-mla-rope", matched=matched)
    return lemmas.corrected_speedup(preset("M"), config, n), f"n = {n}, experts {config.d_expert} wide"


def ffn_speedup(form: str) -> Value:
    """The FFN's factor in Theorem 3.3: in its statement, and at the end of its proof."""
    statement = N_TOTAL / (TOP_K + N_SHARED)
    return {"statement": statement, "proof": 4 * statement}[form], ""


# Rotary positions and Algorithm 1.


def relative_position_error() -> Value:
    """The largest difference between the two sides of eq. 10 over many positions, in float64."""
    import torch

    from moemla.rope import RotaryEmbedding

    width, length = 64, 128
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, width, dtype=torch.float64, generator=generator)
    rope = RotaryEmbedding(width, length, dtype=torch.float64)
    spread = [rope(v.expand(1, 1, length, width)).squeeze() for v in (q, k)]
    left = spread[0] @ spread[1].T  # (m, n): <R_m q, R_n k>
    right = spread[1] @ q  # (n - m): <q, R_{n-m} k>
    m, n = torch.triu_indices(length, length)
    worst = (left[m, n] - right[n - m]).abs().max().item()
    return worst, f"{length} positions, {width} dimensions"


def balanced_update(rule: str) -> Value:
    """How far a rule moves every bias in one step, in units of gamma, when all experts are equally loaded."""
    import torch

    from moemla import balancing

    tokens = 1000 * N_ROUTED
    counts = torch.full((N_ROUTED,), tokens * TOP_K // N_ROUTED)
    moved = balancing.RULES[rule](torch.zeros(N_ROUTED, dtype=torch.float64), counts, TOP_K, 1.0)
    drift = f"(k - 1)/N_r = {(TOP_K - 1) / N_ROUTED:.4f}"
    return moved.mean().item(), drift if rule == "algorithm-1" else ""


def balanced_share(form: str) -> Value:
    """The share of tokens at an expert: Algorithm 1's target 1/N_r, and what top-6 routing gives on average."""
    return {"printed": 1 / N_ROUTED, "mean": TOP_K / N_ROUTED}[form], f"k/N_r = {TOP_K}/{N_ROUTED}"


def step_ratio() -> Value:
    """One step of eq. 4 over one of Algorithm 1 for the same overload, biases relative to each other."""
    import torch

    from moemla import balancing

    counts = torch.full((N_ROUTED,), 6000)
    counts[0] += 620
    counts[1:] -= 10
    zero = torch.zeros(N_ROUTED, dtype=torch.float64)
    steps = [balancing.RULES[rule](zero, counts, TOP_K, 1.0) for rule in ("equation-4", "algorithm-1")]
    gaps = [(step[0] - step[1]).item() for step in steps]
    return gaps[0] / gaps[1], f"N_r/k = {N_ROUTED / TOP_K:.2f}"


def gate_change() -> Value:
    """What a bias does to a gate's value when it stands inside the softmax (Algorithm 1, lines 3-4; eq. 2)."""

    def gate(bias: float) -> float:
        scores = [math.exp(1.0 + bias), math.exp(0.5)]  # two chosen experts, renormalised
        return scores[0] / sum(scores)

    step = 1e-6
    return abs(gate(step) - gate(-step)) / (2 * step), "d gate / d b for two chosen experts, logits 1.0 and 0.5"


def noise_floor(tokens: int, routed: int = N_ROUTED, top_k: int = TOP_K) -> Value:
    """The CV that independent uniform routing shows in a window of that many tokens."""
    from moemla import balancing

    floors = (f"{balancing.noise_floor(routed, top_k, t):.3f} at {t:,}" for t in (SEQUENCE, 8192, 65536))
    return balancing.noise_floor(routed, top_k, tokens), "floor " + ", ".join(floors)
