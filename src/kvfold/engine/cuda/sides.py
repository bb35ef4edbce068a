"""One side of half a page in the order of the CUDA kernels, and back: its codes, then SCALE_BYTES with a token's scale each.

Regions are uint8 views [..., bytes] of such a side. Whatever else a page holds lies in bits that scales leave, so that every
copy is whole 128-byte lines: of keys the mean's float16 scale, of trellis and computed codes the page's float16 unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from kvfold.codebook.trellis import STATES
from kvfold.engine.cuda.computed import START_BYTES, pack_starts, pack_words, unpack_starts, unpack_words
from kvfold.engine.cuda.fields import pack_half, unpack_half
from kvfold.engine.cuda.formats import COMPUTED, SCALE_BYTES, TRELLIS, book_of, code_bytes
from kvfold.engine.cuda.streams import HALF_TOKENS, pack_streams, unpack_streams
from kvfold.packing.layout import PageLayout
from kvfold.packing.on_torch import PageCodec

SCALE = 63  # what of a header is the scale
UNIT, MEAN = slice(0, 2), slice(2, 4)  # scales of a lane's tokens whose second bytes hold more


class Side(ABC):
    """side: "key" or "value"; fmt: its format number. bytes: of half a page."""

    def __init__(self, layout: PageLayout, side: str, fmt: int) -> None:
        self.layout, self.side, self.format = layout, side, fmt
        self.value, self.dim = side == "value", layout.head_dim
        self.code_bytes = code_bytes(self.dim, fmt)
        self.bytes = self.code_bytes + SCALE_BYTES
        self.pages, self.fields = PageCodec(layout), {f.name: f for f in getattr(layout, side)}

    @abstractmethod
    def put(self, halves: list[Tensor], rows: Tensor) -> None:
        """Canonical rows uint8 [P, page bytes] into the regions [P, H, bytes] of both halves, which are zero."""

    @abstractmethod
    def take(self, halves: list[Tensor]) -> dict[str, Tensor]:
        """Inverse of put: values of the canonical fields by name, as PageCodec.write takes them."""

    @abstractmethod
    def put_mean_scale(self, half: Tensor, scale: Tensor) -> None:
        """scale: its two bytes [..., 2]."""

    @abstractmethod
    def mean_scale(self, half: Tensor) -> Tensor:
        """Inverse of put_mean_scale."""

    @abstractmethod
    def put_units(self, half: Tensor, unit: Tensor) -> None:
        """unit: float16 [..., g, i], the scales of tokens 8 i + g; [..., 1, 1] where scales are codes."""

    def _pairs(self, half: Tensor) -> Tensor:
        """View [..., g, i, byte] of what tokens 8 i + g have behind the codes, where that is two bytes."""
        return half[..., self.code_bytes :].unflatten(-1, (8, 8, 2))


class ScalarSide(Side):
    """64 float16 scales, token 8 i + g at [g][i]. Scales are not negative: the signs of K scales [g][t], g < 4, t < 4, hold
    bit 4 g + t of the mean's scale."""

    def put(self, halves: list[Tensor], rows: Tensor) -> None:
        codes = self.pages.read(rows, self.side, self.fields["codes"]).split(HALF_TOKENS, dim=-2)
        scales = (
            self.pages.planes_of(rows, self.side, self.fields["scale"])[0].unflatten(-2, (2, 8, 8)).transpose(-3, -2)
        )
        for h, half in enumerate(halves):
            half[..., : self.code_bytes] = pack_half(codes[h], self.format, self.value)
            self._pairs(half)[:] = scales[..., h, :, :, :]

    def take(self, halves: list[Tensor]) -> dict[str, Tensor]:
        codes, scales = [], []
        for half in halves:
            codes.append(unpack_half(half[..., : self.code_bytes], self.dim, self.format, self.value))
            s = self._pairs(half).transpose(-3, -2).flatten(-3).contiguous().view(torch.int16)
            hides = self.layout.mean and not self.value
            scales.append((s & 0x7FFF if hides else s).view(torch.float16))
        return {"codes": torch.cat(codes, dim=-2), "scale": torch.cat(scales, dim=-1)[..., None]}

    def put_mean_scale(self, half: Tensor, scale: Tensor) -> None:
        bits = (scale.contiguous().view(torch.int16).int()[..., None] >> self._hidden(scale.device)) & 1
        self._pairs(half)[..., :4, :4, 1] |= bits.to(torch.uint8) << 7

    def mean_scale(self, half: Tensor) -> Tensor:
        bits = (self._pairs(half)[..., :4, :4, 1] >> 7).int() << self._hidden(half.device)
        return bits.sum((-2, -1))[..., None].to(torch.int16).view(torch.uint8)

    def put_units(self, half: Tensor, unit: Tensor) -> None:
        self._pairs(half)[:] = unit[..., None].view(torch.uint8)

    def _hidden(self, device: torch.device) -> Tensor:
        """Bit of the mean's scale in the sign of K scale [g][t]."""
        return torch.arange(16, device=device).view(4, 4)


