"""CPU contenders: kvfold's own engine, torch attention over a 16-bit cache, and reading the packed bytes once.

Every contender cycles over copies of its data so that a step finds none of it in a cache of ordinary size. Data is
Gaussian: speed does not depend on values, except that softmax peaks rise a few times per sequence in real data too.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvfold.bench.case import Case
from kvfold.bench.harness import Contender
from kvfold.config import PAGE_TOKENS
from kvfold.engine.cpu import library
from kvfold.engine.cpu.engine import CpuEngine, page_addresses
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView
from kvfold.errors import InvalidConfig

WORKING_SET = 512 << 20  # bytes a contender cycles over, at least two copies
MAX_COPY_BYTES = 400 << 20  # above this a single copy is far larger than any cache left to one core
SOURCE_PAGES = 16  # distinct pages, repeated
NAMES = ("kvfold", "read-floor", "torch-sdpa", "torch-sdpa-folded")
FOLD_NAMES = ("kvfold", "scalar", "torch-eager")
CPU = torch.device("cpu")


class Field:
    """The contenders of one case."""

    def __init__(self, case: Case, level: str | None) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(case.threads)
        self.case = case
        self.dtype = torch.bfloat16
        shape = LayerShape(0, case.kv_heads, case.head_dim, self.dtype.itemsize)
        self.engine = CpuEngine(case.spec, shape, self.dtype, CPU, level=level, threads=case.threads)
        self.torch_engine = TorchEngine(case.spec, shape, self.dtype, CPU)
        self.level = self.engine.level.name
        new = 1 if case.op == "decode" else case.new_tokens
        self.q = torch.randn(case.batch, case.query_heads, new, case.head_dim, dtype=self.dtype)
        self.k = torch.randn(case.batch, case.kv_heads, new, case.head_dim, dtype=self.dtype)
        self.scale = case.head_dim**-0.5

    def finish(self) -> None:
        """Nothing is left under way after a step."""

    def contender(self, name: str) -> Contender:
        """One of FOLD_NAMES for `fold`, else one of NAMES."""
        known = FOLD_NAMES if self.case.op == "fold" else NAMES
        if name not in known:
            raise InvalidConfig(f"no contender {name!r} for {self.case.op} on cpu", f"Use some of: {', '.join(known)}")
        if self.case.op == "fold":
            return self._fold(name)
        return {"kvfold": self._kvfold, "read-floor": self._floor}.get(name, functools.partial(self._sdpa, name))()

    @functools.cached_property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Keys and values to fold, [SOURCE_PAGES, H, 128, D]."""
        size = (SOURCE_PAGES, self.case.kv_heads, PAGE_TOKENS, self.case.head_dim)
        return torch.randn(size).to(self.dtype), torch.randn(size).to(self.dtype)

    @functools.cached_property
    def caches(self) -> list[Tensor]:
        """Folded copies, each [batch * pages, page_bytes]."""
        source = torch.empty(SOURCE_PAGES, self.engine.page_bytes, dtype=torch.uint8)
        self.engine.fold(*self.vectors, True, list(source), (None, None))
        rows = self.case.batch * self.case.pages
        size = rows * self.engine.page_bytes
        caches = []
        for _ in range(max(2, -(-WORKING_SET // size)) if size < MAX_COPY_BYTES else 1):
            cache = torch.empty(rows, self.engine.page_bytes, dtype=torch.uint8)
            library.call("kvf_advise_huge")(cache.data_ptr(), cache.nbytes)
            for start in range(0, rows, SOURCE_PAGES):
                cache[start : start + SOURCE_PAGES] = source[: rows - start]
            caches.append(cache)
        return caches

    def _packed_bytes(self) -> int:
        return self.case.batch * self.case.pages * self.engine.row_bytes

    def _kvfold(self) -> Contender:
        case, sinks, none = self.case, self.vectors[0][0, :, :4], self.vectors[0][0, :, :0]

        def step(i: int) -> Tensor:
            cache = self.caches[i % len(self.caches)].unflatten(0, (case.batch, case.pages))
            views = [SequenceView([rows], case.context, sinks, sinks, none, none, 0, None, None) for rows in cache]
            return self.engine.attend(AttendRequest(self.q, self.k, self.k, self.scale, views))

        return Contender("kvfold", step, self._packed_bytes())

    def _floor(self) -> Contender:
        tables = [page_addresses([cache]) for cache in self.caches]
        pointer = ctypes.POINTER(ctypes.c_uint64)
        engine, read = self.engine, library.call("kvf_read")

        def step(i: int) -> int:
            table = tables[(i + 1) % len(tables)]
            return read(
                engine.level.index, self.case.threads, table.ctypes.data_as(pointer), len(table), engine.row_bytes
            )

        return Contender("read-floor", step, self._packed_bytes())

    @functools.cached_property
    def exact(self) -> list[tuple[Tensor, Tensor]]:
        """16-bit caches [B, H, T, D]; for prefill the new tokens lie at their end."""
        case = self.case
        tokens = case.context + (case.new_tokens if case.op == "prefill" else 0)
        part = torch.randn(case.batch, case.kv_heads, min(tokens, 4096), case.head_dim, dtype=self.dtype)
        full = part.repeat(1, 1, -(-tokens // part.shape[2]), 1)[:, :, :tokens].contiguous()
        return [(full.clone(), full.clone()) for _ in range(2 if full.nbytes < MAX_COPY_BYTES // 2 else 1)]

    def _sdpa(self, name: str) -> Contender:
        case, group = self.case, self.case.query_heads // self.case.kv_heads
        mask = None
        if case.op == "prefill":
            rows = torch.arange(case.new_tokens)[:, None] + case.context
            mask = torch.arange(case.context + case.new_tokens) <= rows
        q = self.q
        if name == "torch-sdpa-folded":
            q = q.reshape(case.batch, case.kv_heads, group * q.shape[2], case.head_dim)
            mask = mask.repeat(group, 1) if mask is not None else None

        def step(i: int) -> Tensor:
            k, v = self.exact[i % len(self.exact)]
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=name == "torch-sdpa")

        k, v = self.exact[0]
        return Contender(name, step, k.nbytes + v.nbytes)

    def _scalar(self) -> CpuEngine:
        """The same level's encoder of the scalar codes that are no narrower."""
        spec = self.case.spec
        key, value = (replace(side, codec="mse", bits=math.ceil(side.bits)) for side in (spec.key, spec.value))
        shape = self.engine.shape
        scalar = replace(spec, key=key, value=value)
        return CpuEngine(scalar, shape, self.dtype, CPU, level=self.level, threads=self.case.threads)

    def _fold(self, name: str) -> Contender:
        engine: CpuEngine | TorchEngine = self._scalar() if name == "scalar" else self.engine
        if name == "torch-eager":
            engine = self.torch_engine
        pages = self.case.pages
        keys, values = (torch.cat([x] * -(-pages // SOURCE_PAGES))[:pages] for x in self.vectors)
        rows = list(torch.empty(pages, engine.page_bytes, dtype=torch.uint8))

        def step(i: int) -> None:
            engine.fold(keys, values, True, rows, (None, None))

        return Contender(name, step, keys.nbytes + values.nbytes)
