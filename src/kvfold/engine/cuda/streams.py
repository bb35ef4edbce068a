"""Trellis codes in the order of the CUDA kernels: each lane's runs of coordinates as one stream of bits (kernels/trellis.cuh).

Also their search on the GPU, and the tables that the kernels look levels up in.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from kvfold.codebook.trellis import STATES, Code, code
from kvfold.engine.cuda import driver

HALF_TOKENS = 64
LANES = 32
ZERO = 64  # kernels/formats.cuh: what is added to a level to make it a byte
WARPS = 8  # kernels/viterbi.cu


@functools.cache
def places(dim: int, value: bool) -> Tensor:
    """int64 [32, tokens * run]: place token * D + dim, inside a half, of every code of each lane, in the stream's order."""
    lane, tokens = torch.arange(LANES).view(-1, 1, 1), 16 if value else 8
    u = torch.arange(tokens).view(1, -1, 1)
    g, t = lane // 4, lane % 4
    run = dim // 8 if value else dim // 4
    token = 8 * (4 * (u // 8) + u % 4) + t + 4 * (u // 4 % 2) if value else 8 * u + g
    return (token * dim + (g if value else t) * run + torch.arange(run)).reshape(LANES, -1)


def pack_streams(symbols: Tensor, book: Code, value: bool) -> Tensor:
    """symbols uint8 [..., 64, D] -> uint8 [..., 4 D (bits of two symbols)]."""
    dim, lead = symbols.shape[-1], symbols.shape[:-2]
    order = places(dim, value).to(symbols.device)
    even, odd = symbols.flatten(-2)[..., order].unflatten(-1, (-1, 2)).unbind(-1)  # [..., lane, pair]
    widths = _pair(book)
    bits = [even >> i & 1 for i in reversed(range(widths[0]))] + [odd >> i & 1 for i in reversed(range(widths[1]))]
    weight = 1 << torch.arange(7, -1, -1, dtype=torch.uint8, device=symbols.device)
    stream = (torch.stack(bits, dim=-1).flatten(-2).unflatten(-1, (-1, 8)) * weight).sum(-1, dtype=torch.uint8)
    words = stream.unflatten(-1, (-1, 4)).flip(-1)  # [..., lane, word, byte]: most significant bits first
    piece = 2 if words.shape[-2] % 4 else 4
    return words.unflatten(-2, (-1, piece)).transpose(-4, -3).reshape(*lead, -1)


def unpack_streams(packed: Tensor, dim: int, book: Code, value: bool) -> Tensor:
    """Inverse of pack_streams: uint8 [..., 64, D]."""
    lead, widths = packed.shape[:-1], _pair(book)
    count = packed.shape[-1] // (4 * LANES)
    piece = 2 if count % 4 else 4
    words = packed.unflatten(-1, (-1, LANES, piece, 4)).transpose(-4, -3).flip(-1).flatten(-3)  # [..., lane, bytes]
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    bits = (words[..., None] >> shifts & 1).flatten(-2).unflatten(-1, (-1, sum(widths)))
    weight = 1 << torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
    even, odd = (
        (part * weight[8 - part.shape[-1] :]).sum(-1, dtype=torch.uint8) for part in bits.split(list(widths), dim=-1)
    )
    codes = torch.stack([even, odd], dim=-1).flatten(-3)
    out = torch.empty_like(codes)
    out[..., places(dim, value).flatten().to(packed.device)] = codes
    return out.unflatten(-1, (HALF_TOKENS, dim)).view(*lead, HALF_TOKENS, dim)


def as_int32(words: Tensor) -> Tensor:
    """Words of 32 bits in int64, as contiguous int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def level_pairs(bits: float, device: torch.device) -> Tensor:
    """uint8 [2^(6 + bits of two symbols), 2]: both levels + ZERO of every window of two steps."""
    book = code(bits)
    widths = _pair(book)
    window = torch.arange(STATES << sum(widths))
    early, late = (torch.from_numpy(book.by_window[i]) for i in (0, -1))
    pairs = torch.stack([early[window >> widths[1]], late[window & (len(late) - 1)]], dim=-1)
    return (pairs + ZERO).to(torch.uint8).to(device)


def table_bytes(pair_bits: int, shared: int) -> int:
    """Bytes of all copies of a table of level pairs on a chip whose blocks may have `shared` bytes (kernels/trellis.cuh)."""
    one, most = 2 * STATES << pair_bits, 32768 if shared > 131072 else 8192
    return one * next(copies for copies in (8, 4, 2, 1) if one * copies <= most or copies == 1)


class SearchArgs(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("x", "symbols", "first", "level0", "level1")),
        ("count", ctypes.c_longlong),
        ("starts", ctypes.c_uint64),
        ("shift", ctypes.c_int),
    )


class Search:
    """codec.torch_trellis.viterbi by kernels/viterbi.cu, for one code: the same codes and states."""

    def __init__(self, book: Code, dim: int, capability: tuple[int, int], device: torch.device) -> None:
        self.kernel = driver.kernel("viterbi.cu", (dim, *_pair(book)), capability, 1)
        self.device = device
        self.levels = [torch.from_numpy(book.by_window[i] * book.grid).to(device) for i in (0, -1)]
        self.starts, self.shift = sum(1 << s for s in book.starts), book.shift

    def __call__(self, x: Tensor, book: Code) -> tuple[Tensor, Tensor]:
        """inputs int32 [N, D] -> (symbols uint8 [N, D], first states uint8 [N])."""
        x = x.contiguous()
        symbols = torch.empty(x.shape, dtype=torch.uint8, device=self.device)
        first = torch.empty(len(x), dtype=torch.uint8, device=self.device)
        pointers = (y.data_ptr() for y in (x, symbols, first, *self.levels))
        a = SearchArgs(*pointers, len(x), self.starts, self.shift)
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.kernel.launch((-(-len(x) // WARPS), 1, 1), 32 * WARPS, stream, a)
        return symbols, first


def _pair(book: Code) -> tuple[int, int]:
    return book.widths[0], book.widths[-1]
