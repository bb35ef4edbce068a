"""Other people's codecs in their simplest form, to be measured beside ours: KIVI's, and llama.cpp's q4_0 after a rotation.

Reference code in torch for one sequence of one layer, float32 [H, T, D]: codes are made, counted and read back, not packed.
Nothing here is a profile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvfold.errors import UnsupportedHeadDim
from kvfold.rotation.on_torch import Rotation
from kvfold.rotation.reference import stream

BLOCK = 32  # values that share a scale: KIVI's group size in its paper, and q4_0's block


@dataclass(frozen=True)
class Coded:
    """Groups of values as they would be stored. codes uint8 [..., G], meta float16: what each group keeps beside them."""

    codes: Tensor
    bits: int
    meta: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Stored bits, of codes and of every number beside them."""
        return self.codes.numel() * self.bits + 16 * sum(m.numel() for m in self.meta)


def affine(x: Tensor, bits: int) -> Coded:
    """Asymmetric round to nearest, x [..., G]: q = round((x - z) / s), z = min x, s = (max x - min x) / (2^bits - 1), as in
    KIVI (arXiv 2402.02750, section 2). s and z are float16 [..., 1]."""
    zero = x.amin(-1, keepdim=True)
    top = (1 << bits) - 1
    scale, zero = ((x.amax(-1, keepdim=True) - zero) / top).half(), zero.half()
    safe = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    codes = torch.round((x - zero.float()) / safe).clamp(0, top).to(torch.uint8)
    return Coded(codes, bits, (scale, zero))


def affine_decode(coded: Coded) -> Tensor:
    scale, zero = coded.meta
    return coded.codes.float() * scale.float() + zero.float()


def q4_0(x: Tensor) -> Coded:
    """llama.cpp's q4_0, x [..., 32]: d = the value of largest size over -8, q = floor(x / d + 8.5) up to 15; 4.5 bits."""
    extreme = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    d = extreme / -8
    inverse = torch.where(d == 0, torch.zeros_like(d), 1 / d)
    codes = (x * inverse + 8.5).floor().clamp(0, 15).to(torch.uint8)
    return Coded(codes, 4, (d.half(),))


def q4_0_decode(coded: Coded) -> Tensor:
    return (coded.codes.float() - 8) * coded.meta[0].float()


class Peer(Protocol):
    """One layer's keys (side 0) and values (side 1), float32 [H, T, D]; T is a multiple of BLOCK."""

    def fold(self, x: Tensor, side: int) -> tuple[Tensor, int]:
        """(x_hat float32 [H, T, D], bits that storing it takes)."""


class Kivi:
    """KIVI (arXiv 2402.02750): keys per channel in groups of 32 tokens, values per token in groups of 32 channels."""

    def __init__(self, bits: int, dim: int) -> None:
        if dim % BLOCK:
            raise UnsupportedHeadDim(
                f"KIVI's groups of {BLOCK} do not divide head_dim {dim}", "Leave this baseline out"
            )
        self.bits = bits

    def fold(self, x: Tensor, side: int) -> tuple[Tensor, int]:
        # Grouped axis last: tokens of one channel for keys, channels of one token for values.
        lines = x.mT if side == 0 else x
        coded = affine(lines.reshape(*lines.shape[:-1], -1, BLOCK), self.bits)
        back = affine_decode(coded).reshape(lines.shape)
        return (back.mT if side == 0 else back), coded.size


class RotatedQ4:
    """A seeded signed Hadamard transform per head, then q4_0: what llama.cpp does with a rotated 4-bit cache."""

    def __init__(self, dim: int, heads: int, layer: int, seed: int, device: torch.device) -> None:
        if dim % BLOCK:
            raise UnsupportedHeadDim(
                f"q4_0's blocks of {BLOCK} do not divide head_dim {dim}", "Leave this baseline out"
            )
        keys = [[stream(seed, layer, head, side) for head in range(heads)] for side in (0, 1)]
        self.rotations = [Rotation("hadamard", dim, k, device) for k in keys]

    def fold(self, x: Tensor, side: int) -> tuple[Tensor, int]:
        rotation = self.rotations[side]
        y = rotation.forward(x)
        coded = q4_0(y.reshape(*y.shape[:-1], -1, BLOCK))
        return rotation.inverse(q4_0_decode(coded).reshape(x.shape)), coded.size
