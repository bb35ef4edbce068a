"""Folds and attention of the CUDA kernels over pools of blocks: pages are written and read where they lie.

What a step reads is the same for all its layers, so its tables are made once. A layer then takes three launches: the
addresses of its pages, its exact tokens gathered into a workspace, attention. Layers run one after another on one stream
and share the tables and the workspace.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.engine.cuda.arguments import SEQUENCE_WORDS
from kvfold.engine.cuda.engine import MAX_BATCH, CudaEngine
from kvfold.engine.cuda.prefill import MIN_COLUMNS
from kvfold.engine.pools import PooledCall, PooledFold, Pools
from kvfold.engine.request import AttendRequest, Runs, SequenceView

UNIT = torch.int64  # rows are gathered as these


def upload(x: NDArray[np.int64], device: torch.device) -> Tensor:
    """x on the device, in stream order: the host does not wait for what the device has yet to do."""
    return torch.from_numpy(x).to(device, non_blocking=True)


class Tables:
    """A step's reads as the kernels want them. page_offsets: int64 [pages] bytes from the start of a layer's pool, `pages` the
    addresses in the layer that runs. batches: sequences that the decode kernel takes together."""

    def __init__(self, call: PooledCall, pools: Pools, sinks: int, groups: int) -> None:
        device = pools.exact.device
        block, page = np.divmod(call.page_numbers, pools.pages.shape[1])
        offsets = block * pools.pages.stride(0) + page * pools.pages.stride(1)
        self.page_offsets = upload(offsets, device)
        self.pages = torch.empty_like(self.page_offsets)
        few = [run for run in call.runs if run[2] * groups < MIN_COLUMNS]
        parts = [(at, min(MAX_BATCH, end - at), new) for first, count, new in few
                 for end in [first + count] for at in range(first, end, MAX_BATCH)]  # fmt: skip
        heads, dim = pools.exact.shape[1], pools.exact.shape[3] // 2
        longest = max(1, int(call.recent.max()))
        most = max((count for _, count, _ in parts), default=0)
        self.exact = torch.empty(2 * most * heads * (longest + sinks), dim, dtype=pools.exact.dtype, device=device)
        self.batches = [Batch(self, call, pools, sinks, longest, *part) for part in parts]


class Batch:
    """sequences: int64 [count, SEQUENCE_WORDS], records of the kernels that point into the tables. rows: int64, where the
    exact tokens of all of them are in a layer's pool, in units of UNIT."""

    def __init__(
        self, tables: Tables, call: PooledCall, pools: Pools, sinks: int, longest: int, first: int, count: int, new: int
    ) -> None:
        self.first, self.count, self.new = first, count, new
        at, device = slice(first, first + count), pools.exact.device
        heads, dim = pools.exact.shape[1], pools.exact.shape[3] // 2
        bytes_ = pools.exact.element_size()
        recent = _positions(call, pools, first, count, longest)
        sink = call.sink_block[at, None] * pools.exact.stride(0) + np.arange(sinks) * pools.exact.stride(2)
        head = torch.arange(heads, device=device).view(1, heads, 1) * pools.exact.stride(1)
        side = torch.arange(2, device=device).view(2, 1, 1, 1) * dim
        places = [upload(x, device)[:, None] + head + side for x in (recent, sink)]  # [2, count, H, tokens]
        self.rows = torch.cat([p.flatten() for p in places]) // (UNIT.itemsize // bytes_)
        words = np.zeros((count, SEQUENCE_WORDS), np.int64)
        row, ring, sunk = dim * bytes_, heads * longest, heads * sinks
        base, number = tables.exact.data_ptr(), np.arange(count)
        words[:, 0], words[:, 1] = base + number * ring * row, base + (count + number) * ring * row
        base += 2 * count * ring * row
        words[:, 2], words[:, 3] = base + number * sunk * row, base + (count + number) * sunk * row
        words[:, 4] = tables.pages.data_ptr() + 8 * call.page_start[:-1][at]
        ints = np.zeros((count, 6), np.int32)  # length, folded, pads, first, ring, unused
        ints[:, 0], ints[:, 1], ints[:, 4] = (call.folded + call.recent)[at], call.folded[at], longest
        words[:, 5:8], words[:, 8] = ints.view(np.int64), longest * dim
        self.sequences = upload(words, device)
        self.exact = tables.exact[: len(self.rows)]


