"""Rotations on any torch device. Same float32 operations in the same order as the reference, hence the same bits."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kvfold.rotation import reference


def hadamard(x: Tensor) -> Tensor:
    """Unnormalised (O_m ⊗ H) x over the last axis, float32 [..., D]; see rotation.reference.hadamard_f32."""
    dim = x.shape[-1]
    pow2, m = reference.factor(dim)
    y = x.reshape(*x.shape[:-1], m, pow2)
    h = 1
    while h < pow2:
        v = y.reshape(*y.shape[:-1], pow2 // (2 * h), 2, h)
        a, b = v.unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).reshape(y.shape)
        h *= 2
    if m > 1:
        c = torch.from_numpy(reference.hartley(m)).to(x.device)
        rows = []
        for i in range(m):
            acc = c[i, 0] * y[..., 0, :]
            for j in range(1, m):
                acc = acc + c[i, j] * y[..., j, :]
            rows.append(acc)
        y = torch.stack(rows, dim=-2)
    return y.reshape(x.shape)


class Rotation:
    """One rotation per KV head of one side of one layer.

    keys: stream keys, one per head. All tensors are float32 [..., H, R, D] with the head third from the end.
    """

    def __init__(self, kind: str, dim: int, keys: list[int], device: torch.device) -> None:
        self.kind, self.dim = kind, dim
        if kind == "hadamard":
            s = np.stack([reference.signs(dim, k) for k in keys])
            self.signs = torch.from_numpy(s).to(device)[:, None, :]
        else:
            r = np.stack([reference.matrix(kind, dim, k) for k in keys])
            self.dense = torch.from_numpy(r.astype(np.float32)).to(device)

    def unnormalised(self, x: Tensor) -> Tensor:
        """sqrt(D) R x, what the canonical encoder reads."""
        if self.kind == "hadamard":
            return hadamard(x * self.signs)
        return (x @ self.dense.mT) * math.sqrt(self.dim)

    def forward(self, x: Tensor) -> Tensor:
        """R x."""
        if self.kind == "hadamard":
            return hadamard(x * self.signs) * (1 / math.sqrt(self.dim))
        return x @ self.dense.mT

    def inverse(self, y: Tensor) -> Tensor:
        """R^T y."""
        if self.kind == "hadamard":
            return hadamard(y) * self.signs * (1 / math.sqrt(self.dim))
        return y @ self.dense
