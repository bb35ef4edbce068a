"""`polar` on any torch device; equations in codec.polar."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codebook import angles
from kvfold.codec.fields import POLAR_BITS, fields
from kvfold.codec.on_torch import half
from kvfold.codec.polar import LEVELS, sector_boundaries, sector_centres
from kvfold.config import SideSpec
from kvfold.packing.on_torch import unpack
from kvfold.rotation.on_torch import Rotation

FULL_TURN = 2 * torch.pi


class Polar:
    """Angles and radii of blocks of 16 rotated coordinates; z is the rotated vector itself."""

    def __init__(self, spec: SideSpec, dim: int, keys: list[int], device: torch.device) -> None:
        self.latent = dim
        self.fields = fields(spec, dim)
        self.rotation = Rotation(spec.rotation, dim, keys, device)
        books = [(sector_centres(), sector_boundaries())]
        books += [angles.solve(level, POLAR_BITS[level - 1]) for level in range(2, LEVELS + 1)]
        self.boundaries = [torch.from_numpy(b).float().to(device) for _, b in books]
        # (cos, sin) by code, per level.
        self.points = [
            torch.stack([torch.from_numpy(c).cos(), torch.from_numpy(c).sin()], -1).float() for c, _ in books
        ]
        self.points = [p.to(device) for p in self.points]

    def freeze(self, x: Tensor) -> Tensor | None:
        return None

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        first, second = self.rotation.forward(x).unflatten(-1, (-1, 2)).unbind(-1)
        theta = torch.atan2(second, first)
        theta = torch.where(theta < 0, theta + FULL_TURN, theta)
        outer = torch.bucketize(theta, self.boundaries[0], out_int32=True)
        r = torch.hypot(first, second)
        inner = []
        for boundaries in self.boundaries[1:]:
            first, second = r.unflatten(-1, (-1, 2)).unbind(-1)
            inner.append(torch.bucketize(torch.atan2(second, first), boundaries, out_int32=True))
            r = torch.hypot(first, second)
        return {
            "outer": outer.to(torch.uint8),
            "inner": torch.cat(inner, dim=-1).to(torch.uint8),
            "radius": r.half(),
        }

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        outer, inner, _ = self.fields
        r = half(planes_of["radius"])
        codes = unpack(planes_of["inner"], inner.bits, inner.count).int()
        end = inner.count
        for level in range(LEVELS, 1, -1):
            n = r.shape[-1]
            r = (r[..., None] * self.points[level - 1][codes[..., end - n : end]]).flatten(-2)
            end -= n
        codes = unpack(planes_of["outer"], outer.bits, outer.count).int()
        return (r[..., None] * self.points[0][codes]).flatten(-2)

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        return self.rotation.forward(q)

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        return self.rotation.inverse(z)
