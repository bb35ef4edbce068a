"""How many bytes a cache allocates, before it does: what pools and sequences are built by, and what the planner asks."""

from __future__ import annotations

import functools
import mmap

from kvfold.codec.fields import state_bytes
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.variant import Reach

# A slab holds 1/64 of the pages there are, so free space stays within about 2 % of the pages in use.
SLACK = 64
MIN_SLAB_PAGES = 4
MAX_SLAB_PAGES = 256
TABLE_ENTRY_BYTES = 8


def mapped(nbytes: int, on_cpu: bool) -> int:
    """What reserving `nbytes` takes: whole pages of the system's memory on the CPU, where slabs are mapped."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE if on_cpu else nbytes


def slab_pages(used: int) -> int:
    """Pages that the next slab of a pool asks for when `used` are in use and none is free."""
    return min(MAX_SLAB_PAGES, max(MIN_SLAB_PAGES, used // SLACK))


def pool_bytes(pages: int, page_bytes: int, on_cpu: bool) -> int:
    """Bytes of a pool that grew to `pages` pages in use without ever giving one back."""
    rows = total = 0
    while rows < pages:
        slab = mapped(slab_pages(rows) * page_bytes, on_cpu)
        # Once slabs have their full size, the rest are alike.
        n = -(-(pages - rows) // (slab // page_bytes)) if slab_pages(rows) == MAX_SLAB_PAGES else 1
        rows += n * (slab // page_bytes)
        total += n * slab
    return total


def pool_bytes_at_most(pages: int, page_bytes: int, on_cpu: bool) -> int:
    """Bytes that a pool grows to while at most `pages` pages are in use, whatever is given back in between: it grows only
    when no row is free."""
    if not pages:
        return 0
    rows = pages - 1 + mapped(slab_pages(pages - 1) * page_bytes, on_cpu) // page_bytes
    return rows * _row_bytes(page_bytes, on_cpu)


@functools.cache
def _row_bytes(page_bytes: int, on_cpu: bool) -> int:
    """The most that a row takes of a slab of any size, mapping included."""
    slabs = [mapped(n * page_bytes, on_cpu) for n in range(MIN_SLAB_PAGES, MAX_SLAB_PAGES + 1)]
    return max(-(-slab // (slab // page_bytes)) for slab in slabs)


def exact_bytes(spec: CacheSpec, kv_heads: int, values: int, dtype_bytes: int) -> int:
    """Ring and sinks of one sequence in one layer; values: numbers per token and KV head, keys and values together."""
    return (spec.ring_tokens() + spec.sinks) * kv_heads * values * dtype_bytes


def window_pages(spec: CacheSpec, reach: Reach, tokens: int) -> int:
    """Pages that a sequence of a layer with a reach holds at a length: what queries may read, or could after a trim inside the
    exact part."""
    pages = spec.folded_tokens(tokens) // PAGE_TOKENS
    return pages - min(reach.first(max(0, tokens - spec.ring_tokens())) // PAGE_TOKENS, pages)


def window_bytes(spec: CacheSpec, reach: Reach, tokens: int, page_bytes: int, on_cpu: bool) -> int:
    """Pages and their table of a folded layer with a reach; spec: the layer's own. Every page is a slab of its own."""
    return window_pages(spec, reach, tokens) * (mapped(page_bytes, on_cpu) + TABLE_ENTRY_BYTES)


@functools.cache
def folds_smaller(
    spec: CacheSpec, reach: Reach, page_bytes: int, kv_heads: int, dims: tuple[int, int], dtype_bytes: int
) -> bool:
    """Whether a layer with a reach takes less folded, in memory of the CPU, than as the exact tokens that it reads, at any length
    from where it is full; spec: the layer's own; dims: of keys and of values."""
    full = range(2 * reach.tokens, 3 * reach.tokens + PAGE_TOKENS, PAGE_TOKENS // 2)
    most = max(window_bytes(spec, reach, n, page_bytes, on_cpu=True) for n in full)
    frozen = sum(state_bytes(side, kv_heads, dim) for side, dim in zip((spec.key, spec.value), dims, strict=True))
    exact = kv_heads * sum(dims) * dtype_bytes
    return most + frozen + spec.ring_tokens() * exact < reach.tokens * exact
