"""Optimal scalar quantizers for one coordinate of a uniform point on the sphere (TurboQuant, Lemma 1 and eq. 4).

Everything is in units of 1/sqrt(d): X = sqrt(d) t, so that X -> N(0, 1). Density on [-sqrt(d), sqrt(d)]:
f(x) = Gamma(d/2) / (sqrt(pi d) Gamma((d-1)/2)) (1 - x^2/d)^((d-3)/2).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import InvalidConfig, UnsupportedHeadDim

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MAX_BITS = 8
# Panels of the cumulative distribution, five Gauss points each: levels of the 8-bit book change by < 1e-10 at twice as many.
PANELS = 1 << 14
NEWTON_STEPS = 200
# Beyond this many standard deviations the normalised density is below 1e-16; finer panels are better spent inside.
TAIL = 9.0
# Grid of the integer levels by bits: 7-bit integers where a kernel exists (vpmaddubsw and PRMT need |level| <= 63); 62 and
# 60 lose .03 and .24 % of MSE at d = 128, 63 would lose .20 and .48 %;
# 3:10 at two bits, whose ratio .300 is that of the optimal levels (.3006 at d = 128). Wider books run in torch only.
TOP_LEVEL = {1: 1, 2: 10, 3: 62, 4: 60, 5: 4095, 6: 4095, 7: 16383, 8: 16383}
# The squared error is flat around the best step: six digits of it cost 10^-12.
STEP_DIGITS = 6
SECANT_STEPS = 20
STEP_NOISE = 1e-14  # of the quadrature, relative to the step


@dataclass(frozen=True)
class Codebook:
    """Real-valued optimum. centroids float64 [2^bits] ascending; boundaries [2^bits - 1]; mse = expected squared error."""

    bits: int
    dim: int
    centroids: F64
    boundaries: F64
    mse: float


@dataclass(frozen=True)
class Table:
    """Integer form that every backend uses. Reconstruction is step * levels[code]; code = #{thresholds < u}."""

    levels: NDArray[np.int32]
    step: np.float32
    thresholds: F32


class _Density:
    """f, its cumulative and its first moment, by panels of Gauss-Legendre quadrature."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.edge = min(math.sqrt(dim), TAIL)
        self.log_norm = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - 0.5 * math.log(math.pi * dim)
        self.grid = np.linspace(-self.edge, self.edge, PANELS + 1)
        self.nodes, self.weights = np.polynomial.legendre.leggauss(5)
        mass = self._panel(self.grid[:-1], self.grid[1:])
        total = mass.sum()
        self.log_norm -= math.log(total)
        self.cumulative = np.concatenate([[0.0], np.cumsum(mass / total)])

    def pdf(self, x: F64) -> F64:
        inside = np.clip(1 - x * x / self.dim, 1e-300, None)
        return np.asarray(np.exp(self.log_norm + 0.5 * (self.dim - 3) * np.log(inside)))

    def _panel(self, lo: F64, hi: F64) -> F64:
        half = (hi - lo) / 2
        x = (lo + half)[..., None] + half[..., None] * self.nodes
        return np.asarray((self.pdf(x) * self.weights).sum(-1) * half)

    def cdf(self, x: F64) -> F64:
        i = np.clip(np.searchsorted(self.grid, x, side="right") - 1, 0, PANELS - 1)
        return np.asarray(self.cumulative[i] + self._panel(self.grid[i], x))

    def moment(self, x: F64) -> F64:
        """M(x) with M' = x f: closed form -d/(d-1) (1 - x^2/d) f(x)."""
        return np.asarray(-self.dim / (self.dim - 1) * np.clip(1 - x * x / self.dim, 0, None) * self.pdf(x))


