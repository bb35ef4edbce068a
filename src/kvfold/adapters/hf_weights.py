"""transformers: what a model's weights take in memory, quantized ones with everything that their codes need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers as they lie in memory; storage that several of them share counts once.

    Quantized weights are tensors made of tensors (torchao: codes, scales, zero points), or bring further tensors in an
    attribute (bitsandbytes: scales of blocks, their own scales, code books). Both are counted in full.
    """
    storages: dict[tuple[str, int], int] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), getattr(module, "state", None))
        for plain in (t for x in held for t in _plain(x)):
            storage = plain.untyped_storage()
            storages[str(plain.device), storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# Attributes of bitsandbytes' weights, of the state of its 8-bit layers, and of its quantization states.
_PARTS = ("quant_state", "CB", "SCB", "absmax", "code", "offset", "state2")


def _plain(x: Any) -> Iterator[Tensor]:
    """The ordinary tensors that a weight, or what belongs to one, is made of."""
    if isinstance(x, Tensor):
        if (flatten := getattr(x, "__tensor_flatten__", None)) is not None:
            for name in flatten()[0]:
                yield from _plain(getattr(x, name))
            return
        yield x
    elif not type(x).__module__.startswith("bitsandbytes."):
        return
    for name in _PARTS:
        if (part := getattr(x, name, None)) is not None:
            yield from _plain(part)
