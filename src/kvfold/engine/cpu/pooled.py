"""Attention of the native library over pools of blocks: no copy of pages or exact tokens, one call per run of sequences."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.engine.cpu import library
from kvfold.engine.cpu.engine import DTYPES, CpuEngine
from kvfold.engine.pools import PooledCall, Pools

SEQUENCE = np.dtype(library.Sequence)


def attend(
    engine: CpuEngine, pools: Pools, call: PooledCall, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor
) -> None:
    """As kvfold.engine.pools.attend. The last dimension of every tensor is contiguous, `out` altogether."""
    blocks, in_block = np.divmod(call.page_numbers, pools.pages.shape[1])
    addresses = (pools.pages.data_ptr() + blocks * pools.pages.stride(0) + in_block * pools.pages.stride(1)).astype(
        np.uint64
    )
    sequences = _sequences(pools, call, addresses)
    for first, count, new in call.runs:
        at = int(call.token_start[first])
        result = out[at : at + count] if new == 1 else torch.empty(count, q.shape[1], new, q.shape[2], dtype=q.dtype)
        request = library.AttendRequest(
            ctypes.pointer(engine.format),
            ctypes.cast(sequences.ctypes.data + first * SEQUENCE.itemsize, ctypes.POINTER(library.Sequence)),
            count,
            q.shape[1],
            new,
            DTYPES[q.dtype],
            DTYPES[k.dtype],
            engine.level.index,
            engine.thread_count(),
            scale,
            *(_vectors(x, at, new) for x in (q, k, v)),
            result.data_ptr(),
        )
        engine.check(library.call("kvf_attend")(request))
        if new > 1:
            out[at : at + count * new].unflatten(0, (count, new)).copy_(result.transpose(1, 2))


def _sequences(pools: Pools, call: PooledCall, addresses: NDArray[np.uint64]) -> NDArray[np.void]:
    """The library's records of the sequences, borrowing the arrays of `call` and `addresses`."""
    exact = pools.exact
    size, dim = exact.element_size(), exact.shape[-1] // 2
    s = np.zeros(len(call.folded), SEQUENCE)
    s["pages"] = addresses.ctypes.data + addresses.itemsize * call.page_start[:-1]
    s["folded"], s["recent"] = call.folded, call.recent
    s["recent_table"] = call.recent_table.ctypes.data + call.recent_table.itemsize * call.recent_start[:-1]
    s["recent_block"] = exact.shape[2]
    sinks = call.sink_block * (exact.stride(0) * size)
    for side, offset in (("key", 0), ("value", dim * size)):
        base = exact.data_ptr() + offset
        for name, data in ((f"recent_{side}", base), (f"sink_{side}", base + sinks)):
            s[name]["data"] = data
            s[name]["outer_stride"], s[name]["head_stride"], s[name]["inner_stride"] = exact.stride()[:3]
    return s


def _vectors(x: Tensor, token: int, new: int) -> library.Vectors:
    """Tokens from `token` on as [sequences, heads, new, D]."""
    return library.Vectors(
        x.data_ptr() + token * x.stride(0) * x.element_size(), new * x.stride(0), x.stride(1), x.stride(0)
    )
