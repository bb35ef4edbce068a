"""What a codec stores per vector, as fields of a page. Arithmetic only: planner, layout and codecs all ask here."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from kvfold.codebook import trellis
from kvfold.config import TRELLIS_CODECS, TUNED, SideSpec
from kvfold.errors import InvalidConfig, UnsupportedHeadDim
from kvfold.packing.layout import Field
from kvfold.rotation.reference import MIN_HEAD_DIM

Fields = dict[str, NDArray[Any]]  # one array [..., count] per field: uint8 codes, float16 halves

POLAR_BLOCK = 16  # coordinates per radius: 2 to the number of levels
POLAR_BITS = (4, 2, 2, 2)  # angle bits of levels 1..4; with a float16 radius (4*8 + 2*7 + 16) / 16 = 3.875 bits
TRELLIS_MULTIPLE = 8  # coordinates
OUTLIER_SHARE = 4  # one channel in four is an outlier channel: 32 of 128


def split_dims(dim: int) -> tuple[int, int]:
    """Outlier and regular channels of codec `split`: (32, 96) at head_dim 128."""
    if dim % OUTLIER_SHARE or dim // OUTLIER_SHARE < MIN_HEAD_DIM:
        raise UnsupportedHeadDim(
            f"codec 'split' needs a head_dim that is a multiple of {OUTLIER_SHARE} and at least "
            f"{OUTLIER_SHARE * MIN_HEAD_DIM}, not {dim}",
            "Use codec 'mse', such as profile 'turbo-3' has it",
        )
    return dim // OUTLIER_SHARE, dim - dim // OUTLIER_SHARE


def split_bits(bits: float) -> tuple[int, int]:
    """Code widths of outlier and regular channels: 3.5 -> (4, 3), 2.5 -> (3, 2).

    (32*4 + 96*3 + 2*16) / 128 = 3.5: the two float16 scales are part of the name, in which 32*4 + 96*3 alone is 3.25.
    """
    return int(bits) + 1, int(bits)


def state_bytes(spec: SideSpec, kv_heads: int, dim: int) -> int:
    """Bytes that a codec freezes per sequence: int16 outlier channels of `split`, a byte per head of `tuned`."""
    if spec.codec == TUNED:
        return kv_heads
    return 2 * kv_heads * split_dims(dim)[0] if spec.codec == "split" else 0


def fields(spec: SideSpec, dim: int, value_bytes: int = 2) -> tuple[Field, ...]:
    """Fields of one side at head_dim `dim`; `value_bytes` is the model's, read by `raw` only.

    Raises UnsupportedHeadDim where the codec has no form.
    """
    bits = int(spec.bits)
    if spec.codec == TUNED:
        raise InvalidConfig("codec 'tuned' has other fields in every layer", "Use it with torch, or another profile")
    if spec.codec == "raw":
        return (Field("values", "raw", 8 * value_bytes, dim),)
    if dim < MIN_HEAD_DIM:
        raise UnsupportedHeadDim(
            f"codec {spec.codec!r} needs a head_dim of at least {MIN_HEAD_DIM}, not {dim}", "Use profile 'lossless'"
        )
    if spec.codec in ("mse", "uniform"):
        return (Field("codes", "codes", bits, dim), Field("scale", "half", 16, 1))
    if spec.codec == "qjl" or (spec.codec == "prod" and bits == 1):
        return (Field("signs", "codes", 1, dim), Field("norm", "half", 16, 1))
    if spec.codec == "prod":
        return (
            Field("codes", "codes", bits - 1, dim),
            Field("scale", "half", 16, 1),
            Field("signs", "codes", 1, dim),
            Field("gamma", "half", 16, 1),
        )
    if spec.codec == "polar":
        if dim % POLAR_BLOCK:
            raise UnsupportedHeadDim(
                f"codec 'polar' works on blocks of {POLAR_BLOCK} coordinates, and head_dim {dim} is no multiple",
                "Use codec 'mse', such as profile 'turbo-3' has it",
            )
        return (
            Field("outer", "codes", POLAR_BITS[0], dim // 2),
            Field("inner", "codes", POLAR_BITS[1], dim // 2 - dim // POLAR_BLOCK),
            Field("radius", "half", 16, dim // POLAR_BLOCK),
        )
    if spec.codec in TRELLIS_CODECS:
        if dim % TRELLIS_MULTIPLE:
            raise UnsupportedHeadDim(
                f"codec {spec.codec!r} needs a head_dim that is a multiple of {TRELLIS_MULTIPLE}, not {dim}",
                "Use codec 'mse', such as profile 'turbo-3' has it",
            )
        widths = trellis.code(spec.bits, spec.codec).widths
        symbols = (
            Field(name, "codes", width, dim // len(widths))
            for name, width in zip(("symbols", "odd_symbols"), widths, strict=False)
        )
        return (*symbols, Field("header", "codes", 8, 1), Field("unit", "half", 16, 1, rows=1))
    outlier, regular = split_dims(dim)
    high, low = split_bits(spec.bits)
    return (
        Field("outlier_codes", "codes", high, outlier),
        Field("outlier_scale", "half", 16, 1),
        Field("regular_codes", "codes", low, regular),
        Field("regular_scale", "half", 16, 1),
    )
