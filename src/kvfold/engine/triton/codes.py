"""Codes of canonical pages to levels, in Triton: planes of scalar codes, and trellis codes by a table of pairs.

`at` points to a side of one KV head of a page; tokens int32 [T]. D numbers in a vector, DP the next power of two: what lies
beyond D is zero codes. All loads are bytes, for in a page nothing is aligned to more.
"""

from __future__ import annotations

import triton
import triton.language as tl

PAGE: tl.constexpr = tl.constexpr(128)
STATE_BITS: tl.constexpr = tl.constexpr(6)
STARTS: tl.constexpr = tl.constexpr(4)  # entries of a trellis book before its pairs
ZERO: tl.constexpr = tl.constexpr(64)


@triton.constexpr_function
def _row_bytes(width, count):
    """Bytes of `count` codes of `width` bits in planes of their own."""
    return sum((count * w + 7) // 8 for w in (4, 2, 1) if width & w)


@triton.jit
def _plane(at, tokens, WIDTH: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Codes int32 [T, DP] of one plane: WIDTH bits each, WIDTH * D / 8 bytes a token."""
    EACH: tl.constexpr = 8 // WIDTH
    byte = tl.arange(0, DP // EACH)
    x = tl.load(at + tokens[:, None] * (D // EACH) + byte[None, :], mask=byte[None, :] < D // EACH, other=0)
    codes = (x.to(tl.int32)[:, :, None] >> (WIDTH * tl.arange(0, EACH))[None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(codes, (tokens.shape[0], DP))


@triton.jit
def _scalar(at, tokens, book, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Levels float16 [T, DP]. book: int32 [4], level + ZERO of sixteen codes."""
    if BITS == 3:
        codes = _plane(at, tokens, 2, D, DP) | (_plane(at + PAGE * D // 4, tokens, 1, D, DP) << 2)
    else:
        codes = _plane(at, tokens, BITS, D, DP)
    word = tl.load(book)
    if BITS > 2:
        word = tl.where((codes & 4) != 0, tl.load(book + 1), word)
    if BITS > 3:
        upper = tl.where((codes & 4) != 0, tl.load(book + 3), tl.load(book + 2))
        word = tl.where((codes & 8) != 0, upper, word)
    return (((word >> ((codes & 3) * 8)) & 127) - ZERO).to(tl.float16)


@triton.jit
def _symbol_plane(at, tokens, index, PW: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr, COUNT: tl.constexpr):
    """The PW bits of symbols that one plane holds, at their places among the WIDTH bits."""
    ROW: tl.constexpr = (COUNT * PW + 7) // 8
    SHIFT: tl.constexpr = WIDTH & ~(2 * PW - 1)  # wider planes come first and hold lower bits
    bit = index * (STEPS * PW)
    inside = (index >= 0) & (index < COUNT // STEPS)
    x = tl.load(at + tokens[:, None] * ROW + (bit // 8)[None, :], mask=inside[None, :], other=0)
    x = x.to(tl.int32) >> (bit % 8)[None, :]
    out = (x & ((1 << PW) - 1)) << (SHIFT + WIDTH * (STEPS - 1))
    if STEPS == 2:
        out |= ((x >> PW) & ((1 << PW) - 1)) << SHIFT
    return out


@triton.jit
def _symbols(at, tokens, index, WIDTH: tl.constexpr, STEPS: tl.constexpr, COUNT: tl.constexpr):
    """STEPS symbols of WIDTH bits from number index * STEPS on, the earlier in the higher bits: int32 [T, *]; 0 before the first.

    COUNT: symbols of a token.
    """
    out = tl.zeros((tokens.shape[0], index.shape[0]), tl.int32)
    if WIDTH & 4:
        out |= _symbol_plane(at, tokens, index, 4, WIDTH, STEPS, COUNT)
    if WIDTH & 2:
        out |= _symbol_plane(at + PAGE * _row_bytes(WIDTH & 4, COUNT), tokens, index, 2, WIDTH, STEPS, COUNT)
    if WIDTH & 1:
        out |= _symbol_plane(at + PAGE * _row_bytes(WIDTH & 6, COUNT), tokens, index, 1, WIDTH, STEPS, COUNT)
    return out


@triton.jit
def _trellis(at, tokens, first, book, EVEN: tl.constexpr, ODD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Levels float16 [T, DP]. EVEN, ODD: bits of alternating steps; first: start states int32 [T].

    book: int16, STARTS states, then both levels + ZERO (the earlier in the low byte) of every window of two steps.
    """
    BOTH: tl.constexpr = EVEN + ODD
    BEFORE: tl.constexpr = (STATE_BITS + BOTH - 1) // BOTH
    pair = tl.arange(0, DP // 2)
    window = first[:, None] << (BOTH * tl.minimum(pair + 1, BEFORE + 1))[None, :]
    for back in tl.static_range(BEFORE + 1):
        if EVEN == ODD:
            new = _symbols(at, tokens, pair - back, EVEN, 2, D)
        else:
            second = at + PAGE * _row_bytes(EVEN, D // 2)
            new = _symbols(at, tokens, pair - back, EVEN, 1, D // 2) << ODD
            new |= _symbols(second, tokens, pair - back, ODD, 1, D // 2)
        window |= new << (BOTH * back)
    two = tl.load(book + STARTS + (window & ((64 << BOTH) - 1))).to(tl.int32)
    levels = ((two[:, :, None] >> (8 * tl.arange(0, 2))[None, None, :]) & 127) - ZERO
    return tl.reshape(levels, (tokens.shape[0], DP)).to(tl.float16)


@triton.jit
def side(at, tokens, book, EVEN: tl.constexpr, ODD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """One side of a page: (levels float16 [T, DP], their scales float32 [T]). ODD 0: scalar codes of EVEN bits."""
    if ODD == 0:
        levels = _scalar(at, tokens, book, EVEN, D, DP)
        scale = tl.load((at + PAGE * _row_bytes(EVEN, D)).to(tl.pointer_type(tl.float16)) + tokens).to(tl.float32)
    else:
        if EVEN == ODD:
            header_at = at + PAGE * _row_bytes(EVEN, D)
        else:
            header_at = at + PAGE * (_row_bytes(EVEN, D // 2) + _row_bytes(ODD, D // 2))
        header = tl.load(header_at + tokens).to(tl.int32)
        first = tl.load(book + (header >> 6)).to(tl.int32)
        levels = _trellis(at, tokens, first, book, EVEN, ODD, D, DP)
        unit = tl.load((header_at + PAGE).to(tl.pointer_type(tl.float16))).to(tl.float32)
        scale = unit * (header & 63).to(tl.float32)
    return levels, scale
