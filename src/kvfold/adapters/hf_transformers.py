"""transformers: a FoldedCache for `past_key_values`. The attention that reads it is in hf_attention.

The oldest and the newest transformers that the tests ran with are 5.17 and 5.23.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from kvfold.adapters.hf_attention import Handle, LazyMask, Runs, attach, detach, no_gradients, no_pads, register
from kvfold.adapters.hf_weights import weights_bytes
from kvfold.cache.fidelity import Fidelity
from kvfold.cache.guard import CallGuard
from kvfold.cache.layer import FoldedAttention
from kvfold.config import CacheSpec
from kvfold.dispatch import ENGINES
from kvfold.engine.request import AttendRequest
from kvfold.engine.select import make_engine
from kvfold.engine.variant import PLAIN, Variant
from kvfold.errors import CannotTrim, InvalidConfig, Unsupported
from kvfold.planner.architecture import variant_of
from kvfold.profiles import load

__all__ = ["FoldedCache", "FoldedLayer", "attach", "detach", "register"]

F = TypeVar("F", bound=Callable[..., Any])

# Nothing between `update` and the end of attention can be traced: pages are bytes behind handles.
_eager: Callable[[F], F] = torch.compiler.disable(
    reason="kvfold: a folded cache cannot be compiled into a full graph; leave fullgraph off, or use a stock cache"
)


class FoldedLayer(CacheLayerMixin):
    """A full-attention layer of a FoldedCache."""

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
        self.columns = 0  # tokens of the batch as the host counts them: padding included
        self.holes: list[Runs] = []  # which columns of each row are padding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.folded.prepare(key_states, value_states)
        if len(self.holes) != len(key_states):
            self.holes = [[] for _ in range(len(key_states))]
        self.is_initialized = True

    @property
    def latent(self) -> bool:
        """Whether keys are latents and values their rotary parts: see engine.variant."""
        return self.folded.variant.latent

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, call: int = 0, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Two handles for the attention function. Nothing is stored before its attention was computed."""
        if self.latent and key_states.shape[1] != 1:
            raise Unsupported("this transformers expands latents (MLA) before caching them", "Upgrade transformers")
        self.lazy_initialization(key_states, value_states)
        handle = Handle(self, call, key_states, value_states)
        return handle, handle

    @_eager
    def attend(self, handle: Handle, call: AttendRequest, mask: LazyMask | None) -> Tensor:
        """Attention [B, H * G, Q, D] of the call behind a handle, which then belongs to the past."""
        self.guard.begin(self.folded.layer, handle.call)
        stored = False
        try:
            new = call.q.shape[2]
            pads = mask.pads(new, self.columns, self.holes) if mask is not None else no_pads(self.holes)
            out = self.folded.attend(call.q, call.k, call.v, pads, call.scale, call.softcap, call.sink_logits)
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

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -n columns; a positive n is the length to keep, as transformers once had it."""
        n = int(-tokens_to_remove if tokens_to_remove <= 0 else max(0, self.columns - tokens_to_remove))
        if n > self.columns:
            raise CannotTrim(f"cannot remove {n} of {self.columns} tokens", "Crop at most what the cache holds")
        keep = self.columns - n
        padding = [sum(stop - max(start, keep) for start, stop in runs if stop > keep) for runs in self.holes]
        self.folded.trim([n - p for p in padding])
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

    def fork(self, guard: CallGuard, compact: bool = False) -> FoldedLayer:
        """An independent continuation that shares folded pages."""
        other = copy.copy(self)
        other.folded, other.guard = self.folded.compact() if compact else self.folded.fork(), guard
        other.holes = [list(runs) for runs in self.holes]
        return other


# Newer kinds of layers, which older versions have no name for.
HybridWindowLayer = getattr(cache_utils, "LinearAttentionAndSlidingWindowAttentionLayer", LinearAttentionLayer)
EmptyLayer = getattr(cache_utils, "DummyLayer", LinearAttentionLayer)


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
        for states in (self.conv_states, self.recurrent_states):
            for i, x in states.items():
                if x is not None:
                    states[i] = x[torch.tensor(rows, device=x.device)]

    def reset(self) -> None:
        FoldedLayer.reset(self)
        LinearAttentionLayer.__init__(self, self.number_of_states)

    def fork(self, guard: CallGuard, compact: bool = False) -> FoldedHybridLayer:
        other = super().fork(guard, compact)
        for name, x in vars(self).items():
            if isinstance(x, dict):
                setattr(other, name, copy.deepcopy(x))
        return other


# Families of multi-head latent attention that the tests hold to the stock cache.
LATENT = (
    *("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash"),
    *("minicpm3", "mistral4", "youtu"),
)
# Families that a folded cache cannot serve, and why: each would be silently wrong, or fail half-way through a call.
NOT_FOLDED = {
    **dict.fromkeys(("diffllama", "doge", "jetmoe"), "changes keys after caching them"),
    **dict.fromkeys(("inkling_text", "inkling2_text"), "adds a bias by position to its scores (position_bias)"),
    "minimax": "makes a cache of its own kind",
    "recurrent_gemma": "keeps running states in its modules, outside of caches",
    **dict.fromkeys(("rwkv", "xlstm"), "keeps running states outside of caches of this kind"),
}
# What takes the place of which of transformers' layers.
FOLDED = {DynamicLayer: FoldedLayer, LinearAttentionAndFullAttentionLayer: FoldedHybridLayer}
# Layers of other kinds stay as transformers has them: their memory is bounded.
STOCK_LAYERS = (
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    HybridWindowLayer,
    EmptyLayer,
)


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
        if getattr(text, "kv_lora_rank", None) and text.model_type not in LATENT:
            raise Unsupported(
                f"{text.model_type} caches a latent (MLA) in a way that was not tested", "Use the stock cache"
            )
        if text.model_type in NOT_FOLDED:
            raise Unsupported(f"{text.model_type} {NOT_FOLDED[text.model_type]}", "Use the stock cache for it")
        layers: list[Any] = DynamicCache(config=config).layers
        if not layers:
            raise InvalidConfig("this config describes no cache layers", "Pass the config of a decoder model")
        if all(type(x) is LinearAttentionLayer for x in layers):
            raise Unsupported(
                f"no layer of this {text.model_type} keeps keys and values",
                "There is nothing to fold: use its own cache",
            )
        # Linear layers store in ways the host does not report one by one, so a call ends with the last other layer.
        counted = [i for i, x in enumerate(layers) if isinstance(x, CacheLayerMixin)]
        self.guard = CallGuard(counted[-1] if counted else -1)
        variant = variant_of(text.to_dict(), slides=False)
        own = self.spec.for_latents() if variant.latent else self.spec
        for i, layer in enumerate(layers):
            if (kind := FOLDED.get(type(layer))) is not None:
                states = getattr(layer, "number_of_states", 0)
                layers[i] = kind(own, i, backend, self.guard, variant, states)
            elif type(layer) not in STOCK_LAYERS:
                raise Unsupported(f"layer {i} has the unknown cache kind {type(layer).__name__}", "Use the stock cache")
        super().__init__(layers=layers)

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

    @_eager
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        call = self._enter(layer_idx, key_states)
        if isinstance(self.layers[layer_idx], FoldedLayer):
            return super().update(key_states, value_states, layer_idx, call=call)
        self.guard.stored.add(layer_idx)
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
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
            for i in self.guard.stored:
                if isinstance(x := self.layers[i], FoldedLayer):
                    x.crop(columns - x.columns)
                else:
                    vars(x).update(sliding[i])
        self.guard.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest -n columns of every layer, or of none: CannotTrim if one cannot."""
        self.guard.check()
        for i, x in enumerate(self.layers):
            full = isinstance(x, DynamicSlidingWindowLayer) and x.get_seq_length() >= x.sliding_window
            linear = isinstance(x, LinearAttentionLayer) and any(x.has_previous_state.values())
            if (full and not x.record_past) or (linear and not (x.record_past and x.is_croppable)):
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
            elif type(x) is LinearAttentionLayer:
                x.__init__(x.number_of_states)
            elif type(x) is HybridWindowLayer:
                x.__init__(x.sliding_window, x.number_of_states)
            else:
                x.reset()

    def watch(self, every: int = 16) -> None:
        """Compare folded with exact attention on one folded page in `every`; `report` has the figures by layer, of this
        cache and its forks together. Layers of latent attention are left out."""
        for x in self.folded_layers:
            x.folded.fidelity = None if x.latent else Fidelity(every)

    def fork(self, compact: bool = False) -> FoldedCache:
        """An independent continuation: folded pages are shared, everything else copied.

        compact: a copy to go back to, with the least exact tokens; fork it to continue.
        """
        self.guard.check()
        other = copy.copy(self)
        other.guard = CallGuard(self.guard.last)
        other.layers = [
            x.fork(other.guard, compact) if isinstance(x, FoldedLayer) else copy.deepcopy(x) for x in self.layers
        ]
        return other

    @property
    def nbytes(self) -> int:
        """Every byte allocated for the context, of folded and of stock layers."""
        return sum(x.folded.nbytes for x in self.folded_layers) + self._stock_bytes

    @property
    def _stock_bytes(self) -> int:
        """Of everything that is held as transformers holds it."""
        return sum(_tensor_bytes(x) for x in self.layers)

    @property
    def used_bytes(self) -> int:
        """What this cache's own tokens need, where `nbytes` counts all of the pools that it shares with others."""
        return sum(x.folded.used_bytes for x in self.folded_layers) + self._stock_bytes

    @property
    def unshared_bytes(self) -> int:
        """`used_bytes` without pages, which forks share."""
        return sum(x.folded.exact_bytes for x in self.folded_layers) + self._stock_bytes

    @property
    def reference_bytes(self) -> int:
        """16 bits per key and value of the folded layers' tokens: what the ratio is against."""
        return sum(
            2 * s.length * s.ring_k.shape[0] * (s.ring_k.shape[2] + s.ring_v.shape[2])
            for x in self.folded_layers
            for s in x.folded.sequences
        )

    def report(self, model: Any = None) -> dict[str, Any]:
        """Bytes by layer and kind, tokens, bits per value, ratio to 16 bits; with a model, those of its weights, too."""
        layers = []
        for i, x in enumerate(self.layers):
            if isinstance(x, FoldedLayer):
                layers.append({**(row := x.folded.report()), **_with_states(x, row["bytes"])})
            else:
                layers.append({"layer": i, "kind": type(x).__name__, "bytes": _tensor_bytes(x)})
        folded_bytes = sum(x.folded.nbytes for x in self.folded_layers)
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


def _with_states(layer: FoldedLayer, folded: int) -> dict[str, int]:
    """What a folded layer's row in a report says of the state beside it."""
    states = _tensor_bytes(layer)
    return {"bytes": folded + states, "state_bytes": states} if isinstance(layer, FoldedHybridLayer) else {}


def _tensor_bytes(layer: Any) -> int:
    """Bytes of the tensors a stock cache layer holds, in attributes or in dicts of states."""
    seen: dict[int, int] = {}
    for x in vars(layer).values():
        for t in x.values() if isinstance(x, dict) else (x,):
            if isinstance(t, Tensor):
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(seen.values())
