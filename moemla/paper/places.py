"""Places of the paper as the ledger names them: "abstract", "section 3.1", "eq. 7", "Table 2, ROW, COLUMN".

Built in chapter 19.
"""

import re
from functools import cache

SIZES = ("XS", "S", "M", "L", "XL")
FOUR = ("MHA", "MLA-RoPE", "MoE-MHA", "MoE-MLA-RoPE")
# The paper's eight tables: labels of rows and of columns, as printed.
TABLES: dict[int, tuple[tuple[str, ...], tuple[str, ...]]] = {
    1: (SIZES, ("Layers", "Hidden", "Heads", "Parameters")),
    2: (
        ("MHA", "MLA", "MLA-RoPE", "MoE-MHA", "MoE-MLA", "MoE-MLA-RoPE"),
        ("Compression Ratio", "Validation Perplexity", "Active Parameters"),
    ),
    3: (FOUR, ("Config", "Val. PPL", "FLOPs", "Speedup")),
    4: (("1:1", "2:1", "4:1", "8:1"), ("Latent Dim", "Validation Perplexity", "Memory Savings")),
    5: (("Coarse", "Standard", "Fine"), ("Total Experts", "Routing Space", "Val. PPL", "Load CV")),
    6: (("Parameters", "KV Cache", "Activations", "Total", "vs. MHA"), FOUR),
    7: (SIZES, ("Params", "MHA PPL", "MoE-MLA-RoPE PPL", "Relative Improvement", "95% CI")),
    8: (FOUR, ("Grammar", "Creativity", "Coherence", "Overall")),
}
DASHES = {  # cells that hold a dash
    "Table 2, MHA, Compression Ratio",
    "Table 2, MoE-MHA, Compression Ratio",
    "Table 5, Coarse, Routing Space",
    "Table 6, vs. MHA, MHA",
}
MARK = "**"  # of significance: Table N, ROW, **
_PLACE = re.compile(
    r"abstract|title page|section \d(\.\d){0,2}|eq\. \d+|eqs\. \d+-\d+|Lemma 3\.[12]|Theorem 3\.[34]|Algorithm 1"
    r"|reference \d+|Table [1-8](, caption)?"
)


def cells() -> list[str]:
    """Every cell of the paper's tables that holds more than a dash, as `where` has it."""
    labels = ((n, row, column) for n, (rows, columns) in TABLES.items() for row in rows for column in columns)
    return [cell for n, row, column in labels if (cell := f"Table {n}, {row}, {column}") not in DASHES]


@cache
def _places() -> set[str]:
    rows = {f"Table {n}, {row}" for n, (rows, _) in TABLES.items() for row in rows}
    return {*cells(), *rows, *(f"{row}, {MARK}" for row in rows)}


def is_place(text: str) -> bool:
    """Whether the paper has a place of that name."""
    return text in _places() or _PLACE.fullmatch(text) is not None
