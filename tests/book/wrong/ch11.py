"""Wrong versions of what the reader writes in chapter 11."""

STORED = "store(c, at, total, real[:, None] & (o < n_out)[None, :])"
OUT = "    kept = real[:, None] & (o < n_out)[None, :]\n    tl.store(c + at, total, mask=kept)"

WRONG = {
    "place_tile": [
        (
            "not stable: an expert's last slot of a block comes first",
            "mine.cumsum(0) - mine",
            "mine.sum(0) - mine.cumsum(0)",
        ),
        ("the slot counts itself", "mine.cumsum(0) - mine", "mine.cumsum(0)"),
        ("each block begins where the first does", "pid * e + lane, lane < e", "lane, lane < e"),
        (
            "slots beyond the last one are sent to row 0",
            "store(order, row, slot, slot < m)",
            "store(order, row, slot, slot >= 0)",
        ),
        (
            "order and place exchanged",
            "store(place, slot, row, slot < m)\n    store(order, row, slot",
            "store(order, slot, row, slot < m)\n    store(place, row, slot",
        ),
    ],
    "product_tile": [
        (
            "a tile writes into its neighbour's rows",
            STORED,
            "store(c, at, total, (row < len(slots.order))[:, None] & (o < n_out)[None, :])",
        ),
        ("no row is masked", "real = row < slots.offsets[e + 1]", "real = row < len(slots.order)"),
        ("columns beyond the last are written", STORED, "store(c, at, total, real[:, None] & (o >= 0)[None, :])"),
        (
            "two strides of w are exchanged",
            "i[:, None] * w_i + o[None, :] * w_o",
            "i[:, None] * w_o + o[None, :] * w_i",
        ),
        ("rows of a are taken to lie side by side", "source[:, None] * a_row", "source[:, None] * n_in"),
        (
            "the inner edge is not masked",
            "(i < n_in)[:, None] & (o < n_out)[None, :]",
            "(i >= 0)[:, None] & (o < n_out)[None, :]",
        ),
        ("the row of the slot and not of the token", "slot // top_k if top_k else row", "slot if top_k else row"),
        ("the gate of the row and not of the slot", "load(gate, slot, real)", "load(gate, row, real)"),
        ("the gate applied twice", "load(gate, slot, real)[:, None]", "load(gate, slot, real)[:, None] ** 2"),
        ("the last step of columns is left out", "range(0, n_in, STEP)", "range(0, n_in - STEP + 1, STEP)"),
        ("only the last step of columns counts", "total += left @ right", "total = left @ right"),
    ],
    "weight_tile": [
        (
            "an expert without rows is left unwritten",
            "    total = torch.zeros(len(i), len(o))",
            "    if first == last:\n        return\n    total = torch.zeros(len(i), len(o))",
        ),
        ("rows of the next expert are added", "real = row < last", "real = row < len(slots.order)"),
        ("the last rows are left out", "range(first, last, block)", "range(first, last - block + 1, block)"),
        ("a is gathered by b's rule", "slot // k_a if k_a else row", "slot // k_b if k_b else row"),
        ("a and b exchanged in their strides", "(pid * n_a + i[:, None]) * n_b", "(pid * n_b + i[:, None]) * n_a"),
        ("each step begins anew", "total += left.T @ right", "total = left.T @ right"),
        ("columns beyond the last are written", "in_a.T & in_b", "in_a.T & (o >= 0)"),
    ],
    "product_kernel": [
        ("a tile writes into its neighbour's rows", OUT, OUT.replace("real[:, None]", "(row >= 0)[:, None]")),
        ("no row is masked", "real = row < tl.load(offsets + e + 1)", "real = row < tl.load(offsets + n_experts)"),
        ("columns beyond the last are written", OUT, OUT.replace("(o < n_out)", "(o >= 0)")),
        (
            "two strides of w are exchanged",
            "i[:, None] * w_i + o[None, :] * w_o",
            "i[:, None] * w_o + o[None, :] * w_i",
        ),
        ("rows of a are taken to lie side by side", "source[:, None] * a_row", "source[:, None] * n_in"),
        ("every program does the first columns", "tl.program_id(1) * LANES + tl.arange", "tl.arange"),
        (
            "the gate applied twice",
            "mask=real, other=0.0)[:, None]",
            "mask=real, other=0.0)[:, None] * tl.load(gate + slot, mask=real, other=0.0)[:, None]",
        ),
        ("the gate applied where none is asked for", "    if GATED:\n", "    if GATED or GATHER:\n"),
        (
            "only the last step of columns counts",
            "tl.dot(left, right, total,",
            "tl.dot(left, right, tl.zeros((BLOCK, LANES), tl.float32),",
        ),
    ],
    "place_some": [
        ("padding goes to row 0", "row.where(expert >= 0, -1)", "row"),
        (
            "padding is entered in order",
            "store(order, row, slot, expert >= 0)",
            "store(order, row.clamp(min=0), slot, slot < m)",
        ),
        (
            "padding is taken for expert 0",
            "expert = load(chosen, slot, slot < m, -1)",
            "expert = load(chosen, slot, slot < m, -1).clamp(min=0)",
        ),
        (
            "the row of padding is not written",
            "store(place, slot, row, slot < m)",
            "store(place, slot, row, expert >= 0)",
        ),
    ],
    "narrow_tile": [
        ("the hidden units are kept without their bend, and used so", "F.gelu(total)", "total"),
        ("the hidden layer is kept after its bend", "store(z, at, total,", "store(z, at, F.gelu(total),"),
        ("the gate applied twice", "load(gate, slot, real)[:, None]", "load(gate, slot, real)[:, None] ** 2"),
        (
            "a tile writes into its neighbour's rows",
            "        kept = real[:, None] & (i < d)[None, :]\n",
            "        kept = (row < len(slots.order))[:, None] & (i < d)[None, :]\n",
        ),
        (
            "w_out in the layout of w_in",
            "(e * f + unit[:, None]) * d + i[None, :]",
            "(e * d + i[None, :]) * f + unit[:, None]",
        ),
        (
            "lanes without a unit are written",
            "store(z, at, total, real[:, None] & is_unit)",
            "store(z, at, total, real[:, None] & (unit >= 0))",
        ),
    ],
}
