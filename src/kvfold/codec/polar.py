"""PolarQuant (arXiv 2502.02617, section 3): recursive polar coordinates of blocks of 16 rotated coordinates.

Level 1 turns coordinate pairs into (r, theta), theta in [0, 2 pi); level l >= 2 turns pairs of radii of level l - 1 into
(r, psi), psi = atan2(second, first) in [0, pi/2]; after four levels one radius per block is left. Angles are independent
after a random rotation: theta is uniform (16 equal sectors), psi has density sin^(2^(l-1) - 1)(2 psi) (codebook.angles).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfold.codebook import angles
from kvfold.codec.fields import POLAR_BITS, Fields

F64 = NDArray[np.float64]

SECTORS = 1 << POLAR_BITS[0]
LEVELS = len(POLAR_BITS)


def sector_boundaries() -> F64:
    """Lower ends of sectors 1..15 of level 1, radians."""
    return 2 * np.pi * np.arange(1, SECTORS) / SECTORS


def sector_centres() -> F64:
    return 2 * np.pi * (np.arange(SECTORS) + 0.5) / SECTORS


class Polar:
    """One head in float64. rotation [D, D]: y = R x."""

    def __init__(self, rotation: F64) -> None:
        self.rotation = rotation

    def freeze(self, x: F64) -> None:
        return None

    def encode(self, x: F64, state: None = None) -> Fields:
        """x [..., D] -> `outer` uint8 [..., D/2], `inner` uint8 [..., 7 D/16] (level 2, then 3, then 4), `radius`.

        Boundaries belong to the lower code. `radius` float16 [..., D/16] is the norm of each block.
        """
        y = (x @ self.rotation.T).reshape(*x.shape[:-1], -1, 2)
        theta = np.arctan2(y[..., 1], y[..., 0])
        outer = np.searchsorted(sector_boundaries(), np.where(theta < 0, theta + 2 * np.pi, theta), side="left")
        r = np.hypot(y[..., 0], y[..., 1])
        inner = []
        for level in range(2, LEVELS + 1):
            a, b = r[..., 0::2], r[..., 1::2]
            _, boundaries = angles.solve(level, POLAR_BITS[level - 1])
            inner.append(np.searchsorted(boundaries, np.arctan2(b, a), side="left"))
            r = np.hypot(a, b)
        return {
            "outer": outer.astype(np.uint8),
            "inner": np.concatenate(inner, axis=-1).astype(np.uint8),
            "radius": r.astype(np.float16),
        }

    def decode(self, fields: Fields, state: None = None) -> F64:
        r = fields["radius"].astype(np.float64)
        inner = fields["inner"]
        end = inner.shape[-1]
        for level in range(LEVELS, 1, -1):
            centres, _ = angles.solve(level, POLAR_BITS[level - 1])
            psi = centres[inner[..., end - r.shape[-1] : end]]
            end -= r.shape[-1]
            r = np.stack([r * np.cos(psi), r * np.sin(psi)], axis=-1).reshape(*r.shape[:-1], -1)
        theta = sector_centres()[fields["outer"]]
        y = np.stack([r * np.cos(theta), r * np.sin(theta)], axis=-1).reshape(*r.shape[:-1], -1)
        return np.asarray(y @ self.rotation)
