"""The trellis search of the native library. Mirrors csrc/kvfold_trellis.h."""

from __future__ import annotations

import functools
from ctypes import POINTER, Structure, c_int16, c_int32, c_int64, c_uint64, c_void_p

import torch
from torch import Tensor

from kvfold.codebook.trellis import Code
from kvfold.engine.cpu import library
from kvfold.errors import NoImplementation

PERIOD, LEVELS = 4, 64


class Trellis(Structure):
    _fields_ = (
        ("period", c_int32),
        ("width", c_int32 * PERIOD),
        ("index", c_void_p * PERIOD),
        ("levels", c_int32),
        ("level", c_int16 * LEVELS),
        ("shift", c_int32),
        ("starts", c_uint64),
    )


ARGUMENTS = [POINTER(Trellis), c_int32, c_int32, c_void_p, c_int64, c_int32, c_void_p, c_void_p]


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
    native = Trellis(
        period=book.period, levels=len(book.levels), shift=book.shift, starts=sum(1 << s for s in book.starts)
    )
    native.width[: book.period] = book.widths
    native.index[: book.period] = [index.ctypes.data for index in book.index]
    native.level[: len(book.levels)] = [v * book.grid for v in book.levels]
    chosen = library.choose_level(level).index
    status = library.call("kvf_trellis_encode")(
        native,
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
