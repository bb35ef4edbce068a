"""Trellis codes in the native library: the search, which mirrors csrc/kvfold_trellis.h, and what attention reads them with."""

from __future__ import annotations

import functools
from ctypes import POINTER, c_int32, c_int64, c_void_p

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.codebook.trellis import STATE_BITS, Code
from kvfold.engine.cpu import library
from kvfold.errors import NoImplementation

ARGUMENTS = [POINTER(library.Trellis), c_int32, c_int32, c_void_p, c_int64, c_int32, c_void_p, c_void_p]


@functools.cache
def missing() -> str:
    """Why the search cannot be used; empty if it can."""
    if (reason := library.missing()) != "":
        return reason
    try:
        function = library.call("kvf_trellis_encode")
    except AttributeError:
        return "the native library is older than the trellis codec: reinstall kvfold"
    function.restype, function.argtypes = c_int32, ARGUMENTS  # type: ignore[attr-defined]
    return ""


def viterbi(x: Tensor, book: Code, level: str | None = None) -> tuple[Tensor, Tensor]:
    """codec.trellis.viterbi on the CPU: inputs [N, D] -> (symbols uint8 [N, D], first states uint8 [N])."""
    if (reason := missing()) != "":
        raise NoImplementation.of("the trellis search", [("cpu", [reason])])
    x = x.to(torch.int16).contiguous()
    symbols = torch.empty(x.shape, dtype=torch.uint8)
    starts = torch.empty(len(x), dtype=torch.uint8)
    chosen = library.choose_level(level).index
    status = library.call("kvf_trellis_encode")(
        search(book),
        chosen,
        library.default_threads(),
        x.data_ptr(),
        *x.shape,
        symbols.data_ptr(),
        starts.data_ptr(),
    )
    if status != library.OK:
        raise NoImplementation.of("the trellis search", [("cpu", [f"the native library answered {status}"])])
    return symbols, starts


@functools.cache
def _indices(book: Code) -> tuple[list[int], list[NDArray[np.uint8]]]:
    """The different levels of a code, and per phase the place of every window's level among them."""
    levels, place = np.unique(np.array(book.levels), return_inverse=True)
    return levels.tolist(), [np.ascontiguousarray(place[i], np.uint8) for i in book.index]


@functools.cache
def search(book: Code) -> library.Trellis:
    """What the native library searches a code with. Kept, since the library borrows it."""
    levels, index = _indices(book)
    out = library.Trellis(
        period=book.period,
        levels=len(levels),
        grid=book.grid,
        clip=book.clip,
        shift=book.shift,
        gain=float(book.gain),
        starts=sum(1 << s for s in book.starts),
    )
    out.width[: book.period] = book.widths
    out.index[: book.period] = [i.ctypes.data for i in index]
    out.level[: len(levels)] = [v * book.grid for v in levels]
    return out


def _reversed(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)


def _affine(masks: tuple[int, ...], window_bits: int, first: int) -> int:
    """The matrix that maps eight bits of a stream window, from bit `first` on, to their share of the index, as gf2p8affineqb
    takes it: byte 7 - i selects what output bit i is the parity of. A stream's bit 0 is the oldest, a mask's highest."""
    out = 0
    for i, mask in enumerate(reversed(masks)):
        out |= (_reversed(mask, window_bits) >> first & 0xFF) << (8 * (7 - i))
    return out


@functools.cache
def _pairs(book: Code) -> NDArray[np.int8]:
    """Levels of two steps, [2^(6 + both widths), 2], by the stream's bits from the first window's oldest on."""
    early, late = book.widths[0], book.widths[-1]
    length = STATE_BITS + early + late
    register = np.array([_reversed(w, length) for w in range(1 << length)])
    first, second = book.by_window[0], book.by_window[-1]
    return np.stack([first[register >> late], second[register & (len(second) - 1)]], axis=-1).astype(np.int8)


@functools.cache
def reader(book: Code) -> library.TrellisReader:
    """What the native library reads a code with. Kept, since the library borrows it."""
    out = library.TrellisReader()
    for phase in range(2):
        width, masks = book.widths[phase % book.period], book.masks[phase % book.period]
        out.widths[phase] = width
        out.affine_low[phase] = _affine(masks, STATE_BITS + width, 0)
        out.affine_high[phase] = _affine(masks, STATE_BITS + width, 8)
    out.levels[: len(book.levels)] = book.levels
    out.starts[:] = [_reversed(s, STATE_BITS) for s in book.starts]
    out.pairs = _pairs(book).ctypes.data
    return out
