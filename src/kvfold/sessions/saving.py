"""A session to its folder: what is new is appended, then the manifest is replaced, then what it no longer names goes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvfold.adapters.hf_layers import FoldedHybridLayer, FoldedIndexedLayer
from kvfold.adapters.hf_state import numbers_of, tensors_of
from kvfold.adapters.hf_transformers import FoldedCache, FoldedLayer
from kvfold.config import PAGE_TOKENS
from kvfold.errors import SessionExists
from kvfold.sessions import files, manifest
from kvfold.sessions.manifest import Layer, Manifest, Segment, State
from kvfold.sessions.segments import Tensors, write_pages, write_state

if TYPE_CHECKING:
    from kvfold.sessions.session import Session

SEGMENT_BYTES = 64 << 20  # of pages in one file; also what a save holds in memory at a time


@dataclass
class Saved:
    """What of a session lies in files: its leading pages and its checkpoints. The files are of one folder."""

    folder: Path = Path()
    segments: list[Segment] = field(default_factory=list)
    checkpoints: dict[int, State] = field(default_factory=dict)

    def upto(self, tokens: int) -> Saved:
        """What of it is of the first `tokens` tokens. Caches know themselves which pages are still as they were."""
        return replace(self, checkpoints={n: x for n, x in self.checkpoints.items() if n <= tokens})


def save(session: Session, folder: Path) -> Saved:
    """Write a session to a folder of its own; nothing is lost of what was there until all of it is replaced.

    Appends what is new if the session was saved or loaded before. Raises SessionExists if the folder holds something else,
    StorageFailed if the system refuses.
    """
    with files.storing(folder):
        fresh = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            files.sync(folder.parent)
        with files.locked(folder, alone=True), _held(session.cache):
            _refuse_foreign(folder)
            try:
                made = _write(session, folder)
            except BaseException:
                _abandon(folder)
                raise
            clean(folder, made.files)
    for layer in session.cache.folded_layers:
        layer.folded.sequences[0].mark()
    return Saved(folder, made.segments, {x.length: x for x in made.checkpoints})


@contextmanager
def _held(cache: FoldedCache) -> Iterator[None]:
    cache.guard.hold()
    try:
        yield
    finally:
        cache.guard.free()


def _refuse_foreign(folder: Path) -> None:
    others = [p.name for p in folder.iterdir() if not _ours(p.name)]
    if others:
        raise SessionExists(f"{folder} is not a session: it holds {others[0]}", "Name another folder")


def _ours(name: str) -> bool:
    return name == manifest.NAME or files.is_temporary(name) or bool(manifest.FILE_NAME.fullmatch(name))


def _abandon(folder: Path) -> None:
    """Free what a save that failed has written: a full disk needs it."""
    if (folder / manifest.NAME).exists():
        clean(folder, Manifest.read(folder).files)
    else:
        shutil.rmtree(folder)


def clean(folder: Path, keep: set[str]) -> None:
    """Remove files of ours that the manifest does not name."""
    for path in folder.iterdir():
        if _ours(path.name) and path.name not in keep | {manifest.NAME}:
            path.unlink(missing_ok=True)


def _write(session: Session, folder: Path) -> Manifest:
    cache = session.cache
    layers = [describe(x) for x in cache.layers]
    segments = _kept(session, folder)
    segments += _append(session, folder, _absorb(segments, _pages(cache), layers))
    made = Manifest(
        spec=cache.spec,
        profile=cache.profile,
        layers=layers,
        model=session.runner.fingerprint,
        segments=segments,
        state=_state(folder, cache, session.tokens),
        checkpoints=_checkpoints(session, folder),
        sampler=session.sampler.state(),
        notes=session.notes,
    )
    files.sync(folder)
    made.write(folder)
    files.sync(folder)
    return made


def describe(layer: Any) -> Layer:
    """A layer as manifests tell it."""
    if not isinstance(layer, FoldedLayer):
        return Layer(type(layer).__name__)
    heads, dim, dtype, _ = layer.folded.shape
    value_dim = layer.folded.value_dim if layer.folded.value_dim != dim else 0
    return Layer("folded", heads, dim, str(dtype).removeprefix("torch."), layer.folded.canonical_page_bytes, value_dim)


def _pages(cache: FoldedCache) -> int:
    return max((len(x.folded.sequences[0].pages) for x in cache.folded_layers), default=0)


def _kept(session: Session, folder: Path) -> list[Segment]:
    """Segments of earlier saves that still hold, as long as their files are there or can be linked to."""
    unchanged = min((x.folded.sequences[0].unchanged for x in session.cache.folded_layers), default=0)
    out: list[Segment] = []
    for s in session.saved.segments:
        if s.first >= unchanged or not _adopt(session.saved.folder / s.file, folder / s.file):
            break
        out.append(replace(s, pages=min(s.pages, unchanged - s.first)))
    return out


def _adopt(file: Path, target: Path) -> bool:
    """Have a file of another session in this folder, too: the same blocks of the disk where it can be, else a copy."""
    if target.exists():
        return True
    try:
        os.link(file, target)
    except FileNotFoundError:
        return False
    except OSError:
        # Another file system, or one without links.
        files.write(target, lambda path: shutil.copyfile(file, path))
    return True


def _absorb(segments: list[Segment], pages: int, layers: list[Layer]) -> range:
    """Pages to write. Takes off the list what is smaller than the new part, or mostly trimmed away, so that files stay few:
    a page is rewritten at most once for each doubling of the files' size."""
    limit = max(1, SEGMENT_BYTES // max(1, sum(x.page_bytes for x in layers)))
    start = sum(s.pages for s in segments)
    while segments and start < pages:
        last = segments[-1]
        if last.pages * 2 > last.stored and (last.pages > pages - start or last.pages >= limit):
            break
        start = segments.pop().first
    return range(start, pages)


def _append(session: Session, folder: Path, pages: range) -> Iterator[Segment]:
    cache = session.cache
    column = sum(x.folded.canonical_page_bytes for x in cache.folded_layers)
    step = max(1, SEGMENT_BYTES // max(1, column))
    for first in range(pages.start, pages.stop, step):
        count = min(step, pages.stop - first)
        rows = {i: _canonical(x, first, count) for i, x in _folded(cache)}
        tokens = torch.zeros(count * PAGE_TOKENS, dtype=torch.int32)
        own = session.tokens[first * PAGE_TOKENS : (first + count) * PAGE_TOKENS]
        tokens[: len(own)] = torch.tensor(own, dtype=torch.int32)
        yield write_pages(folder, first, tokens, rows, _beside_page_0(cache) if first == 0 else {})


def _folded(cache: FoldedCache) -> list[tuple[int, FoldedLayer]]:
    return [(i, x) for i, x in enumerate(cache.layers) if isinstance(x, FoldedLayer)]


def _canonical(layer: FoldedLayer, first: int, count: int) -> Tensor:
    s, out = layer.folded.sequences[0], torch.empty(count, layer.folded.canonical_page_bytes, dtype=torch.uint8)
    for row, page in zip(out, s.pages[first : first + count], strict=True):
        row.copy_(layer.folded.canonical(page))
    return out


def _beside_page_0(cache: FoldedCache) -> Tensors:
    """Sinks and frozen codec states: they are settled when page 0 is folded."""
    out: Tensors = {}
    for i, x in _folded(cache):
        s = x.folded.sequences[0]
        parts = {"sink_keys": s.sinks_k, "sink_values": s.sinks_v, "state_keys": s.state[0], "state_values": s.state[1]}
        out |= {f"layers.{i}.{name}": t.detach().cpu().contiguous() for name, t in parts.items() if t is not None}
    return out


def _state(folder: Path, cache: FoldedCache, tokens: list[int]) -> State:
    tensors: Tensors = {}
    numbers: dict[str, Any] = {}
    folded = max((x.folded.sequences[0].folded for x in cache.folded_layers), default=0)
    length = cache.get_seq_length()
    for i, x in enumerate(cache.layers):
        own: Tensors = {}
        if isinstance(x, FoldedLayer):
            k, v = x.folded.sequences[0].exact()
            own = {"keys": k, "values": v}
        if not isinstance(x, FoldedLayer) or isinstance(x, FoldedHybridLayer | FoldedIndexedLayer):
            own, numbers[str(i)] = {**own, **tensors_of(x)}, numbers_of(x)
        tensors |= {f"layers.{i}.{name}": t.detach().cpu().contiguous() for name, t in own.items()}
    tensors["tokens"] = torch.tensor(tokens[folded // PAGE_TOKENS * PAGE_TOKENS : length], dtype=torch.int32)
    return write_state(folder, length, folded, tensors, numbers)


def _checkpoints(session: Session, folder: Path) -> list[State]:
    """Checkpoints are written once."""
    out = []
    for length, cache in sorted(session.checkpoints.items()):
        known = session.saved.checkpoints.get(length)
        if known is None or not _adopt(session.saved.folder / known.file, folder / known.file):
            known = _state(folder, cache, session.tokens)
        out.append(known)
    return out
