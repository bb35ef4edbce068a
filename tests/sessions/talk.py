"""Sessions of tiny models, and what of two sessions must be equal."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.adapters.hf_state import numbers_of, tensors_of
from kvfold.adapters.hf_transformers import FoldedCache, FoldedLayer
from kvfold.sessions.runner import Runner
from kvfold.sessions.session import Session

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import tiny

OTHERS = ("llama", "llama64", "gemma3", "mistral")
FAMILIES = (*OTHERS, "qwen3_next", "hybrid")


@functools.cache
def model_of(family: str) -> Any:
    """A tiny model; `hybrid` has linear-attention layers like qwen3_next, and no experts."""
    if family != "hybrid":
        return tiny.make(family)
    tiny.CONFIGS["hybrid"] = lambda: _dense(tiny.CONFIGS["qwen3_next"]())
    return tiny.make("hybrid")


def _dense(config: Any) -> Any:
    config.num_experts = config.num_experts_per_tok = 0
    config.mlp_only_layers = list(range(config.num_hidden_layers))
    return config


def words(length: int, seed: int = 0) -> list[int]:
    return tiny.prompt(1, length, seed)[0].tolist()


def runner(family: str, **kwargs: Any) -> Runner:
    return Runner(model_of(family), **kwargs)


def filled(r: Runner, length: int, seed: int = 0) -> Session:
    s = Session(r)
    s.extend(words(length, seed))
    return s


def page_bytes(cache: FoldedCache) -> list[list[bytes]]:
    """Whole pages of each folded layer, in canonical bytes."""
    return [
        [x.folded.canonical(p).numpy().tobytes() for q in x.folded.sequences for p in q.pages[: q.folded // 128]]
        for x in cache.folded_layers
    ]


def pages(s: Session) -> list[list[bytes]]:
    return page_bytes(s.cache)


def contents(cache: FoldedCache) -> list[object]:
    """Everything of a cache that a later call can see: pages, exact tokens, sinks, states, windows, counters."""
    out: list[object] = [page_bytes(cache)]
    for x in cache.layers:
        if isinstance(x, FoldedLayer):
            (q,) = x.folded.sequences
            view = q.view(0)
            sinks = min(q.length, q.engine.spec.sinks)
            tensors = [view.recent_k, view.recent_v, q.sinks_k[:, :sinks], q.sinks_v[:, :sinks], *q.state]
            out.append((x.columns, q.length, q.folded, len(q.pages)))
        else:
            tensors, numbers = list(tensors_of(x).values()), numbers_of(x)
            out.append({k: v for k, v in numbers.items() if v is not None})
        out += [None if t is None else (str(t.dtype), t.float().tolist()) for t in tensors]
    return out


def same(a: Session, b: Session) -> bool:
    return a.tokens == b.tokens and a.sampler == b.sampler and contents(a.cache) == contents(b.cache)


def continuation(s: Session, steps: int = 5) -> Tensor:
    """Logits of greedy steps: the same for sessions in the same state."""
    out = []
    token = 7
    for _ in range(steps):
        out.append(s.extend([token]))
        token = int(out[-1].argmax())
    return torch.stack(out)
