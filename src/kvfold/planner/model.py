"""A model as the planner sees it: what each layer keeps per token, what it keeps at all, and how wide it computes."""

from __future__ import annotations

from dataclasses import dataclass

from kvfold.engine.variant import PLAIN, Variant

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Attention:
    """Keys and values that one layer keeps for every token.

    variant: its softmax and how far back it reads, which decide what engine runs it; of latent attention, key_dim is the latent's
    and value_dim its rotary key's. indexer: numbers per token that are kept exactly beside them, by which queries choose what
    they read; position_bytes: of what is kept beside those.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    variant: Variant = PLAIN
    indexer: int = 0
    position_bytes: int = 0

    @property
    def latent(self) -> bool:
        return self.variant.latent

    @property
    def window(self) -> int | None:
        """Tokens that are kept exactly in sliding and chunked layers, unless they fold; None: all there are."""
        return self.variant.reach.tokens if self.variant.reach is not None else None

    @property
    def values(self) -> int:
        """Numbers kept per token."""
        return self.kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True)
class State:
    """Numbers that one layer keeps whatever the context. dtype_bytes: None means the model's own. vector: numbers along the
    last axis of what may be kept in 8-bit codes, which have a scale for each; 0: it may not."""

    name: str
    values: int
    dtype_bytes: int | None = None
    vector: int = 0

    def bytes_as(self, states: str, dtype_bytes: int) -> int:
        """In memory, kept as `CacheSpec.states` says, in a model of this dtype."""
        width = self.dtype_bytes or dtype_bytes
        return (
            self.values + self.values // self.vector * width
            if states == "int8" and self.vector
            else self.values * width
        )


@dataclass(frozen=True)
class Layer:
    """kind: full, latent, indexed (sparse), sliding, chunked, linear, conv, hybrid or hybrid_sliding (attention and a running
    state), shared (reads another layer's keys) or none."""

    kind: str
    attention: Attention | None = None
    states: tuple[State, ...] = ()


@dataclass(frozen=True)
class Scores:
    """What a family's own softmax holds of all scores at once, where torch has no fused form of it: `tensors` in the model's
    dtype, or in float32 if `wide`. None of them: scores in the model's dtype and their softmax in float32."""

    tensors: int = 0
    wide: bool = False

    def bytes_each(self, dtype_bytes: int) -> int:
        """Per score, in a model of this dtype."""
        if not self.tensors:
            copied = 0 if dtype_bytes == FLOAT32_BYTES else FLOAT32_BYTES
            return dtype_bytes + copied + FLOAT32_BYTES
        return self.tensors * (FLOAT32_BYTES if self.wide else dtype_bytes)


@dataclass(frozen=True)
class Model:
    """name: its model_type. mlp_values: numbers of a token that the MLP, or the experts that it runs through, hold at once.
    linear_values: float32 numbers of a token that a linear-attention or state-space layer holds at once, 0 without such layers.
    streams: hidden states of a token that are carried from layer to layer (Gemma 3n: several).
    """

    name: str
    layers: tuple[Layer, ...]
    dtype_bytes: int
    hidden: int
    query_heads: int
    mlp_values: int
    linear_values: int
    vocabulary: int
    max_context: int | None = None
    scores: Scores = Scores()
    streams: int = 1
