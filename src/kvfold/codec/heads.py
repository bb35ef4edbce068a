"""`mse` and `uniform` for one KV head, vectors in and fields out: in float64, and in canonical float32."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvfold.codebook import Table
from kvfold.codec.fields import Fields
from kvfold.codec.scalar import decode, encode, grid
from kvfold.rotation.reference import hadamard_f32, hadamard_matrix, signs

F64 = NDArray[np.float64]


class Exact:
    """The format's quantizer in float64: integer levels, the scale that `kind` names, any rotation [D, D].

    It differs from `scalar.encode_exact` in the levels only, from `Canonical` in the precision only.
    """

    def __init__(self, book: Table, rotation: F64, kind: str, search: int = 1) -> None:
        self.book, self.rotation, self.kind, self.search = book, rotation, kind, search
        self.dim = len(rotation)

    def freeze(self, x: F64) -> None:
        return None

    def encode(self, x: F64, state: None = None) -> Fields:
        """x [..., D] -> `codes` uint8 [..., D], `scale` float16 [..., 1]."""
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        y = x @ self.rotation.T
        # u has mean square 1, the unit of the table.
        u = np.divide(y * np.sqrt(self.dim), norm, out=np.zeros_like(y), where=norm > 0)
        tried = [
            np.searchsorted(self.book.thresholds.astype(np.float64), u * f, side="left")
            for f in grid(self.search).astype(np.float64)
        ]
        cosines = [self._cosine(u, codes) for codes in tried]
        codes = np.take_along_axis(np.stack(tried), np.argmax(cosines, axis=0)[None, ..., None], axis=0)[0]
        levels = self.book.levels[codes].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind == "norm":
                scale = norm / np.sqrt(self.dim) * float(self.book.step)
            elif self.kind == "unbiased":
                scale = norm**2 / (y * levels).sum(-1, keepdims=True)
            elif self.kind == "least-squares":
                scale = (y * levels).sum(-1, keepdims=True) / (levels**2).sum(-1, keepdims=True)
            else:
                scale = norm / np.linalg.norm(levels, axis=-1, keepdims=True)
        return {"codes": codes.astype(np.uint8), "scale": np.where(norm > 0, scale, 0).astype(np.float16)}

    def _cosine(self, u: F64, codes: NDArray[np.intp]) -> F64:
        """<u, L>^2 / |L|^2 of the levels L of `codes`."""
        levels = self.book.levels[codes].astype(np.float64)
        return np.asarray((u * levels).sum(-1) ** 2 / (levels**2).sum(-1))

    def decode(self, fields: Fields, state: None = None) -> F64:
        """Fields -> x_hat [..., D]."""
        z = fields["scale"].astype(np.float64) * self.book.levels[fields["codes"]]
        return np.asarray(z @ self.rotation)


class Canonical:
    """The encoder whose codes and bytes every backend equals: signed Hadamard rotation of the stream `key`."""

    def __init__(self, book: Table, dim: int, key: int, kind: str, search: int = 1) -> None:
        self.book, self.dim, self.kind, self.search = book, dim, kind, search
        self.signs = signs(dim, key)

    def freeze(self, x: F64) -> None:
        return None

    def encode(self, x: NDArray[np.floating], state: None = None) -> Fields:
        """x [..., D], rounded to float32 -> `codes` uint8 [..., D], `scale` float16 [..., 1]."""
        y = hadamard_f32(x.astype(np.float32) * self.signs)
        codes, scales = encode(y, self.book, self.kind, self.search)
        return {"codes": codes, "scale": scales[..., None]}

    def decode(self, fields: Fields, state: None = None) -> F64:
        """Fields -> x_hat [..., D]."""
        z = decode(fields["codes"], fields["scale"][..., 0], self.book)
        return np.asarray(z.astype(np.float64) @ (hadamard_matrix(self.dim) * self.signs))
