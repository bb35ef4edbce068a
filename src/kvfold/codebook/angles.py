"""Optimal scalar quantizers for the angles of PolarQuant (arXiv 2502.02617, section 3).

The angle of level l has density proportional to sin^(2^(l-1) - 1)(2 psi) on [0, pi/2]: it compares the norms of two
independent Gaussian vectors of 2^(l-1) coordinates. Level 1 is uniform on the circle and needs no table.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]

NODES = (
    128  # Gauss-Legendre nodes per cell: the integrands are trigonometric polynomials of degree 16, exact long before
)
STEPS = 200  # Lloyd's iteration at least halves the error per step at four levels
DIGITS = 9  # of the stored angles: one machine's libm must not decide a boundary on another


@functools.cache
def solve(level: int, bits: int) -> tuple[F64, F64]:
    """Lloyd-Max quantizer of level >= 2: (angles [2^bits] ascending, boundaries [2^bits - 1]), float64 radians."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    power = 2 ** (level - 1) - 1
    n = 1 << bits
    # Around pi/4 the density is cos^power(2 t): symmetric, so the book is too.
    c = (np.arange(n) + 0.5) / n * (np.pi / 2) - np.pi / 4
    for _ in range(STEPS):
        b = np.concatenate([[-np.pi / 4], (c[1:] + c[:-1]) / 2, [np.pi / 4]])
        half = np.diff(b)[:, None] / 2
        t = b[:-1, None] + half * (1 + nodes)
        mass = weights * np.cos(2 * t) ** power
        c = (mass * t).sum(1) / mass.sum(1)
        c = (c - c[::-1]) / 2
    angles = np.array([float(f"{x:.{DIGITS}g}") for x in c + np.pi / 4])
    return angles, (angles[1:] + angles[:-1]) / 2
