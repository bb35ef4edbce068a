"""Notices calls that overlap, or that stopped half-way and left some layers with tokens that others lack."""

from __future__ import annotations

import threading
from typing import Any

from kvfold.errors import CacheMisuse


class CallGuard:
    """The layers of a model use a cache in order, once per call; anything else is two calls at once or one that failed.

    last: index of the last layer whose storing ends a call.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.call = 0  # number of the call under way
        self.at = -1  # last layer that was entered, -1 between calls
        self._entered: set[tuple[int, str]] = set()
        self.stored: set[int] = set()  # layers that already hold the tokens of the call under way
        self.moved: set[int] = set()  # layers whose running state has taken them in
        self.before: Any = None  # what the cache remembers of its state before the call under way
        self.busy = False
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def enter(self, layer: int, part: str = "") -> tuple[int, bool]:
        """A layer begins a part of its work: (number of the call, whether the call is new). A part comes once per call."""
        with self._lock:
            if self.busy:
                raise _overlap()
            new = self.at < 0 or layer < self.at or (layer, part) in self._entered
            if new:
                if self.unfinished:
                    raise _unfinished()
                self._idle()
            self.at = layer
            self._entered.add((layer, part))
            return self.call, new

    def begin(self, layer: int, call: int) -> None:
        """Attention of a layer begins; refuses everything else until `end`."""
        with self._lock:
            if layer in self.stored and call == self.call:
                raise CacheMisuse(
                    f"the keys of layer {layer} were used twice in one call", "Use the stock cache for this model"
                )
            if self.busy or call != self.call:
                raise _overlap()
            self.busy = True

    def end(self, layer: int, stored: bool) -> None:
        """Attention of a layer ended, with or without storing its tokens."""
        with self._lock:
            self.busy = False
            if stored:
                self._store(layer)

    def store(self, layer: int) -> None:
        """A layer took the tokens of the call under way."""
        with self._lock:
            self._store(layer)

    def _store(self, layer: int) -> None:
        self.stored.add(layer)
        if layer == self.last:
            self._idle()

    def _idle(self) -> None:
        self.call += 1
        self.at, self.before = -1, None
        self.stored.clear()
        self.moved.clear()
        self._entered.clear()

    @property
    def unfinished(self) -> bool:
        return bool(self.stored or self.moved)

    def _check(self) -> None:
        if self.busy:
            raise _overlap()
        if self.unfinished:
            raise _unfinished()

    def check(self) -> None:
        """Raise if a call is under way or stopped half-way."""
        with self._lock:
            self._check()

    def hold(self) -> None:
        """Refuse every use until `free`: something else works on the cache's rows."""
        with self._lock:
            self._check()
            self.busy = True

    def free(self) -> None:
        with self._lock:
            self.busy = False
            self._idle()

    def fail(self, moved: set[int], before: Any) -> None:
        """Like `free`, after work that left its tokens in the running states of layers: a call that did not finish."""
        with self._lock:
            self.busy = False
            self._idle()
            self.moved, self.before = set(moved), before

    def clear(self) -> None:
        """Forget the call under way; whatever still runs in it is refused."""
        with self._lock:
            if self.busy:
                raise _overlap()
            self._idle()


def _overlap() -> CacheMisuse:
    return CacheMisuse(
        "one cache is used by two calls at once", "Give every concurrent generation its own cache or fork"
    )


def _unfinished() -> CacheMisuse:
    return CacheMisuse(
        "an earlier call on this cache did not finish, or another is under way",
        "Call cache.rollback() to drop the unfinished tokens, and use one cache per concurrent generation",
    )
