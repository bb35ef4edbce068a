"""What one benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.errors import InvalidConfig


@dataclass(frozen=True)
class Case:
    """context: folded tokens (fold: tokens to fold). new_tokens: of a prefill call."""

    op: str
    context: int
    query_heads: int
    kv_heads: int
    head_dim: int
    key_bits: float
    value_bits: float
    codec: str
    batch: int
    threads: int
    new_tokens: int

    def __post_init__(self) -> None:
        if self.context < PAGE_TOKENS or self.context % PAGE_TOKENS:
            raise InvalidConfig(f"context {self.context} is not a multiple of {PAGE_TOKENS}", "Use whole pages")
        if self.query_heads % self.kv_heads:
            raise InvalidConfig(
                f"{self.query_heads} query heads do not divide among {self.kv_heads} KV heads", "Use a multiple"
            )

    @property
    def pages(self) -> int:
        return self.context // PAGE_TOKENS

    @property
    def spec(self) -> CacheSpec:
        """Scales as in the profiles: unbiased keys, least-squares values, centred, four sinks."""
        return CacheSpec(
            key=SideSpec(self.codec, self.key_bits, "unbiased"),
            value=SideSpec(self.codec, self.value_bits, "least-squares"),
        )
