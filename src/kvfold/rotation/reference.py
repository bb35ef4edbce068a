"""Rotations in NumPy: the only place where a seed becomes signs or a matrix.

Two kinds. `hadamard`: R = (O_m ⊗ H_{2^k}) diag(s) / sqrt(D) with D = 2^k m, m odd, s random signs, H the Walsh-Hadamard
matrix and O_m the m x m Hartley matrix cas(2 pi i j / m) (O_m O_m^T = m I, O_1 = 1): powers of two are pure Hadamard,
80 = 16 x 5, 96 = 32 x 3, 112 = 16 x 7. `dense`: Q of the QR decomposition of an i.i.d. Gaussian matrix, as in Alg. 1 of
the TurboQuant paper (arXiv 2504.19874). Signs are not optional: without them a DC offset lands in one coordinate.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import InvalidConfig, UnsupportedHeadDim

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

MIN_HEAD_DIM = 8
_MASK = (1 << 64) - 1
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(state: int) -> int:
    """One output of the SplitMix64 generator for a 64-bit state (Steele, Lea, Flood 2014, fig. 15)."""
    z = (state + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)


def stream(seed: int, *path: int) -> int:
    """A 64-bit key for one (seed, layer, head, side, ...) path; different paths give unrelated keys."""
    key = splitmix64(seed & _MASK)
    for step in path:
        key = splitmix64(key ^ splitmix64(step & _MASK))
    return key


def signs(dim: int, key: int) -> F32:
    """`dim` random signs of the stream `key`: bit j % 64 of output j // 64, set meaning -1. float32 [dim]."""
    words = [splitmix64((key + w) & _MASK) for w in range((dim + 63) // 64)]
    bits = np.array([(words[j // 64] >> (j % 64)) & 1 for j in range(dim)], dtype=np.float32)
    return (1 - 2 * bits).astype(np.float32)


def gaussian(shape: tuple[int, ...], key: int) -> F64:
    """Independent N(0, 1) numbers of the stream `key`, float64 [shape], by Box and Muller's method.

    Outputs 2i and 2i + 1 of the stream give u1 = (a >> 11) + 1 and u2 = b >> 11 over 2^53, hence the pair
    sqrt(-2 ln u1) (cos 2 pi u2, sin 2 pi u2), in row-major order. Not NumPy's generator, whose streams may change.
    """
    pairs = (math.prod(shape) + 1) // 2
    # Counter mode: word w is splitmix64(key + w), in wrapping 64-bit arithmetic.
    z = np.uint64(key & _MASK) + np.arange(2 * pairs, dtype=np.uint64) + np.uint64(_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    u = ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.float64).reshape(pairs, 2) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(u[:, 0] + 2.0**-53)), 2 * np.pi * u[:, 1]
    both = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return np.asarray(both.ravel()[: math.prod(shape)].reshape(shape))


def factor(dim: int) -> tuple[int, int]:
    """dim = pow2 * odd."""
    if dim < MIN_HEAD_DIM:
        raise UnsupportedHeadDim(
            f"head_dim {dim} is too small to rotate", f"Use at least {MIN_HEAD_DIM}, or profile 'lossless'"
        )
    pow2 = dim & -dim
    return pow2, dim // pow2


@functools.cache
def hartley(m: int) -> F32:
    """cas(2 pi i j / m), float32 [m, m]; symmetric, and its square is m times the identity."""
    i = np.arange(m)
    a = 2 * np.pi * ((i[:, None] * i[None, :]) % m) / m
    return (np.cos(a) + np.sin(a)).astype(np.float32)


def hadamard_f32(x: F32) -> F32:
    """Unnormalised (O_m ⊗ H) x over the last axis, in the canonical order of float32 operations.

    Butterflies h = 1, 2, 4, ... inside each block of 2^k; then, across the m blocks, sums from block 0 upwards.
    """
    dim = x.shape[-1]
    pow2, m = factor(dim)
    y = x.astype(np.float32, copy=True).reshape(*x.shape[:-1], m, pow2)
    h = 1
    while h < pow2:
        v = y.reshape(*y.shape[:-1], pow2 // (2 * h), 2, h)
        a, b = v[..., 0, :].copy(), v[..., 1, :].copy()
        v[..., 0, :], v[..., 1, :] = a + b, a - b
        h *= 2
    if m > 1:
        c = hartley(m)
        rows = []
        for i in range(m):
            acc = c[i, 0] * y[..., 0, :]
            for j in range(1, m):
                acc = acc + c[i, j] * y[..., j, :]
            rows.append(acc)
        y = np.stack(rows, axis=-2)
    return y.reshape(x.shape)


def hadamard_matrix(dim: int) -> F64:
    """(O_m ⊗ H_{2^k}) / sqrt(dim), float64, orthogonal and symmetric."""
    pow2, m = factor(dim)
    H = np.ones((1, 1))
    while len(H) < pow2:
        H = np.block([[H, H], [H, -H]])
    i = np.arange(m)
    a = 2 * np.pi * ((i[:, None] * i[None, :]) % m) / m
    return np.kron(np.cos(a) + np.sin(a), H) / np.sqrt(dim)


def dense_matrix(dim: int, key: int) -> F64:
    """Haar-random orthogonal matrix of the stream `key`, float64 [dim, dim]: Q of a Gaussian QR, columns sign-fixed."""
    factor(dim)
    q, r = np.linalg.qr(gaussian((dim, dim), key))
    return np.asarray(q * np.sign(np.diag(r)))


def matrix(kind: str, dim: int, key: int) -> F64:
    """The rotation R (y = R x) of one head in float64 [dim, dim]."""
    if kind == "hadamard":
        return hadamard_matrix(dim) * signs(dim, key).astype(np.float64)
    if kind == "dense":
        return dense_matrix(dim, key)
    raise InvalidConfig(f"unknown rotation {kind!r}", "Use 'hadamard' or 'dense'")
