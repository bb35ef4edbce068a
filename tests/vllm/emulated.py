"""vLLM on a CPU with the decode steps that layers on a GPU take, their kernels emulated (tests/kernels/on_host.py)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from on_host import HostEngine, Kernels

from kvfold.adapters.vllm import attention, backend, layer
from kvfold.engine.cuda import driver
from kvfold.engine.cuda.steps import Steps, Workspace


def install(steps: bool) -> Kernels:
    """Layers run on the emulated engine; with `steps`, decode steps need nothing of the host. Returns what was launched."""
    kernels, shared = Kernels(), {}

    def make_engine(name: str, spec: Any, shape: Any, dtype: torch.dtype, device: torch.device) -> HostEngine:
        return HostEngine(spec, shape, dtype)

    class Layer(layer.PooledLayer):
        def __init__(self, engine: HostEngine, memory: Any, requests: int) -> None:
            super().__init__(engine, memory, requests)
            type(torch.cuda.current_stream()).cuda_stream = 0  # of what vLLM has in its place on CPUs
            if steps:
                if "workspace" not in shared:
                    shared["workspace"] = Workspace(engine, requests)  # type: ignore[arg-type]
                self.steps = Steps(engine, memory, shared["workspace"])  # type: ignore[arg-type]

    attention.make_engine = backend.make_engine = make_engine  # type: ignore[assignment]
    attention.PooledLayer = Layer  # type: ignore[misc]
    backend.steps_on_device = lambda _spec: steps
    driver.kernel = kernels.kernel  # type: ignore[assignment]
    return kernels
