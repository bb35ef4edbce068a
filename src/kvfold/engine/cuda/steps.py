"""Decode steps over pools of blocks, of which the host only knows how many requests they have.

Where a request's tokens lie, what has left its window and which page it fills is worked out by the kernels, from the lengths and
block tables that the pools' owner keeps on the device. A layer takes three launches: enter (gather what is read, store what is
new), attend, fold. Their arguments stay what they are from step to step, so a step can be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.config import PAGE_TOKENS
from kvfold.engine.cuda import driver
from kvfold.engine.cuda.arguments import SEQUENCE_WORDS, EnterArgs
from kvfold.engine.cuda.engine import MAX_BATCH, CudaEngine
from kvfold.engine.cuda.folding import not_finite
from kvfold.engine.cuda.memory import aligned
from kvfold.engine.pools import Pools
from kvfold.errors import CacheMisuse

MOST_NEW = 32  # new tokens of a request: one, and drafts
THREADS = 256  # kernels/enter.cu
LAYERS = 1024
LOST = 2  # kernels/enter.cuh


@dataclass(frozen=True)
class Requests:
    """The requests of a step, in tensors on the device. lengths: int32 [B] tokens of each, the call's own included, fewer than
    `new` where there is no request. pages, exact: int32 [B, n] block tables, rows contiguous; block 0 is nobody's. new: tokens
    of each in the call, at most MOST_NEW. fills: False if the host knows that none fills a page."""

    lengths: Tensor
    pages: Tensor
    exact: Tensor
    new: int
    fills: bool = True


class Workspace:
    """What layers of one shape work in, one after another. A graph points to it, so it stays.

    gathered: [2, requests, H, rows, D], keys and values; a page that fills lies at `front`. sequences: int64 [requests,
    SEQUENCE_WORDS], full: int64 [requests] the addresses that CudaEngine.fold_to takes.
    """

    def __init__(self, engine: CudaEngine, most: int) -> None:
        """most: requests of a step; more than fit are taken in turns."""
        spec, heads, dim, device = engine.spec, engine.shape.kv_heads, engine.shape.head_dim, engine.device
        self.capacity = min(most, MAX_BATCH)
        self.front = -(-spec.window // PAGE_TOKENS) * PAGE_TOKENS
        self.rows = self.front + PAGE_TOKENS + MOST_NEW
        shape = (2, self.capacity, heads, self.rows, dim)
        sinks = 2 * self.capacity * heads * spec.sinks
        self.memory = torch.zeros(torch.Size(shape[:4]).numel() + sinks, dim, dtype=engine.dtype, device=device)
        self.gathered = self.memory[: torch.Size(shape[:4]).numel()].view(shape)
        self.sequences = torch.zeros(self.capacity, SEQUENCE_WORDS, dtype=torch.int64, device=device)
        self.full = torch.zeros(self.capacity, dtype=torch.int64, device=device)
        self.addresses = torch.zeros(self.capacity, 0, dtype=torch.int64, device=device)
        self._held: list[Tensor] = []

    def reserve(self, pages: int) -> None:
        """Room for so many addresses of pages a request."""
        if self.addresses.shape[1] < pages:
            self.hold(self.addresses)
            self.addresses = torch.zeros(self.capacity, pages, dtype=torch.int64, device=self.full.device)

    def hold(self, *tensors: Tensor) -> None:
        """Keep memory that a graph may point to."""
        self._held += [x for x in tensors if all(x is not y for y in self._held)]

    def page(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, H, 128, D] of the pages that the call's tokens fall into."""
        keys, values = self.gathered[:, :count, :, self.front : self.front + PAGE_TOKENS]
        return keys, values


