# mypy: ignore-errors
"""The search of trellis codes in Triton: codec.torch_trellis.viterbi in one launch, the same symbols and states.

A program walks VECTORS vectors forward, all states side by side, keeps the predecessor that each state came from in memory,
and walks back. A step shifts WIDTH bits into the state, so predecessor p of state s is p * 64 >> WIDTH | s >> WIDTH.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvfold.codebook.trellis import ERROR_TOP, STATES, Code
from kvfold.codec.trellis import METRIC_TOP, RENORMALISE

VECTORS = 16  # of a program
BLOCK = 1 << 13  # vectors of a launch: predecessors take 64 bytes per value
ERROR: tl.constexpr = tl.constexpr(ERROR_TOP)
METRIC: tl.constexpr = tl.constexpr(METRIC_TOP)


@triton.jit
def _forward(cost, x, levels, back, n, WIDTH: tl.constexpr, SHIFT: tl.constexpr, N: tl.constexpr):
    """One step: metrics int32 [N, 64] of the states after it; writes where each came from."""
    P: tl.constexpr = 1 << WIDTH
    p, s = tl.arange(0, P), tl.arange(0, 64)
    level = tl.load(levels + p[:, None] * 64 + s[None, :])
    error = tl.minimum(tl.abs(x[:, None, None] - level[None, :, :]), ERROR)
    old = tl.broadcast_to(tl.reshape(cost, (N, P, 64 // P))[:, :, :, None], (N, P, 64 // P, P))
    total = tl.minimum(tl.reshape(old, (N, P, 64)) + ((error * error) >> SHIFT), METRIC)
    best = tl.min(total * P + p[None, :, None], axis=1)  # the lower predecessor keeps a tie, also among saturated sums
    tl.store(back + n[:, None] * 64 + s[None, :], (best % P).to(tl.uint8))
    return best // P


@triton.jit
def _backward(state, symbols, back, n, inside, D: tl.constexpr, WIDTH: tl.constexpr):
    """One step back: the state before; writes the symbol."""
    tl.store(symbols + n * D, (state & ((1 << WIDTH) - 1)).to(tl.uint8), mask=inside)
    origin = tl.load(back + n * 64 + state).to(tl.int32)
    return ((origin << 6) | state) >> WIDTH


@triton.jit
def search(inputs, levels, back, symbols, first, count, start, CODE: tl.constexpr, D: tl.constexpr, N: tl.constexpr):
    """inputs int32 [count, D]; levels: int32, every window's of even, then of odd steps; back: uint8 [D, padded count, 64].

    Writes symbols uint8 [count, D] and first states uint8 [count]. start: int32 [64], metrics before the first step. CODE: bits
    of even and of odd steps, shift of squared errors, steps between subtractions of the smallest metric.
    """
    n = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    inside, step = n < count, tl.num_programs(0).to(tl.int64) * N * 64
    s = tl.arange(0, 64)
    cost = tl.zeros((N, 64), tl.int32) + tl.load(start + s)[None, :]
    odd_levels = levels + (64 << CODE[0])
    for pair in range(D // 2):
        x = tl.load(inputs + n * D + 2 * pair, mask=inside, other=0)
        cost = _forward(cost, x, levels, back + 2 * pair * step, n, CODE[0], CODE[2], N)
        x = tl.load(inputs + n * D + 2 * pair + 1, mask=inside, other=0)
        cost = _forward(cost, x, odd_levels, back + (2 * pair + 1) * step, n, CODE[1], CODE[2], N)
        if (2 * pair + 2) % CODE[3] == 0:
            cost = cost - tl.min(cost, axis=1)[:, None]
    state = tl.min(cost * 64 + s[None, :], axis=1) % 64
    tl.debug_barrier()  # other threads read what these wrote
    for i in range(D // 2):
        t = D - 1 - 2 * i
        state = _backward(state, symbols + t, back + t * step, n, inside, D, CODE[1])
        state = _backward(state, symbols + t - 1, back + (t - 1) * step, n, inside, D, CODE[0])
    tl.store(first + n, state.to(tl.uint8), mask=inside)


class Search:
    """viterbi for one code on one device."""

    def __init__(self, book: Code, device: torch.device) -> None:
        even, odd = book.by_window[0], book.by_window[-1]
        self.levels = torch.from_numpy(np.concatenate([even, odd]).astype(np.int32) * book.grid).to(device)
        start = np.full(STATES, METRIC_TOP, np.int32)
        start[list(book.starts)] = 0
        self.start = torch.from_numpy(start).to(device)
        self.code = (book.widths[0], book.widths[-1], book.shift, RENORMALISE)

    def __call__(self, x: Tensor, book: Code) -> tuple[Tensor, Tensor]:
        """inputs int32 [N, D] -> (symbols uint8 [N, D], first states uint8 [N])."""
        count, dim = x.shape
        symbols = torch.empty(count, dim, dtype=torch.uint8, device=x.device)
        first = torch.empty(count, dtype=torch.uint8, device=x.device)
        programs = -(-min(count, BLOCK) // VECTORS)
        back = torch.empty(dim, programs * VECTORS, STATES, dtype=torch.uint8, device=x.device)
        for at in range(0, count, BLOCK):
            some = slice(at, min(at + BLOCK, count))
            vectors = x[some].contiguous()
            search[(programs,)](
                vectors,
                self.levels,
                back,
                symbols[some],
                first[some],
                len(vectors),
                self.start,
                self.code,
                dim,
                VECTORS,
            )
        return symbols, first
