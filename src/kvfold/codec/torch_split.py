"""`split` on any torch device; equations in codec.split."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.codec.fields import fields, split_bits, split_dims
from kvfold.codec.on_torch import Scalar
from kvfold.codec.split import OUTLIER_STREAM, REGULAR_STREAM, not_frozen
from kvfold.config import SideSpec
from kvfold.rotation.reference import stream


class Split:
    """Two scalar quantizers, their bases side by side: z = (outlier, regular). State: outlier channels int16 [H, D/4]."""

    def __init__(self, spec: SideSpec, dim: int, keys: list[int], device: torch.device) -> None:
        self.latent = dim
        self.fields = fields(spec, dim)
        self.parts = {
            name: Scalar(
                SideSpec("mse", bits, spec.scale, spec.rotation, search=spec.search),
                part,
                [stream(key, path) for key in keys],
                device,
            )
            for name, bits, part, path in zip(
                ("outlier", "regular"),
                split_bits(spec.bits),
                split_dims(dim),
                (OUTLIER_STREAM, REGULAR_STREAM),
                strict=True,
            )
        }

    def freeze(self, x: Tensor) -> Tensor:
        """x float32 [H, T, D] -> the D/4 channels of largest L2 norm, ascending; of equal norms the lower channel."""
        norms = torch.linalg.vector_norm(x, dim=1)
        order = torch.sort(norms, dim=-1, descending=True, stable=True).indices
        return order[:, : self.parts["outlier"].dim].sort(dim=-1).values.to(torch.int16)

    def _order(self, state: Tensor | None) -> Tensor:
        """All channels, outlier ones first, each group ascending: int64 [H, D]."""
        if state is None:
            raise not_frozen()
        regular = torch.ones(len(state), self.latent, dtype=torch.bool, device=state.device)
        regular.scatter_(1, state.long(), False)
        return torch.sort(regular.to(torch.uint8), dim=-1, stable=True).indices

    def _gather(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [..., H, R, D] -> its outlier and regular sub-vectors."""
        order = self._order(state)[:, None].expand(x.shape)
        sizes = [part.dim for part in self.parts.values()]
        outlier, regular = torch.gather(x, -1, order).split(sizes, dim=-1)
        return outlier, regular

    def encode(self, x: Tensor, state: Tensor | None) -> dict[str, Tensor]:
        return {
            f"{name}_{field}": value
            for (name, part), sub in zip(self.parts.items(), self._gather(x, state), strict=True)
            for field, value in part.encode(sub, None).items()
        }

    def decode(self, planes_of: dict[str, list[Tensor]], state: Tensor | None) -> Tensor:
        return torch.cat(
            [
                part.decode({"codes": planes_of[f"{name}_codes"], "scale": planes_of[f"{name}_scale"]}, None)
                for name, part in self.parts.items()
            ],
            dim=-1,
        )

    def project(self, q: Tensor, state: Tensor | None) -> Tensor:
        both = zip(self.parts.values(), self._gather(q, state), strict=True)
        return torch.cat([part.project(sub, None) for part, sub in both], dim=-1)

    def lift(self, z: Tensor, state: Tensor | None) -> Tensor:
        both = zip(self.parts.values(), z.split([part.dim for part in self.parts.values()], dim=-1), strict=True)
        x = torch.cat([part.lift(sub, None) for part, sub in both], dim=-1)
        return torch.empty_like(x).scatter_(-1, self._order(state)[:, None].expand(x.shape), x)
