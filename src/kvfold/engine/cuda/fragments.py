"""Canonical bytes of a page to the order the CUDA kernels read, and back.

Fragment order of one KV head: two halves of 64 tokens, each [mean int8 x D, permuted | pad to 128][K][V]; a side is its
codes, then a scale per token (sides.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kvfold.engine.cuda.sides import side_of
from kvfold.packing.layout import PageLayout
from kvfold.packing.on_torch import PageCodec

PAGES = 64  # moved at a time: bits of trellis codes are bytes on the way


@functools.cache
def mean_index(dim: int) -> Tensor:
    """Place of dimension d among the mean's bytes."""
    d = torch.arange(dim)
    return (d // 4 % 4) * (dim // 4) + d // 16 * 4 + d % 4


class Fragments:
    """The bijection for one page layout. key, value: format numbers."""

    def __init__(self, layout: PageLayout, key: int, value: int) -> None:
        self.layout, self.dim = layout, layout.head_dim
        self.sides = {"key": side_of(layout, "key", key), "value": side_of(layout, "value", value)}
        self.mean_bytes = (self.dim + 127) // 128 * 128 if layout.mean else 0
        self.half_bytes = self.mean_bytes + sum(side.bytes for side in self.sides.values())
        self.head_bytes = 2 * self.half_bytes
        self.page_bytes = layout.kv_heads * self.head_bytes

    def halves(self, rows: Tensor, side: str) -> list[Tensor]:
        """Views [P, H, bytes] of a side of rows uint8 [P, page_bytes] in fragment order."""
        start = self.mean_bytes + (self.sides["key"].bytes if side == "value" else 0)
        return [half[..., start : start + self.sides[side].bytes] for half in self._halves(rows)]

    def from_canonical(self, rows: Tensor) -> Tensor:
        """uint8 [P, canonical page bytes] -> [P, page_bytes] in fragment order."""
        return torch.cat([self._from_canonical(some) for some in rows.split(PAGES)])

    def to_canonical(self, rows: Tensor) -> Tensor:
        """Inverse of from_canonical."""
        return torch.cat([self._to_canonical(some) for some in rows.split(PAGES)])

    def _halves(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.unflatten(-1, (self.layout.kv_heads, 2, self.half_bytes)).unbind(-2)

    def _from_canonical(self, rows: Tensor) -> Tensor:
        out = torch.zeros(len(rows), self.page_bytes, dtype=torch.uint8, device=rows.device)
        for name, side in self.sides.items():
            side.put(self.halves(out, name), rows)
        if self.layout.mean:
            src = rows.unflatten(-1, (self.layout.kv_heads, self.layout.head_bytes))
            codes, scales, place = self._means(src)
            for h, (half, key) in enumerate(zip(self._halves(out), self.halves(out, "key"), strict=True)):
                half[..., place] = codes[..., h, :]
                self.sides["key"].put_mean_scale(key, scales[..., h, :])
        return out

    def _to_canonical(self, rows: Tensor) -> Tensor:
        out = torch.zeros(len(rows), self.layout.page_bytes, dtype=torch.uint8, device=rows.device)
        pages = PageCodec(self.layout)
        for name, side in self.sides.items():
            pages.write(out, name, side.take(self.halves(rows, name)))
        if self.layout.mean:
            codes, scales, place = self._means(out.unflatten(-1, (self.layout.kv_heads, self.layout.head_bytes)))
            for h, (half, key) in enumerate(zip(self._halves(rows), self.halves(rows, "key"), strict=True)):
                codes[..., h, :] = half[..., place]
                scales[..., h, :] = self.sides["key"].mean_scale(key)
        return out

    def _means(self, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of canonical regions [P, H, head_bytes]: views of codes [..., half, D], of scales [..., half, byte]; codes' places."""
        codes, scales = self.layout.offset("mean", "codes"), self.layout.offset("mean", "scale")
        return (
            regions[..., codes : codes + 2 * self.dim].unflatten(-1, (2, self.dim)),
            regions[..., scales : scales + 4].unflatten(-1, (2, 2)),
            mean_index(self.dim).to(regions.device),
        )
