"""Attention over packed pages and exact tokens, in Triton.

`pages` sums a split of a row's pages in the rotated basis; `finish` merges a row's splits, turns them back, adds the exact
tokens and writes. A row is (sequence, KV head, tile of COLS query columns); column i G + g of KV head h is query token i of
head h G + g. Scores are kept times log2 e. Levels are integers and so exact in float16; a query stands in two float16 parts,
weights are rounded to float16 relative to the largest of their 64 tokens.

rows: int64 [B, WORDS], see `engine.row_words`. CALL: (H, G, COLS, D, D of values, sinks, softcap or 0, window or 0). PAGES: (bits
of even and of odd steps of keys, the same of values, first byte of values, of the mean or 0, bytes of a head).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvfold.engine.triton.codes import side

WORDS: tl.constexpr = tl.constexpr(12)
HALF: tl.constexpr = tl.constexpr(64)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
HIDDEN: tl.constexpr = tl.constexpr(-1e30)
FINE: tl.constexpr = tl.constexpr(2048.0)  # the second float16 part of a query stands that much larger
BASIS: tl.constexpr = tl.constexpr(16)  # rotated numbers turned back at a time
EXACT: tl.constexpr = tl.constexpr(32)  # exact tokens at a time


@triton.jit
def _count(rows, word):
    """A number of tokens in a row's record."""
    return tl.load(rows + word).to(tl.int32)


@triton.jit
def _log2(s, SOFTCAP: tl.constexpr):
    """Scores in units of log2, capped."""
    if SOFTCAP > 0:
        s = SOFTCAP * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E / SOFTCAP)) + 1.0))
    return s * LOG2E


@triton.jit
def _weigh(s, seen, top, mass):
    """One block of scores [COLS, T] into a running softmax: (maximum, mass, what older sums shrink by, weights relative to
    the block's own maximum, what these shrink by)."""
    own = tl.max(tl.where(seen, s, HIDDEN), axis=1)
    new = tl.maximum(top, own)
    weights = tl.where(seen, tl.exp2(s - own[:, None]), 0.0)
    old_share, own_share = tl.exp2(top - new), tl.exp2(own - new)
    return new, mass * old_share + tl.sum(weights, axis=1) * own_share, old_share, weights, own_share


@triton.jit
def _half_page(region, tokens, mean_half, q, book, CALL: tl.constexpr, PAGES: tl.constexpr):
    """Scores [COLS, T] of 64 tokens of a page. q: (as it is, first part, second part, largest number)."""
    D: tl.constexpr = CALL[3]
    DP: tl.constexpr = triton.next_power_of_2(D)
    levels, scale = side(region, tokens, book, PAGES[0], PAGES[1], D, DP)
    s = tl.dot(q[1], tl.trans(levels)) + tl.dot(q[2], tl.trans(levels)) * (1.0 / FINE)
    s = s * q[3][:, None] * scale[None, :]
    if PAGES[5] > 0:
        d = tl.arange(0, DP)
        mean = tl.load(region + PAGES[5] + mean_half * D + d, mask=d < D, other=0).to(tl.int8, bitcast=True)
        unit = tl.load((region + PAGES[5] + 2 * D + 2 * mean_half).to(tl.pointer_type(tl.float16))).to(tl.float32)
        s += (tl.sum(q[0] * mean.to(tl.float32)[None, :], axis=1) * unit)[:, None]
    return s


