"""How many bytes a cache allocates, before it does: what pools and sequences are built by, and what the planner asks."""

from __future__ import annotations

import functools
import mmap

from kvfold.codec.fields import state_bytes
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.variant import Reach

# Where a slab takes all its memory at once, it holds 1/256 of the pages there are: free space stays within about .5 % of them.
SLACK = 256
MIN_SLAB_PAGES = 4
MAX_SLAB_PAGES = 256
# On the CPU a slab takes memory row by row, as rows are first written. It can be large, which wastes less on rounding to the
# system's pages, and must not be too large, for its rows go back to the system together: as many as there are pages, up to these.
MIN_MAPPED_PAGES = 32
MAX_MAPPED_BYTES = 1 << 23
TABLE_ENTRY_BYTES = 8


def mapped(nbytes: int, on_cpu: bool) -> int:
    """What writing `nbytes` of reserved memory takes: whole pages of the system's memory on the CPU, where slabs are mapped."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE if on_cpu else nbytes


def slab_pages(used: int, page_bytes: int, on_cpu: bool) -> int:
    """Pages that the next slab of a pool asks for when `used` are in use and none is free."""
    if not on_cpu:
        return min(MAX_SLAB_PAGES, max(MIN_SLAB_PAGES, used // SLACK))
    most = max(MIN_MAPPED_PAGES, min(MAX_SLAB_PAGES, _power_of_two(MAX_MAPPED_BYTES // page_bytes)))
    return min(most, max(MIN_MAPPED_PAGES, _power_of_two(used)))


def _power_of_two(n: int) -> int:
    """The largest up to n, or 0. So many rows of whole 16 bytes round to few system pages, 256 of them to none."""
    return 1 << n.bit_length() >> 1


def slab_rows(used: int, page_bytes: int, on_cpu: bool) -> int:
    """Rows of the next slab: what was asked for, and what else rounding leaves room for."""
    return mapped(slab_pages(used, page_bytes, on_cpu) * page_bytes, on_cpu) // page_bytes


def pool_bytes(pages: int, page_bytes: int, on_cpu: bool) -> int:
    """Bytes of a pool that grew to `pages` pages in use without ever giving one back."""
    rows = total = 0
    while rows < pages:
        n = slab_rows(rows, page_bytes, on_cpu)
        # On the CPU the last slab has taken what its first rows need.
        total += mapped(min(n, pages - rows) * page_bytes, on_cpu) if on_cpu else n * page_bytes
        rows += n
    return total


def pool_bytes_at_most(pages: int, page_bytes: int, on_cpu: bool) -> int:
    """Bytes that a pool grows to while at most `pages` pages are in use, whatever is given back in between: it grows only
    when no row is free, and writes a row for the first time only when no other is free."""
    if not pages:
        return 0
    if on_cpu:
        return mapped(pages * _row_bytes(page_bytes), on_cpu)
    return (pages - 1 + slab_rows(pages - 1, page_bytes, on_cpu)) * page_bytes


@functools.cache
def _row_bytes(page_bytes: int) -> int:
    """The most that a row takes of a slab of any size on the CPU, rounding included."""
    slabs = [mapped(n * page_bytes, on_cpu=True) for n in range(MIN_MAPPED_PAGES, MAX_SLAB_PAGES + 1)]
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
    # The most is held where a window or chunk has begun but the exact part has not, or where a chunk ends.
    begin, end = spec.ring_tokens() * 2 // PAGE_TOKENS + 4, 4
    most = max(window_bytes(spec, reach, n, page_bytes, on_cpu=True) for n in {*full[:begin], *full[-end:]})
    frozen = sum(state_bytes(side, kv_heads, dim) for side, dim in zip((spec.key, spec.value), dims, strict=True))
    exact = kv_heads * sum(dims) * dtype_bytes
    return most + frozen + spec.ring_tokens() * exact < reach.tokens * exact
