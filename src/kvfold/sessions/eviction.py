"""Memory freed by writing sessions out, coldest first; and by forgetting those nobody named, where there is no room to write."""

from __future__ import annotations

import threading

from kvfold.errors import SessionError, StorageFailed
from kvfold.sessions.disk import Disk
from kvfold.sessions.entry import Counts, Entry


def save(disk: Disk, entry: Entry) -> None:
    """Write what the disk does not have yet of a session that is taken. Raises StorageFailed."""
    if entry.session is not None and (state := entry.unsaved()) is not None:
        entry.session.save(disk.folder(entry.name))
        entry.saved = state


class Eviction:
    """entries, lock, counts: the store's. spare_disk: bytes that sessions without a name of their own may take of the disk."""

    def __init__(
        self, entries: dict[str, Entry], lock: threading.RLock, disk: Disk | None, counts: Counts, spare_disk: int
    ) -> None:
        self._entries, self._lock, self._disk, self._counts = entries, lock, disk, counts
        self._spare_disk = spare_disk

    def free_one(self) -> bool:
        """Write out, or without a disk forget, the session that was not used for longest. False if none can go.

        Where the disk takes no more, sessions without a name are forgotten and others stay; StorageFailed if only those are left.
        """
        failed: StorageFailed | None = None
        stay: set[str] = set()
        while (entry := self._coldest(stay)) is not None:
            try:
                kept = self._written(entry)
            except BaseException as error:
                entry.in_use = False
                if not isinstance(error, StorageFailed):
                    raise
                failed = error
                stay.add(entry.name)
                continue
            self._let_go(entry, kept)
            return True
        if failed is not None:
            raise failed
        return False

    def _coldest(self, stay: set[str]) -> Entry | None:
        """The session in memory that was not used for longest and may go, taken; None if there is none."""
        with self._lock:
            idle = [e for e in self._entries.values() if e.session is not None and not e.in_use and e.name not in stay]
            can_go = [e for e in idle if self._disk is not None or e.automatic]
            if not can_go:
                return None
            entry = min(can_go, key=lambda e: e.used)
            entry.in_use = True
        return entry

    def _written(self, entry: Entry) -> bool:
        """Whether the disk has it now. Raises StorageFailed for a session that must not be forgotten."""
        if self._disk is None:
            return False
        try:
            save(self._disk, entry)
        except StorageFailed:
            if not entry.automatic:
                raise
            return False
        self._counts.written_out += 1
        return True

    def _let_go(self, entry: Entry, kept: bool) -> None:
        """Free the memory of a session that was taken. kept: on the disk; else it is forgotten."""
        with self._lock:
            session, entry.session, entry.in_use = entry.session, None, False
            if not kept:
                del self._entries[entry.name]
                self._counts.dropped += 1
        if session is not None:
            session.close()
        if self._disk is None:
            return
        if kept:
            self._spare(self._disk)
        elif self._disk.has(entry.name):  # as of an earlier save
            self._disk.remove(entry.name)

    def _spare(self, disk: Disk) -> None:
        """Remove the oldest sessions without a name of their own from a disk that has too much of them."""
        with self._lock:
            idle = [e for e in self._entries.values() if e.automatic and not e.in_use and e.session is None]
        taken = 0
        for e in sorted(idle, key=lambda e: -e.used):
            taken += _bytes(disk, e)
            if taken > self._spare_disk:
                with self._lock:
                    if e.in_use or e.session is not None:
                        continue
                    self._entries.pop(e.name, None)
                if disk.has(e.name):
                    disk.remove(e.name)
                self._counts.dropped += 1


def _bytes(disk: Disk, entry: Entry) -> int:
    """What it takes of the disk; nothing if its folder was damaged or removed by somebody else."""
    try:
        return disk.bytes(entry.name)
    except SessionError:
        return 0
