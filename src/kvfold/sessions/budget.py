"""Memory of a store: what sessions take, what they and calls under way may still take, and room made before they do."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvfold.cache.sizes import TABLE_ENTRY_BYTES, pool_bytes_at_most
from kvfold.config import PAGE_TOKENS
from kvfold.errors import InvalidConfig, OverBudget
from kvfold.sessions.runner import Runner
from kvfold.sessions.session import Session


def parse_bytes(size: int | str) -> int:
    """`8GiB`, `512 MB`, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?)B?|B)?", str(size).strip())
    amount = float(match[1]) * _step(match[2], match[3]) if match else 0
    if amount < 1:
        raise InvalidConfig(f"{size!r} is not an amount of memory", "Write it as 8GiB, 512MB, or bytes")
    return int(amount)


def _step(prefix: str | None, binary: str | None) -> int:
    return (1024 if binary else 1000) ** (" kMGT".index(prefix.replace("K", "k"))) if prefix else 1


@dataclass
class Promise:
    """What a session may come to hold. pages: in every folded layer, beyond those it has. checkpoints: in all, of
    checkpoint_bytes each."""

    pages: int
    checkpoints: int
    checkpoint_bytes: int

    @property
    def bytes_of_checkpoints(self) -> int:
        return self.checkpoints * self.checkpoint_bytes


