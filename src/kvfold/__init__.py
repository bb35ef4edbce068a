"""Fold an LLM's KV cache to a fifth of its size and decode from the packed pages.

Stages, in the order a key vector meets them: rotation, codebook, codec, packing, engine, cache; above them profiles,
adapters, loading, evaluation, sessions, serving and the command line. Importing this package loads NumPy and the standard
library only; `load`, `FoldedCache`, `Session`, `attach`, `detach` and `cuda_graphs`
load torch and transformers when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvfold.config import CacheSpec, SideSpec
from kvfold.errors import KvfoldError, MissingExtra

if TYPE_CHECKING:
    from kvfold.adapters.hf_graph import cuda_graphs
    from kvfold.adapters.hf_transformers import FoldedCache, attach, detach, register
    from kvfold.serving.model import load
    from kvfold.sessions.session import Session
    from kvfold.sessions.store import SessionStore

__version__ = "0.1.0"
__all__ = [
    "CacheSpec",
    "FoldedCache",
    "KvfoldError",
    "Session",
    "SessionStore",
    "SideSpec",
    "__version__",
    "attach",
    "cuda_graphs",
    "detach",
    "load",
    "register",
]

_ADAPTER = "kvfold.adapters.hf_transformers"
_LAZY = dict.fromkeys(("FoldedCache", "attach", "detach", "register"), _ADAPTER)
_LAZY |= {"Session": "kvfold.sessions.session", "SessionStore": "kvfold.sessions.store"}
_LAZY |= {"cuda_graphs": "kvfold.adapters.hf_graph"}
_LAZY |= {"load": "kvfold.serving.model"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "safetensors", "xxhash"):
            raise
        raise MissingExtra.of(f"kvfold.{name}", str(error.name), "transformers") from error


def __dir__() -> list[str]:
    return sorted(__all__)
