"""A side's bases and bits per channel: what is stored of them, per model, and where they come from when a digest names them.

A vector x of a head becomes u = forward @ x, channels of unit variance in decreasing order of what an error in them costs;
channel c is coded with widths[c] bits, 0 to MAX_WIDTH, and an error of u_c counts weight[c] squared times.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvfold.errors import InvalidConfig

MAX_WIDTH = 4
DIGEST_DIGITS = 32
SIDES = ("key", "value")


@dataclass(frozen=True)
class Basis:
    """One side of one layer. forward, inverse: float32 [H, D, D], inverse @ forward = 1. widths: uint8 [H, D]. weight: float32
    [H, D], above 0. cost: float32 [H, D, D], what an error e of x costs: |cost @ e|^2."""

    forward: Tensor
    inverse: Tensor
    widths: Tensor
    weight: Tensor
    cost: Tensor

    @property
    def stored_bytes(self) -> int:
        """Bytes per token and head of the codes of all heads together."""
        return -(-int(self.widths.sum()) // (8 * len(self.widths)))


NAMES = tuple(Basis.__dataclass_fields__)
Bases = dict[tuple[int, str], Basis]

_known: dict[str, Bases] = {}


def content(bases: Bases) -> bytes:
    """All layers as the bytes of one safetensors file."""
    return save(
        {
            f"layers.{layer}.{side}.{name}": getattr(basis, name).contiguous()
            for (layer, side), basis in bases.items()
            for name in NAMES
        }
    )


def remember(data: bytes) -> str:
    """Make the bases in a file's bytes known by their digest, which is returned. Raises InvalidConfig for other bytes."""
    try:
        tensors = load(data)
        places = sorted({tuple(name.split(".")[1:3]) for name in tensors})
        bases = {
            (int(layer), side): Basis(**{n: tensors[f"layers.{layer}.{side}.{n}"] for n in NAMES})
            for layer, side in places
        }
    except (SafetensorError, KeyError, ValueError) as error:
        raise InvalidConfig(
            f"these are not the bases of a tuned profile ({error})", "Make them with kvfold tune"
        ) from error
    digest = hashlib.sha256(data).hexdigest()[:DIGEST_DIGITS]
    _known[digest] = bases
    return digest


def read(path: Path) -> str:
    """`remember` the bases in a file. Raises InvalidConfig."""
    try:
        return remember(path.read_bytes())
    except OSError as error:
        raise InvalidConfig(f"{path} cannot be read ({error})", "Keep it beside the profile that names it") from error


def find(digest: str, layer: int, side: str) -> Basis:
    """The basis of a side of a layer in the file of that digest. Raises InvalidConfig if no such file was read."""
    bases = _known.get(digest)
    if bases is None:
        raise InvalidConfig(
            f"the bases {digest} of a tuned profile were not read",
            "Load the profile that kvfold tune wrote beside them first",
        )
    if (layer, side) not in bases:
        raise InvalidConfig(f"the tuned profile has no {side} basis for layer {layer}", "Tune the model that it is for")
    return bases[layer, side]
