"""Caches that are measured against a model's own: the folded one, and those of others by name (`--baseline`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, HQQQuantizedLayer, QuantizedLayer, QuantoQuantizedLayer

from kvfold import profiles
from kvfold.adapters.hf_state import tensors_of
from kvfold.adapters.hf_transformers import FoldedCache
from kvfold.codec.peers import Kivi, Peer, RotatedQ4
from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.errors import InvalidConfig, MissingExtra, UnsupportedModel
from kvfold.evaluation.simulated import SimulatedLayer

WINDOW, SINKS = 64, 4  # of every baseline whose method knows them, and of our profiles
# transformers' quantized caches hold up to so many exact tokens and then fold all of them: as many as a folded cache
# with WINDOW holds at most. They know no sinks.
RESIDUAL = WINDOW + PAGE_TOKENS


class Contender(Protocol):
    """A kind of cache under measurement."""

    @property
    def name(self) -> str:
        """As --baseline has it."""

    def start(self) -> Any:
        """An empty cache for one sequence."""

    def exact_tokens(self, cache: Any) -> int:
        """Past tokens that the coming call will read exactly."""

    def sizes(self, cache: Any) -> dict[str, float | int]:
        """bits_per_value, cache_bytes, reference_bytes, page_tokens."""


@dataclass(frozen=True)
class Folded:
    """Our own cache."""

    name: str
    config: Any
    spec: CacheSpec

    def start(self) -> FoldedCache:
        return FoldedCache(self.config, spec=self.spec)

    def exact_tokens(self, cache: FoldedCache) -> int:
        """Of the first layer that folds; windows fold from their first call on, or not at all."""
        layers = [*cache.folded_layers, *cache.paged_layers]
        sequences = layers[0].folded.sequences if layers else []
        return sequences[0].exact_tokens if sequences else 0

    def sizes(self, cache: FoldedCache) -> dict[str, float | int]:
        layers = [x["bits_per_value"] for x in cache.report()["layers"] if "bits_per_value" in x]
        return {
            "bits_per_value": sum(layers) / len(layers) if layers else 16.0,
            "cache_bytes": cache.nbytes,
            "reference_bytes": cache.reference_bytes,
            "page_tokens": PAGE_TOKENS,
        }


def _with_layers(config: Any, make: Any) -> DynamicCache:
    """The model's own cache with `make(index)` in place of each full-attention layer. Raises UnsupportedModel if none."""
    cache = DynamicCache(config=config)
    full = [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicLayer]
    if not full:
        raise UnsupportedModel("this model has no full-attention layer", "There is nothing to compare")
    for i in full:
        cache.layers[i] = make(i)
    return cache


def _other_bytes(cache: DynamicCache, kind: type) -> int:
    """Of layers that a baseline leaves alone."""
    return sum(t.nbytes for x in cache.layers if not isinstance(x, kind) for t in tensors_of(x).values())


@dataclass(frozen=True)
class Simulated:
    """A peer's codec in SimulatedLayers: `kivi-2` or `rotated-q4`."""

    name: str
    config: Any
    seed: int = 1

    def _peer(self, layer: int, heads: int, dim: int, device: torch.device) -> Peer:
        return Kivi(2, dim) if self.name == "kivi-2" else RotatedQ4(dim, heads, layer, self.seed, device)

    def start(self) -> DynamicCache:
        return _with_layers(self.config, lambda i: SimulatedLayer(functools.partial(self._peer, i), WINDOW, SINKS))

    def exact_tokens(self, cache: DynamicCache) -> int:
        return _first(cache, SimulatedLayer).exact_tokens

    def sizes(self, cache: DynamicCache) -> dict[str, float | int]:
        own = [x for x in cache.layers if isinstance(x, SimulatedLayer)]
        values = sum(x.folded_values for x in own)
        return {
            "bits_per_value": sum(x.folded_bits for x in own) / values if values else 16.0,
            "cache_bytes": sum(x.stored_bytes for x in own) + _other_bytes(cache, SimulatedLayer),
            "reference_bytes": sum(x.reference_bytes for x in own),
            "page_tokens": PAGE_TOKENS,
        }


