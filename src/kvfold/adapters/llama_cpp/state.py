"""A saved llama.cpp sequence, parsed byte for byte: its keys and values, and everything around them unchanged. NumPy only.

Two forms hold the same data. A file, of `llama_state_seq_save_file` and of llama-server's slots, begins with a magic number,
version 3 and the tokens; a blob of `llama_state_seq_get_data` begins with another magic number and the sequence. Then, after
`llama_kv_cache::state_write` (llama.cpp, src/llama-kv-cache.cpp): the number of streams; for each the number of cells, and unless
that is 0 per cell its position and its sequences; whether values are transposed, the number of layers, all keys, all values.

The layout is llama.cpp's own and names nothing, so what is not exactly this is refused, up to the last byte.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvfold.errors import Unsupported

FILE_MAGIC, FILE_VERSION = 0x67677371, 3
BLOB_MAGIC = 0xAF143CD8
# GGML's number of a type -> its name and the bytes of a number.
TYPES = {0: ("float32", 4), 1: ("float16", 2), 30: ("bfloat16", 2)}
CELL_BYTES = 12
Raw = NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Matrix:
    """One side of a layer. raw: [cells, width], the bits of its numbers. kind: GGML's number of their type."""

    kind: int
    raw: Raw

    @property
    def dtype(self) -> str:
        return TYPES[self.kind][0]


@dataclass(frozen=True)
class SlotState:
    """before: the bytes up to the data of the only stream that has cells. after: those behind it, of empty streams. transposed:
    whether values are stored by number instead of by cell. keys, values: of every layer that llama.cpp caches, in order."""

    before: bytes
    cells: int
    transposed: bool
    keys: list[Matrix]
    values: list[Matrix]
    after: bytes

    def to_bytes(self) -> bytes:
        """The state as llama.cpp wrote it; the inverse of `parse`."""
        parts = [self.before, struct.pack("<II", self.transposed, len(self.keys))]
        for x in self.keys:
            parts += [struct.pack("<iQ", x.kind, x.raw.shape[1] * x.raw.itemsize), x.raw.tobytes()]
        for x in self.values:
            if self.transposed:
                parts += [struct.pack("<iII", x.kind, x.raw.itemsize, x.raw.shape[1]), x.raw.T.tobytes()]
            else:
                parts += [struct.pack("<iQ", x.kind, x.raw.shape[1] * x.raw.itemsize), x.raw.tobytes()]
        return b"".join([*parts, self.after])


def parse(data: bytes) -> SlotState:
    """The content of a slot file, or a blob. Raises Unsupported for anything else, and for what is not read here: quantized
    types, several sequences or streams with cells, caches in several parts, running states."""
    at = _Reader(data)
    magic = at.take("<I")
    if magic == FILE_MAGIC:
        if (version := at.take("<I")) != FILE_VERSION:
            raise _refused(f"version {version} of llama.cpp's state files", f"version {FILE_VERSION} is known")
        at.skip(4 * at.take("<I"))
    elif magic == BLOB_MAGIC:
        at.skip(4)
    else:
        raise _refused(f"a file that begins with {magic:#010x}", "slot files and states of one sequence are known")
    streams = at.take("<I")
    empty = 0
    while empty < streams and (cells := at.take("<I")) == 0:
        empty += 1
    if empty == streams:
        raise _refused("a state without tokens", "there is nothing to fold")
    _check_cells(np.frombuffer(at.bytes(cells * CELL_BYTES), "<i4").reshape(cells, 3))
    before = data[: at.place]
    transposed, layers = at.take("<I"), at.take("<I")
    if transposed > 1 or layers == 0:
        raise _refused("this layout", "cells with more than a position and a sequence are not known")
    keys = [_by_cell(at, cells) for _ in range(layers)]
    values = [_by_number(at, cells) if transposed else _by_cell(at, cells) for _ in range(layers)]
    after = data[at.place :]
    if after != bytes(4 * (streams - empty - 1)):
        raise _refused(
            f"{len(after)} bytes after the values",
            "running states, sliding-window caches and several sequences are not known",
        )
    return SlotState(before, cells, bool(transposed), keys, values, after)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def bytes(self, count: int) -> memoryview:
        if count > len(self.data) - self.place:
            raise _refused(f"a state that ends early, after {len(self.data)} bytes", "save it again")
        self.place += count
        return memoryview(self.data)[self.place - count : self.place]

    def skip(self, count: int) -> None:
        self.bytes(count)

    def take(self, form: str) -> int:
        return int(struct.unpack(form, self.bytes(struct.calcsize(form)))[0])


def _check_cells(cells: NDArray[np.int32]) -> None:
    """cells: [n, 3] position, number of sequences, the sequence."""
    if (cells[:, 1] != 1).any() or (cells[:, 2] != cells[0, 2]).any() or (np.diff(cells[:, 0]) <= 0).any():
        raise _refused("these cells", "the tokens of one sequence in the order of their positions are known")


def _type_size(kind: int) -> int:
    if kind not in TYPES:
        raise _refused(
            f"keys or values of GGML type {kind}", "run llama.cpp with its cache in f16, bf16 or f32: -ctk f16 -ctv f16"
        )
    return TYPES[kind][1]


def _by_cell(at: _Reader, cells: int) -> Matrix:
    kind, row = at.take("<i"), at.take("<Q")
    return _matrix(at, kind, cells, row // _type_size(kind), row)


def _by_number(at: _Reader, cells: int) -> Matrix:
    kind, size, width = at.take("<i"), at.take("<I"), at.take("<I")
    if size != _type_size(kind):
        raise _refused(f"numbers of {size} bytes in GGML type {kind}", "the layout is another one")
    x = _matrix(at, kind, width, cells, cells * size)
    return Matrix(kind, x.raw.T)


def _matrix(at: _Reader, kind: int, rows: int, columns: int, row_bytes: int) -> Matrix:
    size = _type_size(kind)
    if columns * size != row_bytes or columns == 0:
        raise _refused(f"rows of {row_bytes} bytes in GGML type {kind}", "the layout is another one")
    return Matrix(kind, np.frombuffer(at.bytes(rows * row_bytes), f"<u{size}").reshape(rows, columns))


def _refused(what: str, cure: str) -> Unsupported:
    return Unsupported(f"kvfold does not read {what}", cure[0].upper() + cure[1:])
