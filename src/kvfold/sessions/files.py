"""Files that are whole or not there: written beside, synced, renamed; the folder synced after."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError
from torch import Tensor

from kvfold.errors import SessionNotFound, StorageFailed

TEMPORARY = ".tmp"  # ending of files that are being written; a killed process leaves them, the next save removes them
# safetensors writes beside the path it is given, under a name of its own, and renames.
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


def is_temporary(name: str) -> bool:
    """Whether a file of this name is one whose writer was killed, if nobody writes now."""
    return name.endswith(TEMPORARY) or bool(_OF_SAFETENSORS.fullmatch(name))


def bytes_of(x: Tensor) -> memoryview:
    """A tensor's bytes, in its order, on the CPU; its own memory where that is possible."""
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def digest(*parts: bytes | memoryview) -> str:
    """XXH3, 128 bits, of the parts one after the other; 32 hex digits, most significant first."""
    h = xxhash.xxh3_128()
    for part in parts:
        h.update(part)
    return h.hexdigest()


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turns what the system says against writing into StorageFailed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise StorageFailed(
            f"{path} could not be written: {reason}",
            "Free space on the disk, or check its permissions; what was saved before is whole",
        ) from error


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """`fill` writes a file at the path it is given; afterwards the bytes are on the disk under `path`, or nothing changed.

    The name itself lasts once the folder is synced.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        fill(temporary)
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Make the bytes of a file, or the names in a folder, last."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(folder: Path, alone: bool) -> Iterator[None]:
    """Hold a folder against other processes and threads: `alone` to write, together with others to read.

    The lock ends with the process that holds it. Raises SessionNotFound if the folder is gone.
    """
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SessionNotFound(f"no session at {folder}", "Check the name: kvfold sessions ls") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)
