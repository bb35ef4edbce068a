"""Many sessions of one model under one memory budget: shared beginnings once, the least recently used on disk."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvfold.config import PAGE_TOKENS
from kvfold.errors import (
    CacheMisuse,
    InvalidConfig,
    OverBudget,
    SessionError,
    SessionExists,
    SessionNotFound,
    StorageFailed,
)
from kvfold.sessions import archive, fingerprint
from kvfold.sessions.budget import Budget, BudgetedRunner, parse_bytes
from kvfold.sessions.content import Content
from kvfold.sessions.disk import Disk, check_name
from kvfold.sessions.entry import AUTOMATIC, Counts, Entry, Tokens, common_length
from kvfold.sessions.eviction import Eviction, save
from kvfold.sessions.manifest import Manifest
from kvfold.sessions.session import Session

WAYS_BACK = 4  # first and last call and two between: a long prompt's end is shared more often than its middle


class SessionStore:
    """memory: what the caches of all its sessions may take (`8GiB`). disk: folder of sessions that are committed or written
    out; without one, sessions live as long as the store. spare_disk: what sessions without a name of their own may take of
    it. Other arguments as of Runner, whose `ways_back` are where sessions may branch off each other.

    A session that was opened belongs to one caller until it is released. Methods may be called from any thread.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        profile: str = "balanced",
        *,
        memory: int | str = "8GiB",
        disk: str | Path | None = None,
        spare_disk: int | str = "16GiB",
        ways_back: int = WAYS_BACK,
        **options: Any,
    ) -> None:
        limit, spare = parse_bytes(memory), parse_bytes(spare_disk)
        self.disk = Disk(Path(disk)) if disk is not None else None
        self.counts = Counts()
        self.runner = BudgetedRunner(model, tokenizer, profile, ways_back=ways_back, **options)
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._clock = 0
        self._eviction = eviction = Eviction(self._entries, self._lock, self.disk, self.counts, spare)
        self.runner.budget = self.budget = Budget(limit, self.runner, self._lock, self._in_memory, eviction.free_one)
        if self.disk is not None:
            self.disk.claim()
            self._entries.update({name: self._found(self.disk, name) for name in self.disk.names()})

    # Looking

    @property
    def names(self) -> list[str]:
        """Sessions with a name of their own."""
        with self._lock:
            return sorted(n for n, e in self._entries.items() if not e.automatic)

    @property
    def nbytes(self) -> int:
        """Bytes that the sessions in memory take: every slab of pages, and at most what each has besides."""
        return self.budget.nbytes

    def sessions(self) -> list[dict[str, Any]]:
        """One row per session: name, tokens, bytes in memory (shared pages counted in each; of one on the disk, its files)
        and of the same tokens at 16 bits, whether it is in memory, in use, on the disk."""
        per_token = sum(self.runner.layer_reference_bytes)
        with self._lock:
            rows = [{**e.row(), "on_disk": self._saved(e.name)} for e in self._entries.values()]
        return [{**r, "reference_bytes": r["tokens"] * per_token} for r in rows]

    def report(self) -> dict[str, Any]:
        """Sessions and bytes, and counts of what was looked up, found, written out and brought back."""
        with self._lock:
            entries = list(self._entries.values())
            kinds, promised = self.budget.kinds(), self.budget.promised_bytes
        return {
            "memory_bytes": sum(kinds.values()),
            "memory_bytes_by_kind": kinds,
            "memory_reference_bytes": self.budget.reference_bytes,
            "memory_limit_bytes": self.budget.limit,
            "promised_bytes": promised,
            "page_bytes": kinds["pages"],
            "sessions": len(entries),
            "sessions_in_memory": sum(e.session is not None for e in entries),
            "sessions_in_use": sum(e.in_use for e in entries),
            **vars(self.counts),
        }

    def notes(self, name: str) -> dict[str, Any]:
        """What its owner keeps with a session; of one on the disk, without bringing it back. Raises SessionNotFound,
        DamagedSession."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                raise SessionNotFound(f"no session {name!r}", "See the names there are")
            if entry.session is not None:
                return entry.session.notes
        return Manifest.read(self.disk.folder(name)).notes if self.disk is not None else {}

    # Using

    def open(self, name: str) -> Session:
        """The session of that name, brought back if it was written out; a new one if there is none. It is the caller's until
        `release`. Raises CacheMisuse if it is in use, OverBudget, and what Session.load raises."""
        check_name(name)
        with self._lock:
            entry = self._entries.setdefault(name, Entry(name))
            self._take(entry)
        return self._present(entry)

    def longest_prefix(self, tokens: Sequence[int]) -> Session:
        """The longest beginning of `tokens`, short of the last, that any session can be forked at: its end or a checkpoint.
        It goes on as a fresh one fed in calls cut there; empty if there is none. The caller's until `release`."""
        session = self._begun(np.asarray(tokens, np.int32), longest=True)
        self.counts.look_up(len(session.tokens))
        return session

    def admit(self, tokens: Sequence[int], most: int, reuse: bool = True) -> Session:
        """`longest_prefix`, or without `reuse` an empty session, with room promised to go on to `most` tokens: until it is
        released, its calls are not refused. Raises OverBudget if that is more than what other sessions were promised leaves."""
        wanted = np.asarray(tokens, np.int32)
        way = max((e.way(wanted) for e in list(self._entries.values())), default=0) if reuse else 0
        self.budget.check(most, len(wanted), way)
        try:
            return self._promised(self._begun(wanted, longest=reuse), most, len(wanted))
        except (OverBudget, StorageFailed):
            if self.budget.promises or not reuse:
                raise
        # What is shared may lie scattered over slabs that hold little else.
        return self._promised(self._begun(wanted, longest=False), most, len(wanted))

    def _promised(self, session: Session, most: int, prompt: int) -> Session:
        try:
            self.budget.promise(session, most, prompt)
        except BaseException:
            self.discard(session)
            raise
        self.counts.look_up(len(session.tokens))
        return session

    def _begun(self, wanted: Tokens, longest: bool) -> Session:
        """A session in use that begins as `wanted`, or is empty."""
        fork = self._fork_of(wanted) if longest else None
        with self._lock:
            # Where two prompts part, others will: the new session keeps a checkpoint there.
            shared = max((common_length(e.tokens, wanted) for e in self._entries.values()), default=0)
        if fork is None:
            with self.budget.room(sessions=1):
                fork = Session(self.runner)
        fork.landmark = shared
        return self._enter(fork, AUTOMATIC + secrets.token_hex(8))

    def fork(self, session: Session, name: str) -> Session:
        """A fork of a session in use, under a name that is free; in use as well."""
        self._free_name(name)
        with self.budget.room(sessions=1, checkpoints=len(session.checkpoints)):
            return self._enter(session.fork(), name)

    def rename(self, session: Session, name: str) -> None:
        """Give a session in use a name that is free, on the disk, too."""
        with self._lock:
            entry = self._mine(session)
            self._free_name(name)
            if self.disk is not None and self.disk.has(entry.name):
                session.saved = replace(session.saved, folder=self.disk.rename(entry.name, name))
            self._entries[name] = self._entries.pop(entry.name)
            entry.name = session.name = name

    def replace(self, session: Session, name: str) -> None:
        """Give a session in use that has no name of its own this one, instead of the session that had it. The disk keeps
        that until this one is written. Raises CacheMisuse if that one is in use."""
        check_name(name)
        with self._lock:
            entry, old = self._mine(session), self._entries.get(name)
            if not entry.automatic or (old is not None and old.in_use):
                raise CacheMisuse(
                    f"session {name!r} cannot be replaced by {entry.name!r} now", "Fork or release it first"
                )
            self._entries[name] = self._entries.pop(entry.name)
            former, entry.name, session.name, entry.saved = entry.name, name, name, None
        if old is not None and old.session is not None:
            old.session.close()
        if self._saved(former) and self.disk is not None:
            self.disk.remove(former)

    def commit(self, session: Session) -> None:
        """When this returns, the session as it is now is on the disk. Raises StorageFailed."""
        if self.disk is None:
            raise InvalidConfig("this store has no disk folder", "Give it one: SessionStore(..., disk=folder)")
        save(self.disk, self._mine(session))

    def release(self, session: Session) -> None:
        """Give a session back to the store, which may write it out from now on. Sessions without a name of their own that
        this one continues are dropped: nobody will miss them."""
        session.check()
        session.share()
        with self._lock:
            entry = self._mine(session)
            self.budget.forget(session)
            entry.note(session.tokens, {*session.checkpoints, len(session.tokens)}, session.nbytes)
            self._give_back(entry)
            idle = [e for e in self._entries.values() if e is not entry and e.automatic and not e.in_use]
            needless = [self._pop(e.name) for e in idle if entry.continues(e)]
        for e in needless:
            self._erase(e)

    def discard(self, session: Session) -> None:
        """Give up a session in use, as after a call that could not be taken back. What the disk has of it stays."""
        with self._lock:
            entry = self._mine(session)
            self.budget.forget(session)
            entry.session, entry.in_use, entry.saved = None, False, None
            if not self._saved(entry.name):
                del self._entries[entry.name]
        session.close()

    def verify(self, name: str) -> None:
        """Read every byte that the disk has of a session. Raises SessionNotFound, DamagedSession, WrongVersion."""
        if self.disk is None:
            raise SessionNotFound(f"session {name!r} is not on a disk", "Give the store a folder")
        archive.verify(self.disk.folder(name))

    def remove(self, name: str) -> None:
        """Forget a session, in memory and on the disk. Raises SessionNotFound, and CacheMisuse if it is in use."""
        self._erase(self._pop(name))

    def _pop(self, name: str) -> Entry:
        with self._lock:
            if name not in self._entries:
                raise SessionNotFound(f"no session {name!r}", "See the names there are")
            self._take(self._entries[name])
            return self._entries.pop(name)

    def _erase(self, entry: Entry) -> None:
        if entry.session is not None:
            entry.session.close()
        if self.disk is not None and self.disk.has(entry.name):
            self.disk.remove(entry.name)

    def close(self) -> None:
        """Write everything out and let other stores use the folder. Sessions in use are not written: release them before.
        Raises StorageFailed if the disk does not take a session with a name; the others are written all the same."""
        if self.disk is None:
            return
        try:
            while self._eviction.free_one():
                pass
        finally:
            self.disk.give_up()

    def __enter__(self) -> SessionStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Entries

    def _take(self, entry: Entry) -> None:
        if entry.in_use:
            raise CacheMisuse(f"session {entry.name!r} is in use", "Release it first, or fork it")
        self._clock += 1
        entry.in_use, entry.used = True, self._clock

    def _give_back(self, entry: Entry) -> None:
        self._clock += 1
        entry.in_use, entry.used = False, self._clock

    def _mine(self, session: Session) -> Entry:
        with self._lock:
            entry = self._entries.get(session.name)
        if entry is None or entry.session is not session or not entry.in_use:
            raise CacheMisuse(f"session {session.name!r} was not opened in this store", "Open it first")
        return entry

    def _enter(self, session: Session, name: str) -> Session:
        session.name = name
        with self._lock:
            self._entries[name] = entry = Entry(name, session)
            self._take(entry)
        return session

    def _free_name(self, name: str) -> None:
        if check_name(name) in self._entries:
            raise SessionExists(f"there is a session {name!r} already", "Use another name, or remove it first")

    def _present(self, entry: Entry) -> Session:
        """The session of an entry that was taken, in memory."""
        try:
            if entry.session is None:
                entry.session = self._bring_back(entry.name)
                entry.session.name = entry.name
                if self._saved(entry.name):
                    entry.saved = entry.unsaved()
            return entry.session
        except BaseException:
            with self._lock:
                entry.in_use = False
                if not self._saved(entry.name):
                    self._entries.pop(entry.name, None)
            raise

    def _fork_of(self, wanted: Tokens) -> Session | None:
        """The best fork that can be made; sessions that are damaged, or too large to be brought back now, are passed over."""
        failed: set[str] = set()
        while True:
            with self._lock:
                there = [(e.way(wanted), e) for e in self._entries.values() if e.name not in failed]
                length, entry = max(there, key=lambda x: x[0], default=(0, None))
                if entry is None or length == 0:
                    return None
                if mine := not entry.in_use:
                    self._take(entry)
            try:
                fork = self._fork(entry, length)
            except SessionError:
                fork = None
            finally:
                if mine:
                    self._give_back(entry)
            if fork is not None:
                return fork
            failed.add(entry.name)

    def _fork(self, entry: Entry, length: int) -> Session | None:
        """From memory, or straight from the disk, where the session itself then stays."""
        if entry.session is not None:
            with self.budget.room(sessions=1):
                return entry.session.prefix(length)
        return self._read(self.disk.folder(entry.name), length) if self.disk is not None else None

    # Memory

    def _in_memory(self) -> list[Session]:
        return [e.session for e in self._entries.values() if e.session is not None]

    # The disk

    def _saved(self, name: str) -> bool:
        return self.disk is not None and self.disk.has(name)

    def _found(self, disk: Disk, name: str) -> Entry:
        """A session on the disk. One that cannot be read keeps its name, and `open` says why; nothing is forked from it."""
        entry = Entry(name)
        try:
            made = Manifest.read(disk.folder(name))
            fingerprint.check(made.model, self.runner.fingerprint)
            if made.spec == self.runner.spec:
                ways = [x.length for x in (*made.checkpoints, made.state)]
                entry.note(Content.tokens_of(disk.folder(name), made), ways, disk.bytes(name))
        except SessionError:
            return entry
        return entry

    def _bring_back(self, name: str) -> Session:
        if self.disk is not None and self.disk.has(name):
            return self._read(self.disk.folder(name))
        with self.budget.room(sessions=1):
            return Session(self.runner)

    def _read(self, folder: Path, upto: int | None = None) -> Session:
        made = Manifest.read(folder) if upto is None else Manifest.read(folder).upto(upto)
        pages, checkpoints = -(-made.state.folded // PAGE_TOKENS), len(made.checkpoints)
        # A checkpoint is restored whole and then made compact.
        with self.budget.room(pages, sessions=1 + min(1, checkpoints), checkpoints=checkpoints):
            session = Session.restored(self.runner, folder, upto=upto)
        self.counts.brought_back += 1
        return session
