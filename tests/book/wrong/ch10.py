"""Wrong versions of what the reader writes in chapter 10."""

STORED = "    store(out, to, a * c - b * s, kept)\n    store(out, to + half, b * c + a * s, kept)"
TURNED = "a * c - b * s, mask=kept)\n    tl.store(out + to + half, b * c + a * s, mask=kept)"
PAIRED = "    store(out, to, a * c - b * s, kept)\n    store(out, to + 1, b * c + a * s, kept)"
HIT = "hit = lane[None, :] == best[:, None]"
BIASED = "biased = score + load(bias, lane, lane < e)"
SLOPED = "slope = (slope - even) / total * score * (1 - score)"

EVERY_ROW = "(row >= 0)[:, None] & (pair < half)[None, :]"
EVERY_PAIR = "(row < n)[:, None] & (pair >= 0)[None, :]"

WRONG = {
    "turn_tile": [
        ("rows beyond the last are written", STORED, STORED.replace("kept", EVERY_ROW)),
        ("a half writes into the next: its lanes are not masked", STORED, STORED.replace("kept", EVERY_PAIR)),
        ("no lane of the half is masked, reading or writing", "(pair < half)", "(pair >= 0)"),
        (
            "two strides are exchanged",
            "row[:, None] * x_row + pair[None, :] * x_k",
            "row[:, None] * x_k + pair[None, :] * x_row",
        ),
        ("rows of x are taken to lie side by side", "row[:, None] * x_row", "row[:, None] * 2 * half"),
        ("the high half is half a row of numbers on, not of columns", "low + half * x_k", "low + half"),
        (
            "out is written with the strides of x",
            "row[:, None] * 2 * half + pair[None, :]",
            "row[:, None] * x_row + pair[None, :] * x_k",
        ),
        ("the direction is ignored", "load(sin, at, kept) * way", "load(sin, at, kept)"),
        ("the sine is negated whatever the direction", "load(sin, at, kept) * way", "-load(sin, at, kept)"),
        ("the direction turns the cosine too", "load(cos, at, kept),", "load(cos, at, kept) * way,"),
        ("positions begin anew in each tile", "(row % steps)", "(torch.arange(block) % steps)"),
        ("steps rows in a row share a position", "(row % steps)", "(row // steps)"),
        ("the sign of one sine", "b * c + a * s", "b * c - a * s"),
        (
            "all rows from its first on are cleared, so that the last program has to come last",
            STORED,
            f"    out[pid * block * 2 * half : n * 2 * half] = 0\n{STORED}",
        ),
    ],
    "route_tile": [
        ("lanes of padding win", "biased.where(expert, -torch.inf)", "biased"),
        ("padding is filled with 0", "biased.where(expert, -torch.inf)", "biased.where(expert, 0.0)"),
        ("a winner is set to 0 and wins again", "left.where(~hit, -torch.inf)", "left.where(~hit, 0.0)"),
        ("of equals the last wins", "left.argmax(1)", "left.shape[1] - 1 - left.flip(1).argmax(1)"),
        ("all equals win in one round", HIT, "hit = left == left.max(1, keepdim=True).values"),
        ("the bias in the gate", BIASED, f"{BIASED}\n    score = biased"),
        ("the bias does not choose", BIASED, "biased = score"),
        (
            "the bias within the sigmoid",
            BIASED,
            "biased = (load(logits, at, token & expert) + load(bias, lane, lane < e)).sigmoid()",
        ),
        ("gates are not renormalised", "store(gate, slot, score / total, mine)", "store(gate, slot, score, mine)"),
        ("gates are shares of all experts' scores", "(score * mine).sum", "(score * expert).sum"),
        ("a small number is added to the sum, and is larger than it", ".clamp(min=1e-30)", " + 1e-9"),
        ("winners in the order of experts", "a + rank\n", "a + mine.cumsum(1) - 1\n"),
        ("counts are overwritten", "counts += mine.sum(0)[:e]", "counts[:] = mine.sum(0)[:e]"),
        ("tokens beyond the last are counted", "counts += mine.sum(0)[:e]", "counts += (rank < a).sum(0)[:e]"),
        (
            "a program counts the tokens of all before it again",
            "counts += mine.sum(0)[:e]",
            "counts += index[index >= 0].bincount(minlength=e)",
        ),
        ("rows are taken to be as wide as the tile", "row[:, None] * e + lane", "row[:, None] * lanes(e) + lane"),
    ],
    "back_tile": [
        ("a small number is added to the sum, and is larger than it", ".clamp(min=1e-30)", " + 1e-9"),
        ("lanes without a winner add their half to the sum", ".sigmoid() * kept", ".sigmoid()"),
        ("a score does not lower the other gates", "(slope - even)", "slope"),
        ("the slopes' mean without its sum below", "keepdim=True) / total", "keepdim=True)"),
        (
            "the plain mean of the slopes",
            "(slope * score).sum(1, keepdim=True) / total",
            "slope.sum(1, keepdim=True) / a",
        ),
        ("the sum below is left out", SLOPED, SLOPED.replace(" / total", "")),
        ("the sigmoid's slope is left out", SLOPED, SLOPED.replace(" * score * (1 - score)", "")),
        ("the sigmoid's slope of the gate", SLOPED, "slope = (slope - even) / total * score * (1 - score / total)"),
        ("the slope of expert i and not of slot i", "load(index, place, kept, 0)", "slot[None, :]"),
        (
            "lanes without a winner write over expert 0",
            "store(grad, at, slope, kept)",
            "store(grad, at, slope, (row < n)[:, None])",
        ),
        ("slots of the next row are read", "row[:, None] * a + slot", "(row[:, None] + 1) % n * a + slot"),
        ("slots are as many as the tile has", "row[:, None] * a + slot", "row[:, None] * lanes(a) + slot"),
        (
            "all rows from its first on are cleared, so that the last program has to come last",
            "    store(grad, at, slope, kept)",
            "    grad[pid * block * e :] = 0\n    store(grad, at, slope, kept)",
        ),
    ],
    "turn_kernel": [
        ("rows beyond the last are written", TURNED, TURNED.replace("kept", EVERY_ROW)),
        ("a half writes into the next: its lanes are not masked", TURNED, TURNED.replace("kept", EVERY_PAIR)),
        (
            "two strides are exchanged",
            "row[:, None] * x_row + pair[None, :] * x_k",
            "row[:, None] * x_k + pair[None, :] * x_row",
        ),
        ("rows of x are taken to lie side by side", "row[:, None] * x_row", "row[:, None] * 2 * half"),
        ("the high half is half a row of numbers on, not of columns", "low + half * x_k", "low + half"),
        (
            "out is written with the strides of x",
            "row[:, None] * 2 * half + pair[None, :]",
            "row[:, None] * x_row + pair[None, :] * x_k",
        ),
        ("the direction is ignored", "other=0.0) * way", "other=0.0)"),
        ("every program does the first rows", "tl.program_id(0) * BLOCK + ", ""),
        ("programs begin LANES rows apart", "tl.program_id(0) * BLOCK", "tl.program_id(0) * LANES"),
        ("positions begin anew in each tile", "(row % steps)", "(tl.arange(0, BLOCK) % steps)"),
        ("steps rows in a row share a position", "(row % steps)", "(row // steps)"),
        ("the sign of one sine", "b * c + a * s", "b * c - a * s"),
    ],
    "turn_neighbours": [
        ("the direction is ignored", "load(sin, at, kept) * way", "load(sin, at, kept)"),
        ("each row has a position of its own", "(row % steps)", "row.clamp(max=steps - 1)"),
        ("rows beyond the last are written", PAIRED, PAIRED.replace("kept", EVERY_ROW)),
        ("a row writes into the next: its lanes are not masked", PAIRED, PAIRED.replace("kept", EVERY_PAIR)),
        ("pairs of the other layout are read", "2 * pair[None, :] * x_k", "pair[None, :] * x_k"),
        (
            "the halves are read and neighbours written",
            "2 * pair[None, :] * x_k\n    a, b = load(x, low, kept), load(x, low + x_k, kept)",
            "pair[None, :] * x_k\n    a, b = load(x, low, kept), load(x, low + half * x_k, kept)",
        ),
        (
            "neighbours are read and the halves written",
            f"(row[:, None] * half + pair[None, :]) * 2\n{PAIRED}",
            f"row[:, None] * 2 * half + pair[None, :]\n{PAIRED.replace('to + 1', 'to + half')}",
        ),
        ("the neighbour is the next number and not the next column", "low + x_k", "low + 1"),
        (
            "two strides are exchanged",
            "row[:, None] * x_row + 2 * pair[None, :] * x_k",
            "row[:, None] * x_k + 2 * pair[None, :] * x_row",
        ),
        (
            "each column has an angle of its own",
            "half + pair[None, :]\n    c,",
            "half + 2 * pair[None, :] % half\n    c,",
        ),
        ("the sign of one sine", "b * c + a * s", "b * c - a * s"),
    ],
    "softmax_tile": [
        ("the largest of the tile", "z.max(1, keepdim=True).values", "z.max()"),
        (
            "all rows from its first on are cleared, so that the last program has to come last",
            "    store(out, at,",
            "    out[pid * block * e : n * e] = 0\n    store(out, at,",
        ),
        ("padding is filled with 0", "load(logits, at, kept, -torch.inf)", "load(logits, at, kept)"),
        (
            "padding is left out of the sum and yet is the largest",
            "z = (z - largest).exp()",
            "z = (z - largest.clamp(min=0)).exp()",
        ),
        ("the largest is not taken off", "(z - largest).exp()", "z.exp()"),
        ("the largest of each column", "z.max(1, keepdim=True)", "z.max(0, keepdim=True)"),
        ("shares of a column", "z.sum(1, keepdim=True)", "z.sum(0, keepdim=True)"),
        ("rows are taken to be as wide as the tile", "row[:, None] * e + lane", "row[:, None] * lanes(e) + lane"),
        ("rows beyond the last are written", "keepdim=True), kept)", "keepdim=True), (lane < e)[None, :])"),
        (
            "a row writes into the next: its lanes are not masked",
            "keepdim=True), kept)",
            "keepdim=True), (row < n)[:, None])",
        ),
    ],
}
