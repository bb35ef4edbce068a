"""What one scheduler step asks of every folded layer, worked out from vLLM's block tables: numbers only, no tensors, no vLLM.

vLLM hands out two kinds of blocks per request (see `blocks`): blocks of pages, and blocks of exact tokens. Block 0 is vLLM's
null block: tokens there have no exact copy. From this everything follows, and nothing is remembered between steps:

- A page is folded in the step that completes it. Every full page is therefore valid, whoever reads it: the request itself
  later, another that shares its prefix, one that is resumed.
- A request reads its newest tokens exactly: those of the page being filled and of pages still in the window. Where the exact
  copies are gone (a prefix found in the cache long after) it reads their pages instead.
- Tokens of a page that is not full have no other place than their exact block. If that is null, memory was lost: refuse.
- A block that is read in this step for the last time may be in the table a second time, for tokens that this step writes. What
  such a request reads is read before anything is written.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.config import PAGE_TOKENS
from kvfold.engine.pools import PooledCall
from kvfold.errors import CacheMisuse

Ints = NDArray[np.int64]
Table = NDArray[np.int32]
NULL_BLOCK = 0


@dataclass(frozen=True)
class Geometry:
    """window, sinks: of the profile. block_pages: pages to a block. exact_tokens: tokens of an exact block."""

    window: int
    sinks: int
    block_pages: int
    exact_tokens: int


@dataclass(frozen=True)
class Fold:
    """Consecutive pages of one request that this step completes. numbers: where they go. head: blocks of the tokens of the
    first page that came in earlier steps, `head_tokens` of them. token: the call's token that follows these. overwritten:
    whether these blocks are written in this step."""

    numbers: Ints
    head: Table
    head_tokens: int
    token: int
    starts_sequence: bool
    overwritten: bool


@dataclass(frozen=True)
class Step:
    """reads: what queries attend to. apart: sequences of it, none in `runs`, whose exact blocks are written in this step.
    token, block, slot: [m] the call's tokens that get an exact copy, and where."""

    reads: PooledCall
    apart: list[int]
    token: Ints
    block: Ints
    slot: Ints
    folds: list[Fold]

    @functools.cached_property
    def reads_own_folds(self) -> bool:
        """Whether a request reads a page that this step folds."""
        return bool(self.folds) and bool(
            np.isin(np.concatenate([f.numbers for f in self.folds]), self.reads.page_numbers).any()
        )


def plan(geometry: Geometry, starts: Ints, lengths: Ints, pages: Table, exact: Table) -> Step:
    """starts: [n + 1] first new token of each request in the flat call. lengths: [n] tokens, the call's own included. pages,
    exact: [n, ...] block tables. Raises CacheMisuse if a request's exact tokens are gone."""
    new = np.diff(starts)
    rows = [
        _Row(geometry, int(starts[i]), int(new[i]), int(lengths[i]), pages[i], exact[i]) for i in np.flatnonzero(new)
    ]
    copies = [row.copies() for row in rows]
    token, block, slot = (np.concatenate([c[part] for c in copies]) for part in range(3))
    apart = [i for i, row in enumerate(rows) if row.overwritten]
    return Step(_reads(rows, apart), apart, token, block, slot, [f for row in rows for f in row.folds()])


