"""The kernels' numbers of codecs, and the bytes of their codes (kernels/formats.cuh)."""

from __future__ import annotations

from kvfold.codebook.trellis import Code, code
from kvfold.config import TRELLIS_CODECS

SCALE_BYTES = 128  # of one side of half a page
TRELLIS, COMPUTED = 10, 20  # format number of a trellis code, or of a computed one, less twice its bits


def format_of(codec: str, bits: float) -> int:
    """The kernels' number of a codec: its bits; 1 for uniform; 10, or 20, and twice its bits for trellis, or computed."""
    if codec in TRELLIS_CODECS:
        return (COMPUTED if codec == "computed" else TRELLIS) + int(2 * bits)
    return 1 if codec == "uniform" else int(bits)


def bits_of(fmt: int) -> int:
    """Of a scalar code."""
    return 2 if fmt == 1 else fmt


def book_of(fmt: int) -> Code:
    """Of a trellis code or a computed one."""
    return code((fmt - COMPUTED) / 2, "computed") if fmt > COMPUTED else code((fmt - TRELLIS) / 2)


def code_bytes(dim: int, fmt: int) -> int:
    """Codes of one side of half a page."""
    return 4 * dim * (fmt - COMPUTED if fmt > COMPUTED else fmt - TRELLIS if fmt > TRELLIS else 2 * bits_of(fmt))
