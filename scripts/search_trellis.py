#!/usr/bin/env python
"""Look for better codes than those of src/kvfold/codebook/trellis.toml, and write them there. Needs the native library.

Random parity masks, then hill climbing, from the committed codes too: a run never makes one worse. The encoder is exact in
integers, so that the same seed finds the same codes on any machine. `--rates 2 3` redoes some, `--seed` tries others.
The measure is the least-squares error of random directions in 128 dimensions, start states as they are stored included.

Computed codes (`--computed 2 3`) are searched among those that a kernel makes with few operations: a field is a sum of whole
words of symbols, and of one such sum moved by some bits and masked. The CUDA kernels have these masks and weights in them.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kvfold.codebook.trellis import STATE_BITS, STATES, Code, code, sums
from kvfold.codec.trellis import quantize_inputs, read_levels
from kvfold.engine.cpu.trellis import viterbi

F32 = NDArray[np.float32]

FILE = Path(__file__).parent.parent / "src" / "kvfold" / "codebook" / "trellis.toml"
# Index bits of each rate.
RATES = {"1": 3, "1.5": 4, "2": 4, "2.5": 5, "3": 6, "3.5": 6, "4": 6}
TOP = 63  # of the levels: seven-bit integers, as the kernels of scalar codecs have
GRID = 72  # input units per standard deviation, about
FINER = 99  # from 3.5 bits on
DIM = 128
DRAWS, KEPT, CLIMBS, PATIENCE = 240, 6, 4000, 900
COMPUTED, WEIGHTS = ("2", "3"), (3, 2)  # rates of computed codes, what their fields weigh
OPERATIONS, COMPUTED_DRAWS = 3, 20000


def directions(count: int, seed: int) -> F32:
    x = np.random.default_rng([seed, DIM]).standard_normal((count, DIM))
    return (x * (DIM / (x * x).sum(-1, keepdims=True)) ** 0.5).astype(np.float32)


def encode(book: Code, u: F32) -> NDArray[np.float64]:
    symbols, states = viterbi(torch.from_numpy(quantize_inputs(u, book)), book)
    return read_levels(symbols.numpy(), states.numpy(), book).astype(np.float64)


def error(book: Code, u: F32) -> float:
    """Mean squared error relative to the vectors', at each vector's best scale."""
    levels = encode(book, u)
    return float(1 - ((u * levels).sum(-1) ** 2 / (levels * levels).sum(-1)).mean() / DIM)


def with_levels(book: Code, upper: NDArray[np.float64]) -> Code:
    """The book with real-valued levels (by index, upper half) on the integer grid."""
    step = float(f"{abs(upper).max() / TOP:.6g}")
    whole = [int(v) for v in np.rint(upper / step)]
    unit = FINER if sum(book.widths) / book.period > 3 else GRID
    return replace(book, levels=(*(-v for v in reversed(whole)), *whole), step=step, grid=max(1, round(unit * step)))


def refit(book: Code, u: F32) -> Code:
    """Levels moved to the means of the inputs that took them, once."""
    symbols, states = viterbi(torch.from_numpy(quantize_inputs(u, book)), book)
    plain = replace(book, levels=tuple(range(len(book.levels))))
    index = read_levels(symbols.numpy(), states.numpy(), plain).ravel()
    half = len(book.levels) // 2
    total, count = np.bincount(index, u.ravel(), 2 * half), np.bincount(index, minlength=2 * half)
    total, count = (total - total[::-1])[half:], (count + count[::-1])[half:]
    old = np.array(book.levels[half:]) * book.step
    return with_levels(book, np.where(count > 0, total / np.maximum(count, 1), old))


def drawn(widths: tuple[int, ...], bits: int, random: np.random.Generator) -> Code:
    """Random masks in which the newest symbol sets the upper index bits and the past mixes into all."""
    masks = []
    for width in widths:
        past = random.integers(1, STATES, bits) << width
        masks.append(tuple(int(p) | (1 << (width - 1 - j) if j < width else 0) for j, p in enumerate(past)))
    share = (np.arange(1 << (bits - 1)) + 0.5) / (1 << bits)
    upper = np.sqrt(2) * 1.6 * share / (1 - 0.62 * share)  # roughly the normal quantiles above the median
    return with_levels(Code(widths, tuple(masks), (), 1.0, 1, subspace(16, 32)), upper)


def subspace(a: int, b: int) -> tuple[int, ...]:
    return tuple(sorted({0, a, b, a ^ b}))


def mutated(book: Code, random: np.random.Generator) -> Code:
    """One to three bits of past flipped in the masks; now and then another set of start states."""
    if random.random() < 0.1:
        a, b = random.choice(np.arange(1, STATES), 2, replace=False)
        return replace(book, starts=subspace(int(a), int(b)))
    masks = [list(m) for m in book.masks]
    for _ in range(int(random.integers(1, 4))):
        phase = int(random.integers(book.period))
        masks[phase][int(random.integers(len(masks[phase])))] ^= 1 << int(
            random.integers(book.widths[phase], STATE_BITS + book.widths[phase])
        )
    return replace(book, masks=tuple(tuple(m) for m in masks))


def climb(book: Code, u: F32, random: np.random.Generator) -> tuple[float, Code]:
    for _ in range(3):
        book = refit(book, u)
    best, idle = error(book, u), 0
    for _ in range(CLIMBS):
        other = mutated(book, random)
        if (found := error(other, u)) < best * 0.9998:
            book, best, idle = other, found, 0
            fitted = refit(book, u)
            if (found := error(fitted, u)) < best:
                book, best = fitted, found
        elif (idle := idle + 1) == PATIENCE:
            break
    return best, book


def search(committed: Code, bits: int, seed: int) -> Code:
    """The best of climbs from random codes and from the committed one."""
    widths = committed.widths
    random = np.random.default_rng(seed)
    few, more, many = directions(32, seed), directions(160, seed + 1), directions(2048, seed + 2)
    pool = sorted(
        ((error(book, few), i, book) for i, book in enumerate(drawn(widths, bits, random) for _ in range(DRAWS)))
    )
    found = [climb(book, more, random)[1] for book in (committed, *(book for _, _, book in pool[:KEPT]))]
    found.append(committed)
    book = min(found, key=lambda b: error(b, many))
    for _ in range(4):
        fitted = refit(book, many)
        book = min(book, fitted, key=lambda b: error(b, many))
    spaces = sorted({subspace(a, b) for a, b in itertools.combinations(range(1, STATES), 2)})
    ranked = sorted(spaces, key=lambda s: error(replace(book, starts=s), more))[:12]
    book = min((replace(book, starts=s) for s in (*ranked, book.starts)), key=lambda b: error(b, many))
    return settled(book, directions(512, seed + 3), many)


def settled(book: Code, u: F32, many: F32) -> Code:
    """Start states exchanged one by one while that helps."""
    moved = True
    while moved:
        moved = False
        for old in book.starts:
            rest = [s for s in book.starts if s != old]
            others = [replace(book, starts=tuple(sorted([*rest, s]))) for s in range(STATES) if s not in rest]
            best = min(others, key=lambda b: error(b, u))
            if best.starts != book.starts and error(best, many) < error(book, many):
                book, moved = best, True
                break
    return book


@dataclass(frozen=True)
class Field:
    """A computed code's field: the sum of the symbols in `whole`, by how many steps they lie back, and, in the bits of `kept`, of
    those in `moved`, shifted by `shift` bits."""

    whole: frozenset[int]
    moved: frozenset[int] = frozenset()
    shift: int = 0
    kept: int = 0

    @property
    def operations(self) -> int:
        """Three-input logical instructions and shifts."""
        return len(self.whole) // 2 + (1 + len(self.moved) // 2 + 1 if self.moved else 0)

    def masks(self, width: int) -> tuple[int, ...]:
        out = []
        for bit in reversed(range(width)):
            mask = sum(1 << b * width + bit for b in self.whole if b * width + bit < STATE_BITS + width)
            if self.kept >> bit & 1 and 0 <= bit - self.shift < width:
                places = (b * width + bit - self.shift for b in self.moved)
                mask ^= sum(1 << p for p in places if p < STATE_BITS + width)
            out.append(mask)
        return tuple(out)


def computed(width: int, fields: Sequence[Field], step: float, starts: tuple[int, ...]) -> Code:
    masks = tuple(m for f in fields for m in f.masks(width))
    upper = sums(WEIGHTS, width)
    levels = (*(-v for v in reversed(upper)), *upper)
    return Code((width,), (masks,), levels, step, max(1, round(GRID * step)), starts, WEIGHTS)


def drawn_field(width: int, random: np.random.Generator) -> Field:
    symbols = range(1 + -(-STATE_BITS // width))
    whole = frozenset(b for b in symbols if random.random() < 0.5)
    if random.random() < 0.5:
        return Field(whole)
    moved = frozenset(b for b in symbols if random.random() < 0.4)
    return Field(
        whole, moved, int(random.choice([s for s in range(1 - width, width) if s])), int(random.integers(1, 1 << width))
    )


def search_computed(committed: Code, seed: int) -> Code:
    """The best of all pairs of fields drawn, and of the committed code, with start states of its own."""
    width, random = committed.widths[0], np.random.default_rng(seed)
    few, more, many = directions(32, seed), directions(160, seed + 1), directions(2048, seed + 2)
    drawn = [(drawn_field(width, random), drawn_field(width, random)) for _ in range(COMPUTED_DRAWS)]
    pairs = {
        p for p in drawn if sum(f.operations for f in p) <= OPERATIONS and all(m for f in p for m in f.masks(width))
    }
    step = committed.step

    def usable(fields: tuple[Field, Field]) -> bool:
        masks = [m for f in fields for m in f.masks(width)]  # every new bit must be seen
        return all(any(m >> bit & 1 for m in masks) for bit in range(width))

    books = [computed(width, p, step, subspace(16, 32)) for p in sorted(pairs, key=repr) if usable(p)]
    ranked = sorted(books, key=lambda b: error(b, few))[:KEPT]
    spaces = sorted({subspace(a, b) for a, b in itertools.combinations(range(1, STATES), 2)})
    found = [committed]
    for book in (*ranked, committed):
        starts = min(spaces[:: len(spaces) // 60], key=lambda s: error(replace(book, starts=s), more))
        steps = [float(f"{step * f:.6g}") for f in (0.97, 1, 1.03)]
        found += [replace(book, starts=starts, step=s, grid=max(1, round(GRID * s))) for s in steps]
    book = min(found, key=lambda b: error(b, many))
    return settled(book, directions(512, seed + 3), many)


def text(name: str, book: Code) -> str:
    levels = (
        f"weights = {list(book.weights)}" if book.weights else f"levels = {list(book.levels[len(book.levels) // 2 :])}"
    )
    masks = [list(m) for m in book.masks]
    return (
        f"[{name}]\nwidths = {list(book.widths)}\nmasks = {masks}\n{levels}\n"
        f"step = {book.step}\ngrid = {book.grid}\nstarts = {list(book.starts)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", nargs="*", default=[], choices=list(RATES))
    parser.add_argument("--computed", nargs="*", default=[], choices=COMPUTED)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    names = [*(f'trellis."{r}"' for r in options.rates), *(f'computed."{r}"' for r in options.computed)]
    parts = {part.split("]")[0][1:]: part.strip() + "\n" for part in FILE.read_text().split("\n\n") if part}
    for name in names or list(parts):
        codec, bits = name.rstrip('"').split('."')
        old = code(float(bits), codec)
        book = search(old, RATES[bits], options.seed) if codec == "trellis" else search_computed(old, options.seed)
        print(f"{codec} {bits}: {error(book, directions(8192, 99)):.5f}", flush=True)
        parts[name] = text(name, book)
        FILE.write_text("\n".join(parts.values()))


if __name__ == "__main__":
    main()