@triton.jit
def pages(queries, rows, key_book, value_book, parts, new, CALL: tl.constexpr, PAGES: tl.constexpr):
    """queries: float32 [2, B H, columns, D], scaled, as they are and in the keys' basis. new: query tokens.

    parts: float32 [B H tiles, splits, COLS (DV + 2)]: values, maxima, masses. Grid (splits, tiles, B H).
    """
    H: tl.constexpr = CALL[0]
    G: tl.constexpr = CALL[1]
    COLS: tl.constexpr = CALL[2]
    D: tl.constexpr = CALL[3]
    DV: tl.constexpr = CALL[4]
    WINDOW: tl.constexpr = CALL[7]
    DP: tl.constexpr = triton.next_power_of_2(D)
    DVP: tl.constexpr = triton.next_power_of_2(DV)
    bh = tl.program_id(2).to(tl.int64)
    rows += (bh // H) * WORDS
    table, folded = tl.load(rows).to(tl.pointer_type(tl.int64)), _count(rows, 1)
    past = folded + _count(rows, 2) - _count(rows, 3)  # position of query token i: past + i
    c = tl.program_id(1) * COLS + tl.arange(0, COLS)
    d = tl.arange(0, DP)
    at, inside = (bh * new * G + c)[:, None] * D + d[None, :], (c < new * G)[:, None] & (d < D)[None, :]
    plain = tl.load(queries + at, mask=inside, other=0.0)
    turned = tl.load(queries + tl.num_programs(2).to(tl.int64) * new * G * D + at, mask=inside, other=0.0)
    largest = tl.maximum(tl.max(tl.abs(turned), axis=1), 1e-30)
    turned = turned / largest[:, None]
    coarse = turned.to(tl.float16)
    q = (plain, coarse, ((turned - coarse.to(tl.float32)) * FINE).to(tl.float16), largest)
    position = past + c // G

    top, mass = tl.full((COLS,), HIDDEN, tl.float32), tl.zeros((COLS,), tl.float32)
    values = tl.zeros((COLS, DVP), tl.float32)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(past + tl.program_id(1) * COLS // G - WINDOW + 1, 0) // HALF
    halves = tl.maximum((folded + HALF - 1) // HALF - begin, 0)
    each = (halves + tl.num_programs(0) - 1) // tl.num_programs(0)
    begin += tl.program_id(0) * each
    for n in range(begin, tl.minimum(begin + each, (folded + HALF - 1) // HALF)):
        region = tl.load(table + n // 2).to(tl.pointer_type(tl.uint8)) + (bh % H) * PAGES[6]
        tokens = n % 2 * HALF + tl.arange(0, HALF)
        s = _log2(_half_page(region, tokens, n % 2, q, key_book, CALL, PAGES), CALL[6])
        t = n * HALF + tl.arange(0, HALF)
        seen = ((t >= CALL[5]) & (t < folded))[None, :]
        if WINDOW > 0:
            seen = seen & (t[None, :] > position[:, None] - WINDOW)
        top, mass, old_share, weights, own_share = _weigh(s, seen, top, mass)
        levels, scale = side(region + PAGES[4], tokens, value_book, PAGES[2], PAGES[3], DV, DVP)
        scale = tl.where((t >= CALL[5]) & (t < folded), scale, 0.0)  # stale bytes of a trimmed page are anything
        unit = tl.maximum(tl.max(scale, axis=0), 1e-30)
        weights = (weights * (scale / unit)[None, :]).to(tl.float16)
        values = values * old_share[:, None] + tl.dot(weights, levels) * (unit * own_share)[:, None]

    part = parts + ((bh * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)) * (
        COLS * (DV + 2)
    )
    column, v = tl.arange(0, COLS), tl.arange(0, DVP)
    tl.store(part + column[:, None] * DV + v[None, :], values, mask=(v < DV)[None, :])
    tl.store(part + COLS * DV + column, top)
    tl.store(part + COLS * (DV + 1) + column, mass)


@triton.jit
def _merged(parts, turns, splits, CALL: tl.constexpr):
    """Splits of a row as one: (maximum, mass, values [COLS, DVP] in the model's basis)."""
    COLS: tl.constexpr = CALL[2]
    DV: tl.constexpr = CALL[4]
    DVP: tl.constexpr = triton.next_power_of_2(DV)
    column, v = tl.arange(0, COLS), tl.arange(0, DVP)
    top, mass = tl.full((COLS,), HIDDEN, tl.float32), tl.zeros((COLS,), tl.float32)
    for i in range(splits):
        own = tl.load(parts + i * (COLS * (DV + 2)) + COLS * DV + column)
        new = tl.maximum(top, own)
        mass = mass * tl.exp2(top - new)
        mass += tl.load(parts + i * (COLS * (DV + 2)) + COLS * (DV + 1) + column) * tl.exp2(own - new)
        top = new
    values = tl.zeros((COLS, DVP), tl.float32)
    for start in range(0, DV, BASIS):
        z = start + tl.arange(0, BASIS)
        total = tl.zeros((COLS, BASIS), tl.float32)
        for i in range(splits):
            part = parts + i * (COLS * (DV + 2))
            share = tl.exp2(tl.load(part + COLS * DV + column) - top)
            total += tl.load(part + column[:, None] * DV + z[None, :]) * share[:, None]
        turn = tl.load(turns + z[:, None] * DV + v[None, :], mask=(v < DV)[None, :], other=0.0)
        values += tl.dot(total, turn, input_precision="ieee")
    return top, mass, values


@triton.jit
def _exact(rows, word, e, h, new, sinks, old, D: tl.constexpr, kind: tl.constexpr):
    """Pointers to exact tokens e [T] of head h: word 4 keys, 5 values."""
    SIZE: tl.constexpr = D * kind.primitive_bitwidth // 8
    sink = tl.load(rows + word) + (h * sinks + e) * SIZE
    recent = tl.load(rows + word + 2) + h * tl.load(rows + word + 4) + (e - sinks) * SIZE
    fresh = tl.load(rows + word + 6) + (h * new + e - old + tl.load(rows + 3)) * SIZE
    return tl.where(e < sinks, sink, tl.where(e < old, recent, fresh)).to(tl.pointer_type(kind))


@triton.jit
def finish(q, out, rows, turns, parts, splits, new, scale, sink_logits, CALL: tl.constexpr, DOT: tl.constexpr):
    """q [B H, columns, D], out [B H, columns, DV]; turns: float32 [H, DV, DV], lifts values; sink_logits: float32 [H G] or None.

    DOT: what exact keys and values are multiplied in. Grid (tiles, B H).
    """
    H: tl.constexpr = CALL[0]
    G: tl.constexpr = CALL[1]
    COLS: tl.constexpr = CALL[2]
    D: tl.constexpr = CALL[3]
    DV: tl.constexpr = CALL[4]
    WINDOW: tl.constexpr = CALL[7]
    DP: tl.constexpr = triton.next_power_of_2(D)
    DVP: tl.constexpr = triton.next_power_of_2(DV)
    kind: tl.constexpr = q.dtype.element_ty
    tile, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    h = bh % H
    rows += (bh // H) * WORDS
    folded, recent, pads = _count(rows, 1), _count(rows, 2), _count(rows, 3)
    c, d, v = tile * COLS + tl.arange(0, COLS), tl.arange(0, DP), tl.arange(0, DVP)
    i = c // G
    asked = (c < new * G) & (i >= pads)
    query = tl.load(q + (bh * new * G + c)[:, None] * D + d[None, :], mask=asked[:, None] & (d < D)[None, :], other=0.0)
    top, mass, values = _merged(
        parts + (bh * tl.num_programs(0) + tile) * splits * (COLS * (DV + 2)), turns + h * DV * DV, splits, CALL
    )

    sinks = tl.where(folded > 0, CALL[5], 0)
    old = (
        sinks + recent
    )  # exact tokens: sinks, recent, new ones that are no padding, as far as the tile's last column sees
    count = old + tl.minimum((tile * COLS + COLS + G - 1) // G, new) - pads
    for start in range(0, count, EXACT):
        e = start + tl.arange(0, EXACT)
        there = e < count
        key = tl.load(
            _exact(rows, 4, e, h, new, sinks, old, D, kind)[:, None] + d[None, :],
            mask=there[:, None] & (d < D)[None, :],
            other=0.0,
        )
        value = tl.load(
            _exact(rows, 5, e, h, new, sinks, old, DV, kind)[:, None] + v[None, :],
            mask=there[:, None] & (v < DV)[None, :],
            other=0.0,
        )
        s = tl.dot(query.to(DOT), tl.trans(key.to(DOT)), input_precision="ieee")
        seen = there[None, :] & ((e - old + pads)[None, :] <= i[:, None])
        if WINDOW > 0:
            t = tl.where(e < sinks, e, folded + e - sinks)
            seen = seen & (t[None, :] > (folded + recent - pads + i)[:, None] - WINDOW)
        top, mass, old_share, weights, own_share = _weigh(_log2(s * scale, CALL[6]), seen, top, mass)
        o = tl.dot(weights.to(DOT), value.to(DOT), input_precision="ieee")
        values = values * old_share[:, None] + o * own_share[:, None]
    if sink_logits is not None:
        logits = tl.load(sink_logits + h * G + c % G) * LOG2E
        new_top = tl.maximum(top, logits)
        mass = mass * tl.exp2(top - new_top) + tl.exp2(logits - new_top)
        values = values * tl.exp2(top - new_top)[:, None]
    values = tl.where((i >= pads)[:, None], values / mass[:, None], 0.0)
    at = (bh * new * G + c)[:, None] * DV + v[None, :]
    tl.store(out + at, values.to(kind), mask=(c < new * G)[:, None] & (v < DV)[None, :])


def dot_type(dtype: object, device: str) -> object:
    """What exact tokens are multiplied in: the model's own dtype. On CPUs, which interpret, bfloat16 products are wrong."""
    return tl.float32 if device == "cpu" else getattr(tl, str(dtype).removeprefix("torch."))
