"""The plan: bytes of every layer at a context, what fits into a memory, and which term binds."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from kvfold.cache import sizes
from kvfold.codec.fields import state_bytes
from kvfold.config import PAGE_TOKENS, TUNED, CacheSpec
from kvfold.planner.model import Attention, Layer, Model
from kvfold.planner.pages import page_of, spec_of
from kvfold.planner.workspace import workspace_bytes

REFERENCE_BYTES = 2  # per value: what ratios are against
WINDOW_TENSOR_BYTES = 8  # transformers keeps the length of a sliding window as a tensor, too
FOLDING = ("full", "latent", "indexed", "hybrid")
SLIDING = ("sliding", "chunked")


@dataclass(frozen=True)
class Setting:
    """What is planned for. sessions: caches. rows: of each cache, a batch. dtype_bytes: of the model's keys; None: as its config
    says. prefill_tokens: of each row in one call."""

    spec: CacheSpec
    context: int
    sessions: int = 1
    weights_bytes: int = 0
    dtype_bytes: int | None = None
    backend: str = "auto"
    device: str = "cpu"
    prefill_tokens: int = 2048
    rows: int = 1


@functools.cache
def attention_bytes(s: Setting, a: Attention, folds: bool, dtype_bytes: int, layer: int = 0) -> int:
    """What one layer of one cache allocates for keys and values, after steps of one token."""
    spec, tokens, rows = s.spec, s.context, s.rows
    if not folds:
        beside = 0 if a.window is None else WINDOW_TENSOR_BYTES
        return rows * min(tokens, a.window or tokens) * a.values * dtype_bytes + beside
    spec, reach = spec_of(spec, a), a.variant.reach
    page_bytes, _ = page_of(spec, a, dtype_bytes, s.backend, s.device, layer)
    pages = spec.folded_tokens(tokens) // PAGE_TOKENS
    if reach is not None:
        paged = rows * sizes.window_bytes(spec, reach, tokens, page_bytes, s.device == "cpu")
    else:
        paged = sizes.pool_bytes(rows * pages, page_bytes, s.device == "cpu") + sizes.TABLE_ENTRY_BYTES * rows * pages
    exact = sizes.exact_bytes(spec, a.kv_heads, a.key_dim + a.value_dim, dtype_bytes)
    frozen = state_bytes(spec.key, a.kv_heads, a.key_dim) + state_bytes(spec.value, a.kv_heads, a.value_dim)
    return paged + rows * (exact + (frozen if pages else 0) + tokens * (a.indexer * dtype_bytes + a.position_bytes))


@functools.cache
def windows_fold(model: Model, spec: CacheSpec, dtype_bytes: int, backend: str, device: str) -> bool:
    """Whether sliding and chunked layers fold: as a cache decides it, by the first of them, for all."""
    a = next((x.attention for x in model.layers if x.kind in SLIDING), None)
    if a is None or a.variant.reach is None or device != "cpu" or TUNED in (spec.key.codec, spec.value.codec):
        return False
    if any(x.kind == "hybrid_sliding" for x in model.layers):
        return False
    page_bytes, _ = page_of(spec, a, dtype_bytes, backend, device)
    dims = a.key_dim, a.value_dim
    return sizes.folds_smaller(spec_of(spec, a), a.variant.reach, page_bytes, a.kv_heads, dims, dtype_bytes)


def _row(model: Model, s: Setting, i: int, layer: Layer) -> dict[str, Any]:
    dtype_bytes = s.dtype_bytes or model.dtype_bytes
    row: dict[str, Any] = {
        "layer": i,
        "kind": layer.kind,
        "folds": False,
        "backend": "",
        "bytes": 0,
        "reference_bytes": 0,
    }
    if (a := layer.attention) is not None:
        windows = layer.kind in SLIDING and windows_fold(model, s.spec, dtype_bytes, s.backend, s.device)
        row["folds"] = layer.kind in FOLDING or windows
        tuned = i if TUNED in (s.spec.key.codec, s.spec.value.codec) else 0  # other layers of a shape are alike
        row["bytes"] = s.sessions * attention_bytes(s, a, row["folds"], dtype_bytes, tuned)
        if row["folds"]:
            _, row["backend"] = page_of(s.spec, a, dtype_bytes, s.backend, s.device, tuned)
        kept = s.sessions * s.rows * min(s.context, a.window or s.context)
        row["reference_bytes"] = kept * (a.values + a.indexer) * REFERENCE_BYTES
    row["state_bytes"] = s.sessions * s.rows * sum(x.bytes_as(s.spec.states, dtype_bytes) for x in layer.states)
    return row


def _by_layer(model: Model, setting: Setting) -> Iterator[tuple[Setting, Layer]]:
    """Layers, each with the bits of its own that a graded cache gives it."""
    folding = [(i, x) for i, x in enumerate(model.layers) if x.kind in FOLDING and x.attention is not None]
    places = [i for i, x in folding if x.attention is not None and not x.attention.latent]
    for i, layer in enumerate(model.layers):
        spec = setting.spec.for_layer(places.index(i), len(places)) if i in places else setting.spec
        yield replace(setting, spec=spec), layer


def plan(model: Model, setting: Setting) -> dict[str, Any]:
    """Bytes by term, all sessions together; `layers` has a row per layer. Weights and workspace count once."""
    rows = [_row(model, own, i, layer) for i, (own, layer) in enumerate(_by_layer(model, setting))]
    total = {k: sum(r[k] for r in rows) for k in ("bytes", "reference_bytes", "state_bytes")}
    # Prefill reads windows by way of torch.
    runs = {r["layer"]: "torch" if r["kind"] in SLIDING else r["backend"] for r in rows if r["folds"]}
    dtype_bytes = setting.dtype_bytes or model.dtype_bytes
    workspace = workspace_bytes(model, setting.prefill_tokens, setting.rows, dtype_bytes, runs, setting.context)
    common = total["state_bytes"] + setting.weights_bytes + workspace
    return {
        "context": setting.context,
        "sessions": setting.sessions,
        "batch": setting.rows,
        "reference_bytes": total["reference_bytes"],
        "folded_bytes": total["bytes"],
        "ratio": total["reference_bytes"] / total["bytes"],
        "state_bytes": total["state_bytes"],
        "state_dtype": _state_dtype(model, setting.spec.states),
        "weights_bytes": setting.weights_bytes,
        "workspace_bytes": workspace,
        "total_bytes": total["bytes"] + common,
        "total_reference_bytes": total["reference_bytes"] + common,
        "layers": rows,
    }


def _state_dtype(model: Model, states: str) -> str | None:
    """What recurrent states are held in: transformers keeps them in float32 whatever the model's dtype."""
    recurrent = [x for layer in model.layers for x in layer.states if x.name == "recurrent"]
    if not recurrent:
        return None
    return "int8" if states == "int8" and all(x.vector for x in recurrent) else "float32"
