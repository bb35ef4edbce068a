"""transformers: a FoldedCache for `past_key_values`. Its layers are in hf_layers, the attention that reads them in hf_attention.

The oldest and the newest transformers that the tests ran with are 5.17 and 5.23.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from kvfold.adapters.hf_attention import attach, detach, no_gradients, register
from kvfold.adapters.hf_coded import CodedStateLayer
from kvfold.adapters.hf_families import CODED_STATES, LATENT, NOT_FOLDED
from kvfold.adapters.hf_layers import (
    FOLDED,
    STOCK_LAYERS,
    FoldedHybridLayer,
    FoldedIndexedLayer,
    FoldedLayer,
    FoldedWindowLayer,
    HybridWindowLayer,
    PagedLayer,
    eager,
    last_readers,
    own_windows,
    windows_of,
)
from kvfold.adapters.hf_state import tensor_bytes
from kvfold.adapters.hf_weights import weights_bytes
from kvfold.cache.fidelity import Fidelity
from kvfold.cache.guard import CallGuard
from kvfold.cache.sizes import folds_smaller
from kvfold.config import TUNED, CacheSpec
from kvfold.dispatch import ENGINES
from kvfold.engine.request import LayerShape
from kvfold.engine.select import make_engine
from kvfold.errors import CannotTrim, InvalidConfig, Unsupported
from kvfold.planner.architecture import variant_of
from kvfold.profiles import load

__all__ = ["FoldedCache", "FoldedLayer", "attach", "detach", "register"]


class FoldedCache(Cache):
    """A transformers cache whose full-attention layers are folded.

    config: the model's config. profile: a profile's name, or spec: a CacheSpec. backend: `auto` or the name of an engine.
    Raises UnknownProfile, and Unsupported for layer kinds it does not know.
    """

    def __init__(
        self, config: Any, profile: str = "balanced", *, spec: CacheSpec | None = None, backend: str = "auto"
    ) -> None:
        self.spec = spec if spec is not None else load(profile).spec
        self.profile = profile if spec is None else "custom"
        if backend not in (names := ["auto", *(i.name for i in ENGINES)]):
            raise InvalidConfig(f"unknown engine {backend!r}", f"Use one of: {', '.join(names)}")
        if not hasattr(config, "get_text_config"):
            raise InvalidConfig(f"{type(config).__name__} is not a transformers config", "Pass model.config")
        text = config.get_text_config(decoder=True)
        if text.model_type in NOT_FOLDED:
            raise Unsupported(f"{text.model_type} {NOT_FOLDED[text.model_type]}", "Use the stock cache for it")
        variant = variant_of(text.to_dict(), slides=False)
        if variant.latent and not variant.expanded and text.model_type not in LATENT:
            raise Unsupported(
                f"{text.model_type} caches a latent (MLA) in a way that was not tested", "Use the stock cache"
            )
        try:
            layers: list[Any] = DynamicCache(config=config).layers
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise Unsupported(
                f"transformers makes no cache of its own for a {config.model_type} ({type(error).__name__}: {error})",
                "Pass the config of the part that decodes text, or use the model without a folded cache",
            ) from error
        if not layers:
            raise InvalidConfig("this config describes no cache layers", "Pass the config of a decoder model")
        if all(type(x) is LinearAttentionLayer for x in layers):
            raise Unsupported(
                f"no layer of this {text.model_type} keeps keys and values",
                "There is nothing to fold: use its own cache",
            )
        if self.spec.states == "int8" and any(isinstance(x, LinearAttentionLayer) for x in layers):
            if text.model_type not in CODED_STATES:
                raise Unsupported(
                    f"{text.model_type} changes its states where they lie, so they cannot be codes",
                    "Use states 'exact'",
                )
            layers = [CodedStateLayer(x.number_of_states) if type(x) is LinearAttentionLayer else x for x in layers]
        self.guard = CallGuard(-1)
        own = self.spec.for_latents() if variant.latent else self.spec
        folding = [i for i, layer in enumerate(layers) if type(layer) in FOLDED]
        for i, layer in enumerate(layers):
            if (kind := FOLDED.get(type(layer))) is not None:
                states = getattr(layer, "number_of_states", 0)
                layers[i] = kind(own.for_layer(folding.index(i), len(folding)), i, backend, self.guard, variant, states)
            elif type(layer) not in STOCK_LAYERS:
                raise Unsupported(f"layer {i} has the unknown cache kind {type(layer).__name__}", "Use the stock cache")
        self.backend, self._softmax = backend, variant_of(text.to_dict(), slides=True)
        # Until the first call decides whether they fold. Models that attend by themselves make masks of their own, too.
        self._windows = {} if variant.expanded else windows_of(text, layers)
        self._last_readers = last_readers(text)
        super().__init__(layers=layers)
        self._share()

    def _share(self) -> None:
        """Tell folded layers how many layers read them, and the guard which layer's storing ends a call."""
        for i, (_, readers) in self._last_readers.items():
            if isinstance(x := self.layers[i], PagedLayer):
                x.readers = readers
        # Linear layers store in ways the host does not report one by one, so a call ends with the last other layer.
        ends = {i: i for i, x in enumerate(self.layers) if isinstance(x, CacheLayerMixin)}
        ends |= {i: last for i, (last, _) in self._last_readers.items() if isinstance(self.layers[i], PagedLayer)}
        self.guard.last = max(ends, key=ends.__getitem__, default=-1)

    def _settle_windows(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Fold sliding and chunked layers if they take less folded: all of them or none, since they share a mask.

        A GPU has no kernels for them, and tuned profiles no bases: there they stay exact.
        """
        windows, self._windows = self._windows, {}
        spec, heads, dims = self.spec.for_windows(), keys.shape[1], (keys.shape[-1], values.shape[-1])
        first = replace(self._softmax, reach=windows[layer])
        shape = LayerShape(layer, heads, dims[0], keys.dtype.itemsize, variant=first, value_dim=dims[1])
        if keys.device.type != "cpu" or TUNED in (spec.key.codec, spec.value.codec):
            return
        page_bytes = make_engine(self.backend, spec, shape, keys.dtype, keys.device).page_bytes
        if folds_smaller(spec, windows[layer], page_bytes, heads, dims, keys.dtype.itemsize):
            for i, reach in windows.items():
                variant = replace(self._softmax, reach=reach)
                self.layers[i] = FoldedWindowLayer(spec, i, self.backend, self.guard, variant)
            self._share()

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """Folded layers, those with windows included."""
        return [x for x in self.layers if isinstance(x, PagedLayer)]

    @property
    def folded_layers(self) -> list[FoldedLayer]:
        return [x for x in self.layers if isinstance(x, FoldedLayer)]

    def _enter(self, layer: int, states: Tensor, part: str = "") -> int:
        """A layer begins a part of its work; returns the number of the call."""
        if torch.is_grad_enabled() and states.requires_grad:
            raise no_gradients()
        call, new = self.guard.enter(layer, part)
        if new:
            # What `rollback` needs. Sliding layers replace their tensors at every call, so references are enough.
            sliding = {i: dict(vars(x)) for i, x in enumerate(self.layers) if isinstance(x, DynamicSlidingWindowLayer)}
            self.guard.before = (self.get_seq_length(), sliding)
        return call

    @eager
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        call = self._enter(layer_idx, key_states)
        if layer_idx in self._windows:
            self._settle_windows(layer_idx, key_states, value_states)
        if isinstance(self.layers[layer_idx], PagedLayer):
            return super().update(key_states, value_states, layer_idx, call=call)
        self.guard.stored.add(layer_idx)
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        own_windows(self.layers[layer_idx])
        self.guard.store(layer_idx)
        return out

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *args: Any, **kwargs: Any
    ) -> Tensor:
        self._enter_linear(layer_idx, conv_states, f"conv {state_idx}")
        return super().update_conv_state(conv_states, layer_idx, state_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, *args: Any, **kwargs: Any
    ) -> Tensor:
        self._enter_linear(layer_idx, recurrent_states, f"recurrent {state_idx}")
        return super().update_recurrent_state(recurrent_states, layer_idx, state_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        layer = self.layers[layer_idx]
        if isinstance(layer, CodedStateLayer) and layer.has_previous_state[state_idx]:
            return layer.recurrent_state(state_idx)
        return super().get_recurrent_state(layer_idx, state_idx)

    def _enter_linear(self, layer: int, states: Tensor, part: str) -> None:
        # In a last layer that has both, the state may come before attention, which ends the call, or after it.
        if layer < self.guard.last or (layer == self.guard.last and self.guard.at >= 0):
            self._enter(layer, states, part)
            self.guard.moved.add(layer)

    def rollback(self) -> None:
        """Drop the tokens of a call that failed half-way, where only some layers hold them.

        Raises CannotTrim if a layer with a running state (linear attention) has already taken the call into it.
        """
        if self.guard.unfinished:
            columns, sliding = self.guard.before
            if columns == 0:
                self.reset()
                return
            if self.guard.moved:
                raise CannotTrim(
                    "a linear-attention layer has taken the unfinished call into its state",
                    "Continue from a fork made before the call, or reset() the cache and prefill again",
                )
            # What chooses among tokens may have taken the call before its layer has.
            for i in {*self.guard.stored, *(i for i, x in enumerate(self.layers) if isinstance(x, FoldedIndexedLayer))}:
                if isinstance(x := self.layers[i], PagedLayer):
                    x.crop(columns - x.columns)
                else:
                    vars(x).update(sliding[i])
        self.guard.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -n columns of every layer, or of none: CannotTrim if one cannot."""
        self.guard.check()
        for i, x in enumerate(self.layers):
            full = isinstance(x, DynamicSlidingWindowLayer) and x.get_seq_length() >= x.sliding_window
            passed = isinstance(x, PagedLayer) and not x.can_crop(int(tokens_to_remove))
            linear = isinstance(x, LinearAttentionLayer) and any(x.has_previous_state.values())
            if passed or (full and not x.record_past) or (linear and not (x.record_past and x.is_croppable)):
                raise CannotTrim(
                    f"layer {i} ({type(x).__name__}) does not keep what it would need to go back",
                    "Continue from a fork made before those tokens",
                )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget everything; the next call may bring another batch."""
        self.guard.clear()
        for x in self.layers:
            # Stock layers would keep zeroed tensors of the old batch.
            if type(x) is DynamicSlidingWindowLayer:
                x.__init__(x.sliding_window)
            elif type(x) in (LinearAttentionLayer, CodedStateLayer):
                x.__init__(x.number_of_states)
            elif type(x) is HybridWindowLayer:
                x.__init__(x.sliding_window, x.number_of_states)
            else:
                x.reset()

    def watch(self, every: int = 16) -> None:
        """Compare folded with exact attention on one folded page in `every`; `report` has the figures by layer, of this
        cache and its forks together. Layers of latent attention, and of models that attend by themselves, are left out."""
        for x in self.folded_layers:
            x.folded.fidelity = None if x.latent or x.expanded else Fidelity(every)

    def fork(self, compact: bool = False) -> FoldedCache:
        """An independent continuation: folded pages are shared, everything else copied.

        compact: a copy to go back to, with the least exact tokens; fork it to continue.
        """
        self.guard.check()
        other = copy.copy(self)
        other.guard = CallGuard(self.guard.last)
        other.layers = [
            x.fork(other.guard, compact) if isinstance(x, PagedLayer) else copy.deepcopy(x) for x in self.layers
        ]
        return other

    @property
    def nbytes(self) -> int:
        """Every byte allocated for the context, of folded and of stock layers."""
        return sum(x.folded.nbytes for x in self.paged_layers) + self._stock_bytes

    @property
    def _stock_bytes(self) -> int:
        """Of everything that is held as transformers holds it."""
        return sum(tensor_bytes(x) for x in self.layers)

    @property
    def used_bytes(self) -> int:
        """What this cache's own tokens need, where `nbytes` counts all of the pools that it shares with others."""
        return sum(x.folded.used_bytes for x in self.paged_layers) + self._stock_bytes

    @property
    def unshared_bytes(self) -> int:
        """`used_bytes` without pages, which forks share; pages of windows, which change hands all the time, are counted."""
        windows = sum(x.folded.used_bytes for x in self.paged_layers if not isinstance(x, FoldedLayer))
        return sum(x.folded.exact_bytes for x in self.folded_layers) + windows + self._stock_bytes

    @property
    def reference_bytes(self) -> int:
        """16 bits per key and value of the folded layers' tokens, in windows of those read: what the ratio is against."""
        return sum(x.reference_bytes for x in self.paged_layers)

    def report(self, model: Any = None) -> dict[str, Any]:
        """Bytes by layer and kind, tokens, bits per value, ratio to 16 bits; with a model, those of its weights, too."""
        layers = []
        for i, x in enumerate(self.layers):
            if isinstance(x, PagedLayer):
                layers.append({**x.folded.report(), **_with_states(x)})
            else:
                layers.append({"layer": i, "kind": type(x).__name__, "bytes": tensor_bytes(x)})
        folded_bytes = sum(x.nbytes for x in self.paged_layers)
        return {
            "profile": self.profile,
            "cache_bytes": self.nbytes,
            "folded_layer_bytes": folded_bytes,
            "state_bytes": self.nbytes - folded_bytes,
            "reference_bytes": self.reference_bytes,
            "ratio": self.reference_bytes / folded_bytes if folded_bytes else 1.0,
            "tokens": self.get_seq_length(),
            **({} if model is None else {"weights_bytes": weights_bytes(model)}),
            "layers": layers,
        }


def _with_states(layer: PagedLayer) -> dict[str, int]:
    """What a folded layer's row in a report says of all it holds, and of the state beside it."""
    states = tensor_bytes(layer) if isinstance(layer, FoldedHybridLayer) else 0
    return {"bytes": layer.nbytes + states, **({"state_bytes": states} if states else {})}
