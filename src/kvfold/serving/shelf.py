"""Where the sessions of requests come from and go to: a store, in which prompts find what was read before."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvfold.errors import CacheMisuse, InvalidConfig, SessionNotFound
from kvfold.serving.prompts import Message
from kvfold.sessions.disk import check_name
from kvfold.sessions.entry import AUTOMATIC
from kvfold.sessions.session import Session
from kvfold.sessions.store import SessionStore

MESSAGES = "messages"  # key of a session's notes


@dataclass(frozen=True)
class Keep:
    """memory: what the caches of all sessions may take. disk: folder that sessions are saved and written out to; None: they
    live as long as the model. spare_disk: what sessions without a name may take of it. watch: one folded page in so many is
    compared with its exact tokens; 0 for none."""

    memory: int | str = "4GiB"
    disk: Path | str | None = None
    spare_disk: int | str = "16GiB"
    watch: int = 64

    def store(self, model: Any, tokenizer: Any, profile: str, call_tokens: int) -> SessionStore:
        return SessionStore(
            model,
            tokenizer,
            profile,
            memory=self.memory,
            disk=self.disk,
            spare_disk=self.spare_disk,
            call_tokens=call_tokens,
            watch=self.watch,
        )


@dataclass(frozen=True)
class Place:
    """The session that is to hold a prompt and its answer, and the messages the prompt was made of."""

    name: str
    messages: Sequence[Message] = ()

    def __post_init__(self) -> None:
        if check_name(self.name).startswith(AUTOMATIC):
            raise InvalidConfig(f"names that begin with {AUTOMATIC} are given to sessions without one", "Use another")


class Shelf:
    """Everything but `rows`, `need` and `limit` is called from the model's thread: `Scheduler.call` gets there from others."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store

    # For requests

    def open(self, tokens: Sequence[int], most: int, reuse: bool = True) -> Session:
        """A session of the request's own that holds a beginning of `tokens`, all but one of them at most, with room to go on
        to `most`; an empty one without `reuse`. What it was forked from stays as it is, so that a request which comes to nothing
        costs nothing. Raises OverBudget if there is no room while others have theirs, StorageFailed if the disk refuses to
        make some."""
        return self.store.admit(tokens, most, reuse)

    def need(self, tokens: int, prompt: int) -> int:
        """Bytes that a request takes at most, alone: its prompt, and its answer up to `tokens` in all. From any thread."""
        return self.store.budget.need(tokens, prompt)

    @property
    def limit(self) -> int:
        """Bytes that all may take."""
        return self.store.budget.limit

    def close(self, session: Session, place: Place | None, answer: str) -> None:
        """Take it back, under the name it is to have. What was of that name is forgotten."""
        try:
            session.check()
        except CacheMisuse:  # a call failed and could not be taken back
            self.discard(session)
            return
        session.notes = {}
        if place is not None:
            if place.messages:
                session.notes[MESSAGES] = [*place.messages, {"role": "assistant", "content": answer}]
            self.store.replace(session, place.name)
        self.store.release(session)

    def discard(self, session: Session) -> None:
        """Give up a session whose state is not known."""
        self.store.discard(session)

    # For people

    def rows(self) -> list[dict[str, Any]]:
        """Sessions with a name, see SessionStore.sessions; `ratio` is 16 bits over what it takes."""
        named = sorted(
            (r for r in self.store.sessions() if not r["name"].startswith(AUTOMATIC)), key=lambda r: r["name"]
        )
        return [{**r, "ratio": r["reference_bytes"] / r["bytes"] if r["bytes"] else 0.0} for r in named]

    def row(self, name: str) -> dict[str, Any]:
        """Raises SessionNotFound."""
        for row in self.rows():
            if row["name"] == name:
                return row
        raise SessionNotFound(f"no session {check_name(name)!r}", "See the names there are")

    def messages(self, name: str) -> list[Message]:
        """Those its prompt was made of, and the answer; empty if it was made of plain text."""
        self.row(name)
        return list(self.store.notes(name).get(MESSAGES, ()))

    def save(self, name: str) -> dict[str, Any]:
        """When this returns, the session is on the disk. Raises SessionNotFound, StorageFailed, InvalidConfig without disk."""
        if self.row(name)["in_memory"] or self.store.disk is None:  # what was written out is there
            with self._opened(name) as session:
                self.store.commit(session)
        return self.row(name)

    def restore(self, name: str) -> dict[str, Any]:
        """Go back to what was saved. Raises SessionNotFound if nothing was, DamagedSession, which leaves what is in memory,
        WrongModel."""
        if not self.row(name)["on_disk"]:
            raise SessionNotFound(f"session {name!r} was never saved", "Save it first")
        self.store.verify(name)
        self.store.discard(self.store.open(name))
        with self._opened(name):
            return self.row(name)

    def fork(self, name: str, to: str) -> dict[str, Any]:
        """Raises SessionExists, SessionNotFound, OverBudget."""
        with self._opened(name) as session:
            self.store.release(self.store.fork(session, Place(to).name))
        return self.row(to)

    def copy(self, name: str, to: str) -> dict[str, Any]:
        """`fork` in the place of another session, if there is one."""
        with self._opened(name) as session:
            copy = self.store.fork(session, AUTOMATIC + secrets.token_hex(8))
            try:
                self.store.replace(copy, Place(to).name)
            finally:
                self.store.release(copy)
        return self.row(to)

    def remove(self, name: str) -> dict[str, Any]:
        """In memory and on the disk; what it was. Raises SessionNotFound."""
        row = self.row(name)
        self.store.remove(name)
        return row

    @contextmanager
    def _opened(self, name: str) -> Iterator[Session]:
        self.row(name)
        session = self.store.open(name)
        try:
            yield session
        finally:
            self.store.release(session)
