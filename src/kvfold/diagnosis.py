"""What a machine and an installation can run: what `kvfold doctor` prints."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from typing import Any

from kvfold.dispatch import ENGINES, explain
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


def model_layers(source: str) -> list[dict[str, Any]]:
    """One row per layer of a model: folds, or stays exact and why. Reads the config only."""
    from kvfold.adapters.hf_transformers import FoldedCache, FoldedLayer
    from kvfold.loading import load_config

    rows = []
    for i, layer in enumerate(FoldedCache(load_config(source)).layers):
        folds = isinstance(layer, FoldedLayer)
        why = "" if folds else "its memory does not grow with the context"
        rows.append({"layer": i, "kind": type(layer).__name__, "folds": folds, "why_not": why})
    return rows
