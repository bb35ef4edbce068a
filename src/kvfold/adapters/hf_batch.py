"""transformers: several one-row caches as the rows of one, for a forward pass that serves them all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from kvfold.adapters.hf_layers import FoldedIndexedLayer, PagedLayer
from kvfold.adapters.hf_state import tensors_of
from kvfold.adapters.hf_transformers import FoldedCache
from kvfold.cache.guard import CallGuard
from kvfold.cache.layer import FoldedAttention
from kvfold.errors import CacheMisuse, Unsupported


class Batch:
    """Takes the rows of one-row caches for as long as they are decoded together; `scatter` hands them back.

    batch = Batch(caches)
    model(ids, past_key_values=batch.cache, **batch.inputs(ids.shape[1]))
    batch.scatter()

    Row b is caches[b]. Folded rows are lent, not copied: pages, rings and lengths stay where they are. Sliding windows and
    running states are copied into tensors of the batch, and back. Until `scatter`, the caches refuse every use.

    What is equal: a row's attention depends on its own tokens and, in the cpu engine, on the number of rows once it has
    more than 32 * (64 // rows) pages; on nothing of its neighbours. So in batches of one size, a row gets the same bits
    whatever the others hold (experts excepted: which rows share one depends on all). In a batch of another size, the
    model's own matrix products may round differently.

    Raises CacheMisuse for caches of different kinds, empty, in use, or of more than one row.
    """

    def __init__(self, caches: Sequence[FoldedCache]) -> None:
        self._caches = list(caches)
        if not self._caches or len({id(c) for c in self._caches}) < len(self._caches):
            raise CacheMisuse(
                "a batch needs at least one cache, and each only once", "Fork a cache to continue it twice"
            )
        for c in self._caches:
            c.guard.check()
            if not c.get_seq_length() or any(x.holes != [[]] for x in c.paged_layers):
                raise CacheMisuse(
                    "a cache of this batch is empty, padded, or has several rows",
                    "Prefill each cache alone, without padding",
                )
        self._lengths = [c.get_seq_length() for c in self._caches]
        rows = list(zip(*(c.layers for c in self._caches), strict=True))
        folded = {i: FoldedAttention.gather([x.folded for x in r]) for i, r in enumerate(rows) if _folds(r[0])}
        for layer, *_ in rows:
            if not (_folds(layer) or isinstance(layer, BATCHED) or not tensors_of(layer)):
                raise Unsupported(f"{type(layer).__name__} cannot be batched", "Decode these caches one by one")
        for c in self._caches:
            c.guard.hold()
        self.cache = self._gather(rows, folded)

    def _gather(self, rows: list[tuple[Any, ...]], folded: dict[int, FoldedAttention]) -> FoldedCache:
        columns = max(self._lengths)
        batch = copy.copy(self._caches[0])
        batch.guard = CallGuard(batch.guard.last)
        batch.layers = []
        for i, layers in enumerate(rows):
            layer = copy.copy(layers[0])
            if i in folded:
                layer.folded, layer.guard, layer.columns = folded[i], batch.guard, columns
                layer.holes = [[(0, columns - n)] if n < columns else [] for n in self._lengths]
            _gather_stock(layer, layers, columns)
            batch.layers.append(layer)
        return batch

    def inputs(self, new: int = 1) -> dict[str, Any]:
        """Arguments of a call with `new` tokens in every row: position_ids [B, new], and the mask of shorter rows."""
        lengths = torch.tensor(self.lengths)
        columns = int(lengths.max())
        out: dict[str, Any] = {"position_ids": lengths[:, None] + torch.arange(new)}
        if int(lengths.min()) < columns:
            out["attention_mask"] = (torch.arange(columns + new) >= (columns - lengths)[:, None]).long()
        return out

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        grown = self.cache.get_seq_length() - max(self._lengths)
        return [n + grown for n in self._lengths]

    def scatter(self) -> None:
        """Hand the rows back. Raises CacheMisuse if a call of the batch did not finish; `batch.cache.rollback()` may undo it."""
        self.cache.guard.check()
        lengths = self.lengths
        for b, (cache, length) in enumerate(zip(self._caches, lengths, strict=True)):
            for mine, layer in zip(self.cache.layers, cache.layers, strict=True):
                if isinstance(layer, PagedLayer):
                    layer.columns = length
                _scatter_stock(mine, layer, b, length)
            cache.guard.free()
        self._caches = []


BATCHED = (DynamicSlidingWindowLayer, LinearAttentionLayer)


def _folds(layer: Any) -> bool:
    return isinstance(layer, PagedLayer)


def _gather_stock(layer: Any, rows: Sequence[Any], columns: int) -> None:
    """Give a layer the rows' tensors of stock kind, one above the other; shorter sliding windows padded on the left.

    The rows' own layers hold none meanwhile: states of hybrids are large.
    """
    if isinstance(layer, DynamicSlidingWindowLayer):
        width = max(x.keys.shape[2] for x in rows)
        for name in ("keys", "values"):
            parts = [getattr(x, name) for x in rows]
            setattr(layer, name, torch.cat([torch.nn.functional.pad(t, (0, 0, width - t.shape[2], 0)) for t in parts]))
        layer.cumulative_length = columns
        for x in rows:
            x.keys = x.values = None
    if isinstance(layer, FoldedIndexedLayer) and layer.indexer_keys is not None:
        pads = [columns - x.columns for x in rows]
        pad = torch.nn.functional.pad
        layer.indexer_keys = torch.cat([pad(x.indexer_keys, (0, 0, n, 0)) for x, n in zip(rows, pads, strict=True)])
        if layer.indexer_position_ids is not None:
            positions = [pad(x.indexer_position_ids, (n, 0)) for x, n in zip(rows, pads, strict=True)]
            layer.indexer_position_ids = torch.cat(positions, dim=1)
    if isinstance(layer, LinearAttentionLayer):
        for name in _states(layer):
            setattr(layer, name, {i: _rows([getattr(x, name)[i] for x in rows]) for i in getattr(layer, name)})
            for x in rows:
                setattr(x, name, dict.fromkeys(getattr(x, name)))
        for name in _FLAGS:
            setattr(layer, name, dict(getattr(layer, name)))


_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized", "has_previous_state", "conv_kernel_size")


def _states(layer: Any) -> list[str]:
    """The attributes of a layer that have its states."""
    return [name for name in ("conv_states", "recurrent_states", "codes", "scales") if hasattr(layer, name)]


def _rows(states: Sequence[Tensor | None]) -> Tensor | None:
    return None if states[0] is None else torch.cat([s for s in states if s is not None])


def _scatter_stock(batch: Any, layer: Any, row: int, length: int) -> None:
    if isinstance(layer, DynamicSlidingWindowLayer):
        kept = min(length, batch.keys.shape[2])
        layer.keys, layer.values = (x[row : row + 1, :, -kept:].clone() for x in (batch.keys, batch.values))
        layer.cumulative_length = length
    if isinstance(layer, FoldedIndexedLayer) and batch.indexer_keys is not None:
        layer.indexer_keys = batch.indexer_keys[row : row + 1, -length:].clone()
        if batch.indexer_position_ids is not None:
            layer.indexer_position_ids = batch.indexer_position_ids[:, row : row + 1, -length:].clone()
    if not isinstance(layer, LinearAttentionLayer):
        return
    for name in _states(batch):
        for i, state in getattr(batch, name).items():
            getattr(layer, name)[i] = None if state is None else state[row : row + 1].clone()