class Budget:
    """limit: bytes. sessions: those in memory now. free_one: writes one out, or returns False if none can go."""

    def __init__(
        self,
        limit: int,
        runner: Runner,
        lock: threading.RLock,
        sessions: Callable[[], list[Session]],
        free_one: Callable[[], bool],
    ) -> None:
        self.limit = limit
        self._runner, self._lock, self._sessions, self._free_one = runner, lock, sessions, free_one
        self._pools = [x.folded.pool for x in runner.new_cache().folded_layers]
        self._pages = self._other = 0  # promised to calls under way
        self._promises: dict[Session, Promise] = {}

    @property
    def page_bytes(self) -> int:
        """Every slab of every pool."""
        return sum(p.nbytes for p in self._pools)

    @property
    def nbytes(self) -> int:
        """All of `kinds`."""
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, int]:
        """Bytes of pages, and of the sessions in memory: exact tokens, states and windows as large as they get; tables;
        checkpoints."""
        with self._lock:
            sessions = self._sessions()
            tables = [q.table_bytes for s in sessions for x in s.cache.folded_layers for q in x.folded.sequences]
            return {
                "pages": self.page_bytes,
                "exact": len(sessions) * self._runner.session_bytes,
                "tables": sum(tables),
                "checkpoints": _checkpoint_bytes(sessions),
            }

    @property
    def reference_bytes(self) -> int:
        """What 16 bits per key and value would take for the tokens of `nbytes`: pages once, however many share them,
        and of each session in memory those not yet in them."""
        per_layer = self._runner.layer_reference_bytes
        with self._lock:
            pages = sum(p.pages_used * b for p, b in zip(self._pools, per_layer, strict=True))
            rest = sum(len(s.tokens) - _pages_of(s) * PAGE_TOKENS for s in self._sessions())
        return pages * PAGE_TOKENS + rest * sum(per_layer)

    @contextmanager
    def room(self, pages: int = 0, sessions: int = 0, checkpoints: int = 0) -> Iterator[None]:
        """Hold room for so many pages in every folded layer, and what so many sessions and checkpoints have besides, while
        they are allocated. Raises OverBudget if nothing more can be written out for it."""
        other = sessions * self._runner.session_bytes + checkpoints * self._runner.checkpoint_bytes
        while (over := self._promise(pages, other)) > 0:
            if not self._free_one():
                raise self._over(over)
        try:
            yield
        finally:
            with self._lock:
                self._pages -= pages
                self._other -= other

    def _over(self, over: int) -> OverBudget:
        return OverBudget(
            f"the sessions in use and this call need {over:,} bytes more than the {self.limit:,} allowed",
            "Give the store more memory, a disk folder, or fewer and shorter sessions at once",
        )

    def _promise(self, pages: int, other: int) -> int:
        """Take the promise, or return how many bytes it is over the limit."""
        with self._lock:
            pages, other = self._pages + pages, self._other + other
            over = self._at_most(pages) + other - self.limit
            if over <= 0:
                self._pages, self._other = pages, other
            return over

    def _at_most(self, pages: int) -> int:
        """Bytes that all sessions come to hold with every promise kept, and calls that take so many pages beyond those.

        A promise counts its checkpoints in full, shared or not: whoever shares them may outlive the session.
        """
        kinds, sessions = self.kinds(), self._sessions()
        left = sum(p.pages for p in self._promises.values())
        slabs = sum(p.nbytes + p.growth(pages) for p in self._pools)
        if left:
            slabs = sum(max(p.nbytes + p.growth(pages), p.at_most(p.pages_used + pages + left)) for p in self._pools)
        free = _checkpoint_bytes([s for s in sessions if s not in self._promises])
        promised = sum(p.bytes_of_checkpoints for p in self._promises.values())
        return slabs + kinds["exact"] + kinds["tables"] + self._table_bytes(pages + left) + free + promised

    def _table_bytes(self, pages: int) -> int:
        return pages * len(self._pools) * TABLE_ENTRY_BYTES

    # Promises to sessions

    @property
    def promised_bytes(self) -> int:
        """What sessions and calls may take, beyond what they have, without asking again."""
        with self._lock:
            return max(0, self._at_most(self._pages) + self._other - self.nbytes)

    def _terms(self, tokens: int, prompt: int, start: int = 0, checkpoints: int = 0) -> Promise:
        """Of a session that begins with `start` tokens and as many checkpoints, reads a prompt and goes on to `tokens`."""
        r = self._runner
        pages = r.spec.folded_tokens(tokens) // PAGE_TOKENS if self._pools else 0
        calls = -(-prompt // r.call_tokens) - start // r.call_tokens
        # One more than are kept while the next is made.
        most = min(max(2, r.ways_back) + 2, checkpoints + calls) if r.ways_back else checkpoints
        return Promise(pages, most, r.checkpoint_bytes + self._table_bytes(pages))

    def need(self, tokens: int, prompt: int) -> int:
        """Bytes that a session which reads a prompt of so many tokens and goes on to `tokens` takes at most, by itself."""
        x = self._terms(tokens, prompt)
        pages = sum(pool_bytes_at_most(x.pages, p.page_bytes, p.device.type == "cpu") for p in self._pools)
        return pages + self._table_bytes(x.pages) + self._runner.session_bytes + x.bytes_of_checkpoints

    def promise(self, session: Session, tokens: int, prompt: int) -> None:
        """Hold room for a session in use to read a prompt and go on to `tokens` tokens, until `forget`. Sessions not in use
        are written out for it. Raises OverBudget if that is not enough."""
        terms = self._terms(tokens, prompt, len(session.tokens), len(session.checkpoints))
        terms.pages = max(0, terms.pages - _pages_of(session))
        while True:
            with self._lock:
                self._promises[session] = terms
                over = self._at_most(self._pages) + self._other - self.limit
                if over <= 0:
                    return
                del self._promises[session]
            if not self._free_one():
                raise self._over(over)

    def forget(self, session: Session) -> None:
        """The session will not grow any more, or is gone."""
        with self._lock:
            self._promises.pop(session, None)

    @property
    def promises(self) -> int:
        """How many there are."""
        return len(self._promises)

    def check(self, tokens: int, prompt: int, shared: int) -> None:
        """Raise OverBudget if a promise to one more session would not be kept even with every other session written out.
        shared: tokens that it may share with any."""
        x = self._terms(tokens, prompt, shared)
        with self._lock:
            pages = x.pages - shared // PAGE_TOKENS + sum(p.pages for p in self._promises.values())
            rows = sum(p.page_bytes * (pages + len(held)) for p, held in zip(self._pools, self._held(), strict=True))
            sessions = (1 + len(self._promises)) * self._runner.session_bytes
            checkpoints = sum(p.bytes_of_checkpoints for p in (x, *self._promises.values()))
            over = rows + sessions + checkpoints + self._other - self.limit
        if over > 0:
            raise self._over(over)

    def _held(self) -> list[set[int]]:
        """Of each pool, the pages of sessions with a promise."""
        caches = [c for s in self._promises for c in (s.cache, *s.checkpoints.values())]
        layers = [[x.folded.sequences[0].pages for x in c.folded_layers] for c in caches]
        return [{page for pages in layers for page in pages[i]} for i in range(len(self._pools))]

    @contextmanager
    def call(self, pages: dict[Session, int], checkpoints: int) -> Iterator[None]:
        """`room` for a call that gives sessions so many pages, and each so many checkpoints; promises are used up first."""
        with self._lock:
            kept = {s: self._promises[s] for s in pages if s in self._promises}
        more = sum(max(0, n - kept[s].pages) if s in kept else n for s, n in pages.items())
        left = {s: p.checkpoints - len(s.checkpoints) for s, p in kept.items()}
        new = sum(max(0, checkpoints - left.get(s, 0)) for s in pages)
        if more or new:
            with self.room(more, checkpoints=new):
                yield
        else:
            yield
        with self._lock:  # only now: a call that fails takes nothing
            for s, p in kept.items():
                p.pages = max(0, p.pages - pages[s])


class BudgetedRunner(Runner):
    """Asks for room before every call."""

    budget: Budget

    @contextmanager
    def room(self, sessions: Sequence[Session], tokens: int, checkpoints: int = 0) -> Iterator[None]:
        pages = {s: _new_pages(s, tokens) for s in sessions}
        if not (any(pages.values()) or checkpoints):
            yield  # as almost every decode step
            return
        with self.budget.call(pages, checkpoints):
            yield


def _checkpoint_bytes(sessions: Sequence[Session]) -> int:
    """Of all of them together; forks share them."""
    return sum(c.unshared_bytes for c in {id(c): c for s in sessions for c in list(s.checkpoints.values())}.values())


def _pages_of(session: Session) -> int:
    layers = session.cache.folded_layers
    return -(-layers[0].folded.sequences[0].folded // PAGE_TOKENS) if layers else 0


def _new_pages(session: Session, tokens: int) -> int:
    """Pages that a call of so many tokens allocates in every folded layer."""
    layers = session.cache.folded_layers
    if not layers:
        return 0
    s = layers[0].folded.sequences[0]
    return max(0, session.cache.spec.folded_tokens(s.length + tokens) // PAGE_TOKENS - s.folded // PAGE_TOKENS)
