"""Codes to canonical bytes on any torch device, and whole pages: fields written to and read from rows of bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.packing.layout import MEANS, Field, PageLayout, planes


def _shifts(width: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=device)


def pack_plane(codes: Tensor, width: int) -> Tensor:
    """codes uint8 [..., n] below 2^width -> uint8 [..., ceil(n * width / 8)]."""
    per = 8 // width
    pad = -codes.shape[-1] % per
    if pad:
        codes = torch.nn.functional.pad(codes, (0, pad))
    c = codes.unflatten(-1, (-1, per)) << _shifts(width, codes.device)
    # Fields do not overlap, so the sum is the bitwise or.
    return c.sum(-1, dtype=torch.uint8)


def unpack_plane(packed: Tensor, width: int, count: int) -> Tensor:
    """Inverse of pack_plane."""
    c = (packed.unsqueeze(-1) >> _shifts(width, packed.device)) & ((1 << width) - 1)
    return c.flatten(-2)[..., :count]


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """One byte tensor per plane, lowest bits first."""
    return [pack_plane((codes >> shift) & ((1 << width) - 1), width) for width, shift in planes(bits)]


def unpack(parts: list[Tensor], bits: int, count: int) -> Tensor:
    """Inverse of pack."""
    total = torch.zeros((), dtype=torch.uint8, device=parts[0].device)
    for part, (width, shift) in zip(parts, planes(bits), strict=True):
        total = total | (unpack_plane(part, width, count) << shift)
    return total


class PageCodec:
    """Reads and writes the fields of canonical pages. rows: uint8 [P, page_bytes]."""

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout

    def _region(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.layout.kv_heads, self.layout.head_bytes))

    def write(self, rows: Tensor, side: str, values: dict[str, Tensor]) -> None:
        """values: one tensor [P, H, rows, count] per field of the side (uint8 codes, float16 halves, raw floats)."""
        region = self._region(rows)
        for f in getattr(self.layout, side):
            at = self.layout.offset(side, f.name)
            x = values[f.name]
            parts = pack(x, f.bits) if f.kind == "codes" else [x.contiguous().view(torch.uint8)]
            for part in parts:
                n = f.rows * part.shape[-1]
                region[..., at : at + n] = part.flatten(-2)
                at += n

    def planes_of(self, rows: Tensor, side: str, f: Field) -> list[Tensor]:
        """The planes of a field as bytes [P, H, rows, plane_bytes]; raw and half fields are one plane."""
        region = self._region(rows)
        at = self.layout.offset(side, f.name)
        out = []
        for n in f.plane_bytes if f.kind == "codes" else (sum(f.plane_bytes),):
            out.append(region[..., at : at + f.rows * n].unflatten(-1, (f.rows, n)))
            at += f.rows * n
        return out

    def read(self, rows: Tensor, side: str, f: Field, dtype: torch.dtype = torch.float16) -> Tensor:
        """One field back as [P, H, rows, count]: uint8 codes, or floats of `dtype` for half and raw fields."""
        parts = self.planes_of(rows, side, f)
        if f.kind == "codes":
            return unpack(parts, f.bits, f.count)
        return parts[0].contiguous().view(dtype)

    def write_means(self, rows: Tensor, codes: Tensor, scale: Tensor) -> None:
        """codes int8 [P, H, 2, D], scale float16 [P, H, 2]."""
        region = self._region(rows)
        at, mid = self.layout.offset("mean", "codes"), self.layout.offset("mean", "scale")
        region[..., at:mid] = codes.flatten(-2).view(torch.uint8)
        region[..., mid : mid + 2 * MEANS] = scale.contiguous().view(torch.uint8)

    def read_means(self, rows: Tensor) -> Tensor:
        """The dequantized mean keys of each half page, float32 [P, H, 2, D]."""
        region = self._region(rows)
        at, mid = self.layout.offset("mean", "codes"), self.layout.offset("mean", "scale")
        codes = region[..., at:mid].contiguous().view(torch.int8).float().unflatten(-1, (MEANS, -1))
        scale = region[..., mid : mid + 2 * MEANS].contiguous().view(torch.float16).float()
        return scale[..., None] * codes
