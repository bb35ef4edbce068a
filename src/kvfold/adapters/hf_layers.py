"""transformers: layers of a FoldedCache, and which of transformers' layers they take the place of."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvfold.adapters.hf_attention import Handle, LazyMask, Runs, no_pads
from kvfold.adapters.hf_coded import CodedStateLayer, select_states
from kvfold.cache.guard import CallGuard
from kvfold.cache.layer import FoldedAttention
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.request import AttendRequest
from kvfold.engine.select import make_engine
from kvfold.engine.variant import PLAIN, Reach, Variant
from kvfold.errors import CannotTrim, Unsupported

REFERENCE_BYTES = 2  # per value: what ratios are against

F = TypeVar("F", bound=Callable[..., Any])

# Nothing between `update` and the end of attention can be traced: pages are bytes behind handles.
eager: Callable[[F], F] = torch.compiler.disable(
    reason="kvfold: a folded cache cannot be compiled into a full graph; leave fullgraph off, or use a stock cache"
)


class PagedLayer(CacheLayerMixin):
    """A layer of a FoldedCache whose keys and values lie in pages."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self,
        spec: CacheSpec,
        layer: int,
        backend: str,
        guard: CallGuard,
        variant: Variant = PLAIN,
        number_of_states: int = 0,
    ) -> None:
        super().__init__(**({"number_of_states": number_of_states} if number_of_states else {}))
        self.folded = FoldedAttention(spec, layer, functools.partial(make_engine, backend), variant)
        self.guard = guard
        self.readers = 1  # layers that attend to this one's keys in a call; the last of them stores it
        self.columns = 0  # tokens of the batch as the host counts them: padding included
        self.holes: list[Runs] = []  # which columns of each row are padding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.folded.prepare(key_states, value_states)
        if len(self.holes) != len(key_states):
            self.holes = [[] for _ in range(len(key_states))]
        self.is_initialized = True

    @property
    def reach(self) -> Reach | None:
        """How far back its queries read, if not to the beginning."""
        return self.folded.variant.reach

    @property
    def nbytes(self) -> int:
        """Every byte allocated for keys and values."""
        return self.folded.nbytes

    @property
    def reference_bytes(self) -> int:
        """16 bits per key and value of its tokens, in windows of those read."""
        total, most = 0, None if self.reach is None else self.reach.tokens
        for s in self.folded.sequences:
            kept = s.length if most is None else min(s.length, most)
            total += REFERENCE_BYTES * kept * s.ring_k.shape[0] * (s.ring_k.shape[2] + s.ring_v.shape[2])
        return total

    @property
    def expanded(self) -> bool:
        """Whether the model attends by itself: see engine.variant."""
        return self.folded.variant.expanded

    @property
    def latent(self) -> bool:
        """Whether keys are latents and values their rotary parts: see engine.variant."""
        return self.folded.variant.latent

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, call: int = 0, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Two handles for the attention function; nothing is stored before its attention was computed. Models that attend by
        themselves get keys and values of all tokens, which are stored at once: padding is not known here, and is stored, too."""
        if self.latent and key_states.shape[1] != 1:
            raise Unsupported("this transformers expands latents (MLA) before caching them", "Upgrade transformers")
        self.lazy_initialization(key_states, value_states)
        if self.expanded:
            return self._take(key_states, value_states, call)
        handle = Handle(self, call, key_states, value_states)
        return handle, handle

    def _take(self, key_states: Tensor, value_states: Tensor, call: int) -> tuple[Tensor, Tensor]:
        self.guard.begin(self.folded.layer, call)
        stored = False
        try:
            every = self.folded.take(key_states, value_states, self.columns)
            self.columns += key_states.shape[2]
            stored = True
        finally:
            self.guard.end(self.folded.layer, stored)
        return every

    @eager
    def attend(self, handle: Handle, call: AttendRequest, mask: LazyMask | None) -> Tensor:
        """Attention [B, H * G, Q, D] of the call behind a handle, which then belongs to the past."""
        self.guard.begin(self.folded.layer, handle.call)
        stored = False
        try:
            new = call.k.shape[2]
            pads = mask.pads(new, self.columns, self.holes, self.reach) if mask is not None else no_pads(self.holes)
            handle.reads += 1
            last = handle.reads == self.readers
            q = _of_all(call.q, new)
            out = self.folded.attend(q, call.k, call.v, pads, call.scale, call.softcap, call.sink_logits, last)
            out = out[:, :, new - call.q.shape[2] :]
            if not last:
                return out
            for runs, n in zip(self.holes, pads, strict=True):
                if n:
                    start = runs.pop()[0] if runs and runs[-1][1] == self.columns else self.columns
                    runs.append((start, self.columns + n))
            self.columns += new
            stored = True
        finally:
            self.guard.end(self.folded.layer, stored)
        return out

    def get_seq_length(self) -> int:
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # the name other libraries still ask for

    def can_crop(self, tokens_to_remove: int) -> bool:
        """Whether `crop` of the newest -n columns is possible in every row."""
        keep = self.columns + min(0, tokens_to_remove)
        rows = zip(self.folded.sequences, self._padding_after(keep), strict=True)
        return all(s.can_trim(self.columns - keep - p) for s, p in rows)

    def _padding_after(self, keep: int) -> list[int]:
        """How many columns from `keep` on are padding, per row."""
        return [sum(stop - max(start, keep) for start, stop in runs if stop > keep) for runs in self.holes]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -n columns; a positive n is the length to keep, as transformers once had it."""
        n = int(-tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove))
        if n > self.columns:
            raise CannotTrim(f"cannot remove {n} of {self.columns} tokens", "Crop at most what the cache holds")
        keep = self.columns - n
        self.folded.trim([n - p for p in self._padding_after(keep)])
        self.holes = [[(a, min(b, keep)) for a, b in runs if a < keep] for runs in self.holes]
        self.columns = keep

    def _select(self, rows: list[int]) -> None:
        if self.folded.sequences:
            self.folded.select(rows)
            self.holes = [list(self.holes[r]) for r in rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([r for r in range(len(self.holes)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(torch.arange(len(self.holes))[indices.cpu()].tolist())

    def reset(self) -> None:
        self.folded.clear()
        self.columns, self.holes = 0, []

    def offload(self) -> None:
        raise Unsupported("a folded cache does not offload", "It is a fifth of the size; leave offloading off")

    prefetch = offload

    def fork(self, guard: CallGuard, compact: bool = False) -> Self:
        """An independent continuation that shares folded pages."""
        other = copy.copy(self)
        other.folded, other.guard = self.folded.compact() if compact else self.folded.fork(), guard
        other.holes = [list(runs) for runs in self.holes]
        return other


def _of_all(q: Tensor, new: int) -> Tensor:
    """A query for each of the `new` tokens. Layers that share keys may be asked for the last ones alone."""
    return q if q.shape[2] >= new else torch.nn.functional.pad(q, (0, 0, new - q.shape[2], 0))


class FoldedLayer(PagedLayer):
    """A full-attention layer: its pages are all there is of the context, and sessions keep them."""


class FoldedWindowLayer(PagedLayer):
    """A sliding or chunked layer that takes less folded than exact: pages that no query reads any more are given up."""

    is_sliding = True

    @property
    def sliding_window(self) -> int:
        return self.reach.tokens  # type: ignore[union-attr]

    @property
    def most_pages(self) -> int:
        """Pages that a row holds between calls, at most."""
        return (self.sliding_window + self.folded.spec.ring_tokens()) // PAGE_TOKENS + 1

    def tensors(self) -> dict[str, Tensor]:
        """What a layer of one row holds, by name: pages in the byte order of files, exact tokens, what codecs froze."""
        if not self.folded.sequences:
            return {}
        s = self.folded.sequences[0]
        pages = [self.folded.canonical(p) for p in s.pages]
        k, v = s.exact()
        frozen = {n: x for n, x in zip(("state_keys", "state_values"), s.state, strict=True) if x is not None}
        return {"keys": k, "values": v, **frozen, **({"pages": torch.stack(pages)} if pages else {})}

    def numbers(self) -> dict[str, int]:
        """The counters of a layer of one row."""
        s = self.folded.sequences[0]
        return {"length": s.length, "folded": s.folded, "given_up": s.given_up}

    def fill(self, tensors: dict[str, Tensor], numbers: dict[str, int]) -> None:
        """Make an empty layer of one row one that holds these."""
        s = self.folded.sequences[0]
        pages = [self.folded.adopt(row) for row in tensors.get("pages", ())]
        state = tensors.get("state_keys"), tensors.get("state_values")
        exact = tensors["keys"], tensors["values"]
        s.restore(pages, numbers["length"], numbers["folded"], exact, state, numbers["given_up"])
        self.columns = numbers["length"]


# Newer kinds of layers, which older versions have no name for.
HybridWindowLayer = getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", LinearAttentionLayer)
EmptyLayer = getattr(cache_utils, "DummyLayer", LinearAttentionLayer)
IndexedLayer: Any = getattr(cache_utils, "DynamicIndexedLayer", DynamicLayer)


class FoldedHybridLayer(FoldedLayer, LinearAttentionAndFullAttentionLayer):
    """A layer with attention and a running state beside each other (Falcon-H1, Zamba 2): keys and values are folded, the
    state is kept as transformers keeps it."""

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return LinearAttentionLayer.is_croppable.fget(self)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Of keys and values, or of the states, which come by name."""
        if args:
            FoldedLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def _select(self, rows: list[int]) -> None:
        super()._select(rows)
        select_states(self, torch.tensor(rows))

    def reset(self) -> None:
        FoldedLayer.reset(self)
        LinearAttentionLayer.__init__(self, self.number_of_states)

    def fork(self, guard: CallGuard, compact: bool = False) -> Self:
        other = super().fork(guard, compact)
        for name, x in vars(self).items():
            if isinstance(x, dict):
                setattr(other, name, copy.deepcopy(x))
        return other


class FoldedIndexedLayer(FoldedLayer):
    """A layer of sparse attention whose indexer has keys of its own for every token, which choose what queries read (DeepSeek
    V3.2): they stay exact, since an error in them would be another choice."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._forget_indexer()

    def _forget_indexer(self) -> None:
        self.indexer_keys: Tensor | None = None
        self.indexer_position_ids: Tensor | None = None  # [axes, batch, tokens], which models set themselves

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Append the indexer's keys [B, Q, D] of a call; returns those of all tokens."""
        before = [] if self.indexer_keys is None else [self.indexer_keys]
        self.indexer_keys = torch.cat([*before, indexer_key_states], dim=1)
        return self.indexer_keys

    @property
    def nbytes(self) -> int:
        beside = (self.indexer_keys, self.indexer_position_ids)
        return super().nbytes + sum(x.nbytes for x in beside if x is not None)

    @property
    def reference_bytes(self) -> int:
        return super().reference_bytes + (
            0 if self.indexer_keys is None else REFERENCE_BYTES * self.indexer_keys.numel()
        )

    def _select(self, rows: list[int]) -> None:
        super()._select(rows)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[rows]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[:, rows]

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, : self.columns].clone()
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., : self.columns].clone()

    def reset(self) -> None:
        super().reset()
        self._forget_indexer()


def own_windows(layer: Any) -> None:
    """Let a window that is a view of all tokens of a long call have memory of its own, so that the rest is given back."""
    for name in ("keys", "values"):
        x = getattr(layer, name, None)
        if isinstance(x, Tensor) and x.untyped_storage().nbytes() > 2 * x.nbytes:
            setattr(layer, name, x.clone())


# What takes the place of which of transformers' layers.
FOLDED = {
    IndexedLayer: FoldedIndexedLayer,
    DynamicLayer: FoldedLayer,
    LinearAttentionAndFullAttentionLayer: FoldedHybridLayer,
}
# Layers of other kinds stay as transformers has them: their memory is bounded.
STOCK_LAYERS = (
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    HybridWindowLayer,
    EmptyLayer,
    CodedStateLayer,
)


def last_readers(text: Any) -> dict[int, tuple[int, int]]:
    """Layers whose keys later layers read instead of having their own (Gemma 3n, Gemma 4): to each, the last that reads them
    and how many attend to them, itself included."""
    out: dict[int, tuple[int, int]] = {}
    if not (shared := getattr(text, "num_kv_shared_layers", None)):
        return out
    types = text.layer_types
    first = len(types) - shared
    for i in range(first, len(types)):
        own = max(j for j in range(first) if types[j] == types[i])
        out[own] = (i, out.get(own, (own, 1))[1] + 1)
    return out


def windows_of(text: Any, layers: list[Any]) -> dict[int, Reach]:
    """What queries of each sliding or chunked layer read. Empty where some of them have a running state beside them: all share a
    mask, and those stay as they are."""
    if any(type(x) is HybridWindowLayer is not LinearAttentionLayer for x in layers):
        return {}
    types = getattr(text, "layer_types", None)
    chunks = getattr(text, "sliding_window", None) is None and getattr(text, "attention_chunk_size", None) is not None
    return {
        i: Reach(x.sliding_window, types[i] == "chunked_attention" if types else chunks)
        for i, x in enumerate(layers)
        if type(x) is DynamicSlidingWindowLayer
    }