@functools.cache
def solve(bits: int, dim: int) -> Codebook:
    """Lloyd-Max codebook of `bits` bits for head_dim `dim` >= 8, by Newton's method on c = centroid(c).

    Raises InvalidConfig for bits outside 1..8, UnsupportedHeadDim below 8. Source: TurboQuant eq. (4), Max 1960.
    """
    if not 1 <= bits <= MAX_BITS:
        raise InvalidConfig(f"{bits} bits per code are not supported", f"Use 1 to {MAX_BITS}")
    if dim < 8:
        raise UnsupportedHeadDim(f"head_dim {dim} is too small for a codebook", "Use head_dim >= 8")
    f = _Density(dim)
    n = 1 << bits
    # Start from companding with the density^(1/3) (Panter-Dite), which is within a few per cent of the optimum.
    third = np.cumsum(f.pdf(f.grid) ** (1 / 3))
    c = np.interp((np.arange(n) + 0.5) / n, third / third[-1], f.grid)
    ends = np.array([f.edge])
    for _ in range(NEWTON_STEPS):
        b = np.concatenate([-ends, (c[1:] + c[:-1]) / 2, ends])
        mass, first = np.diff(f.cdf(b)), np.diff(f.moment(b))
        centroid = first / mass
        g = f.pdf(b)
        upper, lower = g[1:] * (b[1:] - centroid) / mass / 2, g[:-1] * (centroid - b[:-1]) / mass / 2
        upper[-1] = lower[0] = 0.0
        jacobian = np.eye(n) - np.diag(upper + lower) - np.diag(upper[:-1], 1) - np.diag(lower[1:], -1)
        step = np.linalg.solve(jacobian, centroid - c)
        # A full Newton step may cross levels at 7-8 bits; halve it until the order holds.
        while np.any(np.diff(c + step) <= 0) or abs(c + step).max() >= f.edge:
            step /= 2
        c = c + step
        c = (c - c[::-1]) / 2
        if abs(step).max() < 1e-13:
            break
    b = np.concatenate([-ends, (c[1:] + c[:-1]) / 2, ends])
    mass, first = np.diff(f.cdf(b)), np.diff(f.moment(b))
    mse = 1.0 - float((2 * c * first - c * c * mass).sum())
    return Codebook(bits, dim, c, b[1:-1], mse)


def _fitted_step(levels: NDArray[np.int32], dim: int, start: float) -> float:
    """The step near `start` that minimises the mean squared error of the given integer levels with midpoint thresholds.

    It is the fixed point of step = E[L x] / E[L^2]. Iterating that map takes thousands of rounds at 8 bits, where
    every threshold moves with the step; the secant method takes five.
    """
    f = _Density(dim)
    ends = np.array([f.edge])

    def excess(step: float) -> float:
        b = np.concatenate([-ends, np.clip(step * (levels[1:] + levels[:-1]) / 2, -f.edge, f.edge), ends])
        mass, first = np.diff(f.cdf(b)), np.diff(f.moment(b))
        return float((levels * first).sum() / (levels.astype(float) ** 2 * mass).sum()) - step

    old, step = start, start + excess(start)
    before, after = excess(old), excess(step)
    for _ in range(SECANT_STEPS):
        if abs(after) < STEP_NOISE * step or after == before:
            break
        old, step = step, step - after * (step - old) / (after - before)
        before, after = after, excess(step)
    return step


@functools.cache
def table(codec: str, bits: int, dim: int) -> Table:
    """Integer levels, step and thresholds of a scalar codec: `mse` (1..8 bits) or `uniform` (2 bits, -3 -1 1 3).

    The step is rounded to STEP_DIGITS before it becomes float32, so that one machine's last bit of libm cannot
    change a threshold on another.
    """
    if codec == "mse":
        book = solve(bits, dim)
        top = TOP_LEVEL[bits]
        start = float(book.centroids[-1]) / top
        levels = np.rint(book.centroids / start).astype(np.int32)
    elif codec == "uniform" and bits == 2:
        levels = np.array([-3, -1, 1, 3], dtype=np.int32)
        start = 0.5  # an outer level of 1.5, as in the optimal book of two bits
    elif codec == "uniform":
        raise InvalidConfig(f"codec 'uniform' exists at 2 bits only, not {bits}", "Use codec 'mse' for other widths")
    else:
        raise InvalidConfig(f"codec {codec!r} has no scalar table", "Use 'mse' or 'uniform'")
    step = np.float32(float(f"{_fitted_step(levels, dim, start):.{STEP_DIGITS}g}"))
    middle = (levels[1:] + levels[:-1]).astype(np.float32) * np.float32(0.5)
    return Table(levels, step, (middle * step).astype(np.float32))
