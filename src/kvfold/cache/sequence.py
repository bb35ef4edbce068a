"""One sequence of one layer: page table, exact ring, sinks, length."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kvfold.cache.pages import PagePool
from kvfold.cache.sizes import TABLE_ENTRY_BYTES
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.request import LayerShape, Runs, SequenceView
from kvfold.errors import CannotTrim

# Pages folded by one engine call: bounds the float32 copies of a long prefill call. A GPU needs more at a time to be busy.
FOLD_PAGES, FOLD_PAGES_ON_GPU = 8, 64

State = tuple[Tensor | None, Tensor | None]


class Engine(Protocol):
    """What a sequence needs of a backend; see engine.on_torch for the meaning of each."""

    name: str
    spec: CacheSpec
    shape: LayerShape
    page_bytes: int

    def freeze(self, keys: Tensor, values: Tensor) -> State: ...

    def fold(self, keys: Tensor, values: Tensor, first: bool, out: list[Tensor], state: State) -> None: ...

    def refill(self, row: Tensor, keys: Tensor, values: Tensor, state: State) -> None: ...

    def unfold(self, rows: Tensor, state: State) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Staged:
    """Pages folded for an append that is not made yet. keep: how many of the sequence's own pages stay before `new`. first:
    pages of the sequence before all of these, which are given up."""

    keep: int
    new: list[int]
    state: State
    first: int


class LayerSequence:
    """Tokens 0..length-1 of one sequence in one layer.

    Tokens below `folded` lie in pages; token t >= exact_start lies in ring slot t % ring (exact_start <= folded); sinks
    keep tokens 0..sinks-1. Pages are shared between forks; everything else is owned.
    """

    def __init__(self, engine: Engine, pool: PagePool, key_like: Tensor, value_like: Tensor) -> None:
        """key_like, value_like: [H, *, D] tensors that fix heads, head dims, dtype and device."""
        self.engine, self.pool = engine, pool
        spec = engine.spec
        self.ring = spec.ring_tokens()
        self.ring_k = key_like.new_zeros(key_like.shape[0], self.ring, key_like.shape[2])
        self.ring_v = value_like.new_zeros(value_like.shape[0], self.ring, value_like.shape[2])
        self.sinks_k, self.sinks_v = self.ring_k[:, : spec.sinks].clone(), self.ring_v[:, : spec.sinks].clone()
        self.pages: list[int] = []  # changed in place only: the finalizer holds this list
        self.length = self.folded = self.exact_start = 0
        self.given_up = 0  # leading pages that no query can read any more, in layers with a reach
        self.unchanged = 0  # leading pages that are as they were at the last `mark`
        self.changes = 0  # how often anything but `advance` changed it
        self._runs: Runs | None = None  # of `pages`, until they change
        self.state: State = (None, None)
        self._own_pages()

    def _own_pages(self) -> None:
        """Give the pages back when the sequence is dropped without `release`, as a fork going out of scope is."""
        weakref.finalize(self, self.pool.abandon, self.pages).atexit = False

    def _spans(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """(ring slots, tokens - start) of tokens start..stop-1 in at most two pieces."""
        at = start
        while at < stop:
            slot = at % self.ring
            n = min(stop - at, self.ring - slot)
            yield slice(slot, slot + n), slice(at - start, at - start + n)
            at += n

    def _ring(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Exact keys and values of tokens start..stop-1, [H, n, D]; views when they do not wrap."""
        slots = [a for a, _ in self._spans(start, stop)] or [slice(0, 0)]
        if len(slots) == 1:
            return self.ring_k[:, slots[0]], self.ring_v[:, slots[0]]
        return tuple(torch.cat([x[:, s] for s in slots], dim=1) for x in (self.ring_k, self.ring_v))  # type: ignore[return-value]

    def view(self, pads: int) -> SequenceView:
        """The sequence as attention of the next call reads it."""
        k, v = self._ring(self.folded, self.length)
        start = self.given_up * PAGE_TOKENS
        return SequenceView(self.runs, self.folded - start, self.sinks_k, self.sinks_v, k, v, pads, *self.state, start)

    def expand(self, k: Tensor, v: Tensor) -> None:
        """Write all tokens, decoded where they are folded, to k, v [H, length, D]."""
        at = 0
        for run in self.runs:
            for rows in run.split(FOLD_PAGES):
                stop = min(at + len(rows) * PAGE_TOKENS, self.folded)
                for to, decoded in zip((k, v), self.engine.unfold(rows, self.state), strict=True):
                    to[:, at:stop] = decoded[:, : stop - at]
                at = stop
        sinks = min(self.folded, self.sinks_k.shape[1])
        k[:, :sinks], v[:, :sinks] = self.sinks_k[:, :sinks], self.sinks_v[:, :sinks]
        k[:, self.folded :], v[:, self.folded :] = self._ring(self.folded, self.length)

    @property
    def runs(self) -> Runs:
        """Its pages in order, as engines read them."""
        if self._runs is None:
            self._runs = self.pool.runs(self.pages)
        return self._runs

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens k, v [H, n, D] after their attention was computed, and fold every page that leaves the window.

        On error (out of memory, non-finite vectors) the sequence is as it was before.
        """
        self.commit(self.stage(k, v), k, v)

    def stage(self, k: Tensor, v: Tensor) -> Staged:
        """Fold the pages that appending k, v completes. Changes nothing yet: follow with `commit` or `discard`."""
        target = self.engine.spec.folded_tokens(self.length + k.shape[1])
        if target <= self.folded:
            return Staged(len(self.pages), [], self.state, self.given_up)
        state = self.state if self.folded else self._freeze(k, v, target)
        keep, new, first = len(self.pages), list[int](), self.given_up
        try:
            at = self.folded
            if (needed := min(self._first_page(self.length + k.shape[1]), target // PAGE_TOKENS)) * PAGE_TOKENS > at:
                # A call longer than the reach: what is out of sight when it ends is not folded at all.
                keep, first, at = 0, needed, needed * PAGE_TOKENS
            if at % PAGE_TOKENS:
                # The last page was trimmed: a copy of it (forks may share it) keeps its head and gets a new tail.
                keep -= 1
                stop = at - at % PAGE_TOKENS + PAGE_TOKENS
                new.append(self.pool.allocate())
                row = self.pool.row(new[-1])
                row.copy_(self.pool.row(self.pages[-1]))
                self.engine.refill(row, *self._tokens(k, v, at, stop), state)
                at = stop
            most = FOLD_PAGES if k.device.type == "cpu" else FOLD_PAGES_ON_GPU
            while at < target:
                stop = min(target, at + most * PAGE_TOKENS)
                block = [self.pool.allocate() for _ in range(at, stop, PAGE_TOKENS)]
                new += block
                keys, values = (x.unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1) for x in self._tokens(k, v, at, stop))
                self.engine.fold(keys, values, at == 0, [self.pool.row(p) for p in block], state)
                at = stop
        except BaseException:
            self.pool.abandon(new)
            raise
        return Staged(keep, new, state, first)

    def _first_page(self, length: int) -> int:
        """The first page that a query may still read at this length, or after a trim inside the exact part."""
        reach = self.engine.shape.variant.reach
        return 0 if reach is None else reach.first(max(0, length - self.ring)) // PAGE_TOKENS

    def commit(self, staged: Staged, k: Tensor, v: Tensor) -> None:
        """Make the append that was staged. Copies into memory that exists, so it cannot fail."""
        total = self.length + k.shape[1]
        for page in self.pages[staged.keep :]:
            self.pool.release(page)
        if staged.new or staged.keep < len(self.pages):
            self.pages[staged.keep :] = staged.new
            self._runs = None
        self.unchanged = min(self.unchanged, staged.keep)
        self.state = staged.state
        start = max(self.length, total - self.ring)
        for slots, tokens in self._spans(start, total):
            new = slice(tokens.start + start - self.length, tokens.stop + start - self.length)
            self.ring_k[:, slots], self.ring_v[:, slots] = k[:, new], v[:, new]
        sinks = slice(min(self.length, self.sinks_k.shape[1]), min(total, self.sinks_k.shape[1]))
        self.sinks_k[:, sinks] = k[:, : sinks.stop - sinks.start]
        self.sinks_v[:, sinks] = v[:, : sinks.stop - sinks.start]
        self.changes += 1
        self.length = total
        self.folded = max(self.folded, self.engine.spec.folded_tokens(total))
        self.exact_start = max(self.exact_start, total - self.ring)
        self.given_up = staged.first
        while self.pages and self.given_up < min(self._first_page(total), self.folded // PAGE_TOKENS):
            self.pool.release(self.pages.pop(0))
            self.given_up += 1
            self._runs = None

    def advance(self) -> None:
        """Count a token that a kernel has put into the ring. Folds nothing: see `due`."""
        self.length += 1
        self.exact_start = max(self.exact_start, self.length - self.ring)

    @property
    def due(self) -> bool:
        """Whether pages have left the window and are not folded yet."""
        return self.engine.spec.folded_tokens(self.length) > self.folded

    def discard(self, staged: Staged) -> None:
        """Give up an append that was staged."""
        self.pool.abandon(staged.new)

    def _tokens(self, k: Tensor, v: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Exact tokens start..stop-1 from the ring and, past `length`, from the call's own k, v."""
        cut = min(max(self.length, start), stop)
        new_k, new_v = k[:, cut - self.length : stop - self.length], v[:, cut - self.length : stop - self.length]
        if cut == start:
            return new_k, new_v
        old_k, old_v = self._ring(start, cut)
        return torch.cat([old_k, new_k], dim=1), torch.cat([old_v, new_v], dim=1)

    def tokens_of_page(self, page: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Exact keys and values [H, 128, D] of a page that appending k, v folds."""
        return self._tokens(k, v, page * PAGE_TOKENS, (page + 1) * PAGE_TOKENS)

    def _freeze(self, k: Tensor, v: Tensor, target: int) -> State:
        """What codecs freeze per sequence: from a first call of at least a page, else from the first pages themselves."""
        if k.shape[1] >= PAGE_TOKENS:
            return self.engine.freeze(k, v)
        return self.engine.freeze(*self._tokens(k, v, 0, target))

    def trim(self, tokens: int) -> None:
        """Forget the newest `tokens`. Inside the exact part this equals never having appended them: pages that only
        they pushed out of the window are unfolded from their exact copies. Deeper, pages keep their codes and mean."""
        length = self.length - tokens
        if tokens < 0 or length < 0:
            raise CannotTrim(
                f"cannot trim {tokens} of {self.length} tokens", "Trim between 0 and the sequence's length"
            )
        if not self.can_trim(tokens):
            raise CannotTrim("tokens before the window were given up", "Continue from a fork made before those tokens")
        spec = self.engine.spec
        if length < self.folded:
            self.folded = self.exact_start = length
        else:
            self.folded = min(self.folded, max(spec.folded_tokens(length), self.exact_start))
        if self.folded <= spec.sinks:
            # What is left in pages are sinks, and those are exact: back to a sequence that never folded.
            n = self.folded
            self.ring_k[:, :n], self.ring_v[:, :n] = self.sinks_k[:, :n], self.sinks_v[:, :n]
            self.folded = self.exact_start = 0
            self.state = (None, None)
        while (self.given_up + len(self.pages) - 1) * PAGE_TOKENS >= self.folded and self.pages:
            self.pool.release(self.pages.pop())
            self._runs = None
        self.unchanged = min(self.unchanged, len(self.pages))
        self.changes += 1
        self.length = length

    def can_trim(self, tokens: int) -> bool:
        """Whether what the next query would read is still there without the newest `tokens`."""
        reach = self.engine.shape.variant.reach
        return reach is None or reach.first(max(0, self.length - tokens)) >= self.given_up * PAGE_TOKENS

    def mark(self) -> None:
        """Count pages as unchanged from here on."""
        self.unchanged = len(self.pages)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Keys and values [H, n, D] of the tokens that have exact copies besides sinks: exact_start..length-1."""
        return self._ring(self.exact_start, self.length)

    def fork(self) -> LayerSequence:
        """An independent continuation: pages shared, exact tokens and sinks copied."""
        return self._copy(self.engine.spec.ring_tokens(), self.exact_start)

    def compact(self) -> LayerSequence:
        """A fork to be kept and forked again, not continued: it holds the exact tokens that attention reads, no more."""
        return self._copy(max(1, self.length - self.folded), self.folded)

    def _copy(self, ring: int, start: int) -> LayerSequence:
        """A copy with a ring of its own size that holds tokens start..length-1."""
        numbers = {page: n for n, page in enumerate(self.pages)}
        other = LayerSequence.attached(self.engine, self.pool, self.detached(numbers), self.pages)
        other.ring, other.exact_start = ring, start
        other.ring_k, other.ring_v = (x.new_zeros(x.shape[0], ring, x.shape[2]) for x in (self.ring_k, self.ring_v))
        other.sinks_k, other.sinks_v = self.sinks_k.clone(), self.sinks_v.clone()
        other._set_ring(*self._ring(start, self.length))
        return other

    def _set_ring(self, k: Tensor, v: Tensor) -> None:
        for slots, tokens in self._spans(self.exact_start, self.length):
            self.ring_k[:, slots], self.ring_v[:, slots] = k[:, tokens], v[:, tokens]

    def restore(
        self,
        pages: list[int],
        length: int,
        folded: int,
        exact: tuple[Tensor, Tensor],
        state: State,
        given_up: int = 0,
    ) -> None:
        """Make an empty sequence one of `length` tokens, of which `folded` lie in `pages`, whose references it takes over.

        given_up: pages before those. exact: the newest tokens [H, n, D], at least those not folded. Sinks are set apart
        (`sinks_k`, `sinks_v`).
        """
        self.pages[:] = pages
        self._runs = None
        self.changes += 1
        self.length, self.folded, self.exact_start = length, folded, length - exact[0].shape[1]
        self.state, self.given_up = state, given_up
        self._set_ring(*exact)

    def detached(self, where: dict[int, int]) -> dict[str, Any]:
        """Everything but engine and pool; pages as their numbers in `where`."""
        own = {k: x for k, x in self.__dict__.items() if k not in ("engine", "pool")}
        return {**own, "_runs": None, "pages": [where[page] for page in self.pages]}

    @classmethod
    def attached(cls, engine: Engine, pool: PagePool, state: dict[str, Any], ids: list[int]) -> LayerSequence:
        """The sequence that `detached` took apart; ids: the pool's page for each number, of which it takes references."""
        pages = [ids[n] for n in state["pages"]]
        for page in pages:
            pool.retain(page)
        sequence = object.__new__(cls)
        sequence.__dict__.update(state, engine=engine, pool=pool, pages=pages)
        sequence._own_pages()
        return sequence

    def release(self) -> None:
        """Give the pages back; the sequence must not be used afterwards."""
        self._runs = None
        while self.pages:
            self.pool.release(self.pages.pop())

    @property
    def tensors(self) -> list[Tensor]:
        """Ring, sinks and frozen codec state: everything allocated besides pages."""
        own = (self.ring_k, self.ring_v, self.sinks_k, self.sinks_v, *self.state)
        return [t for t in own if t is not None]

    @property
    def table_bytes(self) -> int:
        return TABLE_ENTRY_BYTES * len(self.pages)

    @property
    def exact_tokens(self) -> int:
        """Tokens that the next query would read exactly, sinks included."""
        return self.length - self.folded + (self.engine.spec.sinks if self.folded else 0)
