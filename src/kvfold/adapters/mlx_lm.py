"""mlx-lm: a cache of folded layers for its models, and attention that reads their pages.

    with attach():
        generate(model, tokenizer, prompt, prompt_cache=make_cache(model, "balanced"))

A model calls `cache.update_and_fetch(keys, values)` and gives what it returns to `scaled_dot_product_attention`, which every
model module of mlx-lm imports by name. `attach` puts another function under that name, which attends to folded layers and leaves
the rest to mlx-lm. Arrays are handed to the engine by their memory; there is no kernel for Metal, the CPU engine computes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import mlx.core as mx
import torch
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, make_prompt_cache
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from kvfold import profiles
from kvfold.cache.layer import FoldedAttention
from kvfold.config import CacheSpec
from kvfold.engine.select import make_engine
from kvfold.errors import CacheMisuse, NotAttached, Unsupported

ATTENTION = "scaled_dot_product_attention"
BITS = {
    mx.bfloat16: (mx.uint16, torch.bfloat16),
    mx.float16: (mx.uint16, torch.float16),
    mx.float32: (mx.uint32, torch.float32),
}


class New:
    """What a folded layer returns in place of keys or values: those of the call, [B, H, tokens, D], not yet attended to."""

    def __init__(self, layer: FoldedLayer, x: mx.array) -> None:
        self.layer, self.x = layer, x

    def __getattr__(self, name: str) -> Any:
        raise NotAttached(
            "a folded cache was read by attention that does not know it", "Use `with attach():` around it"
        )


class FoldedLayer:
    """The cache object of one layer."""

    def __init__(self, spec: CacheSpec, layer: int) -> None:
        self.folded = FoldedAttention(spec, layer, lambda *what: make_engine("auto", *what))
        self.offset = 0  # tokens, those of a call under way included

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[New, New]:
        """keys, values [B, H, tokens, D]. They are stored by the attention that follows."""
        if self.offset != self._length:
            raise CacheMisuse(
                f"layer {self.folded.layer}: attention of the last call never ran", "Run it, or begin with a new cache"
            )
        self.offset += keys.shape[2]
        return New(self, keys), New(self, values)

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Attention of queries [B, H * G, tokens, D] over the past and the call itself; then the call is stored."""
        past = self._length
        try:
            out = self.folded.attend(to_torch(queries), to_torch(keys), to_torch(values), [0] * len(queries), scale)
        except BaseException:
            self.offset = past
            raise
        return to_mlx(out)

    @property
    def _length(self) -> int:
        return self.folded.sequences[0].length if self.folded.sequences else 0

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> str | None:
        """The causal mask by name."""
        if return_array or window_size is not None:
            raise Unsupported("folded layers in mlx-lm have no mask but the causal one", "Use mlx-lm's own cache")
        return None if n == 1 else "causal"

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.offset == 0

    def is_trimmable(self) -> bool:
        return True

    def trim(self, n: int) -> int:
        """Forget the newest tokens; returns how many."""
        n = min(self.offset, n)
        self.folded.trim([n] * len(self.folded.sequences))
        self.offset -= n
        return n

    @property
    def nbytes(self) -> int:
        return self.folded.nbytes

    @property
    def state(self) -> FoldedAttention:
        """Nothing that MLX still has to compute, and nothing that its save_prompt_cache, which then says so, can write."""
        return self.folded


def make_cache(model: Any, profile: str | CacheSpec = "balanced") -> list[Any]:
    """The `prompt_cache` of an mlx-lm model: layers that grow are folded, others (windows, states) are mlx-lm's own."""
    spec = profile if isinstance(profile, CacheSpec) else profiles.load(profile).spec
    layers = make_prompt_cache(model)
    if not any(type(layer) is KVCache for layer in layers):
        raise Unsupported("no layer of this model keeps all of its context", "Use mlx-lm's own cache")
    growing = [i for i, layer in enumerate(layers) if type(layer) is KVCache]
    for place, i in enumerate(growing):
        layers[i] = FoldedLayer(spec.for_layer(place, len(growing)), i)
    return layers


@contextmanager
def attach() -> Iterator[None]:
    """Let the attention of all mlx-lm models that are loaded read folded caches; afterwards everything is as it was."""
    stock = getattr(base, ATTENTION)

    @wraps(stock)
    def attention(
        queries: mx.array, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> mx.array:
        if not isinstance(keys, New):
            return stock(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        if sinks is not None or not (mask is None or isinstance(mask, str)):
            raise Unsupported(
                "folded layers in mlx-lm have no attention sinks and no mask but the causal one",
                "Use mlx-lm's own cache",
            )
        return keys.layer.attend(queries, keys.x, values.x, scale)

    modules = [m for name, m in list(sys.modules.items()) if name.startswith("mlx_lm.models.")]
    changed = [m for m in modules if getattr(m, ATTENTION, None) is stock]
    for module in changed:
        setattr(module, ATTENTION, attention)
    try:
        yield
    finally:
        for module in changed:
            setattr(module, ATTENTION, stock)


def to_torch(x: mx.array) -> Tensor:
    """The same numbers as a tensor on the CPU; evaluates x."""
    bits, dtype = BITS[x.dtype]
    return from_dlpack(mx.contiguous(x).view(bits)).view(dtype)


def to_mlx(x: Tensor) -> mx.array:
    """The inverse of to_torch."""
    dtype = next(own for own, (_, theirs) in BITS.items() if theirs == x.dtype)
    return mx.array(x.view(torch.uint16 if x.itemsize == 2 else torch.uint32).numpy()).view(dtype)
