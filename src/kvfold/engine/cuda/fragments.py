"""Canonical bytes of a page to the order the CUDA kernels read, and back.

Fragment order of one KV head: two halves of 64 tokens, each [mean int8 x D, permuted | pad to 128][K][V]; a side is its
codes in the order of mma.m16n8k32 A fragments (see kernels/formats.cuh), then 64 float16 scales, token 8 i + g at
[g][i]. Scales are not negative: the signs of K scales [g][t], g < 4, t < 4, hold bit 4 g + t of the mean's float16
scale, so that every copy is whole 128-byte lines. A side of trellis codes is its lanes' streams (streams.py), then 64
times a header and a byte more: those of tokens g and 8 + g hold the page's unit, of keys 16 + g and 24 + g the mean's scale.
A side of computed codes is its words (computed.py), then its headers' lower six bits, with the unit in bits 6 and 7 of each row
of eight, in odd rows of keys the mean's scale, then its start states.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvfold.codebook.trellis import STATES, Code, code
from kvfold.config import TRELLIS_CODECS
from kvfold.engine.cuda.computed import START_BYTES, pack_starts, pack_words, unpack_starts, unpack_words
from kvfold.engine.cuda.streams import HALF_TOKENS, LANES, as_int32, pack_streams, unpack_streams
from kvfold.packing.layout import PageLayout
from kvfold.packing.on_torch import PageCodec

GROUP = 32  # codes a lane holds in two A fragments
SCALE_BYTES = 128
PAGES = 64  # moved at a time: bits of trellis codes are bytes on the way


TRELLIS, COMPUTED = 10, 20  # format number of a trellis code, or of a computed one, less twice its bits
SCALE = 63  # what of a header is the scale
UNIT, MEAN = slice(0, 2), slice(2, 4)  # scales of a lane's tokens whose second bytes hold more


def format_of(codec: str, bits: float) -> int:
    """The kernels' number of a codec: its bits; 1 for uniform; 10, or 20, and twice its bits for trellis, or computed."""
    if codec in TRELLIS_CODECS:
        return (COMPUTED if codec == "computed" else TRELLIS) + int(2 * bits)
    return 1 if codec == "uniform" else int(bits)


def bits_of(fmt: int) -> int:
    """Of a scalar code."""
    return 2 if fmt == 1 else fmt


def book_of(fmt: int) -> Code:
    """Of a trellis code or a computed one."""
    return code((fmt - COMPUTED) / 2, "computed") if fmt > COMPUTED else code((fmt - TRELLIS) / 2)


def code_bytes(dim: int, fmt: int) -> int:
    """Codes of one side of half a page."""
    return 4 * dim * (fmt - COMPUTED if fmt > COMPUTED else fmt - TRELLIS if fmt > TRELLIS else 2 * bits_of(fmt))


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


def _hidden(device: torch.device) -> Tensor:
    """Bit of the mean's scale in the sign of K scale [g][t]."""
    return torch.arange(16, device=device).view(4, 4)


