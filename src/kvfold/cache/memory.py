"""Memory that lives long, and memory that is given back."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

from kvfold.cache.sizes import mapped

LARGE_BLOCK_BYTES = 1 << 18
M_MMAP_THRESHOLD = -3  # of <malloc.h>


def reserve(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised uint8 that lives long. On the CPU it is mapped, and takes memory as it is first written. Not taken from
    malloc: a slab at the top of the heap would keep every freed activation beneath it."""
    if device.type != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    # Private: a forked process must not write into its parent's pages.
    how = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, mapped(nbytes, on_cpu=True), **how)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        # Where the system hands out 2 MB at a first write, what is taken would not be what was written.
        with suppress(OSError):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def give_back(tail: Tensor) -> bool:
    """Let the system have what the end of a slab takes, from `tail` to the end of its storage, in whole pages of its own; it
    reads as zeros when it is taken again. False, and nothing done, where that cannot be relied on."""
    if sys.platform != "linux":
        return False
    storage = tail.untyped_storage()
    # Inwards at both ends: reserved memory ends where a page does, that of a copied or unpickled slab need not.
    start = mapped(tail.data_ptr(), on_cpu=True)
    size = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if size <= 0:
        return True
    return bool(_libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@functools.cache
def return_large_blocks() -> None:
    """Ask glibc, once per process, to take blocks of LARGE_BLOCK_BYTES and more from the system and give them back when freed.

    By default malloc keeps freed activations of up to 32 MB in its heap, and splits them around whatever younger lies
    above: a 32k prefill in calls of 2,048 then ends 200-400 MB above what it uses, several times the folded cache. The
    price is fresh pages for large activations: 7 % of a prefill of the 12 M model, less of larger ones, nothing of a
    decode step.
    """
    if (mallopt := getattr(_libc(), "mallopt", None)) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)
