"""Which engine runs a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kvfold.config import CacheSpec
from kvfold.dispatch import ENGINES, choose
from kvfold.engine.request import LayerShape

if TYPE_CHECKING:
    from kvfold.cache.layer import AttendingEngine


def make_engine(
    backend: str, spec: CacheSpec, shape: LayerShape, dtype: torch.dtype, device: torch.device
) -> AttendingEngine:
    """The engine named `backend`, or for `auto` the first that has no reason against the layer."""
    return choose("engine", ENGINES, backend, spec, shape, dtype, device).build(spec, shape, dtype, device)
