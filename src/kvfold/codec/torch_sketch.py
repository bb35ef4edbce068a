"""`qjl` and `prod` on any torch device; equations in codec.qjl and codec.prod.

The sign sketch is never multiplied out per token: a page is decoded to z = (scaled levels, scaled signs), the query is
projected by R and by c S once, and an output is lifted once.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvfold.codec.fields import fields
from kvfold.codec.on_torch import LevelReader, Scalar, half
from kvfold.codec.qjl import sketch
from kvfold.config import SideSpec


class Qjl:
    """Signs of S x and the norm of x; z = norm * signs, <q, x_hat> = <c S q, z>."""

    def __init__(self, spec: SideSpec, dim: int, keys: list[int], device: torch.device) -> None:
        self.latent = dim
        self.fields = fields(SideSpec("qjl", 1), dim)
        matrices, scales = zip(*(sketch(spec.sketch, dim, key) for key in keys), strict=True)
        self.c = scales[0]
        self.matrix = torch.from_numpy(np.stack(matrices).astype(np.float32)).to(device)
        self.reader = LevelReader(torch.tensor([-1.0, 1.0], device=device), 1, dim)

    def freeze(self, x: Tensor) -> Tensor | None:
        return None

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        signs = (x @ self.matrix.mT > 0).to(torch.uint8)
        return {"signs": signs, "norm": torch.linalg.vector_norm(x, dim=-1, keepdim=True).half()}

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        return self.reader(planes_of["signs"]) * half(planes_of["norm"])

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        return (q @ self.matrix.mT) * self.c

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        return (z @ self.matrix) * self.c


class Prod:
    """A scalar quantizer at b - 1 >= 1 bits and the sketch of its residual, their bases side by side (latent 2 D)."""

    def __init__(self, spec: SideSpec, dim: int, keys: list[int], device: torch.device) -> None:
        self.dim, self.latent = dim, 2 * dim
        self.fields = fields(spec, dim)
        self.first = Scalar(SideSpec("mse", int(spec.bits) - 1, "norm", spec.rotation), dim, keys, device)
        self.residual = Qjl(spec, dim, keys, device)

    def freeze(self, x: Tensor) -> Tensor | None:
        return None

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        kept = self.first.encode(x, None)
        z = self.first.levels[kept["codes"].int()] * kept["scale"].float()
        sketched = self.residual.encode(x - self.first.lift(z, None), None)
        return {**kept, "signs": sketched["signs"], "gamma": sketched["norm"]}

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        residual = {"signs": planes_of["signs"], "norm": planes_of["gamma"]}
        return torch.cat([self.first.decode(planes_of, None), self.residual.decode(residual, None)], dim=-1)

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        return torch.cat([self.first.project(q, None), self.residual.project(q, None)], dim=-1)

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        return self.first.lift(z[..., : self.dim], None) + self.residual.lift(z[..., self.dim :], None)
