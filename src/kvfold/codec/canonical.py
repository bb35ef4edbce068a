"""float32 arithmetic in the one order that every backend follows, so that codes and bytes are equal everywhere.

IEEE round to nearest, no fused multiply-add, correctly rounded square root and division, sums by a halving tree.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvfold.config import MEAN_TOKENS

F32 = NDArray[np.float32]


def tree_sum(x: F32, axis: int = -1) -> F32:
    """Sum by halves: pad with zeros to a power of two, then repeatedly add the second half to the first."""
    v = np.moveaxis(x, axis, -1)
    n = 1 << max(0, v.shape[-1] - 1).bit_length()
    v = np.concatenate([v, np.zeros((*v.shape[:-1], n - v.shape[-1]), np.float32)], axis=-1)
    while n > 1:
        n //= 2
        v = v[..., :n] + v[..., n:]
    return np.asarray(v[..., 0], dtype=np.float32)


def normalise(y: F32) -> tuple[F32, F32]:
    """y [..., D] -> (u, r): r = sqrt(sum y^2 / D), u = y * (1 / r); zero vectors give u = 0."""
    dim = np.float32(y.shape[-1])
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        r = np.sqrt(tree_sum(y * y) / dim).astype(np.float32)
        inverse = np.where(r > 0, np.float32(1) / r, np.float32(0)).astype(np.float32)
        return (y * inverse[..., None]).astype(np.float32), r


def inverse_sqrt(dim: int) -> np.float32:
    return np.float32(1 / math.sqrt(dim))


def half_means(keys: F32, first: int) -> tuple[NDArray[np.int8], NDArray[np.float16], F32]:
    """Mean keys of the two halves of a page, as stored, without the page's `first` leading tokens.

    keys [..., 128, D] -> (codes int8 [..., 2, D], scales float16 [..., 2], dequantized means float32 [..., 2, D]).
    """
    k = keys.copy()
    k[..., :first, :] = 0
    halves = k.reshape(*k.shape[:-2], 2, MEAN_TOKENS, k.shape[-1])
    counts = np.array([max(1, MEAN_TOKENS - first), min(MEAN_TOKENS, 2 * MEAN_TOKENS - first)], np.float32)
    mean = tree_sum(halves, axis=-2) / counts[:, None]
    scale = (np.abs(mean).max(axis=-1) / np.float32(127)).astype(np.float16)
    s = scale.astype(np.float32)[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(s > 0, mean / s, np.float32(0))
    codes = np.clip(np.rint(ratio), -127, 127).astype(np.int8)
    return codes, scale, (s * codes.astype(np.float32)).astype(np.float32)
