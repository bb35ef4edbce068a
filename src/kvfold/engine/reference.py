"""Fold and unfold one page in NumPy: what a backend's bytes are compared with. Slow on purpose.

Codes and bytes of `raw` and `trellis`, and of `mse` and `uniform` on Hadamard rotations, are canonical: every backend equals them
exactly. The other codecs run in float64 here and equal a backend's up to the rounding of its float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.codec.canonical import half_means
from kvfold.codec.fields import fields
from kvfold.codec.reference import HeadCodec, build
from kvfold.codec.trellis import Trellis
from kvfold.config import MEAN_TOKENS, CacheSpec, SideSpec
from kvfold.packing import reference as packing
from kvfold.packing.layout import PageLayout
from kvfold.rotation.reference import stream

F64 = NDArray[np.float64]
Floats = NDArray[np.floating[Any]]
States = tuple[list[Any], list[Any]]  # per side, per head


def page_layout(
    spec: CacheSpec, kv_heads: int, head_dim: int, value_bytes: int, value_dim: int | None = None
) -> PageLayout:
    """Bytes of a page; `value_bytes` are the model's own and matter to `raw` only. value_dim: None: as of keys."""
    key, value = fields(spec.key, head_dim, value_bytes), fields(spec.value, value_dim or head_dim, value_bytes)
    return PageLayout(key, value, kv_heads, head_dim, spec.centre)


def freeze(spec: CacheSpec, layer: int, keys: Floats, values: Floats) -> States:
    """What codecs freeze from a sequence's first tokens: keys, values [H, T, D]."""
    key, value = (
        [
            None if side_spec.codec == "raw" else _head(spec, side_spec, layer, h, side, x.shape[-1]).freeze(x[h])
            for h in range(len(x))
        ]
        for side, (side_spec, x) in enumerate(((spec.key, keys), (spec.value, values)))
    )
    return key, value


def fold(
    spec: CacheSpec, layer: int, keys: Floats, values: Floats, first_page: bool, states: States | None = None
) -> NDArray[np.uint8]:
    """One page, uint8 [page_bytes], from keys and values [H, 128, D] in the model's dtype."""
    heads, _, dim = keys.shape
    layout = page_layout(spec, heads, dim, keys.dtype.itemsize, values.shape[-1])
    row = np.zeros(layout.page_bytes, np.uint8)
    for h, region in enumerate(row.reshape(heads, -1)):
        k = keys[h]
        if spec.centre:
            codes, scales, means = half_means(k.astype(np.float32), spec.sinks if first_page else 0)
            packing.write_means(region, layout, codes, scales)
            k = k.astype(np.float32) - np.repeat(means, MEAN_TOKENS, axis=0)
        for side, (name, side_spec, x) in enumerate((("key", spec.key, k), ("value", spec.value, values[h]))):
            if side_spec.codec == "raw":
                packing.write(region, layout, name, {"values": x})
                continue
            state = states[side][h] if states else None
            codec = _head(spec, side_spec, layer, h, side, x.shape[-1])
            if isinstance(codec, Trellis):
                held = codec.encode(x.astype(np.float64), skip=spec.sinks if first_page else 0)
            else:
                held = codec.encode(x.astype(np.float64), state)
            packing.write(region, layout, name, held)
    return row


def unfold(
    spec: CacheSpec, layer: int, row: NDArray[np.uint8], like: Floats, states: States | None = None
) -> tuple[F64, F64]:
    """Reconstructed keys and values float64 [H, 128, D]; `like` is any array [H, *, D] of the model's dtype."""
    heads, dim = like.shape[0], like.shape[-1]
    layout = page_layout(spec, heads, dim, like.dtype.itemsize)
    out: tuple[list[F64], list[F64]] = ([], [])
    for h, region in enumerate(row.reshape(heads, -1)):
        for side, (name, side_spec) in enumerate((("key", spec.key), ("value", spec.value))):
            held = packing.read(region, layout, name, like.dtype)
            if side_spec.codec == "raw":
                x_hat = held["values"].astype(np.float64)
            else:
                state = states[side][h] if states else None
                x_hat = _head(spec, side_spec, layer, h, side, dim).decode(held, state)
            if side == 0 and spec.centre:
                x_hat = x_hat + np.repeat(packing.read_means(region, layout), MEAN_TOKENS, axis=0)
            out[side].append(x_hat)
    return np.stack(out[0]), np.stack(out[1])


def _head(spec: CacheSpec, side_spec: SideSpec, layer: int, head: int, side: int, dim: int) -> HeadCodec:
    return build(side_spec, dim, stream(spec.seed, layer, head, side))
