"""transformers: decode steps with a FoldedCache as CUDA graphs.

Launched one by one, the kernels of a step of one token cost the host more than they cost the GPU. A graph launches them
all at once, but holds the addresses it was captured with. So what changes from step to step lies where addresses stay:
token ids and positions in tensors of the step, lengths and page tables in one table that attention reads and `append`
counts up. The host counts along, and folds between two steps what has left the window. A step knows nothing of the
sequences it serves, so caches of one kind share it, one after another.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import ModelOutput

from kvfold.adapters.hf_attention import Handle, LazyMask, is_attached, read_pads
from kvfold.adapters.hf_state import tensors_of
from kvfold.adapters.hf_transformers import FoldedCache, FoldedLayer
from kvfold.cache.guard import CallGuard
from kvfold.cache.sequence import LayerSequence
from kvfold.engine.cuda.arguments import SEQUENCE_WORDS, sequence_words
from kvfold.engine.cuda.engine import MAX_BATCH, CudaEngine
from kvfold.engine.request import AttendRequest
from kvfold.engine.variant import PLAIN
from kvfold.errors import InvalidConfig, NonFiniteInput

# Each holds its activations of one token; more kinds of calls than this are not in turn with each other.
MOST_STEPS = 8

Key = tuple[Any, ...]


@contextlib.contextmanager
def cuda_graphs(model: Any) -> Iterator[Graphs]:
    """Inside `with`, calls of one token per row with a FoldedCache on a GPU run as CUDA graphs; all others as before.

    model: an attached transformers model; `generate` and plain calls both gain. The first call of a kind runs as usual,
    the second is captured, and the rest replay it. Equal to calls without: the same kernels on the same numbers.
    Yields what counts the replays and says why a call was not one.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "config"):
        raise InvalidConfig(f"{type(model).__name__} is not a transformers model", "Pass the model that generates")
    graphs, own = Graphs(model), vars(model).get("forward")

    @functools.wraps(graphs.plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return graphs.forward(*args, **kwargs)

    model.forward = forward
    try:
        yield graphs
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


class Graphs:
    """The captured steps of one model. replays: calls that were one launch; reasons: why the last call was not."""

    def __init__(self, model: Any) -> None:
        self.model, self.plain = model, model.forward
        self.replays = 0
        self.reasons: list[str] = []
        self._names = list(inspect.signature(model.forward).parameters)
        self._seen: OrderedDict[Key, Step | str | None] = OrderedDict()  # a step, why there is none, None: called once
        self._lock = threading.Lock()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = given.get("past_key_values")
        self.reasons = why_not(self.model, self._names, given)
        if self.reasons or not isinstance(cache, FoldedCache):
            return self.plain(*args, **kwargs)
        with self._lock:
            step = self._step(cache, given)
            if step is not None:
                self.replays += 1
                return step.run(cache, given)
        return self.plain(*args, **kwargs)

    def _step(self, cache: FoldedCache, given: dict[str, Any]) -> Step | None:
        """The step for a call; None for the first of its kind, which loads kernels, and for kinds that have none."""
        key = _key(cache, given)
        known = self._seen.get(key)
        if key in self._seen and known is None:
            try:
                known = Step(self.plain, cache, given)
            except (RuntimeError, TypeError) as error:
                # A model that waits for the GPU, or whose control flow depends on it. Nothing was run or stored.
                torch.cuda.synchronize()
                # torch leaves its random numbers in the state of a capture; a copy of that state is not in it.
                generator = torch.cuda.default_generators[given["input_ids"].device.index]
                generator.graphsafe_set_state(generator.clone_state())
                known = f"capture failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        self._seen[key] = known
        self._seen.move_to_end(key)
        while len(self._seen) > MOST_STEPS:
            self._seen.popitem(last=False)
        if isinstance(known, Step):
            return known
        self.reasons = [known or "the first call of its kind"]
        return None


def why_not(model: Any, names: list[str], given: dict[str, Any]) -> list[str]:
    """Every reason against a graph for a call; empty if there is none. names: the arguments of the model's forward."""
    cache, ids = given.get("past_key_values"), given.get("input_ids")
    if not isinstance(cache, FoldedCache):
        return ["the cache is not a FoldedCache"]
    if not is_attached(model):
        return ["the model is not attached"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return ["the call does not bring one token per row"]
    reasons = []
    if torch.is_grad_enabled():
        reasons.append("gradients are on")
    if cache.guard.busy or cache.guard.unfinished:
        reasons.append("an earlier call did not finish")
    for name, x in given.items():
        if isinstance(x, Tensor):
            if name not in ("input_ids", "attention_mask", "position_ids", "cache_position"):
                reasons.append(f"{name} is a tensor")
        elif name != "past_key_values" and not isinstance(x, bool | int | str | None):
            reasons.append(f"{name} is a {type(x).__name__}")
    if "position_ids" not in names:
        reasons.append("the model takes no position_ids")
    elif given.get("position_ids") is None and model.config.get_text_config() is not model.config:
        reasons.append("a composite model was given no position_ids")
    reasons += [f"layer {i}: {why}" for i, x in enumerate(cache.layers) if (why := _against(x, len(ids), ids.device))]
    return reasons or _padding(cache, given)


def _against(layer: Any, batch: int, device: torch.device) -> str:
    """Why a layer cannot take part in a graph; empty if it can."""
    if type(layer) is LinearAttentionLayer:
        fits = all(layer.has_previous_state.values()) and not layer.record_past
        return "" if fits and layer.device == device else "its states are not there yet, or are recorded"
    if type(layer) is not FoldedLayer:
        return f"{type(layer).__name__} moves in memory"
    if layer.readers > 1:
        return "other layers attend to its keys"
    folded = layer.folded
    if type(folded.engine) is not CudaEngine or folded.engine.device != device:
        return "its engine is not the cuda engine of that device"
    if folded.variant != PLAIN or folded.fidelity is not None:
        return "it has a softmax of its own, or is watched"
    if len(folded.sequences) != batch or batch > MAX_BATCH:
        return f"it does not hold {batch} rows, or they are more than {MAX_BATCH}"
    if any(s.length < s.engine.spec.sinks for s in folded.sequences):
        return "its sinks are not there yet"
    return ""


def _padding(cache: FoldedCache, given: dict[str, Any]) -> list[str]:
    """Raises what the call itself would raise for its mask."""
    read: set[tuple[Any, ...]] = set()
    for x in cache.folded_layers:
        past = (x.columns, *(tuple(runs) for runs in x.holes))
        # Layers of one call share the past: the mask, which lies on the GPU, is read once.
        if past not in read and any(read_pads(given.get("attention_mask"), 1, x.columns, x.holes)):
            return ["a row's token is padding"]
        read.add(past)
    return []


def _key(cache: FoldedCache, given: dict[str, Any]) -> Key:
    """What a captured step depends on: kinds and shapes, and the states that layers without pages keep in place."""
    layers = tuple(
        x.folded.shape if isinstance(x, FoldedLayer) else tuple((t.data_ptr(), t.shape) for t in tensors_of(x).values())
        for x in cache.layers
    )
    inputs = tuple(
        (name, tuple(x.shape) if isinstance(x, Tensor) else x)
        for name, x in sorted(given.items())
        if name not in ("past_key_values", "attention_mask")
    )
    return cache.spec, layers, inputs, torch.is_inference_mode_enabled()


class Step:
    """One captured call."""

    def __init__(self, forward: Callable[..., Any], cache: FoldedCache, given: dict[str, Any]) -> None:
        """Captures a call; runs nothing of it. Raises RuntimeError if the model cannot be captured."""
        ids = given["input_ids"]
        layers = cache.folded_layers
        self.inputs = {name: x.clone() for name, x in _inputs(cache, given).items()}
        self.table = torch.zeros(len(layers), len(ids), SEQUENCE_WORDS, dtype=torch.int64, device=ids.device)
        self.nonfinite = torch.zeros(1, dtype=torch.int32, device=ids.device)
        self._told: list[tuple[weakref.ref[LayerSequence], int]] = []  # what `table` tells of, at which change
        self._addresses: list[Tensor] = []  # the page tables it points to
        stand_in = self._stand_in(cache)
        # Engines hold constants, and workspaces are replaced when they grow: the graph has pointers to both.
        self._engines = [x.folded.engine for x in layers]
        self._kept = [engine.ready() for engine in self._engines if isinstance(engine, CudaEngine)]
        self._graph = torch.cuda.CUDAGraph()
        fixed = {n: x for n, x in given.items() if n not in (*self.inputs, "attention_mask", "past_key_values")}
        with torch.cuda.graph(self._graph):
            out = forward(**self.inputs, **fixed, past_key_values=stand_in)
        if not isinstance(out, ModelOutput) or any(
            not isinstance(x, Tensor) and x is not stand_in for x in out.values()
        ):
            raise TypeError("the model returns more than tensors")
        self._kind = type(out)
        self._out = {name: x for name, x in out.items() if isinstance(x, Tensor)}
        self._cached = [name for name, x in out.items() if x is stand_in]

    def _stand_in(self, cache: FoldedCache) -> FoldedCache:
        """The cache as the graph sees it: attention through the table."""
        other = copy.copy(cache)
        other.guard = CallGuard(cache.guard.last)
        at = iter(self.table)
        other.layers = [
            _StepLayer(x, next(at), self.nonfinite) if isinstance(x, FoldedLayer) else x for x in cache.layers
        ]
        return other

    def run(self, cache: FoldedCache, given: dict[str, Any]) -> ModelOutput:
        """The call, for a cache of the kind it was captured with. On error the cache is as it was before, or refuses
        further calls if it has running states, which cannot go back."""
        cache.guard.hold()
        before = cache.get_seq_length()
        try:
            for x in cache.folded_layers:
                x.folded.fold_due()  # what failed to fold in an earlier call
            for name, new in _inputs(cache, given).items():
                self.inputs[name].copy_(new)
            self._tell(cache)
            self._graph.replay()
            try:
                for x in cache.folded_layers:
                    x.columns += 1
                    x.folded.advance()
                self._check_finite()
                for x in cache.folded_layers:
                    x.folded.fold_due()
            except BaseException:
                for x in cache.folded_layers:
                    x.folded.trim([1] * len(x.folded.sequences))
                    x.columns -= 1
                raise
        except BaseException:
            states = {i for i, x in enumerate(cache.layers) if isinstance(x, LinearAttentionLayer)}
            cache.guard.fail(states, (before, {}))
            raise
        cache.guard.free()
        out = {name: x.clone() for name, x in self._out.items()}
        return self._kind(**out, **dict.fromkeys(self._cached, cache))

    def _check_finite(self) -> None:
        if int(self.nonfinite):
            self.nonfinite.zero_()
            raise NonFiniteInput(
                "a key or value of the call holds NaN or infinity",
                "Check the model's activations, or use profile 'lossless'",
            )

    def _tell(self, cache: FoldedCache) -> None:
        """Bring the table up to date, if anything but the step itself changed the sequences."""
        sequences = [s for x in cache.folded_layers for s in x.folded.sequences]
        told = self._told
        if len(told) == len(sequences) and all(
            known() is s and changes == s.changes for s, (known, changes) in zip(sequences, told, strict=True)
        ):
            return
        engine = self._engines[0]
        self._addresses = [engine.addresses(s.runs) for s in sequences]  # type: ignore[union-attr]
        words = [_words(s, pages) for s, pages in zip(sequences, self._addresses, strict=True)]
        self.table.copy_(torch.from_numpy(np.stack(words)).view_as(self.table))
        self._told = [(weakref.ref(s), s.changes) for s in sequences]


def _words(s: LayerSequence, pages: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    at = s.folded % s.ring
    return sequence_words(s.ring_k, s.ring_v, s.sinks_k, s.sinks_v, pages, s.length, s.folded, 0, at, s.ring)


def _inputs(cache: FoldedCache, given: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a call. Padding has been read, and is in no sequence; positions may not come from the cache."""
    out = {name: x for name, x in given.items() if isinstance(x, Tensor) and name != "attention_mask"}
    if "position_ids" not in out:
        out["position_ids"] = torch.full((1, 1), cache.get_seq_length(), device=out["input_ids"].device)
    return out


class _StepLayer(FoldedLayer):
    """A folded layer inside a graph: reads and appends through a table, counts nothing."""

    def __init__(self, layer: FoldedLayer, table: Tensor, nonfinite: Tensor) -> None:
        self.__dict__.update(layer.__dict__)
        self._table, self._nonfinite = table, nonfinite

    def attend(self, handle: Handle, call: AttendRequest, mask: LazyMask | None) -> Tensor:
        engine: CudaEngine = self.folded.engine  # type: ignore[assignment]
        self.folded.check_variant(call)
        out = torch.empty_like(call.q, memory_format=torch.contiguous_format)
        engine.attend_rows(call.q, call.k, call.v, call.scale, self._table, out)
        engine.append(call.k, call.v, self._table, self._nonfinite)
        return out
