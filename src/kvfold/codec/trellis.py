"""`trellis`: rotate, then the path through a 64-state trellis nearest to the vector (Marcellin and Fischer 1990).

One header byte per vector: its scale in units that the page keeps, and the number of its start state. Scales are linear:
what a rounded scale does to a score is then as small for the longest vectors as for the short ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.codebook.trellis import ERROR_TOP, STATE_BITS, STATES, Code
from kvfold.codec.canonical import inverse_sqrt, normalise, tree_sum
from kvfold.codec.fields import Fields
from kvfold.rotation.reference import hadamard_f32, hadamard_matrix, signs

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

Search = Callable[[I32, Code], tuple[U8, U8]]

RENORMALISE = 16  # steps between subtractions of the smallest metric
METRIC_TOP = 65535
SCALE_BITS = 6  # of the header byte; the other two number the start state
SCALE_CODES = 1 << SCALE_BITS
# Scale code of the page's maximum. Vectors appended to a trimmed page may be a quarter longer than the maximum it keeps.
FULL = 50
# Inputs are also tried that much shorter and longer: the path with the best cosine is stored, its scale makes up for it.
FACTORS = (np.float32(1), np.float32(0.95), np.float32(1.06))


def gains(book: Code, search: int) -> list[np.float32]:
    """What normalised inputs are multiplied by, a search each: the code's own gain first, so that it keeps a tie."""
    return [book.gain * f for f in FACTORS[:search]]


def quantize_inputs(u: F32, book: Code, gain: np.float32 | None = None) -> I32:
    """Normalised inputs on the encoder's integer grid, clipped."""
    clip = np.float32(book.clip)
    return np.clip(np.rint(u * (book.gain if gain is None else gain)), -clip, clip).astype(np.int32)


def viterbi(x: I32, book: Code) -> tuple[U8, U8]:
    """Inputs [N, D] -> (symbols [N, D], first states [N]): the path with the least sum of clipped squares.

    Metrics are 16-bit and saturate; the lower predecessor wins a tie, and the lower final state.
    """
    n, dim = x.shape
    levels = np.array(book.levels, np.int32) * book.grid
    cost = np.full((n, STATES), METRIC_TOP, np.int32)
    cost[:, list(book.starts)] = 0
    back = np.empty((dim, n, STATES), np.uint8)
    for t in range(dim):
        width = book.widths[t % book.period]
        error = np.minimum(abs(x[:, t, None] - levels), ERROR_TOP)
        metric = (error * error) >> book.shift
        # Window p << 6 | s: predecessor p << (6 - width) | s >> width, next state s.
        branch = metric[:, book.index[t % book.period]].reshape(n, 1 << width, STATES)
        total = np.repeat(cost.reshape(n, 1 << width, -1), 1 << width, axis=2) + branch
        np.minimum(total, METRIC_TOP, out=total)
        back[t] = total.argmin(1)
        cost = total.min(1)
        if t % RENORMALISE == RENORMALISE - 1:
            cost -= cost.min(1, keepdims=True)
    state = cost.argmin(1)
    symbols = np.empty((n, dim), np.uint8)
    rows = np.arange(n)
    for t in range(dim - 1, -1, -1):
        width = book.widths[t % book.period]
        symbols[:, t] = state & ((1 << width) - 1)
        state = (back[t, rows, state].astype(np.intp) << STATE_BITS | state) >> width
    return symbols, state.astype(np.uint8)


def read_levels(symbols: U8, states: U8, book: Code) -> I32:
    """Levels [..., D] of stored symbols [..., D] and first states [...]: the register, one step at a time."""
    register = states.astype(np.intp)
    out = np.empty(symbols.shape, np.int32)
    for t in range(symbols.shape[-1]):
        width = book.widths[t % book.period]
        register = (register << width | symbols[..., t]) & ((1 << (STATE_BITS + width)) - 1)
        out[..., t] = book.by_window[t % book.period][register]
    return out


