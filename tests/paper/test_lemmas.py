"""The paper's formulas against hand counts, and the corrected ones against the config's."""

import itertools
import math

import pytest

from moemla import ModelConfig, complexity
from moemla.paper import lemmas


@pytest.mark.parametrize("n", [1, 512, 2048])
def test_corrected_formulas_are_what_the_config_counts(n):
    """Lemma 3.1 rebuilt, eq. 15 and the experts, summed, are one block's multiply-adds."""
    dense, moe = ModelConfig.preset("M", "mha-rope"), ModelConfig.preset("M", "moe-mla-rope")
    ffn = 8 * 512**2
    assert lemmas.printed_mha_macs(n, 512) + n * ffn == n * complexity.block_macs_per_token(dense, n)
    experts = lemmas.corrected_moe_macs(512, 32, 62, 2, 6)
    block = lemmas.corrected_mla_macs(n, 512, 256, 8) + n * experts
    assert block == n * complexity.block_macs_per_token(moe, n)


def test_absorbed_attention_by_shapes():
    """Count the multiply-adds of the absorbed products from the shapes of their factors."""
    n, d, heads, r = 16, 32, 4, 12
    k = d // heads
    products = [(n, d, d), (n, d, r), (n, d, r), (n, d, d)]  # q, the two latents, out
    for _ in range(heads):
        products += [(n, k, r), (n, r, n), (n, n, r), (n, r, k)]  # q into the latent, scores, sum, value out
    by_shape = sum(math.prod(p) for p in products)
    assert lemmas.corrected_mla_macs(n, d, r, heads, "absorbed") == by_shape


def test_lemma_3_1():
    at = lemmas.lemma_3_1(512, 512, 0.5)
    assert at == pytest.approx({"printed": 2 / 3, "proof": 5 / 6, "rebuilt": 1, "absorbed": 2})
    assert lemmas.lemma_3_1(2048, 512, 0.5)["absorbed"] == 3
    for n, rho in itertools.product((64, 512), (0.25, 0.5, 1.0)):
        d, r = 512, int(rho * 512)
        # both sides of eq. 16
        assert lemmas.printed_mla_macs(n, d, r) == 2 * n * d**2 * (1 + rho) + 2 * n**2 * d * rho
        assert lemmas.proof_mla_macs(n, d, r) - lemmas.printed_mla_macs(n, d, r) == 2 * n * r * d


def test_lemma_3_2_and_theorem_3_3():
    assert lemmas.printed_moe_macs(512, 64, 2, 6) == 64 * 512 + 6 * 512**2 / 32 + 2 * 512**2 / 64
    assert lemmas.printed_speedup(0.5, 64, 2, 6) == 16
    assert lemmas.printed_block_order(4, 8, 4, 64, 2, 6) == 16 * 4 + 4 * 64 * (1.5 + 8 / 64)
    assert lemmas.printed_block_macs(1, 512, 256, 64, 2, 6) < 0  # a cost below nothing
    dense = ModelConfig.preset("M", "mha-rope")
    matched, quarter = (ModelConfig.preset("M", "moe-mla-rope", matched=m) for m in ("parameters", "literal"))
    speed = [lemmas.corrected_speedup(dense, c, n) for c in (matched, quarter) for n in (512, 2048, 8192)]
    assert [round(s, 2) for s in speed] == [1.97, 1.52, 1.19, 0.63, 0.71, 0.84]
    assert lemmas.corrected_speedup(dense, matched, 2**24) == pytest.approx(1, abs=1e-3)


def test_theorem_3_4():
    printed = [lemmas.printed_cache_elements(512, 9, 8, width) for width in (512, 256)]
    corrected = [lemmas.corrected_cache_elements(512, 9, width) for width in (512, 256)]
    assert printed[1] / printed[0] == corrected[1] / corrected[0] == 0.5  # the ratio stands, the factor H does not
    assert printed[0] == 8 * corrected[0]
    for variant, elements in zip(("mha-rope", "mla-rope"), corrected, strict=True):
        config = ModelConfig.preset("M", variant)
        assert elements * 2 == 512 * complexity.cache_bytes_per_token(config)


def test_unknown_forms_are_named():
    with pytest.raises(ValueError, match="form='folded'"):
        lemmas.corrected_mla_macs(8, 8, 4, 2, "folded")
