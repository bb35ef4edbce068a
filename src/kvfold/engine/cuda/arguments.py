"""What the CUDA kernels are given: argument structures as the sources declare them, and their compile-time sizes."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvfold.codebook import table
from kvfold.codebook.trellis import code
from kvfold.config import TRELLIS_CODECS, SideSpec
from kvfold.engine.cuda.formats import COMPUTED, SCALE_BYTES, TRELLIS, code_bytes
from kvfold.engine.cuda.streams import ZERO, table_bytes

# Per multiprocessor; 40 kB would hide the latency at 4.3 TB/s. From 2 slots of 3 kB per warp on nothing is gained.
IN_FLIGHT_BYTES = 112 << 10
# Column groups of 4 queries that one block walks at once, and warps that leave enough registers for them.
WARPS = {(64, 1): 16, (128, 1): 16, (256, 1): 8, (64, 2): 8, (128, 2): 8, (256, 2): 8, (64, 4): 8, (128, 4): 8}


SEQUENCE_WORDS = 9  # 64-bit words of struct Sequence


class Levels(ctypes.Structure):
    _fields_ = (("byte", ctypes.c_uint8 * 16),)


class DecodeArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("q", "k", "v", "out", "seq", "sign_k", "sign_v", "partial", "count")),
        *((f"{x}_{a}", ctypes.c_longlong) for x in "qkvo" for a in "bhi"),
        *((n, ctypes.c_int) for n in ("B", "H", "G", "Q", "sinks", "tiles", "blocks", "parts")),
        ("scale", ctypes.c_float),
        ("key", Levels),
        ("value", Levels),
        ("key_pairs", ctypes.c_void_p),
        ("value_pairs", ctypes.c_void_p),
    )


class UnfoldArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("page", "k", "v", "sign_k")),
        ("head", ctypes.c_longlong),
        ("key", Levels),
        ("value", Levels),
        ("key_pairs", ctypes.c_void_p),
        ("value_pairs", ctypes.c_void_p),
    )


class AppendArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("k", "v", "seq", "nonfinite")),
        *((f"{x}_{a}", ctypes.c_longlong) for x in "kv" for a in "bh"),
        ("H", ctypes.c_int),
    )


class EnterArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("lengths", "page_table", "exact_table", "k", "v", "exact", "pages", "work")),
        *((n, ctypes.c_void_p) for n in ("seq", "address", "full", "status")),
        *((n, ctypes.c_longlong) for n in ("page_row", "exact_row", "k_b", "k_i", "k_h", "v_b", "v_i", "v_h")),
        *((n, ctypes.c_longlong) for n in ("exact_block", "exact_head", "exact_token")),
        *((n, ctypes.c_longlong) for n in ("page_block", "page_one", "address_row")),
        *((n, ctypes.c_int) for n in ("H", "Q", "window", "sinks", "block_pages", "exact_shift")),
        *((n, ctypes.c_int) for n in ("front", "rows", "capacity")),
    )


def levels_of(spec: SideSpec, dim: int) -> Levels:
    """Level + ZERO of every code, repeated to 16 bytes; of a trellis code its start states."""
    if spec.codec in TRELLIS_CODECS:
        return Levels((ctypes.c_uint8 * 16)(*code(spec.bits, spec.codec).starts))
    book = table(spec.codec, int(spec.bits), dim)
    byte = np.resize((book.levels + ZERO).astype(np.uint8), 16)
    return Levels((ctypes.c_uint8 * 16)(*byte.tolist()))


def shared_limit(capability: tuple[int, int]) -> int:
    """Bytes of shared memory one block may have; kernels/trellis.cuh holds the same table."""
    if capability in ((8, 0), (8, 7)):
        return 166912
    return 232448 if (9, 0) <= capability < (12, 0) else 101376


def plan_rings(dim: int, formats: tuple[int, int], mean: bool, groups: int, limit: int) -> tuple[int, int]:
    """(warps, slots per warp): what hides the memory's latency; deeper rings only lengthen every other load's wait.

    Leaves room for merging two warps' results at a time; takes fewer warps where two slots each do not fit.
    """
    key, value = (code_bytes(dim, f) + SCALE_BYTES for f in formats)
    tables = sum(table_bytes(f - TRELLIS, limit) for f in formats if TRELLIS < f < COMPUTED)
    queries = 1 + mean + (formats[0] > COMPUTED)  # rotated, raw, and two thirds of the rotated
    slot = max(key + (-(-dim // 128) * 128 if mean else 0), value)
    columns, warps = 4 * groups, WARPS[dim, groups]
    while True:
        fixed = columns * dim * 2 * queries + columns * 16 + (warps + 1) * columns * 8 + 1700 + tables
        fits = (limit - fixed - columns * (dim + 4) * 4 * 2) // (warps * (slot + 8))
        if fits >= 2 or warps == 8:
            return warps, max(1, min(fits, max(2, IN_FLIGHT_BYTES // (warps * slot))))
        warps //= 2


def share(rows: int, blocks: int) -> tuple[int, int]:
    """(blocks, parts of a row) for rows of one length: so that no block has items of two rows, or whole rows only.

    Parts are 0 where rows are not cut by themselves. Given up for them: at most a quarter, or a sixteenth, of the blocks.
    """
    parts = blocks // rows
    if 4 * parts * rows >= 3 * blocks:
        return parts * rows, parts
    whole = (c for c in range(blocks, blocks - blocks // 16 - 1, -1) if rows % c == 0)
    return next(whole, blocks), 0


def sequence_words(
    recent_k: Tensor,
    recent_v: Tensor,
    sinks_k: Tensor,
    sinks_v: Tensor,
    pages: Tensor,
    length: int,
    folded: int,
    pads: int,
    first: int,
    ring: int,
) -> NDArray[np.int64]:
    """struct Sequence of kernels/ring.cuh as int64 words. recent [H, n, D], token folded + e in slot (first + e) % ring."""
    ints = np.array([length, folded, pads, first, ring, 0], np.int32).view(np.int64)
    pointers = [x.data_ptr() for x in (recent_k, recent_v, sinks_k, sinks_v, pages)]
    return np.concatenate([np.array(pointers, np.int64), ints, np.array([recent_k.stride(0)], np.int64)])
