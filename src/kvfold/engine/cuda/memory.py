"""Memory that kernels are pointed to."""

from __future__ import annotations

import torch
from torch import Tensor


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, in rows of D contiguous numbers on 16-byte boundaries."""
    step = 16 // x.element_size()
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s % step == 0 for s in x.stride()[:-1])
    return x if fits else x.contiguous()


def dense(x: Tensor) -> Tensor:
    """x [..., n, D], or a copy of it, aligned and with its rows one after the other."""
    return aligned(x) if x.stride(-2) == x.shape[-1] else x.contiguous()


_WORK: dict[int, tuple[Tensor, Tensor]] = {}


def workspace(device: int, floats: int, counters: int) -> tuple[Tensor, Tensor]:
    """Partial results and counters of one device, grown on demand and shared by all layers (they run one after another)."""
    work, count = _WORK.get(device, (None, None))
    if work is None or len(work) < floats or len(count) < counters:  # type: ignore[arg-type]
        on = torch.device("cuda", device)
        work = torch.empty(max(floats, 0 if work is None else len(work)), dtype=torch.float32, device=on)
        count = torch.zeros(max(counters, 4096), dtype=torch.int32, device=on)
        _WORK[device] = (work, count)
    return work, count  # type: ignore[return-value]


def current(device: int) -> tuple[Tensor, Tensor]:
    """The workspace of the last call that asked for one."""
    return _WORK[device]
