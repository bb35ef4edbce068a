"""A folder of prompts' pages that is searched by tokens: page files (FORMAT.md), each under a name for the tokens before it.

Files form a tree. The pages that follow the first n tokens of a prompt lie in the folder named by the digest of these n
tokens, so the longest known beginning of a prompt is found by a walk from the folder of no tokens. Files are never changed
and have names of their own, so any number of processes may read and add at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, from_numpy

from kvfold.config import PAGE_TOKENS
from kvfold.errors import DamagedSession
from kvfold.sessions import files
from kvfold.sessions.manifest import Layer, Segment
from kvfold.sessions.segments import PageFile, Tensors, write_pages


@dataclass(frozen=True)
class Piece:
    """The first `pages` pages of a file; the first of them is page `first` of the prompt."""

    file: PageFile
    first: int
    pages: int

    @property
    def tokens(self) -> int:
        """Tokens of the prompt up to the end of this piece."""
        return (self.first + self.pages) * PAGE_TOKENS

    @property
    def whole(self) -> bool:
        """Whether these are all pages that were written to the file."""
        return self.pages == self.file.segment.stored


class PrefixFolder:
    """layers: of the pages, in order, as a session's manifest has them."""

    def __init__(self, folder: Path, layers: list[Layer]) -> None:
        self.folder, self.layers = folder, layers
        self._files: dict[Path, PageFile | None] = {}  # None: damaged

    def find(self, tokens: Sequence[int], pages: int) -> list[Piece]:
        """The longest known beginning of `tokens`, of at most `pages` pages, in pieces that follow one another.

        A page counts if it and everything before it is whole.
        """
        ids = np.asarray(tokens[: pages * PAGE_TOKENS], np.int32)
        found: list[Piece] = []
        first = 0
        while first < len(ids) // PAGE_TOKENS:
            rest = ids[first * PAGE_TOKENS :]
            known = [(self._common(file, rest), file) for file in self._below(ids[: first * PAGE_TOKENS])]
            count, file = max(known, key=lambda x: x[0], default=(0, None))
            if not count or file is None:
                break
            found.append(Piece(file, first, count))
            first += count
        return found

    def add(self, tokens: Sequence[int], first: int, pages: dict[int, Tensor], rest: Tensors) -> None:
        """Keep pages from `first` on of a prompt. tokens: the prompt's, up to the end of these pages. pages, rest: as of
        sessions.segments.write_pages. Raises StorageFailed."""
        ids = np.asarray(tokens, np.int32)
        start = first * PAGE_TOKENS
        folder = self._named(ids[:start])
        with files.storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_pages(folder, first, from_numpy(ids[start:].copy()), pages, rest)
            files.sync(folder)

    def _named(self, ids: np.ndarray) -> Path:
        return self.folder / files.digest(ids.tobytes())

    def _below(self, ids: np.ndarray) -> list[PageFile]:
        """The undamaged files that continue these tokens."""
        paths = sorted(self._named(ids).glob("pages-*.safetensors"))
        return [file for file in map(self._open, paths) if file is not None]

    def _open(self, path: Path) -> PageFile | None:
        """A page file; pages that are not whole and what follows them do not count. None if nothing of it is."""
        if path not in self._files:
            _, first, count, index = path.stem.split("-")
            try:
                file = PageFile(path.parent, Segment(path.name, int(first), int(count), int(count), index), self.layers)
                whole = min(file.pages(i, lambda row, known: None) for i in range(len(self.layers)))
                self._files[path] = file.shortened(whole) if whole else None
            except DamagedSession:
                self._files[path] = None
        return self._files[path]

    @staticmethod
    def _common(file: PageFile, ids: np.ndarray) -> int:
        """How many pages of a file hold these tokens."""
        n = min(len(file.tokens), len(ids) // PAGE_TOKENS * PAGE_TOKENS)
        differ = np.flatnonzero(file.tokens[:n].numpy() != ids[:n])
        return (int(differ[0]) if len(differ) else n) // PAGE_TOKENS
