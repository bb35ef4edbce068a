"""Folders of sessions as wholes: look at one, verify, remove, make one file of it and a folder of that file."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

from kvfold.config import PAGE_TOKENS
from kvfold.errors import DamagedSession, SessionExists, SessionNotFound
from kvfold.sessions import files, manifest
from kvfold.sessions.content import Content
from kvfold.sessions.manifest import Manifest

EPOCH = (1980, 1, 1, 0, 0, 0)  # of all files in an archive: the same session makes the same bytes


def info(folder: Path) -> dict[str, Any]:
    """What a session's manifest says, and its size on the disk. Raises SessionNotFound, DamagedSession, WrongVersion."""
    with files.locked(folder, alone=False):
        made = Manifest.read(folder)
        sizes = {name: _size(folder / name) for name in made.files}
        when = (folder / manifest.NAME).stat().st_mtime
    layers = [made.layers[i] for i in made.folded_layers]
    values = sum(x.kv_heads * sum(x.dims) * PAGE_TOKENS for x in layers)
    pages = -(-made.state.folded // PAGE_TOKENS)
    return {
        "tokens": made.state.length,
        "folded_tokens": made.state.folded,
        "profile": made.profile,
        "disk_bytes": sum(sizes.values()) + _size(folder / manifest.NAME),
        "page_bytes": pages * sum(x.page_bytes for x in layers),
        "bits_per_value": 8 * sum(x.page_bytes for x in layers) / values if values else 0.0,
        "files": len(sizes) + 1,
        "layers": len(made.layers),
        "folded_layers": len(layers),
        "checkpoints": [x.length for x in made.checkpoints],
        "saved": when,
        "version": made.version,
        "writer": made.writer,
        "model": {k: v for k, v in made.model.items() if k != "config"},
        "architecture": made.model.get("config", {}).get("model_type", ""),
        "sampler": made.sampler,
        "notes": made.notes,
    }


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise DamagedSession.at(f"{path.name} is missing", 0) from error


def verify(folder: Path) -> dict[str, Any]:
    """Read every byte of a session. Raises DamagedSession, which says how many tokens are whole."""
    with files.locked(folder, alone=False):
        made = Manifest.read(folder)
        content = Content.of(folder, made, lambda layer, row, digest: None)
        content.check()
    return {"tokens": made.state.length, "pages": sum(content.pages.values()), "files": len(made.files), "whole": True}


def remove(folder: Path) -> None:
    """Delete a session. Once its manifest is gone, it does not exist."""
    with files.storing(folder), files.locked(folder, alone=True):
        (folder / manifest.NAME).unlink(missing_ok=True)
        files.sync(folder)
        shutil.rmtree(folder)
        files.sync(folder.parent)


def export(folder: Path, target: Path) -> None:
    """Make one file of a session: an uncompressed zip of the files its manifest names. Raises SessionExists."""
    if target.exists():
        raise SessionExists(f"{target} exists", "Name another file")
    with files.locked(folder, alone=False):
        names = [manifest.NAME, *sorted(Manifest.read(folder).files)]

        def fill(path: Path) -> None:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
                for name in names:
                    entry = zipfile.ZipInfo(name, EPOCH)
                    with (folder / name).open("rb") as source, out.open(entry, "w", force_zip64=True) as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)

        with files.storing(target):
            files.write(target, fill)
            files.sync(target.parent)


def import_(source: Path, folder: Path) -> None:
    """Make a folder of an exported session and verify it. Raises SessionExists, SessionNotFound and DamagedSession."""
    if folder.exists():
        raise SessionExists(f"{folder} exists", "Name another folder, or remove that session first")
    draft = folder.with_name(folder.name + files.TEMPORARY)
    with files.storing(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            _unpack(source, draft)
            verify(draft)
            files.sync(draft)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        files.sync(folder.parent)


def _unpack(source: Path, draft: Path) -> None:
    """Only files that a session can have, and only stored ones: nothing grows, nothing leaves the folder."""
    try:
        with zipfile.ZipFile(source) as archive:
            for entry in archive.infolist():
                known = entry.filename == manifest.NAME or manifest.FILE_NAME.fullmatch(entry.filename)
                if not known or entry.compress_type != zipfile.ZIP_STORED:
                    raise DamagedSession.at(f"{source} holds {entry.filename[:80]!r}, which is not of a session", 0)
                with archive.open(entry) as packed, (draft / entry.filename).open("xb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
    except FileNotFoundError as error:
        raise SessionNotFound(f"no file {source}", "Give a file that `kvfold sessions export` made") from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, FileExistsError) as error:
        raise DamagedSession.at(f"{source} cannot be unpacked ({error})", 0) from error
    for path in draft.iterdir():
        files.sync(path)
