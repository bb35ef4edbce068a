"""Computed trellis codes in the order of the CUDA kernels: words that hold one step of many vectors (kernels/computed.cuh)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvfold.codebook.trellis import STATE_BITS
from kvfold.engine.cuda.streams import HALF_TOKENS, LANES, as_int32

START_BYTES = 64  # behind 64 bytes of scales: the words of the steps before the first
FIELDS = {2: 4, 3: 2}  # of a byte, by their bits
SPACING = {2: 2, 3: 4}  # bits from one to the next
FIRST = {2: 0, 3: 1}  # bit of the first
SPARE = 0x11111111  # bits of words of 3-bit codes


def _runs(width: int, value: bool) -> int:
    """Words of a step that a lane has."""
    return (1 if value else 2) * (width - 1)


def _links(width: int) -> int:
    """Symbols of a start state."""
    return -(-STATE_BITS // width)


@functools.cache
def _tokens(width: int, value: bool) -> Tensor:
    """int64 [run, lane, byte, field]: token, inside a half, of a word's fields."""
    run = torch.arange(_runs(width, value)).view(-1, 1, 1, 1)
    lane, byte = torch.arange(LANES).view(-1, 1, 1), torch.arange(4).view(-1, 1)
    j, g, t = torch.arange(FIELDS[width]), lane // 4, lane % 4
    if value:
        token = 8 * (4 * (j // 2 if width == 2 else run) + byte) + t + 4 * (j % 2)
    else:
        token = 16 * (run // 2 * FIELDS[width] + j) + 8 * (run % 2) + g
    return token.expand(len(run), LANES, 4, FIELDS[width])


@functools.cache
def _places(dim: int, width: int, value: bool) -> Tensor:
    """int64 [step, run, lane, byte, field]: place token * D + coordinate, inside a half, of every code."""
    step = torch.arange(dim // (8 if value else 16)).view(-1, 1, 1, 1, 1)
    lane, byte = torch.arange(LANES).view(-1, 1, 1), torch.arange(4).view(-1, 1)
    start = dim // 8 * (lane // 4) if value else dim // 4 * (lane % 4) + dim // 16 * byte
    return _tokens(width, value) * dim + start + step


def _shifts(width: int, device: torch.device) -> Tensor:
    """int64 [byte, field]: bit of a word at which a field stands."""
    field = FIRST[width] + SPACING[width] * torch.arange(FIELDS[width], device=device)
    return 8 * torch.arange(4, device=device)[:, None] + field


def pack_words(symbols: Tensor, width: int, value: bool) -> Tensor:
    """symbols uint8 [..., 64, D] -> uint8 [..., 8 D width]."""
    dim, lead = symbols.shape[-1], symbols.shape[:-2]
    codes = symbols.flatten(-2).long()[..., _places(dim, width, value).to(symbols.device)]
    words = (codes << _shifts(width, symbols.device)).sum((-2, -1)).flatten(-3, -2)  # [..., step and run, lane]
    if width == 3:  # the fourth word of four in the spare bits of the others
        words = words.unflatten(-2, (-1, 4))
        planes = words[..., 3:, :] >> torch.arange(1, 4, device=words.device)[:, None] & SPARE
        words = (words[..., :3, :] | planes).flatten(-3, -2)
    words = words.unflatten(-2, (-1, 4)).transpose(-2, -1)  # [..., piece, lane, word]
    return as_int32(words).flatten(-3).view(torch.uint8).view(*lead, -1)


def unpack_words(packed: Tensor, dim: int, width: int, value: bool) -> Tensor:
    """Inverse of pack_words: uint8 [..., 64, D]."""
    lead = packed.shape[:-1]
    words = packed.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    words = words.view(*lead, -1, LANES, 4).transpose(-2, -1).flatten(-3, -2)
    if width == 3:
        three = words.unflatten(-2, (-1, 3))
        fourth = ((three & SPARE) << torch.arange(1, 4, device=words.device)[:, None]).sum(-2, keepdim=True)
        words = torch.cat([three, fourth], dim=-2).flatten(-3, -2)
    codes = words[..., None, None] >> _shifts(width, words.device) & (1 << width) - 1
    out = torch.empty(*lead, HALF_TOKENS * dim, dtype=torch.uint8, device=packed.device)
    out[..., _places(dim, width, value).flatten().to(packed.device)] = codes.flatten(-4).to(torch.uint8)
    return out.unflatten(-1, (HALF_TOKENS, dim))


def pack_starts(states: Tensor, width: int, value: bool) -> Tensor:
    """Start states uint8 [..., 64] -> the words of the steps before the first, uint8 [..., 64]."""
    lanes = torch.arange(4) if value else 4 * torch.arange(8)
    tokens = _tokens(width, value)[:, lanes].to(states.device)  # [run, row, byte, field]
    back = width * torch.arange(_links(width), device=states.device).view(-1, 1, 1, 1, 1)
    symbols = states.long()[..., None, tokens] >> back & (1 << width) - 1
    words = (symbols << _shifts(width, states.device)).sum((-2, -1))  # [..., link, run, row]
    words = words.flatten(-3, -2).transpose(-2, -1)  # [..., row, link and run]
    data = as_int32(words).view(torch.uint8) if value else (words & 255).to(torch.uint8)
    out = torch.zeros(
        *states.shape[:-1], len(lanes), START_BYTES // len(lanes), dtype=torch.uint8, device=states.device
    )
    out[..., : data.shape[-1]] = data
    return out.flatten(-2)


def unpack_starts(packed: Tensor, width: int, value: bool) -> Tensor:
    """Inverse of pack_starts: uint8 [..., 64]."""
    lanes = torch.arange(4) if value else 4 * torch.arange(8)
    tokens = _tokens(width, value)[:, lanes].to(packed.device)
    runs, links = _runs(width, value), _links(width)
    rows = packed.unflatten(-1, (len(lanes), -1)).contiguous()
    words = rows.view(torch.int32).long() & 0xFFFFFFFF if value else rows.long()
    words = words[..., : links * runs].transpose(-2, -1).unflatten(-2, (links, runs))  # [..., link, run, row]
    symbols = words[..., None, None] >> _shifts(width, packed.device) & (1 << width) - 1
    back = width * torch.arange(links, device=packed.device).view(-1, 1, 1, 1, 1)
    states = (symbols << back).sum(-5) & (1 << STATE_BITS) - 1
    if not value:  # byte 0 alone is a start
        states, tokens = states[..., :1, :], tokens[..., :1, :]
    out = torch.empty(*packed.shape[:-1], HALF_TOKENS, dtype=torch.uint8, device=packed.device)
    out[..., tokens.flatten()] = states.flatten(-4).to(torch.uint8)
    return out
