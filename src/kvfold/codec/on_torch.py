"""Codecs on any torch device: what a fold and an attention over pages need of each, behind one small interface."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kvfold.codebook import table
from kvfold.codec.canonical import inverse_sqrt
from kvfold.codec.fields import fields
from kvfold.codec.scalar import grid
from kvfold.config import SideSpec
from kvfold.packing.layout import Field, planes
from kvfold.packing.on_torch import unpack
from kvfold.rotation.on_torch import Rotation

# Values decoded by one table look-up: the widest group whose index stays within 12 bits (a 64 KB table).
GROUP = {1: 8, 2: 4, 3: 4, 4: 2}


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis by halves, as codec.canonical.tree_sum."""
    n = 1 << max(0, x.shape[-1] - 1).bit_length()
    if n != x.shape[-1]:
        x = torch.nn.functional.pad(x, (0, n - x.shape[-1]))
    while n > 1:
        n //= 2
        x = x[..., :n] + x[..., n:]
    return x[..., 0]


def root(x: Tensor) -> Tensor:
    """Correctly rounded square root of float32. torch's own, on CPUs, is one ulp off for some values in a thousand."""
    return torch.sqrt(x.double()).float()


class TorchCodec(Protocol):
    """One side of one layer. A codec writes vectors as fields and reads them back as z in a basis of its own.

    The basis is linear: x_hat = lift(z) and <q, x_hat> = <project(q), z>, so a query is projected once, an output is
    lifted once, and pages are only ever decoded to z. `state` is what a codec freezes per sequence (None for most).
    """

    fields: tuple[Field, ...]
    latent: int

    def freeze(self, x: Tensor) -> Tensor | None:
        """State frozen from the vectors of a sequence's first fold, float32 [H, T, D]."""

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        """float32 [P, H, T, D] -> fields [P, H, T, count]."""

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        """Planes of bytes [P, H, T, n] per field -> z float32 [P, H, T, latent]."""

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        """float32 [H, R, D] -> [H, R, latent]."""

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        """float32 [H, R, latent] -> [H, R, D]."""


def half(parts: list[Tensor]) -> Tensor:
    """A float16 field's bytes as float32."""
    return parts[0].contiguous().view(torch.float16).float()


class LevelReader:
    """Planes of packed codes straight to levels: bytes index a table of whole groups of values."""

    def __init__(self, levels: Tensor, bits: int, count: int) -> None:
        self.bits, self.count, self.levels = bits, count, levels
        self.group = GROUP.get(bits, 0)
        if self.group:
            codes = torch.arange(1 << (bits * self.group), device=levels.device)
            parts = []
            at = 0
            for width, shift in planes(bits):
                field = codes >> at
                parts.append(
                    torch.stack([((field >> (width * j)) & ((1 << width) - 1)) << shift for j in range(self.group)], -1)
                )
                at += width * self.group
            self.table = levels[torch.stack(parts).sum(0)]

    def __call__(self, parts: list[Tensor]) -> Tensor:
        """[..., plane bytes] -> float32 [..., count]."""
        if not self.group:
            return self.levels[unpack(parts, self.bits, self.count).long()]
        index: Tensor | None = None
        at = 0
        for part, (width, _) in zip(parts, planes(self.bits), strict=True):
            field = part.int()
            per_byte = 8 // (width * self.group)
            if per_byte > 1:
                # A byte of this plane serves several groups: split it into their fields.
                step = width * self.group
                s = torch.arange(0, 8, step, dtype=torch.int32, device=part.device)
                field = ((field.unsqueeze(-1) >> s) & ((1 << step) - 1)).flatten(-2)
            field = field << at
            at += width * self.group
            index = field if index is None else index[..., : field.shape[-1]] | field[..., : index.shape[-1]]
        flat = self.table.index_select(0, index.flatten())  # type: ignore[union-attr]
        return flat.view(*index.shape[:-1], -1)[..., : self.count]  # type: ignore[union-attr]


class Scalar:
    """`mse` and `uniform`; see codec.scalar for the equations and the canonical order of operations."""

    def __init__(self, spec: SideSpec, dim: int, keys: list[int], device: torch.device) -> None:
        bits = int(spec.bits)
        book = table(spec.codec, bits, dim)
        self.spec, self.dim, self.latent = spec, dim, dim
        self.fields = fields(spec, dim)
        self.rotation = Rotation(spec.rotation, dim, keys, device)
        self.levels = torch.from_numpy(book.levels).to(device, torch.float32)
        self.thresholds = torch.from_numpy(book.thresholds).to(device)
        self.step = float(book.step)
        # Divisors are tensors: a Python number would be applied as a multiplication by its reciprocal.
        self.one, self.dims = torch.ones((), device=device), torch.tensor(float(dim), device=device)
        self.factors = [torch.tensor(f, device=device) for f in grid(spec.search)]
        self.reader = LevelReader(self.levels, bits, dim)

    def freeze(self, x: Tensor) -> Tensor | None:
        return None

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        y = self.rotation.unnormalised(x)
        r = root(tree_sum(y * y) / self.dims)
        u = y * torch.where(r > 0, self.one / r, 0.0)[..., None]
        best = u.new_zeros(0)
        for i, f in enumerate(self.factors):
            tried = torch.bucketize(u * f, self.thresholds, out_int32=True)
            levels = self.levels[tried]
            d, q = tree_sum(u * levels), tree_sum(levels * levels)
            gain = (d * d) / q
            if i == 0:
                best, codes, dot, square = gain, tried, d, q
            else:
                better = gain > best
                best = torch.where(better, gain, best)
                codes = torch.where(better[..., None], tried, codes)
                dot, square = torch.where(better, d, dot), torch.where(better, q, square)
        rn = r * float(inverse_sqrt(self.dim))
        if self.spec.scale == "norm":
            s = rn * self.step
        elif self.spec.scale == "unbiased":
            s = (rn * self.dims) / dot
        elif self.spec.scale == "least-squares":
            s = (rn * dot) / square
        else:
            s = rn * root(self.dims / square)
        s = torch.where(r == 0, 0.0, s)
        return {"codes": codes.to(torch.uint8), "scale": s.half()[..., None]}

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        return self.reader(planes_of["codes"]) * half(planes_of["scale"])

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        return self.rotation.forward(q)

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        return self.rotation.inverse(z)


class Raw:
    """The model's own numbers in its own dtype: the lossless form, with nothing rotated."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        self.latent = dim
        self.dtype = dtype
        self.fields = fields(SideSpec("raw", 16), dim, dtype.itemsize)

    def freeze(self, x: Tensor) -> Tensor | None:
        return None

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        return {"values": x.to(self.dtype)}

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        values = planes_of["values"][0].contiguous()
        if values.storage_offset() % self.dtype.itemsize:  # one page, behind codes whose bytes are odd in number
            values = values.clone()
        return values.view(self.dtype).float()

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        return q

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        return z