class _Row:
    """One request of a step."""

    def __init__(self, geometry: Geometry, start: int, new: int, length: int, pages: Table, exact: Table) -> None:
        self.geometry, self.start, self.new, self.length = geometry, start, new, length
        self.pages, self.exact = pages, exact
        self.past = length - new
        self.folded = self._folded()
        written = self.exact[-(-self.past // geometry.exact_tokens) : -(-length // geometry.exact_tokens)]
        # Most steps begin no block, and this is asked of every request.
        self.overwritten = bool(len(written)) and bool(np.isin(self.recent, written[written != NULL_BLOCK]).any())

    def _exact_blocks(self, start: int, stop: int) -> Table:
        """Blocks of tokens start..stop-1; start begins a block."""
        size = self.geometry.exact_tokens
        return self.exact[start // size : -(-stop // size)]

    def _folded(self) -> int:
        """How many tokens are read through pages: those before the window, and those without an exact copy."""
        g = self.geometry
        folded = max(0, self.past - g.window) // PAGE_TOKENS * PAGE_TOKENS
        gone = np.flatnonzero(self._exact_blocks(folded, self.past) == NULL_BLOCK)
        if len(gone):
            folded += (int(gone[-1]) + 1) * g.exact_tokens
        if folded > self.past // PAGE_TOKENS * PAGE_TOKENS or (folded and g.sinks and self.exact[0] == NULL_BLOCK):
            raise _lost(self.past)
        return folded

    @property
    def recent(self) -> Table:
        return self._exact_blocks(self.folded, self.past)

    def page_numbers(self, first: int, stop: int) -> Ints:
        block, page = np.divmod(np.arange(first, stop), self.geometry.block_pages)
        return self.pages[block].astype(np.int64) * self.geometry.block_pages + page

    def read_pages(self) -> Ints:
        return self.page_numbers(0, -(-self.folded // PAGE_TOKENS))

    def copies(self) -> tuple[Ints, Ints, Ints]:
        """(token of the call, block, slot) of every new token that has an exact block."""
        block, slot = np.divmod(np.arange(self.past, self.length), self.geometry.exact_tokens)
        where = self._writable(int(block[0]), int(block[-1]) + 1)[block - block[0]].astype(np.int64)
        kept = np.flatnonzero(where != NULL_BLOCK)
        if (where[max(0, self.length // PAGE_TOKENS * PAGE_TOKENS - self.past) :] == NULL_BLOCK).any():
            raise _lost(self.length)
        return self.start + kept, where[kept], slot[kept]

    def _writable(self, first: int, stop: int) -> Table:
        """Exact blocks from number `first` on, null where later tokens of the call have the same block."""
        blocks = self.exact[first:stop]
        if len(blocks) == 1:
            return blocks
        last = np.full(len(blocks), False)
        last[len(blocks) - 1 - np.unique(blocks[::-1], return_index=True)[1]] = True
        return np.where(last, blocks, NULL_BLOCK)

    def folds(self) -> list[Fold]:
        first, stop = self.past // PAGE_TOKENS, self.length // PAGE_TOKENS
        if first == stop:
            return []
        begin = first * PAGE_TOKENS
        head = self._exact_blocks(begin, self.past)
        numbers = self.page_numbers(first, stop)
        return [Fold(numbers, head, self.past - begin, self.start, first == 0, self.overwritten)]


def _reads(rows: list[_Row], apart: list[int]) -> PooledCall:
    numbers, recent = [row.read_pages() for row in rows], [row.recent for row in rows]
    runs: list[tuple[int, int, int]] = []
    for i, row in enumerate(rows):
        if i in apart:
            continue
        if runs and runs[-1][2] == row.new and sum(runs[-1][:2]) == i:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, row.new)
        else:
            runs.append((i, 1, row.new))
    return PooledCall(
        token_start=np.array([row.start for row in rows] + [rows[-1].start + rows[-1].new]),
        page_numbers=np.concatenate(numbers),
        page_start=np.cumsum([0, *map(len, numbers)]),
        folded=np.array([row.folded for row in rows]),
        recent_table=np.concatenate(recent),
        recent_start=np.cumsum([0, *map(len, recent)]),
        recent=np.array([row.past - row.folded for row in rows]),
        sink_block=np.array([int(row.exact[0]) for row in rows]),
        runs=runs,
    )


def _lost(tokens: int) -> CacheMisuse:
    return CacheMisuse(
        f"exact tokens of a request at {tokens} tokens are not in memory",
        "Something outside kvfold moved or dropped vLLM's blocks: run without other KV connectors or block managers",
    )