@functools.cache
def mean_index(dim: int) -> Tensor:
    """Place of dimension d among the mean's bytes."""
    d = torch.arange(dim)
    return (d // 4 % 4) * (dim // 4) + d // 16 * 4 + d % 4


class Fragments:
    """The bijection for one page layout. key, value: format numbers."""

    def __init__(self, layout: PageLayout, key: int, value: int) -> None:
        self.layout, self.formats, self.dim = layout, {"key": key, "value": value}, layout.head_dim
        self.mean_bytes = (self.dim + 127) // 128 * 128 if layout.mean else 0
        self.side = {s: code_bytes(self.dim, f) + SCALE_BYTES for s, f in self.formats.items()}
        self.half_bytes = self.mean_bytes + self.side["key"] + self.side["value"]
        self.head_bytes = 2 * self.half_bytes
        self.page_bytes = layout.kv_heads * self.head_bytes

    def _codes(self, side: str, half: int) -> slice:
        """Place of a side's codes in a head's region; its scales follow."""
        at = half * self.half_bytes + self.mean_bytes + (self.side["key"] if side == "value" else 0)
        return slice(at, at + self.side[side] - SCALE_BYTES)

    def _book(self, side: str) -> Code:
        return book_of(self.formats[side])

    def _is_computed(self, side: str) -> bool:
        return self.formats[side] > COMPUTED

    def _scales(self, regions: Tensor, side: str, half: int) -> Tensor:
        """View [..., g, i, byte] of a side's scales: those of tokens 8 i + g."""
        at = self._codes(side, half).stop
        return regions[..., at : at + SCALE_BYTES].unflatten(-1, (8, 8, 2))

    def _put_mean_scale(self, regions: Tensor, half: int, scale: Tensor) -> None:
        """scale: its two bytes [..., 2]."""
        if self._is_computed("key"):
            self._put_spares(regions, "key", half, scale[..., None, :], slice(1, None, 2))
            return
        scales = self._scales(regions, "key", half)
        if self.formats["key"] > TRELLIS:
            scales[..., MEAN, 1] = scale[..., None, :]
            return
        bits = (scale.contiguous().view(torch.int16).int()[..., None] >> _hidden(scale.device)) & 1
        scales[..., :4, :4, 1] |= bits.to(torch.uint8) << 7

    def _mean_scale(self, regions: Tensor, half: int) -> Tensor:
        if self._is_computed("key"):
            return self._spares(regions, "key", half)[..., 1, :]
        scales = self._scales(regions, "key", half)
        if self.formats["key"] > TRELLIS:
            return scales[..., 0, MEAN, 1]
        bits = (scales[..., :4, :4, 1] >> 7).int() << _hidden(regions.device)
        return bits.sum((-2, -1))[..., None].to(torch.int16).view(torch.uint8)

    def from_canonical(self, rows: Tensor) -> Tensor:
        """uint8 [P, canonical page bytes] -> [P, page_bytes] in fragment order."""
        return torch.cat([self._from_canonical(some) for some in rows.split(PAGES)])

    def to_canonical(self, rows: Tensor) -> Tensor:
        """Inverse of from_canonical."""
        return torch.cat([self._to_canonical(some) for some in rows.split(PAGES)])

    def _from_canonical(self, rows: Tensor) -> Tensor:
        src = rows.unflatten(-1, (self.layout.kv_heads, self.layout.head_bytes))
        out = torch.zeros(*src.shape[:-1], self.head_bytes, dtype=torch.uint8, device=rows.device)
        for side, fmt in self.formats.items():
            (self._put_trellis if fmt > TRELLIS else self._put_scalar)(out, rows, side)
        if self.layout.mean:
            start_codes, mid, dim = self.layout.offset("mean", "codes"), self.layout.offset("mean", "scale"), self.dim
            place = mean_index(dim).to(rows.device)
            for h in (0, 1):
                start = h * self.half_bytes
                out[..., start + place] = src[..., start_codes + h * dim : start_codes + (h + 1) * dim]
                self._put_mean_scale(out, h, src[..., mid + 2 * h : mid + 2 * h + 2])
        return out.flatten(-2)

    def _put_scalar(self, out: Tensor, rows: Tensor, side: str) -> None:
        pages, fields = PageCodec(self.layout), {f.name: f for f in getattr(self.layout, side)}
        c = pages.read(rows, side, fields["codes"])
        s = pages.planes_of(rows, side, fields["scale"])[0].unflatten(-2, (2, 8, 8)).transpose(-3, -2)
        for h in (0, 1):
            codes = c[..., HALF_TOKENS * h : HALF_TOKENS * (h + 1), :]
            out[..., self._codes(side, h)] = pack_half(codes, self.formats[side], side == "value")
            self._scales(out, side, h)[:] = s[..., h, :, :, :]

    def _put_trellis(self, out: Tensor, rows: Tensor, side: str) -> None:
        pages, fields = PageCodec(self.layout), {f.name: f for f in getattr(self.layout, side)}
        book = self._book(side)
        parts = [pages.read(rows, side, fields[name]) for name in ("symbols", "odd_symbols")[: book.period]]
        symbols = parts[0] if book.period == 1 else torch.stack(parts, dim=-1).flatten(-2)
        headers = pages.read(rows, side, fields["header"])[..., 0].unflatten(-1, (2, 8, 8)).mT  # [..., half, g, i]
        unit = pages.planes_of(rows, side, fields["unit"])[0]  # [P, H, 1, 2]
        for h in (0, 1):
            tokens = symbols[..., HALF_TOKENS * h : HALF_TOKENS * (h + 1), :]
            if self._is_computed(side):
                self._put_computed(out, side, h, tokens, headers[..., h, :, :], unit)
                continue
            out[..., self._codes(side, h)] = pack_streams(tokens, book, side == "value")
            scales = self._scales(out, side, h)
            scales[..., 0] = headers[..., h, :, :]
            scales[..., UNIT, 1] = unit

    def _rows(self, regions: Tensor, side: str, half: int) -> Tensor:
        """View [..., g, i] of a computed side's scales: those of tokens 8 i + g."""
        at = self._codes(side, half).stop
        return regions[..., at : at + HALF_TOKENS].unflatten(-1, (8, 8))

    def _put_spares(self, regions: Tensor, side: str, half: int, pair: Tensor, rows: slice) -> None:
        """Two bytes [..., 1, 2] into bits 6 and 7 of rows of scales."""
        two = pair[..., None].int() >> torch.arange(0, 8, 2, device=pair.device) & 3  # [..., 1, byte, 4]
        self._rows(regions, side, half)[..., rows, :] |= (two << 6).to(torch.uint8).flatten(-2)

    def _spares(self, regions: Tensor, side: str, half: int) -> Tensor:
        """What _put_spares put into each row: bytes [..., g, 2]."""
        two = (self._rows(regions, side, half) >> 6).unflatten(-1, (2, 4)).int()
        return (two << torch.arange(0, 8, 2, device=regions.device)).sum(-1).to(torch.uint8)

    def _put_computed(self, out: Tensor, side: str, half: int, tokens: Tensor, headers: Tensor, unit: Tensor) -> None:
        """One half page. tokens [..., 64, D], headers [..., g, i], unit [..., 1, 2]."""
        value, book = side == "value", self._book(side)
        out[..., self._codes(side, half)] = pack_words(tokens, book.widths[0], value)
        self._rows(out, side, half)[:] = headers & SCALE
        means = self.layout.mean and not value
        self._put_spares(out, side, half, unit, slice(0, None, 2 if means else 1))
        starts = torch.tensor(book.starts, dtype=torch.uint8, device=out.device)
        states = starts[(headers >> 6).long()].mT.flatten(-2)
        at = self._codes(side, half).stop + HALF_TOKENS
        out[..., at : at + START_BYTES] = pack_starts(states, book.widths[0], value)

    def _read_computed(self, src: Tensor, side: str, half: int) -> tuple[Tensor, Tensor]:
        """(tokens [..., 64, D], headers [..., 64]) of half a page."""
        value, book = side == "value", self._book(side)
        tokens = unpack_words(src[..., self._codes(side, half)], self.dim, book.widths[0], value)
        at = self._codes(side, half).stop + HALF_TOKENS
        states = unpack_starts(src[..., at : at + START_BYTES], book.widths[0], value)
        number = torch.zeros(STATES, dtype=torch.uint8, device=src.device)
        number[list(book.starts)] = torch.arange(len(book.starts), dtype=torch.uint8, device=src.device)
        scales = (self._rows(src, side, half) & SCALE).mT.flatten(-2)
        return tokens, scales | number[states.long()] << 6

    def _to_canonical(self, rows: Tensor) -> Tensor:
        src = rows.unflatten(-1, (self.layout.kv_heads, self.head_bytes))
        out = torch.zeros(len(rows), self.layout.page_bytes, dtype=torch.uint8, device=rows.device)
        pages = PageCodec(self.layout)
        for side, fmt in self.formats.items():
            pages.write(out, side, (self._read_trellis if fmt > TRELLIS else self._read_scalar)(src, side))
        if self.layout.mean:
            dst = out.unflatten(-1, (self.layout.kv_heads, self.layout.head_bytes))
            start_codes, mid, dim = self.layout.offset("mean", "codes"), self.layout.offset("mean", "scale"), self.dim
            place = mean_index(dim).to(rows.device)
            for h in (0, 1):
                start = h * self.half_bytes
                dst[..., start_codes + h * dim : start_codes + (h + 1) * dim] = src[..., start + place]
                dst[..., mid + 2 * h : mid + 2 * h + 2] = self._mean_scale(src, h)
        return out

    def _read_scalar(self, src: Tensor, side: str) -> dict[str, Tensor]:
        codes, scales = [], []
        for h in (0, 1):
            codes.append(unpack_half(src[..., self._codes(side, h)], self.dim, self.formats[side], side == "value"))
            s = self._scales(src, side, h).transpose(-3, -2).flatten(-3).contiguous().view(torch.float16)
            hides = side == "key" and self.layout.mean
            scales.append((s.view(torch.int16) & 0x7FFF).view(torch.float16) if hides else s)
        return {"codes": torch.cat(codes, dim=-2), "scale": torch.cat(scales, dim=-1)[..., None]}

    def _read_trellis(self, src: Tensor, side: str) -> dict[str, Tensor]:
        book, codes, headers = self._book(side), [], []
        for h in (0, 1):
            if self._is_computed(side):
                tokens, header = self._read_computed(src, side, h)
            else:
                tokens = unpack_streams(src[..., self._codes(side, h)], self.dim, book, side == "value")
                header = self._scales(src, side, h)[..., 0].mT.flatten(-2)
            codes.append(tokens)
            headers.append(header)
        symbols = torch.cat(codes, dim=-2)
        out = {"header": torch.cat(headers, dim=-1)[..., None], "symbols": symbols[..., :: book.period]}
        if book.period == 2:
            out["odd_symbols"] = symbols[..., 1::2]
        unit = (
            self._spares(src, side, 0)[..., 0, :]
            if self._is_computed(side)
            else self._scales(src, side, 0)[..., 0, UNIT, 1]
        )
        return {**out, "unit": unit.contiguous().view(torch.float16)[..., None, :]}
