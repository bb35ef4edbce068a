"""transformers: what a layer that is not kept page by page holds of a context, as named tensors and plain numbers, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvfold.adapters.hf_layers import FoldedWindowLayer
from kvfold.errors import InvalidInput

Plain = dict[str, Any]


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """Tensors by the name of their attribute, or `name.key` in a dict of states. Constants of a layer have no dims."""
    if isinstance(layer, FoldedWindowLayer):
        return {n: x.contiguous() for n, x in layer.tensors().items()}
    named = {n: x for n, x in _flat(layer).items() if isinstance(x, Tensor) and x.dim()}
    return {n: x.contiguous() for n, x in named.items()}


def numbers_of(layer: Any) -> Plain:
    """Counters, flags and sizes by the same names: what JSON can hold."""
    if isinstance(layer, FoldedWindowLayer):
        return layer.numbers()
    return {n: x for n, x in _flat(layer).items() if x is None or isinstance(x, bool | int | float | str)}


def fill(layer: Any, tensors: dict[str, Tensor], numbers: Plain) -> None:
    """Give an empty layer of the same model what another held. Raises InvalidInput for names it does not have."""
    if isinstance(layer, FoldedWindowLayer):
        layer.fill(tensors, numbers)
        return
    there = _flat(layer)
    for name, x in {**numbers, **tensors}.items():
        owner, _, key = name.partition(".")
        if name not in there:
            raise InvalidInput(f"{type(layer).__name__} has no {name!r}", "Use the model this state was made with")
        if key:
            vars(layer)[owner][int(key)] = x
        else:
            setattr(layer, owner, x)
    mine = tensors_of(layer)
    for x in mine.values():
        layer.dtype, layer.device = x.dtype, x.device
        break
    for name, x in vars(layer).items():
        if isinstance(x, Tensor) and not x.dim() and mine:
            setattr(layer, name, x.to(layer.device))


def _flat(layer: Any) -> Plain:
    """Attributes of a layer, those of dicts one by one."""
    out: Plain = {}
    for name, x in vars(layer).items():
        out |= {f"{name}.{key}": y for key, y in x.items()} if isinstance(x, dict) else {name: x}
    return out


def tensor_bytes(layer: Any) -> int:
    """Bytes of the tensors a stock cache layer holds, in attributes or in dicts of states."""
    seen: dict[int, int] = {}
    for x in vars(layer).values():
        for t in x.values() if isinstance(x, dict) else (x,):
            if isinstance(t, Tensor):
                seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(seen.values())
