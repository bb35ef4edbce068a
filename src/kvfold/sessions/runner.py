"""A model as sessions run it: attached, in calls on a fixed grid, its pages in pools that all sessions share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.hf_transformers import FoldedCache, attach
from kvfold.config import CacheSpec

# Calls end on multiples of it. Tokens fed again in a fresh session are then cut where they were, as equal bits need.
CALL_TOKENS = 512


class Runner:
    """model, tokenizer: of transformers; the model gets attached. profile or spec, backend: as for FoldedCache.

    call_tokens: the grid that calls end on.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        profile: str = "balanced",
        *,
        spec: CacheSpec | None = None,
        backend: str = "auto",
        call_tokens: int = CALL_TOKENS,
    ) -> None:
        self.model, self.tokenizer, self.call_tokens = model, tokenizer, call_tokens
        attach(model)
        self._first = FoldedCache(model.config, profile, spec=spec, backend=backend)
        self.profile, self.spec = self._first.profile, self._first.spec
        self._built = False
        self._lock = threading.Lock()

    def new_cache(self) -> FoldedCache:
        """An empty cache that keeps its pages in the runner's pools."""
        with self._lock:
            if not self._built:
                # Pools are made by a first call, which knows each layer's shape, dtype and device.
                self.forward(self._first, [0])
                self._first.reset()
                self._built = True
            return self._first.fork()

    def forward(self, cache: FoldedCache, tokens: Sequence[int]) -> Tensor:
        """One call over tokens that the cache does not hold yet; logits [V] after the last of them."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        with torch.no_grad():
            return self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]

    @staticmethod
    def undo(cache: FoldedCache, length: int) -> None:
        """Take a failed call back: the cache again holds `length` tokens. Raises CannotTrim if a running state took it in."""
        cache.rollback()
        if (extra := cache.get_seq_length() - length) > 0:  # it failed after its last layer
            cache.crop(-extra)

    def calls(self, start: int, tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Tokens `start` and on of a sequence, cut on the grid."""
        at = 0
        while at < len(tokens):
            n = self.call_tokens - (start + at) % self.call_tokens
            yield tokens[at : at + n]
            at += n
