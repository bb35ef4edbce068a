"""QJL: the signs of a random projection and the vector's length (arXiv 2406.03482, definition 3.1).

    signs = sign(S x),  norm = |x|,  x_hat = c norm S^T signs,  E[x_hat] = x over S.

`gaussian`: S_ij ~ N(0, 1) and c = sqrt(pi/2) / D, as in Algorithm 2 of TurboQuant. `orthogonal`: S is a Haar-random
orthogonal matrix. Each row is then uniform on the sphere, E[s sign(s.x)] = E|t| x / |x| with t one coordinate of such a
row, and c = 1 / (D E|t|), which tends to sqrt(pi / 2D) but is 1 % away from it at D = 24.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kvfold.codec.fields import Fields
from kvfold.rotation.reference import dense_matrix, gaussian, stream

F64 = NDArray[np.float64]

SKETCH_STREAM = 1  # the path from a head's stream key to its sketch


def mean_abs_coordinate(dim: int) -> float:
    """E|t| for one coordinate of a uniform point on the sphere: Gamma(D/2) / (sqrt(pi) Gamma((D+1)/2))."""
    return math.exp(math.lgamma(dim / 2) - math.lgamma((dim + 1) / 2)) / math.sqrt(math.pi)


def sketch(kind: str, dim: int, key: int) -> tuple[F64, float]:
    """(S [dim, dim], c) of the head with stream `key`; kind `gaussian` or `orthogonal`."""
    own = stream(key, SKETCH_STREAM)
    if kind == "gaussian":
        return gaussian((dim, dim), own), math.sqrt(math.pi / 2) / dim
    return dense_matrix(dim, own), 1 / (dim * mean_abs_coordinate(dim))


class Qjl:
    """One head in float64. encode: x [..., D] -> fields; decode: fields -> x_hat."""

    def __init__(self, kind: str, dim: int, key: int) -> None:
        self.matrix, self.c = sketch(kind, dim, key)

    def freeze(self, x: F64) -> None:
        return None

    def encode(self, x: F64, state: None = None) -> Fields:
        """`signs` uint8 [..., D], 1 where a coordinate of S x is positive; `norm` float16 [..., 1]."""
        return {
            "signs": (x @ self.matrix.T > 0).astype(np.uint8),
            "norm": np.linalg.norm(x, axis=-1, keepdims=True).astype(np.float16),
        }

    def decode(self, fields: Fields, state: None = None) -> F64:
        signs = 2.0 * fields["signs"].astype(np.float64) - 1
        return np.asarray(self.c * fields["norm"].astype(np.float64) * (signs @ self.matrix))
