"""What a machine and an installation can run: what `kvfold doctor` prints."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import Any

from kvfold.config import CacheSpec
from kvfold.dispatch import ENGINES, explain
from kvfold.errors import KvfoldError, Unsupported, UnsupportedModel
from kvfold.planner.model import FLOAT32_BYTES, Attention, Layer
from kvfold.planner.pages import page_of, spec_of
from kvfold.planner.plan import SLIDING, windows_fold
from kvfold.profiles import load


def machine() -> dict[str, Any]:
    """Processor, cores, memory, system, Python."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": memory,
        "python": platform.python_version(),
    }


def engines() -> list[dict[str, Any]]:
    """Each engine and why it cannot run a layer of head_dim 128 with the default profile here (empty: it can)."""
    if not find_spec("torch"):
        why = "the package 'torch' is not installed (pip install 'kvfold[transformers]')"
        return [{"name": e.name, "ready": False, "why_not": why} for e in ENGINES]
    import torch

    from kvfold.engine.request import LayerShape

    rows = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = (load("balanced").spec, LayerShape(0, 8, 128, 2), torch.bfloat16, device)
    for name, reasons in explain(ENGINES, *request):
        rows.append({"name": name, "ready": not reasons, "why_not": "; ".join(reasons)})
    return rows


def model_layers(source: str, profile: str = "balanced") -> list[dict[str, Any]]:
    """`layers_of` a model's config; its weights are not read."""
    from kvfold.loading import check_decodes, load_config

    config = load_config(source)
    check_decodes(config, source)
    return layers_of(config, profile)


def layers_of(config: Any, profile: str = "balanced", device: str = "") -> list[dict[str, Any]]:
    """One row per layer of a transformers config, for the best device here or the one named.

    kind: the planner's. holds: the cache's. folds, and if not, why_not. engine: which one runs it; passed_over: what the
    faster ones lack. A config that is refused has no layer that folds, and the refusal as the reason.
    Raises ModelError for sizes that cannot be.
    """
    import torch

    from kvfold.adapters.hf_attention import check_family
    from kvfold.adapters.hf_layers import FoldedWindowLayer, PagedLayer
    from kvfold.adapters.hf_transformers import FoldedCache
    from kvfold.loading import complete
    from kvfold.planner.architecture import read

    spec, refusal, unknown, held = load(profile).spec, "", "", []
    try:
        model = read(complete(config))
    except UnsupportedModel as error:
        unknown = str(error)
    try:
        check_family(config)
        held = FoldedCache(config, profile).layers
    except Unsupported as error:
        refusal = str(error)
    if unknown:
        # The planner does not know these layers; a refusal, if there is one, says more.
        row = {"layer": 0, "kind": "unknown", "holds": "", "folds": False, "why_not": refusal or unknown}
        return [{**row, "engine": "", "passed_over": ""}]
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    windows = not refusal and windows_fold(model, spec, model.dtype_bytes, "auto", where)
    rows = []
    for i, layer in enumerate(model.layers):
        slides = windows and layer.kind in SLIDING  # decided with the first key, so not held yet
        holds = FoldedWindowLayer if slides else type(held[i]) if i < len(held) else None
        row = {"layer": i, "kind": layer.kind, "holds": holds.__name__ if holds is not None else ""}
        if refusal:
            row |= {"folds": False, "why_not": refusal}
        elif layer.attention is not None and holds is not None and issubclass(holds, PagedLayer):
            row |= _engine_of(spec, layer.attention, model.dtype_bytes, where)
        else:
            row |= {"folds": False, "why_not": _why_exact(layer, where)}
        rows.append({"engine": "", "passed_over": ""} | row)
    return [{k: r[k] for k in ("layer", "kind", "holds", "folds", "why_not", "engine", "passed_over")} for r in rows]


def _engine_of(spec: CacheSpec, attention: Attention, dtype_bytes: int, device: str) -> dict[str, Any]:
    """Which engine runs a folded layer, and what those before it lack."""
    import torch

    from kvfold.engine.request import LayerShape

    dtype = torch.float32 if dtype_bytes == FLOAT32_BYTES else torch.bfloat16
    shape = LayerShape(
        0, attention.kv_heads, attention.key_dim, dtype_bytes, variant=attention.variant, value_dim=attention.value_dim
    )
    try:
        _, name = page_of(spec, attention, dtype_bytes, "auto", device)
    except KvfoldError as error:
        return {"folds": False, "why_not": str(error)}
    passed = [(n, r) for n, r in explain(ENGINES, spec_of(spec, attention), shape, dtype, torch.device(device)) if r]
    before = passed[: [e.name for e in ENGINES].index(name)]
    if attention.variant.expanded:
        by_itself = "the model attends by itself, to keys and values that this engine decodes in every call"
        return {"folds": True, "why_not": "", "engine": name, "passed_over": by_itself}
    return {
        "folds": True,
        "why_not": "",
        "engine": name,
        "passed_over": "; ".join(f"{n}: {', '.join(r)}" for n, r in before),
    }


def _why_exact(layer: Layer, device: str) -> str:
    window = layer.attention.window if layer.attention is not None else None
    if window is not None:
        why = "no GPU kernel knows windows" if device == "cuda" else "those take less exact than folded"
        return f"it keeps the newest {window} tokens only, and {why}"
    if layer.states:
        return "a running state, whose memory does not grow with the context"
    return "it keeps no keys and values of its own"