def page_unit(scale: F32) -> NDArray[np.float16]:
    """What a page keeps of its scales [..., T]: the largest, in units of scale codes, float16 [..., 1, 1]."""
    with np.errstate(over="ignore"):
        return (scale.max(axis=-1, initial=0) / np.float32(FULL))[..., None, None].astype(np.float16)


class Trellis:
    """One head. Codes and bytes of every backend equal this canonical encoder's."""

    def __init__(self, book: Code, dim: int, key: int, kind: str, search: int = 1) -> None:
        self.book, self.dim, self.kind, self.search = book, dim, kind, search
        self.signs = signs(dim, key)
        self.viterbi: Search = viterbi  # the native one finds the same path

    def freeze(self, x: F64) -> None:
        return None

    def encode(self, x: NDArray[np.floating[Any]], state: None = None, skip: int = 0) -> Fields:
        """x [..., T, D], the vectors of one page of which the first `skip` stay out of its unit."""
        u, r = normalise(hadamard_f32(x.astype(np.float32) * self.signs))
        rms = r * inverse_sqrt(self.dim)
        symbols, first, dot, square = self._path(u)
        n = np.float32(self.dim)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            if self.kind == "norm":
                wanted = rms * np.float32(self.book.step)
            elif self.kind == "unbiased":
                wanted = (rms * n) / dot
            elif self.kind == "least-squares":
                wanted = (rms * dot) / square
            else:
                wanted = rms * np.sqrt(n / square)
            wanted = np.where(r > 0, wanted, np.float32(0))
            unit = page_unit(wanted[..., skip:])
            scale = np.rint(wanted / unit[..., 0].astype(np.float32))
        scale = np.where(wanted > 0, np.minimum(scale, np.float32(SCALE_CODES - 1)), 0).astype(np.uint8)
        start = np.searchsorted(self.book.starts, first).astype(np.uint8)
        period = self.book.period
        out: Fields = {"symbols": symbols[..., ::period]}
        if period == 2:
            out["odd_symbols"] = symbols[..., 1::period]
        return {**out, "header": (scale | start << np.uint8(SCALE_BITS))[..., None], "unit": unit}

    def _path(self, u: F32) -> tuple[U8, U8, F32, F32]:
        """(symbols [..., D], first states [...], <u, L>, <L, L>) of the best path for normalised vectors u."""
        first, *others = (self._tried(u, gain) for gain in gains(self.book, self.search))
        symbols, states, dot, square = first
        for other in others:
            with np.errstate(invalid="ignore", over="ignore"):
                better = other[2] * other[2] / other[3] > dot * dot / square
            symbols = np.where(better[..., None], other[0], symbols)
            states = np.where(better, other[1], states)
            dot, square = np.where(better, other[2], dot), np.where(better, other[3], square)
        return symbols, states, dot, square

    def _tried(self, u: F32, gain: np.float32) -> tuple[U8, U8, F32, F32]:
        flat, states = self.viterbi(quantize_inputs(u, self.book, gain).reshape(-1, self.dim), self.book)
        symbols, first = flat.reshape(u.shape), states.reshape(u.shape[:-1])
        levels = read_levels(symbols, first, self.book).astype(np.float32)
        return symbols, first, tree_sum(u * levels), tree_sum(levels * levels)

    def decode(self, fields: Fields, state: None = None) -> F64:
        """Fields -> x_hat [..., T, D]."""
        symbols = np.empty((*fields["symbols"].shape[:-1], self.dim), np.uint8)
        for phase, name in zip(range(self.book.period), ("symbols", "odd_symbols"), strict=False):
            symbols[..., phase :: self.book.period] = fields[name]
        header = fields["header"][..., 0]
        levels = read_levels(symbols, np.array(self.book.starts, np.uint8)[header >> np.uint8(SCALE_BITS)], self.book)
        scale = fields["unit"][..., 0].astype(np.float32) * (header & np.uint8(SCALE_CODES - 1)).astype(np.float32)
        z = scale[..., None] * levels.astype(np.float32)
        return np.asarray(z.astype(np.float64) @ (hadamard_matrix(self.dim) * self.signs))
