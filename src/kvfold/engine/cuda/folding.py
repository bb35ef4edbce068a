"""Whole pages of keys and values into the kernels' order, by one kernel for scalar codes and one for trellis codes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvfold.codebook import table
from kvfold.codebook.trellis import Code, code
from kvfold.codec.canonical import inverse_sqrt
from kvfold.config import SCALES, TRELLIS_CODECS, CacheSpec, SideSpec
from kvfold.engine.cuda import driver
from kvfold.engine.cuda.formats import TRELLIS
from kvfold.errors import NonFiniteInput

INDEX_BITS = 6  # of a trellis code's table of levels, at most
BLOCKS = 2  # of the trellis kernel that a multiprocessor holds
ORIGIN_BYTES = 32  # of all states, at a step


class Book(ctypes.Structure):
    _fields_ = (("edge", ctypes.c_uint32 * 7), ("level", ctypes.c_float * 16), ("step", ctypes.c_float))


class FoldArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("k", "v", "page", "sign_k", "sign_v", "nonfinite")),
        *((f"{x}_{a}", ctypes.c_longlong) for x in "kv" for a in "pht"),
        *((n, ctypes.c_int) for n in ("sinks", "rule_k", "rule_v", "search_k", "search_v")),
        ("inv_sqrt_d", ctypes.c_float),
        ("key", Book),
        ("value", Book),
    )


class TrellisFoldArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("x", "page", "sign", "nonfinite", "origins", "window_levels")),
        *((f"x_{a}", ctypes.c_longlong) for a in "pht"),
        *((n, ctypes.c_int) for n in ("pages", "heads", "sinks", "rule")),
        *((n, ctypes.c_float) for n in ("inv_sqrt_d", "step", "gain", "clip", "inv_shift")),
        ("start", ctypes.c_uint8 * 4),
        ("level", ctypes.c_float * (1 << INDEX_BITS)),
    )


class Fold:
    """What a fold of one layer is made with."""

    def __init__(
        self, spec: CacheSpec, formats: tuple[int, int], signs: Tensor, nonfinite: Tensor, capability: tuple[int, int]
    ) -> None:
        """signs [2, H, D] of keys and values; nonfinite int32 [1] becomes 1 if a vector has no finite scale."""
        self.spec, self.formats, self.capability = spec, formats, capability
        self.signs, self.nonfinite = signs, nonfinite
        self.sides = (spec.key, spec.value)


class ScalarFold(Fold):
    """Both sides of pages by kernels/fold.cu."""

    def __init__(self, spec: CacheSpec, *rest: Any) -> None:
        super().__init__(spec, *rest)
        self.books = [book_of(s, self.signs.shape[-1]) for s in self.sides]

    def __call__(self, keys: Tensor, values: Tensor, addresses: Tensor, dtype: int) -> None:
        """keys, values [P, H, 128, D], rows of whole 16 bytes; page p goes to addresses[p], as CudaEngine.fold_to says."""
        _, heads, dim = self.signs.shape
        variant = (dim, *self.formats, int(self.spec.centre), dtype)
        kernel = driver.kernel("fold.cu", variant, self.capability, 1)
        a = FoldArgs(
            *(x.data_ptr() for x in (keys, values, addresses, *self.signs, self.nonfinite)),
            *keys.stride()[:3],
            *values.stride()[:3],
            self.spec.sinks,
            *(SCALES.index(s.scale) for s in self.sides),
            *(s.search for s in self.sides),
            float(inverse_sqrt(dim)),
            *self.books,
        )
        stream = torch.cuda.current_stream(keys.device).cuda_stream
        kernel.launch((len(keys), heads, 2), 2 * dim, stream, a)


class TrellisFold(Fold):
    """Both sides of pages by kernels/fold_trellis.cu, one after the other; arguments as ScalarFold's."""

    def __init__(self, spec: CacheSpec, *rest: Any) -> None:
        super().__init__(spec, *rest)
        device = self.signs.device
        self.codes = [code(s.bits, s.codec) for s in self.sides]
        self.window_levels = [
            torch.from_numpy(np.concatenate([c.by_window[0], c.by_window[-1]]).astype(np.int8)).to(device)
            for c in self.codes
        ]
        self.blocks = BLOCKS * torch.cuda.get_device_properties(device).multi_processor_count

    def __call__(self, keys: Tensor, values: Tensor, addresses: Tensor, dtype: int) -> None:
        heads, dim = self.signs.shape[1:]
        stream = torch.cuda.current_stream(keys.device).cuda_stream
        blocks = min(self.blocks, len(keys) * heads)
        origins = torch.empty(blocks * 128 * dim * ORIGIN_BYTES, dtype=torch.uint8, device=keys.device)
        for side, (x, s, c) in enumerate(zip((keys, values), self.sides, self.codes, strict=True)):
            shape = (dim, *self.formats, int(self.spec.centre), dtype, side)
            kernel = driver.kernel("fold_trellis.cu", (*shape, *parities_of(c)), self.capability, 1)
            pointers = (x, addresses, self.signs[side], self.nonfinite, origins, self.window_levels[side])
            a = TrellisFoldArgs(
                *(p.data_ptr() for p in pointers),
                *x.stride()[:3],
                len(x),
                heads,
                self.spec.sinks,
                SCALES.index(s.scale),
                *(float(f) for f in (inverse_sqrt(dim), np.float32(c.step), c.gain, c.clip, 2.0**-c.shift)),
                (ctypes.c_uint8 * 4)(*c.starts),
                (ctypes.c_float * (1 << INDEX_BITS))(*(level * c.grid for level in c.levels)),
            )
            kernel.launch((blocks, 1, 1), 128, stream, a)


def parities_of(book: Code) -> tuple[int, ...]:
    """Compile-time constants of a code: index bits, and the masks of even and odd steps."""
    masks = (book.masks[0], book.masks[-1])
    return (len(masks[0]), *(m for side in masks for m in (*side, *(0,) * (INDEX_BITS - len(side)))))


def folder(
    spec: CacheSpec, formats: tuple[int, int], signs: Tensor, nonfinite: Tensor, capability: tuple[int, int]
) -> ScalarFold | TrellisFold | None:
    """None for a scalar code beside a trellis code, and for paths searched more than once: torch folds those."""
    trellis = [f > TRELLIS for f in formats]
    again = any(s.codec in TRELLIS_CODECS and s.search > 1 for s in (spec.key, spec.value))
    if again or (any(trellis) and not all(trellis)):
        return None
    return (TrellisFold if all(trellis) else ScalarFold)(spec, formats, signs, nonfinite, capability)


def not_finite(layer: int) -> NonFiniteInput:
    return NonFiniteInput(
        f"layer {layer}: a key or value vector holds NaN or infinity, or is too long for a float16 scale",
        "Check the model's activations, or use profile 'lossless'",
    )


def book_of(spec: SideSpec, dim: int) -> Book:
    book, out = table(spec.codec, int(spec.bits), dim), Book()
    positive = book.thresholds[len(book.thresholds) // 2 + 1 :].astype(np.float32)
    out.edge[: len(positive)] = (positive.view(np.uint32) << 1).tolist()
    out.level[: len(book.levels)] = [float(x) for x in book.levels]
    out.step = float(book.step)
    return out