def _positions(call: PooledCall, pools: Pools, first: int, count: int, longest: int) -> NDArray[np.int64]:
    """[count, longest] where the pool has the first head's keys of a sequence's recent tokens; the first block's beyond."""
    size, out = pools.exact.shape[2], np.zeros((count, longest), np.int64)
    for i in range(count):
        table = call.recent_table[call.recent_start[first + i] : call.recent_start[first + i + 1]].astype(np.int64)
        n = int(call.recent[first + i])
        where = table[:, None] * pools.exact.stride(0) + np.arange(size) * pools.exact.stride(2)
        out[i, :n] = where.ravel()[:n]
    return out


def attend(
    engine: CudaEngine, pools: Pools, call: PooledCall, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor
) -> None:
    """As kvfold.engine.pools.attend. All layers of a step give the same `call`, and their pools have the same strides."""
    tables = call.made.get(Tables)
    groups = q.shape[1] // engine.shape.kv_heads
    if tables is None:
        tables = call.made[Tables] = Tables(call, pools, engine.spec.sinks, groups)
    torch.add(tables.page_offsets, pools.pages.data_ptr(), out=tables.pages)
    for batch in tables.batches:
        gather(pools, batch)
        at = int(call.token_start[batch.first])
        some = slice(at, at + batch.count * batch.new)
        q4, k4, v4, out4 = (x[some].unflatten(0, (batch.count, batch.new)).transpose(1, 2) for x in (q, k, v, out))
        engine.attend_rows(q4, k4, v4, scale, batch.sequences, out4)
    for first, count, new in call.runs:
        if new * groups >= MIN_COLUMNS:
            for i in range(first, first + count):
                some = slice(int(call.token_start[i]), int(call.token_start[i + 1]))
                new_q, new_k, new_v = (x[some].transpose(0, 1)[None] for x in (q, k, v))
                view = _view(engine, pools, call, tables, i)
                out[some] = engine.attend(AttendRequest(new_q, new_k, new_v, scale, [view]))[0].transpose(0, 1)


def _view(engine: CudaEngine, pools: Pools, call: PooledCall, tables: Tables, i: int) -> SequenceView:
    """Sequence i by itself."""
    runs = Runs()
    runs.table = tables.pages[int(call.page_start[i]) : int(call.page_start[i + 1])]
    blocks = call.recent_table[call.recent_start[i] : call.recent_start[i + 1]]
    sinks_k, sinks_v = pools.exact[int(call.sink_block[i]), :, : engine.spec.sinks].chunk(2, dim=-1)
    recent_k, recent_v = pools.tokens(blocks, int(call.recent[i]))
    return SequenceView(runs, int(call.folded[i]), sinks_k, sinks_v, recent_k, recent_v, 0, None, None)


def gather(pools: Pools, batch: Batch) -> None:
    """The batch's exact tokens from a layer's pool to where its records point."""
    width = batch.exact.shape[1] * batch.exact.element_size() // UNIT.itemsize
    flat = pools.exact.view(UNIT)
    last = sum((n - 1) * s for n, s in zip(flat.shape, flat.stride(), strict=True))
    overlapping = flat.as_strided((last + 2 - width, width), (1, 1))  # rows of D numbers that begin at every unit
    torch.index_select(overlapping, 0, batch.rows, out=batch.exact.view(UNIT))


class Folding:
    """One layer's folds, on a stream beside the calls: nothing in a step waits for a page that nobody reads yet. What they write
    is there after `join`; what could not be folded, the engine's flag says."""

    def __init__(self, engine: CudaEngine) -> None:
        self.engine = engine
        self.stream = beside(engine.device)

    def fold(self, folds: list[PooledFold], pools: Pools) -> None:
        """Begin. The tensors of `folds` are nobody else's."""
        if self.engine.folder is None:
            for f in folds:
                self.engine.fold(f.keys, f.values, f.first, [pools.row(n) for n in f.numbers.tolist()])
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.engine.device))
        with torch.cuda.stream(self.stream):
            for f in folds:
                block, page = np.divmod(f.numbers, pools.pages.shape[1])
                at = pools.pages.data_ptr() + block * pools.pages.stride(0) + page * pools.pages.stride(1)
                at[0] |= int(f.first)
                self.engine.fold_to(f.keys, f.values, upload(at, self.engine.device))
                f.keys.record_stream(self.stream)
                f.values.record_stream(self.stream)


def join() -> None:
    """Work that is enqueued from here on reads and writes pages as all folds left them."""
    for device, stream in _BESIDE.items():
        torch.cuda.current_stream(device).wait_stream(stream)


_BESIDE: dict[torch.device, torch.cuda.Stream] = {}


def beside(device: torch.device) -> torch.cuda.Stream:
    """The stream on which all layers of a device fold."""
    if device not in _BESIDE:
        _BESIDE[device] = torch.cuda.Stream(device)
    return _BESIDE[device]