@dataclass(frozen=True)
class Quantized:
    """transformers' own QuantizedCache layers, also in hybrid models, where QuantizedCache itself refuses."""

    name: str
    config: Any
    layer: type[QuantizedLayer]
    bits: int
    axis: int

    def start(self) -> DynamicCache:
        options = {"nbits": self.bits, "axis_key": self.axis, "axis_value": self.axis, "residual_length": RESIDUAL}
        return _with_layers(self.config, lambda _: self.layer(**options))

    def exact_tokens(self, cache: DynamicCache) -> int:
        return _residual(_first(cache, QuantizedLayer))

    def sizes(self, cache: DynamicCache) -> dict[str, float | int]:
        """bits_per_value counts numbers beside the codes at 16 bits, though a float32 model keeps them as float32."""
        bits = values = taken = reference = 0
        for x in cache.layers:
            if not isinstance(x, QuantizedLayer):
                continue
            residual, length = _residual(x), x.get_seq_length()
            row = x.values.element_size()
            for stored in (x._quantized_keys, x._quantized_values):
                codes, meta = _stored(stored)
                bits += 8 * codes.nbytes + 16 * sum(m.numel() for m in meta)
                taken += codes.nbytes + sum(m.nbytes for m in meta)
                width = stored_values(stored) // (length - residual)
                values += (length - residual) * width
                taken += residual * width * row
                reference += 2 * length * width
        return {
            "bits_per_value": bits / values if values else 16.0,
            "cache_bytes": taken + _other_bytes(cache, QuantizedLayer),
            "reference_bytes": reference,
            "page_tokens": RESIDUAL,
        }


def _first(cache: DynamicCache, kind: type) -> Any:
    return next(x for x in cache.layers if isinstance(x, kind))


def _residual(layer: QuantizedLayer) -> int:
    """Tokens a QuantizedLayer holds exactly; its tensors are without dims when there are none."""
    return layer.keys.shape[-2] if layer.is_initialized and layer.keys.dim() == 4 else 0


def _stored(quantized: Any) -> tuple[Tensor, list[Tensor]]:
    """(packed codes, scales and zeros) of optimum-quanto's tensor, or of hqq's pair."""
    if isinstance(quantized, tuple):
        codes, meta = quantized
        return codes, [meta["scale"], meta["zero"]]
    return quantized._data._data, [quantized._scale, quantized._shift]


def stored_values(quantized: Any) -> int:
    """How many numbers a quantized tensor stands for."""
    shape = quantized[1]["shape"] if isinstance(quantized, tuple) else quantized.shape
    return int(torch.Size(shape).numel())


def _quanto(name: str, config: Any, bits: int) -> Quantized:
    if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
        raise MissingExtra.of(f"--baseline {name}", "optimum-quanto", "peers")
    return Quantized(name, config, QuantoQuantizedLayer, bits, 0)


def _hqq(name: str, config: Any) -> Quantized:
    if find_spec("hqq") is None:
        raise MissingExtra.of(f"--baseline {name}", "hqq", "peers")
    return Quantized(name, config, HQQQuantizedLayer, 4, 1)


def _turboquant(name: str, config: Any, seed: int) -> Folded:
    """Algorithm 1 of arXiv 2504.19874 at 3 bits, with the window and sinks that everyone here has."""
    side = SideSpec("mse", 3, "norm")
    return Folded(name, config, CacheSpec(side, side, WINDOW, SINKS, centre=False, seed=seed))


BASELINES = ("hf-quanto-4", "hf-quanto-2", "hf-hqq-4", "kivi-2", "rotated-q4", "turboquant-3")


def baseline(name: str, config: Any, seed: int = 1) -> Contender:
    """The contender of that name, or the profile of that name, for a model's config. Raises InvalidConfig for other names,
    MissingExtra if its package is not installed."""
    if name in ("hf-quanto-4", "hf-quanto-2"):
        return _quanto(name, config, int(name[-1]))
    if name == "hf-hqq-4":
        return _hqq(name, config)
    if name in ("kivi-2", "rotated-q4"):
        return Simulated(name, config, seed)
    if name == "turboquant-3":
        return _turboquant(name, config, seed)
    if name in profiles.names():
        return Folded(name, config, replace(profiles.load(name).spec, seed=seed))
    raise InvalidConfig(f"there is no baseline {name!r}", f"Use some of: {', '.join(BASELINES)}, or profiles")
