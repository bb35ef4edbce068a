"""Page storage of one layer: slabs of equal rows, shared by reference count."""

from __future__ import annotations

import heapq
import threading
from collections import deque
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.memory import give_back, reserve
from kvfold.cache.sizes import mapped, pool_bytes_at_most, slab_rows
from kvfold.engine.request import Runs


class PagePool:
    """Rows of `page_bytes` uint8. A page id names a row for as long as its reference count is above zero.

    Forks of a cache share pools and may run in threads of their own, so every change is made under a lock.
    """

    def __init__(self, page_bytes: int, device: torch.device, one_by_one: bool = False) -> None:
        """one_by_one: every page is a slab, so that what is held never depends on what was: for few pages that come and go."""
        self.page_bytes, self.device, self.one_by_one = page_bytes, device, one_by_one
        self.on_cpu = device.type == "cpu"
        self._slabs: dict[int, Tensor] = {}  # id of a slab's first page -> its rows
        self._used: dict[int, int] = {}  # the same -> how many of them are in use
        self._taken: dict[int, int] = {}  # the same -> how many rows take memory: on the CPU, up to the last in use
        self._where: dict[int, tuple[int, int]] = {}  # page -> (slab, row)
        self._count: dict[int, int] = {}  # page -> references
        self._free: list[int] = []
        self._shared: dict[bytes, int] = {}  # digest of a page's content -> the page
        self._digests: dict[int, bytes] = {}  # the inverse
        self._next = 0
        # What finalizers leave behind. They run anywhere, also inside the lock, so all they may do is append here.
        self._abandoned: deque[list[int]] = deque()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @property
    def nbytes(self) -> int:
        """Every byte of every slab but, on the CPU, of rows after the last in use; free rows before it included."""
        with self._lock:
            self._drain()
            return sum(map(self._bytes, self._taken.values()))

    def _bytes(self, rows: int) -> int:
        """What the first `rows` rows of a slab take."""
        return mapped(rows * self.page_bytes, self.on_cpu)

    @property
    def pages_used(self) -> int:
        with self._lock:
            self._drain()
            return sum(self._used.values())

    def _grow(self) -> None:
        n = 1 if self.one_by_one else slab_rows(sum(self._used.values()), self.page_bytes, self.on_cpu)
        slab = reserve(n * self.page_bytes, self.device)[: n * self.page_bytes].view(n, self.page_bytes)
        first = self._next
        self._next += n
        self._slabs[first], self._used[first], self._taken[first] = slab, 0, 0 if self.on_cpu else n
        for row in range(n):
            self._where[first + row], self._count[first + row] = (first, row), 0
            heapq.heappush(self._free, first + row)

    def allocate(self) -> int:
        """A page of unspecified content with reference count 1; the lowest free id, so sequences stay contiguous."""
        with self._lock:
            self._drain()
            if not self._free:
                self._grow()
            page = heapq.heappop(self._free)
            self._count[page] = 1
            slab, row = self._where[page]
            self._used[slab] += 1
            self._taken[slab] = max(self._taken[slab], row + 1)
            return page

    def growth(self, pages: int) -> int:
        """Bytes that allocating so many pages would add."""
        with self._lock:
            self._drain()
            rows, used = sum(map(len, self._slabs.values())), sum(self._used.values())
            if self.one_by_one:
                return max(0, used + pages - rows) * self._bytes(1)
            left, added = pages, 0
            for slab, taken in self._taken.items():
                # The lowest free row is the next: in every slab those before its last in use, then those after.
                left -= min(left, taken - self._used[slab])
                more = min(left, len(self._slabs[slab]) - taken)
                left -= more
                added += self._bytes(taken + more) - self._bytes(taken)
            while left > 0:
                n = slab_rows(rows, self.page_bytes, self.on_cpu)
                added += self._bytes(min(n, left) if self.on_cpu else n)
                rows, left = rows + n, left - n
            return added

    def at_most(self, pages: int) -> int:
        """Bytes that the slabs grow to while no more than `pages` are in use; at least what they have now."""
        return max(self.nbytes, pool_bytes_at_most(pages, self.page_bytes, self.on_cpu))

    def is_shared(self, page: int) -> bool:
        return page in self._digests

    def share(self, page: int, digest: bytes) -> int:
        """The page to use for this content: one that was shared before under the same digest and holds the same bytes,
        which takes the reference over, or else this one, which later ones will be given."""
        with self._lock:
            other = self._shared.setdefault(digest, page)
            if other == page:
                self._digests[page] = digest
            elif torch.equal(self.row(other), self.row(page)):
                self._count[other] += 1
                self._release(page)
                return other
            return page

    def retain(self, page: int) -> None:
        with self._lock:
            self._count[page] += 1

    def release(self, page: int) -> None:
        """Drop one reference; a slab without used rows is given back to the allocator."""
        with self._lock:
            self._release(page)

    def abandon(self, pages: list[int]) -> None:
        """Release a list of pages at the next change of the pool. For finalizers: takes no lock."""
        if pages:
            self._abandoned.append(pages)

    def _drain(self) -> None:
        while self._abandoned:
            for page in self._abandoned.popleft():
                self._release(page)

    def _release(self, page: int) -> None:
        self._count[page] -= 1
        if self._count[page]:
            return
        if (digest := self._digests.pop(page, None)) is not None:
            del self._shared[digest]
        slab, _ = self._where[page]
        self._used[slab] -= 1
        heapq.heappush(self._free, page)
        if self._used[slab] == 0:
            gone = range(slab, slab + len(self._slabs[slab]))
            self._free = [f for f in self._free if f not in gone]
            heapq.heapify(self._free)
            for p in gone:
                del self._where[p], self._count[p]
            del self._slabs[slab], self._used[slab], self._taken[slab]
        elif self.on_cpu:
            taken = self._taken[slab]
            while self._count[slab + taken - 1] == 0:
                taken -= 1
            if taken < self._taken[slab] and give_back(self._slabs[slab][taken:]):
                self._taken[slab] = taken

    def references(self, page: int) -> int:
        return self._count[page]

    def row(self, page: int) -> Tensor:
        """The bytes of a page, a view [page_bytes]."""
        slab, row = self._where[page]
        return self._slabs[slab][row]

    def runs(self, pages: list[int]) -> Runs:
        """The pages in order, as views [n, page_bytes] over maximal stretches of consecutive rows."""
        out = Runs()
        if not pages:
            return out
        cuts = [0]
        for i, (a, b) in enumerate(pairwise(pages)):
            if b != a + 1 or self._where[a][0] != self._where[b][0]:
                cuts.append(i + 1)
        cuts.append(len(pages))
        for a, b in pairwise(cuts):
            slab, row = self._where[pages[a]]
            out.append(self._slabs[slab][row : row + b - a])
        return out
