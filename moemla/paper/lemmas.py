"""The paper's statements of cost, in multiply-adds (MACs) of one layer: as printed, and as eqs. 11-14 cost.

Letters: n sequence length, d model width, r latent width, rho = r/d, H heads, N all experts, N_s shared ones, k active
routed ones. Built in chapter 3.
"""

from typing import Any

from moemla.complexity import block_macs_per_token
from moemla.config import require


def printed_mha_macs(n: int, d: int) -> int:
    """Eq. 15: 4nd^2 + 2n^2 d, which is right."""
    return 4 * n * d**2 + 2 * n**2 * d


def printed_mla_macs(n: int, d: int, r: int) -> int:
    """Eq. 16, the statement of Lemma 3.1: 2nd^2 (1 + rho) + 2n^2 d rho."""
    return 2 * n * d**2 + 2 * n * d * r + 2 * n**2 * r


def proof_mla_macs(n: int, d: int, r: int) -> int:
    """The terms that the proof of Lemma 3.1 lists: eq. 16 and 2nrd of reconstruction."""
    return printed_mla_macs(n, d, r) + 2 * n * r * d


def corrected_mla_macs(n: int, d: int, r: int, n_heads: int, form: str = "rebuilt") -> int:
    """What eqs. 13-14 cost for `n` tokens.

    Projections are 2nd^2 + 4ndr in both forms. `rebuilt` (eq. 14: each head's keys and values from the
    latent) then attends over heads of width d/H: 2n^2 d. `absorbed` (k_up folded into the query, v_up
    applied after the weighted sum) attends over the latent once a head: 2n^2 H r. Rotating K after eq. 14,
    as the paper does, rules the second out for K.
    """
    require(form in ("rebuilt", "absorbed"), "form", form, "choose 'rebuilt' or 'absorbed'")
    attended = d if form == "rebuilt" else n_heads * r
    return 2 * n * d**2 + 4 * n * d * r + 2 * n**2 * attended


def lemma_3_1(n: int, d: int, rho: float, n_heads: int = 8) -> dict[str, float]:
    """MLA over MHA in Lemma 3.1: printed, as its proof's terms sum, and in both real forms."""
    r, mha = round(rho * d), printed_mha_macs(n, d)
    return {
        "printed": printed_mla_macs(n, d, r) / mha,
        "proof": proof_mla_macs(n, d, r) / mha,
        "rebuilt": corrected_mla_macs(n, d, r, n_heads) / mha,
        "absorbed": corrected_mla_macs(n, d, r, n_heads, "absorbed") / mha,
    }


def printed_moe_macs(d: int, n_total: int, n_shared: int, top_k: int) -> float:
    """Eq. 17 (Lemma 3.2), a token, constants as 1: dN + kd^2 / (N/N_s) + N_s d^2 / N. Built in chapter 6."""
    return d * n_total + top_k * d**2 / (n_total / n_shared) + n_shared * d**2 / n_total


def corrected_moe_macs(d: int, d_expert: int, n_routed: int, n_shared: int, top_k: int) -> int:
    """A token's router and its k + N_s experts of two matrices each. Built in chapter 6."""
    return d * n_routed + (top_k + n_shared) * 2 * d * d_expert


def printed_block_macs(n: int, d: int, r: int, n_total: int, n_shared: int, top_k: int) -> float:
    """Eq. 20 (Theorem 3.3), constants as 1: 4nd^2 of FFN leaves a sum it never entered.

    Built in chapter 9.
    """
    experts = d * n_total + (top_k + n_shared) * d**2 / n_total
    return printed_mla_macs(n, d, r) + experts - 4 * n * d**2


def printed_block_order(n: int, d: int, r: int, n_total: int, n_shared: int, top_k: int) -> float:
    """Eq. 18, the inside of its O: n^2 d rho + nd^2 (1 + rho + (k + N_s)/N). Built in chapter 9."""
    return n**2 * r + n * d**2 * (1 + r / d + (top_k + n_shared) / n_total)


def printed_speedup(rho: float, n_total: int, n_shared: int, top_k: int) -> float:
    """Theorem 3.3's asymptotic factor N / (rho (k + N_s)), 16 for the paper's model. Built in chapter 9."""
    return n_total / (rho * (top_k + n_shared))


def corrected_speedup(standard: Any, config: Any, seq_len: int) -> float:
    """Multiply-adds of one block of `standard` over one of `config`, at `seq_len`. Built in chapter 9.

    For MHA with a dense FFN over the paper's form with rebuilt keys this tends to 1 as seq_len grows.
    """
    return block_macs_per_token(standard, seq_len) / block_macs_per_token(config, seq_len)


def printed_cache_elements(n: int, n_layers: int, n_heads: int, width: int) -> int:
    """Theorem 3.4: 2nLH times d (standard) or r (latent), one factor H too many."""
    return 2 * n * n_layers * n_heads * width


def corrected_cache_elements(n: int, n_layers: int, width: int) -> int:
    """What is kept: two tables a layer, d wide (MHA) or r (latents that heads share)."""
    return 2 * n * n_layers * width
