"""What fits into a memory: the longest context, the most sessions, and the term that binds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvfold.planner.model import Model
from kvfold.planner.plan import Setting, plan

UNBOUNDED = 1 << 32  # tokens, or sessions: beyond it, nothing grows
TERMS = ("weights_bytes", "folded_bytes", "state_bytes", "workspace_bytes")


def fitted(model: Model, setting: Setting, memory: int) -> dict[str, Any]:
    """The plan, whether it fits into `memory` bytes, and the largest context and number of sessions that do.

    binding: the largest of the terms, which is what to make smaller first. max_context is None where no layer grows.
    """
    result = plan(model, setting)
    binding = max(TERMS, key=lambda k: result[k]).removesuffix("_bytes")

    def fits(changed: Setting) -> bool:
        return bool(plan(model, changed)["total_bytes"] <= memory)

    return {
        **result,
        "memory_bytes": memory,
        "fits": result["total_bytes"] <= memory,
        "headroom_bytes": memory - result["total_bytes"],
        "binding": binding,
        "max_context": largest(lambda n: fits(replace(setting, context=n))),
        "max_sessions": largest(lambda n: fits(replace(setting, sessions=n))),
        "model_max_context": model.max_context,
    }


def largest(fits: Callable[[int], bool]) -> int | None:
    """The largest whole number that fits, 0 if 1 does not, None if all up to UNBOUNDED do.

    `fits` must hold for everything below what fits.
    """
    if fits(UNBOUNDED):
        return None
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
