"""Trellis codes: shift registers whose stored bits select a level through parities.

The state is the last STATE_BITS stored bits. A step shifts in k new ones; its window w of STATE_BITS + k bits (newest lowest)
gives an index whose bits are parities of masked w, and the index a level: decoding needs the bits alone, in any order.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import InvalidConfig

I32 = NDArray[np.int32]
U8 = NDArray[np.uint8]

STATE_BITS = 6
STATES = 1 << STATE_BITS
ERROR_TOP = 255  # the encoder clips its errors to it, so that their squares fill 16 bits
CLIP = 3.6  # standard deviations at which the encoder clips its inputs


@dataclass(frozen=True)
class Code:
    """widths: new bits of step t are widths[t % period]. masks: per phase, parity masks over the window, highest index bit
    first. levels: odd-symmetric integers by index. step: what a level's unit is worth in standard deviations. grid: the
    encoder's input units per unit of a level. starts: the states that a vector may begin in, by their stored number.
    weights: of a computed code, what its fields weigh; empty where levels are a table."""

    widths: tuple[int, ...]
    masks: tuple[tuple[int, ...], ...]
    levels: tuple[int, ...]
    step: float
    grid: int
    starts: tuple[int, ...]
    weights: tuple[int, ...] = ()

    @property
    def period(self) -> int:
        return len(self.widths)

    @functools.cached_property
    def index(self) -> tuple[U8, ...]:
        """Per phase, the level index of every window."""
        return tuple(parities(STATE_BITS + width, masks) for width, masks in zip(self.widths, self.masks, strict=True))

    @functools.cached_property
    def by_window(self) -> tuple[I32, ...]:
        """Per phase, the level of every window."""
        levels = np.array(self.levels, np.int32)
        return tuple(levels[index] for index in self.index)

    @property
    def shift(self) -> int:
        """Right shift of squared errors: the fewest bits with which every state is reached before a metric saturates, so
        that no path from a forbidden start state survives."""
        steps = max(self._steps_from(phase) for phase in range(self.period))
        return next(s for s in range(16) if steps * (ERROR_TOP**2 >> s) < 65535)

    def _steps_from(self, phase: int) -> int:
        bits = steps = 0
        while bits < STATE_BITS:
            bits += self.widths[(phase + steps) % self.period]
            steps += 1
        return steps

    @property
    def gain(self) -> np.float32:
        """Standard deviations to the encoder's input units."""
        return np.float32(float(f"{self.grid / self.step:.6g}"))

    @property
    def clip(self) -> int:
        return int(CLIP * self.grid / self.step)


def parities(bits: int, masks: tuple[int, ...]) -> U8:
    """Index of each window of `bits` bits: bit i from the top is the parity of window & masks[i]."""
    window = np.arange(1 << bits)
    out = np.zeros(1 << bits, np.uint8)
    for mask in masks:
        odd = window & mask
        for fold in (8, 4, 2, 1):
            odd ^= odd >> fold
        out = (out << 1 | odd & 1).astype(np.uint8)
    return out


@functools.cache
def code(bits: float, codec: str = "trellis") -> Code:
    """The code of a rate, of codec `trellis` or `computed`. Raises InvalidConfig for one there is none of."""
    codes = _read()[codec]
    if (found := codes.get(f"{bits:g}")) is None:
        raise InvalidConfig(f"there is no {codec} code of {bits:g} bits", f"Use one of: {', '.join(codes)}")
    return found


@functools.cache
def _read() -> dict[str, dict[str, Code]]:
    data = tomllib.loads(resources.files("kvfold.codebook").joinpath("trellis.toml").read_text(encoding="utf-8"))
    return {codec: {bits: _parse(c) for bits, c in codes.items()} for codec, codes in data.items()}


def _parse(c: dict[str, Any]) -> Code:
    masks, weights = tuple(tuple(m) for m in c["masks"]), tuple(c.get("weights", ()))
    upper = tuple(c["levels"]) if not weights else sums(weights, c["widths"][0])
    lower = tuple(-v for v in reversed(upper))
    return Code(tuple(c["widths"]), masks, lower + upper, c["step"], c["grid"], tuple(c["starts"]), weights)


def sums(weights: tuple[int, ...], width: int) -> tuple[int, ...]:
    """Upper half of the levels of a computed code, by index: the weighted sum of its fields of `width` bits, the first highest in
    the index; field values v count as 2 v - (2^width - 1)."""
    index, top = np.arange(1 << (width * len(weights))), (1 << width) - 1
    level = np.zeros(len(index), np.int64)
    for place, weight in enumerate(reversed(weights)):
        level += weight * (2 * (index >> (place * width) & top) - top)
    return tuple(int(v) for v in level[len(level) // 2 :])
