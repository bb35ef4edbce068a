"""A model as sessions run it: attached, in calls on a fixed grid, its pages in pools that all sessions share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfold.adapters.hf_layers import FoldedWindowLayer, PagedLayer
from kvfold.adapters.hf_state import tensors_of
from kvfold.adapters.hf_transformers import FoldedCache, attach
from kvfold.cache.sizes import TABLE_ENTRY_BYTES, mapped
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.sessions.fingerprint import fingerprint

if TYPE_CHECKING:
    from kvfold.sessions.session import Session

# Calls end on multiples of it. Tokens fed again in a fresh session are then cut where they were, as equal bits need.
CALL_TOKENS = 512


class Runner:
    """model, tokenizer: of transformers; the model gets attached. profile or spec, backend: as for FoldedCache.

    call_tokens: the grid that calls end on. ways_back: how many checkpoints a session keeps of itself as it is extended.
    watch: compare folded with exact attention on one page in so many, see `fidelity`; 0 for none.
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
        ways_back: int = 0,
        watch: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.call_tokens, self.ways_back = model, tokenizer, call_tokens, ways_back
        attach(model)
        self._first = FoldedCache(model.config, profile, spec=spec, backend=backend)
        self.profile, self.spec = self._first.profile, self._first.spec
        if watch:
            self._first.watch(watch)
        self.fingerprint = fingerprint(model, tokenizer)
        self._built = False
        self._lock = threading.Lock()

    @property
    def fidelity(self) -> list[dict[str, float | int]]:
        """Of each folded layer, over all sessions of this runner: see cache.fidelity. Empty if nobody watches."""
        layers = [x.folded for x in self._first.folded_layers]
        return [{"layer": x.layer, **x.fidelity.report()} for x in layers if x.fidelity is not None]

    def _device(self, layer: Any) -> torch.device:
        """Where a layer's tensors are, once it has some."""
        if isinstance(layer, PagedLayer):
            return layer.folded.shape[-1]
        return next((x.device for x in tensors_of(layer).values()), self.model.device)

    def _window_bytes(self, layer: Any) -> int:
        """What a sliding window of one token grows to: it keeps the last call whole, folded or not."""
        if isinstance(layer, FoldedWindowLayer):
            pages = layer.most_pages + -(-self.call_tokens // PAGE_TOKENS)
            return pages * (
                mapped(layer.folded.pool.page_bytes, layer.folded.shape[-1].type == "cpu") + TABLE_ENTRY_BYTES
            )
        window = getattr(layer, "sliding_window", None) or 0
        return sum(x.nbytes * (window + self.call_tokens) for x in tensors_of(layer).values()) if window else 0

    def new_cache(self) -> FoldedCache:
        """An empty cache that keeps its pages in the runner's pools."""
        with self._lock:
            if not self._built:
                # Pools are made by a first call, which knows each layer's shape, dtype and device.
                self.forward(self._first, [0])
                self.devices = [self._device(x) for x in self._first.layers]
                self._measure()
                self._first.reset()
                self._built = True
            cache = self._first.fork()
        for layer in cache.paged_layers:
            heads, dim, dtype, device = layer.folded.shape
            k, v = (torch.empty(1, heads, 0, d, dtype=dtype, device=device) for d in (dim, layer.folded.value_dim))
            layer.lazy_initialization(k, v)
        return cache

    def _measure(self) -> None:
        """session_bytes, checkpoint_bytes: the most that a session, or a checkpoint, has besides pages and their table.
        layer_reference_bytes: what 16 bits per key and value of one token take in each folded layer."""
        shapes = [x.folded.sequences[0] for x in self._first.folded_layers]
        self.layer_reference_bytes = [2 * s.ring_k.shape[0] * (s.ring_k.shape[2] + s.ring_v.shape[2]) for s in shapes]
        exact = sum(x.folded.exact_bytes for x in self._first.folded_layers)
        states = self._first.unshared_bytes - exact + sum(map(self._window_bytes, self._first.layers))
        self.session_bytes = exact + states
        slots = self.spec.ring_tokens() + self.spec.sinks
        self.checkpoint_bytes = exact * (self.spec.window + PAGE_TOKENS + self.spec.sinks) // slots + states

    @contextmanager
    def room(self, sessions: Sequence[Session], tokens: int, checkpoints: int = 0) -> Iterator[None]:
        """Wraps every call that gives each session so many more tokens, and checkpoints; a store makes room for them here."""
        yield

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
