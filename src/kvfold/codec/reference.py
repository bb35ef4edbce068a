"""A side's spec to the NumPy codec of one head: what every backend is compared with, and what `distortion` measures."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvfold.codebook import table
from kvfold.codebook.trellis import code
from kvfold.codec.fields import Fields, fields, split_bits, split_dims
from kvfold.codec.heads import Canonical, Exact
from kvfold.codec.polar import Polar
from kvfold.codec.prod import Prod
from kvfold.codec.qjl import Qjl
from kvfold.codec.split import OUTLIER_STREAM, REGULAR_STREAM, Split
from kvfold.codec.trellis import Trellis
from kvfold.config import TRELLIS_CODECS, SideSpec
from kvfold.errors import InvalidConfig
from kvfold.rotation.reference import matrix, stream

F64 = NDArray[np.float64]


class HeadCodec(Protocol):
    """One KV head of one side. x float64 [..., T, D]; fields as codec.fields names them; state as `freeze` returned it."""

    def freeze(self, x: F64) -> Any:
        """What is kept per sequence, from its first tokens [T, D]; None for most codecs."""

    def encode(self, x: F64, state: Any = None) -> Fields: ...

    def decode(self, fields: Fields, state: Any = None) -> F64:
        """Fields -> x_hat float64 [..., T, D]."""


def build(spec: SideSpec, dim: int, key: int) -> HeadCodec:
    """The codec of the head with stream `key`: canonical float32 for `trellis`, and for `mse` and `uniform` on a Hadamard
    rotation; float64 for everything else. Raises UnsupportedHeadDim, and InvalidConfig for `raw`, which has nothing to encode."""
    fields(spec, dim)
    if spec.codec in ("mse", "uniform"):
        book = table(spec.codec, int(spec.bits), dim)
        if spec.rotation == "hadamard":
            return Canonical(book, dim, key, spec.scale, spec.search)
        return Exact(book, matrix(spec.rotation, dim, key), spec.scale, spec.search)
    if spec.codec == "qjl" or (spec.codec == "prod" and spec.bits == 1):
        return Qjl(spec.sketch, dim, key)
    if spec.codec == "prod":
        first = Exact(table("mse", int(spec.bits) - 1, dim), matrix(spec.rotation, dim, key), "norm")
        return Prod(first, Qjl(spec.sketch, dim, key))
    if spec.codec == "polar":
        return Polar(matrix(spec.rotation, dim, key))
    if spec.codec in TRELLIS_CODECS:
        return Trellis(code(spec.bits, spec.codec), dim, key, spec.scale, spec.search)
    if spec.codec == "split":
        outlier, regular = (
            Exact(table("mse", bits, d), matrix(spec.rotation, d, stream(key, path)), spec.scale, spec.search)
            for bits, d, path in zip(
                split_bits(spec.bits), split_dims(dim), (OUTLIER_STREAM, REGULAR_STREAM), strict=True
            )
        )
        return Split(outlier, regular)
    raise InvalidConfig(f"codec {spec.codec!r} stores the numbers themselves", "There is nothing to measure or encode")
