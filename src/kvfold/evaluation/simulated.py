"""A cache of stock tensors whose old tokens went through a peer's codec: measured like a folded cache, nothing saved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from kvfold.codec.peers import Peer
from kvfold.config import PAGE_TOKENS
from kvfold.errors import ShapeMismatch


class SimulatedLayer(DynamicLayer):
    """One full-attention layer. Pages of PAGE_TOKENS are replaced by what their codec gives back once they left the
    window, except the sinks, after the call's own attention: as CacheSpec says of a folded cache. One sequence.

    peer: makes the codec for (heads, head_dim, device) of the first keys.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, peer: Callable[[int, int, torch.device], Peer], window: int, sinks: int) -> None:
        super().__init__()
        self.make, self.window, self.sinks = peer, window, sinks
        self.folded, self.folded_bits = 0, 0
        self.peer: Peer | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if key_states.shape[0] != 1:
            raise ShapeMismatch(f"{key_states.shape[0]} sequences in one call", "A baseline holds one")
        keys, values = super().update(key_states, value_states)
        while self.folded + PAGE_TOKENS <= keys.shape[2] - self.window:
            self._fold()
        return keys, values

    def _fold(self) -> None:
        if self.peer is None:
            self.peer = self.make(self.keys.shape[1], self.keys.shape[3], self.keys.device)
        first, end = self.folded, self.folded + PAGE_TOKENS
        sinks = max(0, self.sinks - first)
        # In new tensors: this call's attention still reads the old ones.
        self.keys, self.values = self.keys.clone(), self.values.clone()
        for side, x in enumerate((self.keys, self.values)):
            page = x[0, :, first:end].float().clone()
            # Sinks stay exact; their place in the page must not widen the range of its groups.
            page[:, :sinks] = page[:, sinks : sinks + 1]
            back, bits = self.peer.fold(page, side)
            x[0, :, first + sinks : end] = back[:, sinks:].to(x.dtype)
            self.folded_bits += bits
        self.folded = end

    @property
    def exact_tokens(self) -> int:
        """Past tokens that a query reads exactly."""
        return self.get_seq_length() - self.folded + min(self.sinks, self.folded)

    @property
    def folded_values(self) -> int:
        """Numbers in pages, of keys and values."""
        return 0 if self.keys is None else self.folded * (self._row(self.keys) + self._row(self.values))

    @property
    def stored_bytes(self) -> int:
        """What it would take: pages as the codec counts them, exact tokens at the model's own dtype."""
        row = self._row(self.keys) + self._row(self.values)
        return self.folded_bits // 8 + self.exact_tokens * row * self.keys.element_size()

    @property
    def reference_bytes(self) -> int:
        return 2 * self.get_seq_length() * (self._row(self.keys) + self._row(self.values))

    @staticmethod
    def _row(x: Tensor) -> int:
        return x.shape[1] * x.shape[3]
