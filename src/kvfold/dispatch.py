"""Asks implementations why not; takes the first without reasons, obeys a name, and never falls back silently.

Implementations are named by dotted strings and imported on first use, so this module imports no stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from kvfold.errors import InvalidConfig, NoImplementation


@dataclass(frozen=True)
class Implementation:
    """`module` holds why_not(*request) -> list of reasons, and the class `factory` built from the same arguments.

    knows: which of the things that a layer's shape calls unusual it can run; None: all. It says so of the others.
    """

    name: str
    module: str
    factory: str
    knows: tuple[str, ...] | None = ()

    def why_not(self, *request: Any) -> list[str]:
        """Every reason against this request; empty if it can run. Errors inside are bugs and propagate."""
        reasons: list[str] = import_module(self.module).why_not(*request)
        unusual = [n for x in request for n in getattr(x, "unusual", ())]
        return [*reasons, *(f"no kernel for {n}" for n in unusual if self.knows is not None and n not in self.knows)]

    def build(self, *request: Any) -> Any:
        make: Callable[..., Any] = getattr(import_module(self.module), self.factory)
        return make(*request)


ENGINES = (
    Implementation("cuda", "kvfold.engine.cuda.engine", "CudaEngine"),
    Implementation("cpu", "kvfold.engine.cpu.engine", "CpuEngine", knows=("a sliding window",)),
    Implementation("triton", "kvfold.engine.triton.engine", "TritonEngine", knows=None),
    Implementation("torch", "kvfold.engine.on_torch", "make", knows=None),
)


def explain(order: tuple[Implementation, ...], *request: Any) -> list[tuple[str, list[str]]]:
    """(name, reasons against it) of every implementation for a request, best first."""
    return [(i.name, i.why_not(*request)) for i in order]


def choose(op: str, order: tuple[Implementation, ...], wanted: str, *request: Any) -> Implementation:
    """The first implementation without reasons, or the one named `wanted`.

    Raises InvalidConfig for an unknown name and NoImplementation, with all reasons, when none can run.
    """
    if wanted != "auto" and wanted not in [i.name for i in order]:
        names = ", ".join(i.name for i in order)
        raise InvalidConfig(f"unknown {op} {wanted!r}", f"Use one of: auto, {names}")
    tried = []
    for i in order:
        if wanted in ("auto", i.name):
            reasons = i.why_not(*request)
            if not reasons:
                return i
            tried.append((i.name, reasons))
    raise NoImplementation.of(op, tried)
