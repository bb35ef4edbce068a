"""Scalar codes in the order of mma.m16n8k32 A fragments (kernels/formats.cuh)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvfold.engine.cuda.formats import bits_of
from kvfold.engine.cuda.streams import HALF_TOKENS, LANES, as_int32

GROUP = 32  # codes a lane holds in two A fragments


@functools.cache
def index(dim: int, fmt: int, value: bool) -> Tensor:
    """int64 [D/16 * 32 * 32]: place token * D + dim, inside a half, of code v of lane l of group n (n-major)."""
    n = torch.arange(dim // 16).view(-1, 1, 1)
    lane = torch.arange(LANES).view(1, -1, 1)
    v = torch.arange(GROUP).view(1, 1, -1)
    g, t = lane // 4, lane % 4
    if fmt == 1:
        word = n * 2 + v // 16
        byte, field, step, r = v % 16 // 4, v % 4, word // 4, word % 4
        row, col = g + 8 * (r & 1), 4 * t + byte + 16 * (r >> 1)
        key = (16 * field + row) * dim + 32 * step + col
        tile, part = 4 * (step // 2) + field, step % 2
    else:
        part, r, byte = v // 16, v % 16 // 4, v % 4
        row, col = g + 8 * (r & 1), 4 * t + byte + 16 * (r >> 1)
        per = dim // 64
        key = (16 * (n // per) + row) * dim + 32 * (2 * (n % per) + part) + col
        tile = n
    token = 8 * (4 * part + byte) + t + 4 * (r >> 1)
    val = token * dim + (dim // 8) * g + 2 * tile + (r & 1)
    return (val if value else key).expand(dim // 16, LANES, GROUP).reshape(-1)


def _place(fmt: int) -> tuple[Tensor, Tensor]:
    """Word and bit of each of 32 codes; for 3 bits, codes 24..31 are handled apart."""
    v = torch.arange(GROUP)
    if fmt in (3, 4):
        return v // 8, 4 * (v % 8)
    if fmt == 2:
        return v // 16, 4 * (v % 8) + 2 * (v % 16 // 8)
    return v // 16, 8 * (v % 16 // 4) + 2 * (v % 4)


def to_words(codes: Tensor, fmt: int) -> Tensor:
    """codes [..., 32] -> int64 words [..., bits]."""
    c = codes.long()
    word, bit = (x.to(c.device) for x in _place(fmt))
    out = torch.zeros(*c.shape[:-1], bits_of(fmt) + 1, dtype=torch.int64, device=c.device)
    out.scatter_add_(-1, word.expand(c.shape), c << bit)
    if fmt == 3:
        spare = 4 * torch.arange(8, device=c.device) + 3
        for i in range(3):
            out[..., i] += (((c[..., 24:] >> i) & 1) << spare).sum(-1)
    return out[..., : bits_of(fmt)]


def from_words(words: Tensor, fmt: int) -> Tensor:
    """Inverse of to_words: uint8 [..., 32]."""
    word, bit = (x.to(words.device) for x in _place(fmt))
    mask = {4: 15, 3: 7}.get(fmt, 3)
    codes = (words[..., word.clamp(max=bits_of(fmt) - 1)] >> bit) & mask
    if fmt == 3:
        spare = 4 * torch.arange(8, device=words.device) + 3
        codes[..., 24:] = sum((((words[..., i : i + 1] >> spare) & 1) << i for i in range(3)), codes[..., 24:] * 0)
    return codes.to(torch.uint8)


def pack_half(codes: Tensor, fmt: int, value: bool) -> Tensor:
    """codes [..., 64, D] -> uint8 [..., 8 D bits]."""
    dim, lead = codes.shape[-1], codes.shape[:-2]
    c = codes.reshape(*lead, HALF_TOKENS * dim)[..., index(dim, fmt, value).to(codes.device)]
    w = to_words(c.view(*lead, dim // 16, LANES, GROUP), fmt).transpose(-3, -2)
    w = w.reshape(*lead, LANES, dim * bits_of(fmt) // 64, 4).transpose(-3, -2)  # [piece][lane][4 words]
    return as_int32(w).flatten(-3).view(torch.uint8)


def unpack_half(packed: Tensor, dim: int, fmt: int, value: bool) -> Tensor:
    """Inverse of pack_half: uint8 [..., 64, D]."""
    lead = packed.shape[:-1]
    w = packed.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    w = (
        w.view(*lead, dim * bits_of(fmt) // 64, LANES, 4)
        .transpose(-3, -2)
        .reshape(*lead, LANES, dim // 16, bits_of(fmt))
        .transpose(-3, -2)
    )
    c = from_words(w, fmt).reshape(*lead, -1)
    codes = torch.empty_like(c)
    codes[..., index(dim, fmt, value).to(c.device)] = c
    return codes.view(*lead, HALF_TOKENS, dim)