class PathSide(Side):
    """Codes that are paths through a trellis, with headers of six bits of scale and two of start state."""

    def __init__(self, layout: PageLayout, side: str, fmt: int) -> None:
        super().__init__(layout, side, fmt)
        self.book = book_of(fmt)

    def put(self, halves: list[Tensor], rows: Tensor) -> None:
        names = ("symbols", "odd_symbols")[: self.book.period]
        parts = [self.pages.read(rows, self.side, self.fields[name]) for name in names]
        symbols = torch.stack(parts, dim=-1).flatten(-2).split(HALF_TOKENS, dim=-2)
        headers = self.pages.read(rows, self.side, self.fields["header"])[..., 0].unflatten(-1, (2, 8, 8)).mT
        unit = self.pages.planes_of(rows, self.side, self.fields["unit"])[0]  # [P, H, 1, 2]
        for h, half in enumerate(halves):
            self._put_half(half, symbols[h], headers[..., h, :, :])
            self.put_units(half, unit.contiguous().view(torch.float16))

    def take(self, halves: list[Tensor]) -> dict[str, Tensor]:
        tokens, headers = zip(*(self._take_half(half) for half in halves), strict=True)
        symbols = torch.cat(tokens, dim=-2)
        out = {"header": torch.cat(headers, dim=-1)[..., None], "symbols": symbols[..., :: self.book.period]}
        if self.book.period == 2:
            out["odd_symbols"] = symbols[..., 1::2]
        return {**out, "unit": self._unit(halves[0]).contiguous().view(torch.float16)[..., None, :]}

    @abstractmethod
    def _put_half(self, half: Tensor, tokens: Tensor, headers: Tensor) -> None:
        """tokens: symbols [..., 64, D]; headers [..., g, i]."""

    @abstractmethod
    def _take_half(self, half: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens [..., 64, D], headers [..., 64])."""

    @abstractmethod
    def _unit(self, half: Tensor) -> Tensor:
        """Its two bytes [..., 2]."""


class TrellisSide(PathSide):
    """Lanes' streams (streams.py), then 64 times a header and a byte more: those of tokens g and 8 + g hold the unit, of keys
    16 + g and 24 + g the mean's scale."""

    def _put_half(self, half: Tensor, tokens: Tensor, headers: Tensor) -> None:
        half[..., : self.code_bytes] = pack_streams(tokens, self.book, self.value)
        self._pairs(half)[..., 0] = headers

    def _take_half(self, half: Tensor) -> tuple[Tensor, Tensor]:
        tokens = unpack_streams(half[..., : self.code_bytes], self.dim, self.book, self.value)
        return tokens, self._pairs(half)[..., 0].mT.flatten(-2)

    def put_mean_scale(self, half: Tensor, scale: Tensor) -> None:
        self._pairs(half)[..., MEAN, 1] = scale[..., None, :]

    def mean_scale(self, half: Tensor) -> Tensor:
        return self._pairs(half)[..., 0, MEAN, 1]

    def put_units(self, half: Tensor, unit: Tensor) -> None:
        self._pairs(half)[..., UNIT, 1] = unit[..., :1, :1].view(torch.uint8)

    def _unit(self, half: Tensor) -> Tensor:
        return self._pairs(half)[..., 0, UNIT, 1]


class ComputedSide(PathSide):
    """Words of many vectors (computed.py), then scales' six bits, with the unit in bits 6 and 7 of each row of eight, in odd rows
    of keys with means the mean's scale, then the words of the start states."""

    def _put_half(self, half: Tensor, tokens: Tensor, headers: Tensor) -> None:
        width = self.book.widths[0]
        half[..., : self.code_bytes] = pack_words(tokens, width, self.value)
        self._rows(half)[:] = headers & SCALE
        starts = torch.tensor(self.book.starts, dtype=torch.uint8, device=half.device)
        half[..., -START_BYTES:] = pack_starts(starts[(headers >> 6).long()].mT.flatten(-2), width, self.value)

    def _take_half(self, half: Tensor) -> tuple[Tensor, Tensor]:
        width = self.book.widths[0]
        states = unpack_starts(half[..., -START_BYTES:], width, self.value)
        number = torch.zeros(STATES, dtype=torch.uint8, device=half.device)
        number[list(self.book.starts)] = torch.arange(len(self.book.starts), dtype=torch.uint8, device=half.device)
        headers = (self._rows(half) & SCALE).mT.flatten(-2) | number[states.long()] << 6
        return unpack_words(half[..., : self.code_bytes], self.dim, width, self.value), headers

    def put_mean_scale(self, half: Tensor, scale: Tensor) -> None:
        self._put_spares(half, scale[..., None, :], slice(1, None, 2))

    def mean_scale(self, half: Tensor) -> Tensor:
        return self._spares(half)[..., 1, :]

    def put_units(self, half: Tensor, unit: Tensor) -> None:
        means = self.layout.mean and not self.value
        self._put_spares(half, unit[..., :1, :1].view(torch.uint8), slice(0, None, 2 if means else 1))

    def _unit(self, half: Tensor) -> Tensor:
        return self._spares(half)[..., 0, :]

    def _rows(self, half: Tensor) -> Tensor:
        """View [..., g, i]: of tokens 8 i + g."""
        return half[..., self.code_bytes : -START_BYTES].unflatten(-1, (8, 8))

    def _put_spares(self, half: Tensor, pair: Tensor, rows: slice) -> None:
        """Two bytes [..., 1, 2] into bits 6 and 7 of rows of scales."""
        two = pair[..., None].int() >> torch.arange(0, 8, 2, device=pair.device) & 3  # [..., 1, byte, 4]
        spares = (two << 6).to(torch.uint8).flatten(-2)
        self._rows(half)[..., rows, :] = self._rows(half)[..., rows, :] & SCALE | spares

    def _spares(self, half: Tensor) -> Tensor:
        """What _put_spares put into each row: bytes [..., g, 2]."""
        two = (self._rows(half) >> 6).unflatten(-1, (2, 4)).int()
        return (two << torch.arange(0, 8, 2, device=half.device)).sum(-1).to(torch.uint8)


def side_of(layout: PageLayout, side: str, fmt: int) -> Side:
    """A page's side of this format number."""
    kind = ComputedSide if fmt > COMPUTED else TrellisSide if fmt > TRELLIS else ScalarSide
    return kind(layout, side, fmt)
