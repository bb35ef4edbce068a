"""Where every byte of a canonical page lies. FORMAT.md in arithmetic: integers only, no arrays."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.config import MEAN_TOKENS, PAGE_TOKENS

FORMAT_VERSION = 1  # of FORMAT.md; whatever stores pages stores it beside them
HEAD_ALIGN = 8  # bytes; a head's region starts on it, so that scales and planes are read by whole words
MEANS = PAGE_TOKENS // MEAN_TOKENS


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, shift) of the planes of a `bits`-wide code: widths 16, 8, 4, 2, 1 of its binary digits, lowest bits first.

    3 -> ((2, 0), (1, 2)): the first plane holds code & 3, the second code >> 2. No plane straddles a byte.
    """
    out = []
    shift = 0
    for width in (32, 16, 8, 4, 2, 1):
        if bits & width:
            out.append((width, shift))
            shift += width
    return tuple(out)


@dataclass(frozen=True)
class Field:
    """`count` numbers of `bits` bits per token. kind: `codes` (unsigned, packed in planes), `half` (float16), `raw` (bytes
    of the model's own dtype). rows: tokens of a page, or 1 for numbers that a page holds once."""

    name: str
    kind: str
    bits: int
    count: int
    rows: int = PAGE_TOKENS

    @property
    def plane_bytes(self) -> tuple[int, ...]:
        """Bytes per row of each plane."""
        return tuple(-(-self.count * width // 8) for width, _ in planes(self.bits))

    @property
    def page_bytes(self) -> int:
        return self.rows * sum(self.plane_bytes)


@dataclass(frozen=True)
class PageLayout:
    """One page of one layer: `kv_heads` equal regions of `head_bytes`.

    A region: key fields, value fields, then, if `mean`, int8 x head_dim for each half of the page, one float16 for
    each half, then zeros up to HEAD_ALIGN.
    """

    key: tuple[Field, ...]
    value: tuple[Field, ...]
    kv_heads: int
    head_dim: int
    mean: bool

    @property
    def used_bytes(self) -> int:
        return sum(f.page_bytes for f in self.key + self.value) + (MEANS * (self.head_dim + 2) if self.mean else 0)

    @property
    def head_bytes(self) -> int:
        return -(-self.used_bytes // HEAD_ALIGN) * HEAD_ALIGN

    @property
    def page_bytes(self) -> int:
        return self.kv_heads * self.head_bytes

    def offset(self, side: str, name: str) -> int:
        """First byte of a field inside a head's region; side `key`, `value`, or `mean` with name `codes` or `scale`."""
        at = 0
        for which, fields in (("key", self.key), ("value", self.value)):
            for f in fields:
                if (which, f.name) == (side, name):
                    return at
                at += f.page_bytes
        if side == "mean" and self.mean:
            return at + (MEANS * self.head_dim if name == "scale" else 0)
        raise KeyError((side, name))

    def bits_per_value(self, values_per_token: int) -> float:
        """Bits of a page over the values it holds; `values_per_token` counts K and V of one KV head."""
        return 8 * self.head_bytes / (PAGE_TOKENS * values_per_token)
