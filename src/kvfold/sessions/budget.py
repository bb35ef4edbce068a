"""Memory of a store: what its sessions take, what calls under way may still take, and room made before they take it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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
            checkpoints = {id(c): c for s in sessions for c in list(s.checkpoints.values())}  # forks share them
            tables = [q.table_bytes for s in sessions for x in s.cache.folded_layers for q in x.folded.sequences]
            return {
                "pages": self.page_bytes,
                "exact": len(sessions) * self._runner.session_bytes,
                "tables": sum(tables),
                "checkpoints": sum(c.unshared_bytes for c in checkpoints.values()),
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
                raise OverBudget(
                    f"the sessions in use and this call need {over:,} bytes more than the {self.limit:,} allowed",
                    "Give the store more memory, a disk folder, or fewer and shorter sessions at once",
                )
        try:
            yield
        finally:
            with self._lock:
                self._pages -= pages
                self._other -= other

    def _promise(self, pages: int, other: int) -> int:
        """Take the promise, or return how many bytes it is over the limit."""
        with self._lock:
            pages, other = self._pages + pages, self._other + other
            over = self.nbytes + sum(p.growth(pages) for p in self._pools) + other - self.limit
            if over <= 0:
                self._pages, self._other = pages, other
            return over


class BudgetedRunner(Runner):
    """Asks for room before every call."""

    budget: Budget

    @contextmanager
    def room(self, sessions: Sequence[Session], tokens: int, checkpoints: int = 0) -> Iterator[None]:
        pages = sum(_new_pages(s, tokens) for s in sessions)
        if not (pages or checkpoints):
            yield  # as almost every decode step
            return
        with self.budget.room(pages, checkpoints=checkpoints):
            yield


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