class Steps:
    """One layer's steps over its pools."""

    def __init__(self, engine: CudaEngine, pools: Pools, workspace: Workspace) -> None:
        """Pools of 16-byte rows; workspace: of the layers' shape, window and sinks."""
        self.engine, self.pools, self.workspace = engine, pools, workspace
        w, exact, pages = workspace, pools.exact, pools.pages
        self.args = EnterArgs(
            exact=exact.data_ptr(),
            pages=pages.data_ptr(),
            work=w.memory.data_ptr(),
            seq=w.sequences.data_ptr(),
            full=w.full.data_ptr(),
            status=engine.nonfinite.data_ptr(),
            exact_block=exact.stride(0),
            exact_head=exact.stride(1),
            exact_token=exact.stride(2),
            page_block=pages.stride(0),
            page_one=pages.stride(1),
            H=engine.shape.kv_heads,
            window=engine.spec.window,
            sinks=engine.spec.sinks,
            block_pages=pages.shape[1],
            exact_shift=exact.shape[2].bit_length() - 1,
            front=w.front,
            rows=w.rows,
            capacity=w.capacity,
        )

    def run(self, requests: Requests, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
        """q, out [tokens, H * G, D], k, v [tokens, H, D], the first B * new tokens of them; writes out. Safe in a CUDA graph."""
        w, new = self.workspace, requests.new
        w.reserve(requests.pages.shape[1] * self.pools.pages.shape[1])
        for at in range(0, len(requests.lengths), w.capacity):
            count = min(w.capacity, len(requests.lengths) - at)
            some = slice(at * new, (at + count) * new)
            q4, k4, v4, out4 = (x[some].unflatten(0, (count, new)).transpose(1, 2) for x in (q, k, v, out))
            k4, v4 = aligned(k4), aligned(v4)
            self._enter(requests, at, count, k4, v4)
            self.engine.attend_rows(q4, k4, v4, scale, w.sequences[:count], out4)
            w.hold(*self.engine.memory())
            if requests.fills:
                self.engine.fold_to(*w.page(count), w.full[:count])

    def _enter(self, requests: Requests, at: int, count: int, k: Tensor, v: Tensor) -> None:
        a, r = self.args, requests
        a.lengths, a.Q = r.lengths.data_ptr() + 4 * at, r.new
        a.page_row, a.exact_row, a.address_row = (
            r.pages.stride(0),
            r.exact.stride(0),
            self.workspace.addresses.stride(0),
        )
        a.page_table = r.pages.data_ptr() + 4 * at * a.page_row
        a.exact_table = r.exact.data_ptr() + 4 * at * a.exact_row
        a.address = self.workspace.addresses.data_ptr()
        a.k, a.v = k.data_ptr(), v.data_ptr()
        a.k_b, a.k_h, a.k_i = k.stride()[:3]
        a.v_b, a.v_h, a.v_i = v.stride()[:3]
        e = self.engine
        kernel = driver.kernel("enter.cu", (e.shape.head_dim,), e.capability, 1)
        kernel.launch((count, e.shape.kv_heads, 2), THREADS, torch.cuda.current_stream(e.device).cuda_stream, a)


class Watch:
    """What the kernels of all layers could not do. flags: int32 [LAYERS], by the layer's number in the model."""

    def __init__(self, device: torch.device) -> None:
        self.flags = torch.zeros(LAYERS, dtype=torch.int32, device=device)
        self._seen = torch.zeros(LAYERS, dtype=torch.int32).pin_memory()
        self._copied = torch.cuda.Event()
        self._copied.record()

    def flag(self, layer: int) -> Tensor:
        return self.flags[layer : layer + 1]

    def look(self) -> None:
        """Without waiting: raises NonFiniteInput or CacheMisuse for what was wrong in an earlier step."""
        if not self._copied.query():
            return
        wrong = self._seen.nonzero().flatten().tolist()
        if wrong:
            lost = int(self._seen[wrong[0]]) == LOST
            self.flags.zero_()
            self._seen.zero_()
            raise lost_tokens() if lost else not_finite(wrong[0])
        self._seen.copy_(self.flags, non_blocking=True)
        self._copied.record()


def lost_tokens() -> CacheMisuse:
    return CacheMisuse(
        "exact tokens of a request are not in memory",
        "Something outside kvfold moved or dropped blocks: run without other KV connectors or block managers",
    )
