"""A folder of saved sessions, one folder each, and their names. No name leaves it."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from kvfold.errors import InvalidConfig, SessionExists
from kvfold.sessions import archive, files
from kvfold.sessions.manifest import NAME as MANIFEST

SESSION_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def default_folder() -> Path:
    """Where the command line and the server keep sessions if not told: KVFOLD_SESSIONS, or the user's data folder."""
    if chosen := os.environ.get("KVFOLD_SESSIONS"):
        return Path(chosen)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "kvfold" / "sessions"


def check_name(name: str) -> str:
    """The name, if a session can have it. Raises InvalidConfig."""
    if not _good(name):
        raise InvalidConfig(
            f"{name[:100]!r} is not a session's name", "Use up to 100 letters, digits, dots, dashes and underscores"
        )
    return name


def _good(name: str) -> bool:
    return SESSION_NAME.fullmatch(name) is not None and not name.endswith(files.TEMPORARY)


class Disk:
    """Nothing is created before it is written to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._claimed: int | None = None

    def folder(self, name: str) -> Path:
        return self.root / check_name(name)

    def has(self, name: str) -> bool:
        return (self.folder(name) / MANIFEST).is_file()

    def names(self) -> list[str]:
        there = self.root.iterdir() if self.root.is_dir() else []
        return sorted(p.name for p in there if _good(p.name) and (p / MANIFEST).is_file())

    def bytes(self, name: str) -> int:
        return int(archive.info(self.folder(name))["disk_bytes"])

    def rename(self, old: str, new: str) -> Path:
        """Raises StorageFailed."""
        with files.storing(self.folder(new)):
            self.folder(old).rename(self.folder(new))
            files.sync(self.root)
        return self.folder(new)

    def remove(self, name: str) -> None:
        archive.remove(self.folder(name))

    def claim(self) -> None:
        """Hold the folder against other stores, until `give_up` or the end of the process.

        Raises SessionExists if one holds it, StorageFailed.
        """
        with files.storing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            raise SessionExists(
                f"another store uses {self.root}", "Stop that process, or use another folder"
            ) from error
        self._claimed = fd

    def give_up(self) -> None:
        if self._claimed is not None:
            os.close(self._claimed)
            self._claimed = None
