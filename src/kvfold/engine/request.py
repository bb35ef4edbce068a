"""What an attention call over a folded layer is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvfold.engine.variant import PLAIN, Reach, Variant


@dataclass(frozen=True)
class LayerShape:
    """Fixed facts of one layer. head_dim: of keys, and of values unless value_dim says otherwise.

    first_head: the model's own number of the first KV head, where a process holds only some of a layer's heads.
    variant: what its calls may ask of the softmax.
    """

    layer: int
    kv_heads: int
    head_dim: int
    dtype_bytes: int
    first_head: int = 0
    variant: Variant = PLAIN
    value_dim: int | None = None

    @property
    def dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.head_dim, self.value_dim or self.head_dim

    @property
    def unusual(self) -> list[str]:
        """What an engine must know besides the plain softmax over vectors of one width."""
        key, value = self.dims
        return self.variant.names + ([f"keys of {key} and values of {value} numbers"] if key != value else [])

    @property
    def heads(self) -> range:
        """The model's own numbers of the KV heads."""
        return range(self.first_head, self.first_head + self.kv_heads)


class Runs(list[Tensor]):
    """Pages in order, as views [n, page_bytes] of consecutive ones. table: what an engine made of them while they stay."""

    table: Tensor | None = None


@dataclass(frozen=True)
class SequenceView:
    """One row of a call, as it was before the call.

    runs: pages in order, as views [n, page_bytes] of the pool's slabs. folded: tokens in pages (the last page may be
    partly valid after a trim). sinks_k, sinks_v: [H, S, D], read in place of tokens 0..S-1 of page 0.
    recent_k, recent_v: [H, length - folded, D], exact. pads: how many of the call's tokens are left padding,
    always fewer than it has.
    state_k, state_v: what the codecs froze for this sequence. start: tokens before the first page, given up in layers with
    a reach; `folded` counts from there.
    """

    runs: list[Tensor]
    folded: int
    sinks_k: Tensor
    sinks_v: Tensor
    recent_k: Tensor
    recent_v: Tensor
    pads: int
    state_k: Tensor | None
    state_v: Tensor | None
    start: int = 0

    def hidden(self, reach: Reach, query: int) -> int:
        """How many tokens from `start` on the call's query number `query` does not read; pads are not counted."""
        return max(0, reach.first(self.start + self.folded + self.recent_k.shape[1] + query) - self.start)


@dataclass(frozen=True)
class AttendRequest:
    """q [B, H * G, Q, D]; k, v [B, H, Q, D] of the same call; softmax scale; one view per row.

    softcap, sink_logits [H * G]: see Variant. An engine is given them only in layers whose shape announces them.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    rows: list[SequenceView]
    softcap: float | None = None
    sink_logits: Tensor | None = None
