"""Codes to canonical bytes in NumPy, one plane at a time, and the fields of one head's region of a page."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvfold.packing.layout import MEANS, PageLayout, planes

U8 = NDArray[np.uint8]
Fields = dict[str, NDArray[Any]]


def pack_plane(codes: U8, width: int) -> U8:
    """codes [..., n] below 2^width, width in 1, 2, 4, 8 -> bytes [..., ceil(n * width / 8)]; value j at bit j * width."""
    per = 8 // width
    n = codes.shape[-1]
    pad = -n % per
    c = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)]).reshape(*codes.shape[:-1], -1, per)
    shifts = (np.arange(per) * width).astype(np.uint8)
    return np.asarray(np.bitwise_or.reduce(np.left_shift(c, shifts), axis=-1), dtype=np.uint8)


def unpack_plane(packed: U8, width: int, count: int) -> U8:
    """Inverse of pack_plane."""
    per = 8 // width
    shifts = (np.arange(per) * width).astype(np.uint8)
    mask = np.uint8((1 << width) - 1)
    c = np.right_shift(packed[..., None], shifts) & mask
    return np.asarray(c.reshape(*packed.shape[:-1], -1)[..., :count], dtype=np.uint8)


def pack(codes: U8, bits: int) -> list[U8]:
    """codes [..., n] of `bits` bits -> one byte array per plane, lowest bits first."""
    out = []
    for width, shift in planes(bits):
        out.append(pack_plane((codes >> np.uint8(shift)) & np.uint8((1 << width) - 1), width))
    return out


def unpack(parts: list[U8], bits: int, count: int) -> U8:
    """Inverse of pack."""
    total = np.zeros((*parts[0].shape[:-1], count), np.uint8)
    for part, (width, shift) in zip(parts, planes(bits), strict=True):
        total |= unpack_plane(part, width, count) << np.uint8(shift)
    return total


def write(region: U8, layout: PageLayout, side: str, values: Fields) -> None:
    """Put a side's fields [rows, count] into one head's region [head_bytes] of a page; side `key` or `value`."""
    for f in getattr(layout, side):
        at = layout.offset(side, f.name)
        x = values[f.name]
        for part in pack(x, f.bits) if f.kind == "codes" else [np.ascontiguousarray(x).view(np.uint8)]:
            region[at : at + part.size] = part.ravel()
            at += part.size


def read(region: U8, layout: PageLayout, side: str, raw: np.dtype[Any]) -> Fields:
    """Inverse of write; `raw` is the dtype of raw fields."""
    out = {}
    for f in getattr(layout, side):
        at = layout.offset(side, f.name)
        if f.kind == "codes":
            parts = []
            for n in f.plane_bytes:
                parts.append(region[at : at + f.rows * n].reshape(f.rows, n))
                at += f.rows * n
            out[f.name] = unpack(parts, f.bits, f.count)
        else:
            dtype = np.dtype(np.float16) if f.kind == "half" else raw
            out[f.name] = region[at : at + f.page_bytes].view(dtype).reshape(f.rows, f.count)
    return out


def write_means(region: U8, layout: PageLayout, codes: NDArray[np.int8], scales: NDArray[np.float16]) -> None:
    """codes [2, D], scales [2] of the halves of a page into one head's region."""
    at, mid = layout.offset("mean", "codes"), layout.offset("mean", "scale")
    region[at:mid] = codes.view(np.uint8).ravel()
    region[mid : mid + scales.nbytes] = scales.view(np.uint8)


def read_means(region: U8, layout: PageLayout) -> NDArray[np.float32]:
    """The dequantized means of the halves of a page, float32 [2, D]."""
    at, mid = layout.offset("mean", "codes"), layout.offset("mean", "scale")
    codes = region[at:mid].view(np.int8).reshape(MEANS, -1)
    scales = region[mid : mid + 2 * MEANS].view(np.float16).astype(np.float32)
    return scales[:, None] * codes.astype(np.float32)
