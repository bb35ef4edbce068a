"""Files of a session: pages with a checksum each, and states. Needs torch and safetensors, no model and no transformers.

A page file holds whole pages of every folded layer in canonical byte order, and the tokens they were made of. A state file holds
what lies outside pages. Neither is ever changed once it has its name.
"""

from __future__ import annotations

import copy
import json
import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.config import PAGE_TOKENS
from kvfold.errors import DamagedSession
from kvfold.sessions import files
from kvfold.sessions.manifest import Layer, Segment, State

CHECKSUM_BYTES = 16
Tensors = dict[str, Tensor]


def checksum(page: Tensor) -> bytes:
    """XXH3, 128 bits, of a page's bytes on the CPU."""
    return xxhash.xxh3_128_digest(files.bytes_of(page))


def _index(tensors: Tensors) -> str:
    """Digest of everything in a page file but the pages, which have checksums in it."""
    parts: list[bytes | memoryview] = []
    for name, x in sorted(tensors.items()):
        if not name.endswith(".pages"):
            kind = str(x.dtype).removeprefix("torch.")
            parts += [f"{name} {kind} {list(x.shape)}\n".encode(), files.bytes_of(x)]
    return files.digest(*parts)


def write_pages(folder: Path, first: int, tokens: Tensor, pages: dict[int, Tensor], rest: Tensors) -> Segment:
    """Write pages first .. first + n - 1 of a session.

    tokens: int32 [n * 128]. pages: layer -> canonical pages uint8 [n, page_bytes], on the CPU. rest: what else belongs to
    them, by name: sinks and frozen codec states, with page 0. Raises StorageFailed; the folder must then be synced by the caller.
    """
    count = len(tokens) // PAGE_TOKENS
    tensors = {"tokens": tokens, **rest}
    for i, rows in pages.items():
        sums = np.frombuffer(b"".join(checksum(row) for row in rows), dtype=np.uint8).reshape(count, CHECKSUM_BYTES)
        tensors |= {f"layers.{i}.pages": rows, f"layers.{i}.checksums": torch.from_numpy(sums.copy())}
    index = _index(tensors)
    name = f"pages-{first:08d}-{count:08d}-{index[:16]}.safetensors"
    with files.storing(folder / name):
        files.write(folder / name, lambda path: save_file(tensors, path))
    return Segment(name, first, count, count, index)


class PageFile:
    """A page file that agrees with its manifest, pages aside; of its index a beginning is enough. Raises DamagedSession."""

    def __init__(self, folder: Path, segment: Segment, layers: list[Layer]) -> None:
        self.segment = segment
        tensors = _tensors(folder / segment.file)
        n = segment.stored
        want: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"tokens": ((n * PAGE_TOKENS,), torch.int32)}
        for i, x in enumerate(layers):
            if x.kind == "folded":
                want[f"layers.{i}.pages"] = ((n, x.page_bytes), torch.uint8)
                want[f"layers.{i}.checksums"] = ((n, CHECKSUM_BYTES), torch.uint8)
        there = {name: (tuple(x.shape), x.dtype) for name, x in tensors.items()}
        if not want.items() <= there.items() or not _index(tensors).startswith(segment.index):
            raise DamagedSession.at(f"{segment.file} does not agree with the manifest", 0)
        self.tokens = tensors["tokens"][: segment.pages * PAGE_TOKENS]
        self._tensors = tensors

    def shortened(self, pages: int) -> PageFile:
        """The same file, of which only the first `pages` pages count."""
        other = copy.copy(self)
        other.segment = replace(self.segment, pages=pages)
        other.tokens = self.tokens[: pages * PAGE_TOKENS]
        return other

    def rest(self, layer: int) -> Tensors:
        """What else belongs to the pages of a layer; see write_pages."""
        head = f"layers.{layer}."
        own = {n.removeprefix(head): x for n, x in self._tensors.items() if n.startswith(head)}
        return {n: x for n, x in own.items() if n not in ("pages", "checksums")}

    def pages(self, layer: int, use: Callable[[Tensor, bytes], object]) -> int:
        """Hand the pages of a layer, one by one, to `use(bytes, checksum)` for as long as they are whole.

        Returns how many were. The bytes are a view of the mapped file.
        """
        rows, sums = self._tensors[f"layers.{layer}.pages"], self._tensors[f"layers.{layer}.checksums"].numpy()
        for n in range(self.segment.pages):
            if checksum(rows[n]) != (known := sums[n].tobytes()):
                return n
            use(rows[n], known)
        return self.segment.pages


def write_state(folder: Path, length: int, folded: int, tensors: Tensors, numbers: dict[str, Any]) -> State:
    """Write what is not in pages; see State. numbers: plain values by layer. Raises StorageFailed."""
    draft = folder / f"state{files.TEMPORARY}"
    with files.storing(draft):
        # Its name holds its digest, so it is known only afterwards.
        try:
            save_file(tensors, draft, metadata={"numbers": json.dumps(numbers, sort_keys=True)})
            known = _digest(draft)
            name = f"state-{length:010d}-{known[:16]}.safetensors"
            files.write(folder / name, draft.rename)
        finally:
            draft.unlink(missing_ok=True)
    return State(name, length, folded, known)


def read_state(folder: Path, state: State) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and numbers of a state file. Raises DamagedSession."""
    path = folder / state.file
    try:
        if _digest(path) != state.digest:
            raise DamagedSession.at(f"{state.file} does not agree with its checksum", 0)
        with safe_open(path, framework="pt") as file:
            numbers = json.loads((file.metadata() or {})["numbers"])
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise DamagedSession.at(f"{state.file} cannot be read ({error})", 0) from error
    return _tensors(path), numbers


def _tensors(path: Path) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise DamagedSession.at(f"{path.name} cannot be read ({error})", 0) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return files.digest(memoryview(content))
