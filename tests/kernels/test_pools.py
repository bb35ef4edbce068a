"""Attention over pools of blocks equals attention over the same tokens in order, wherever the host put the blocks."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.engine import pools
from kvfold.engine.cpu import library, pooled
from kvfold.engine.cpu.engine import CpuEngine
from kvfold.engine.cuda import pooled as on_cuda
from kvfold.engine.cuda.engine import CudaEngine, why_not
from kvfold.engine.cuda.steps import Watch
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.pools import PooledCall, PooledFold, Pools
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView
from kvfold.errors import NonFiniteInput

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
HEADS, GROUP, DIM = 2, 3, 64
SPEC = CacheSpec(SideSpec("mse", 3, "unbiased"), SideSpec("uniform", 2, "unbiased"))


class Host:
    """Pools with blocks in random order, and sequences cut into them as a server's block manager would."""

    def __init__(
        self,
        engine: CpuEngine | CudaEngine | TorchEngine,
        block_pages: int,
        exact_tokens: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        self.engine, self.block_pages, self.exact_tokens = engine, block_pages, exact_tokens
        self.rng = np.random.default_rng(block_pages + exact_tokens)
        padded = block_pages * engine.page_bytes + 48  # as vLLM may
        pages = torch.full((40, padded), 0xAA, dtype=torch.uint8, device=device)
        exact = torch.full((60, HEADS, exact_tokens + 3, 2 * DIM), float("nan"), dtype=dtype, device=device)
        self.pools = Pools(pages[:, :-48].unflatten(1, (block_pages, -1)), exact[:, :, :exact_tokens])
        self.free = {"page": list(self.rng.permutation(40)), "exact": list(self.rng.permutation(60))}

    def place(self, keys: Tensor, values: Tensor, folded: int) -> tuple[list[int], list[int], int]:
        """Page numbers, exact blocks and sink block of a past [H, T, D] of which `folded` tokens lie in pages."""
        full = folded // PAGE_TOKENS * PAGE_TOKENS
        count = -(-folded // PAGE_TOKENS)
        blocks = [int(self.free["page"].pop()) for _ in range(-(-count // self.block_pages))]
        numbers = [blocks[p // self.block_pages] * self.block_pages + p % self.block_pages for p in range(count)]
        assert full == folded or keys.shape[1] >= count * PAGE_TOKENS
        for p, number in enumerate(numbers):
            page = (x[:, p * PAGE_TOKENS : (p + 1) * PAGE_TOKENS][None] for x in (keys, values))
            self.engine.fold(*page, p == 0, [self.pools.row(number)], (None, None))
        exact = []
        for start in range(folded, keys.shape[1], self.exact_tokens):
            exact.append(self.write(keys, values, start))
        return numbers, exact, self.write(keys, values, 0) if folded else 0

    def write(self, keys: Tensor, values: Tensor, start: int) -> int:
        block, stop = int(self.free["exact"].pop()), min(start + self.exact_tokens, keys.shape[1])
        self.pools.exact[block, :, : stop - start] = torch.cat([keys, values], dim=-1)[:, start:stop]
        return block


def request(
    host: Host, shapes: list[tuple[int, int, int]], dtype: torch.dtype
) -> tuple[PooledCall, Tensor, Tensor, Tensor, list[Tensor]]:
    """shapes: (past, folded, new) of each sequence. The call, its q, k, v, and what each sequence attends to in order."""
    q, k, v, expected, placed = [], [], [], [], []
    for i, (past, folded, new) in enumerate(shapes):
        g = torch.Generator().manual_seed(i)
        at = host.pools.exact.device
        keys, values = (torch.randn(HEADS, past + new, DIM, generator=g).to(at, dtype) for _ in range(2))
        query = torch.randn(new, HEADS * GROUP, DIM, generator=g).to(at, dtype)
        numbers, exact, sinks = host.place(keys[:, :past], values[:, :past], folded)
        placed.append((numbers, exact, sinks))
        rows = [torch.stack([host.pools.row(n) for n in numbers])] if numbers else []
        s = SPEC.sinks
        past_tokens = (keys[:, :s], values[:, :s], keys[:, folded:past], values[:, folded:past])
        view = SequenceView(rows, folded, *past_tokens, 0, None, None)
        one = AttendRequest(query.transpose(0, 1)[None], keys[None, :, past:], values[None, :, past:], 0.125, [view])
        expected.append(host.engine.attend(one)[0].transpose(0, 1))
        q.append(query)
        k.append(keys[:, past:].transpose(0, 1))
        v.append(values[:, past:].transpose(0, 1))
    new = [n for _, _, n in shapes]
    runs = [(i, 1, n) for i, n in enumerate(new)]
    if len(set(new)) == 1:
        runs = [(0, len(new), new[0])]
    call = PooledCall(
        token_start=np.cumsum([0, *new]),
        page_numbers=np.array([n for p in placed for n in p[0]], np.int64),
        page_start=np.cumsum([0, *(len(p[0]) for p in placed)]),
        folded=np.array([folded for _, folded, _ in shapes]),
        recent_table=np.array([b for p in placed for b in p[1]], np.int32),
        recent_start=np.cumsum([0, *(len(p[1]) for p in placed)]),
        recent=np.array([past - folded for past, folded, _ in shapes]),
        sink_block=np.array([p[2] for p in placed]),
        runs=runs,
    )
    return call, torch.cat(q), torch.cat(k), torch.cat(v), expected


CALLS = pytest.mark.parametrize(
    "shapes",
    [
        [(391, 256, 1), (77, 0, 1), (512, 384, 1), (0, 0, 1)],
        [(150, 0, 5), (391, 256, 5)],
        [(391, 256, 130), (200, 128, 1), (0, 0, 40)],
        [(256, 256, 3), (384, 352, 2)],  # without exact tokens, and with those of half a page
    ],
    ids=["decode", "drafts", "mixed", "few-exact"],
)


@CALLS
@pytest.mark.parametrize(("block_pages", "exact_tokens"), [(1, 16), (3, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_pools_equal_sequences(
    name: str, dtype: torch.dtype, block_pages: int, exact_tokens: int, shapes: list[tuple[int, int, int]]
) -> None:
    if name == "cpu" and library.missing():
        pytest.skip(library.missing())
    shape = LayerShape(2, HEADS, DIM, dtype.itemsize)
    engine = (CpuEngine if name == "cpu" else TorchEngine)(SPEC, shape, dtype, CPU)
    host = Host(engine, block_pages, exact_tokens, dtype)
    call, q, k, v, expected = request(host, shapes, dtype)
    ways = [pools.attend, pooled.attend] if name == "cpu" else [pools.attend]
    for attend in ways:
        out = torch.full_like(q, float("nan"))
        attend(engine, host.pools, call, q, k, v, 0.125, out)  # type: ignore[arg-type]
        for i, want in enumerate(expected):
            got = out[call.token_start[i] : call.token_start[i + 1]]
            assert torch.equal(got, want) or (attend is pooled.attend and close(got, want)), f"sequence {i}"


def close(got: Tensor, want: Tensor) -> bool:
    """The native library cuts a batch by its longest row, so one row alone may be summed in other parts."""
    eps = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[got.dtype]
    return bool((got - want).abs().max() <= eps * want.abs().max())


def test_tables_say_where_tokens_are() -> None:
    """What the kernels are told of a step, read back on the CPU as they would read it."""
    host = Host(TorchEngine(SPEC, LayerShape(2, HEADS, DIM, 2), torch.float16, CPU), 3, 16, torch.float16)
    call, *_ = request(host, [(391, 256, 1), (77, 0, 1), (512, 384, 1), (150, 128, 90), (300, 128, 2)], torch.float16)
    call.runs[:] = [(0, 3, 1), (3, 1, 90), (4, 1, 2)]
    tables = on_cuda.Tables(call, host.pools, SPEC.sinks, GROUP)
    assert [(b.first, b.count, b.new) for b in tables.batches] == [(0, 3, 1), (4, 1, 2)]
    torch.add(tables.page_offsets, host.pools.pages.data_ptr(), out=tables.pages)
    for batch in tables.batches:
        on_cuda.gather(host.pools, batch)
        for i, record in enumerate(batch.sequences.numpy(), batch.first):
            n, folded = int(call.recent[i]), int(call.folded[i])
            length, read, pads, first, ring, _ = record[5:8].view(np.int32)
            assert (length, read, pads, first) == (folded + n, folded, 0, 0)
            assert ring >= n
            numbers = call.page_numbers[call.page_start[i] : call.page_start[i + 1]]
            addresses = at(record[4], np.int64, (len(numbers),))
            assert addresses.tolist() == [host.pools.row(number).data_ptr() for number in numbers.tolist()]
            tokens = host.pools.tokens(call.recent_table[call.recent_start[i] : call.recent_start[i + 1]], n)
            for pointer, want in zip(record[:2], tokens, strict=True):
                got = at(pointer, np.float16, (HEADS, int(record[8]) // DIM, DIM))[:, :n]
                assert np.array_equal(got, want.numpy())
            sinks = host.pools.exact[int(call.sink_block[i]), :, : SPEC.sinks].chunk(2, dim=-1)
            for pointer, want in zip(record[2:4], sinks, strict=True):
                assert not folded or np.array_equal(at(pointer, np.float16, tuple(want.shape)), want.numpy())


class Reader:
    """In the place of the decode kernel: attends to what the records point to, by the reference."""

    def __init__(self, engine: TorchEngine) -> None:
        self.spec, self.shape, self.engine = engine.spec, engine.shape, engine

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Tensor, out: Tensor) -> None:
        views = []
        for record in sequences.numpy():
            length, folded = record[5:8].view(np.int32)[:2]
            addresses = at(record[4], np.int64, (-(-int(folded) // PAGE_TOKENS),))
            pages = [torch.from_numpy(at(a, np.uint8, (1, self.engine.page_bytes)).copy()) for a in addresses]
            recent, sinks = (
                [torch.from_numpy(at(p, np.float16, (HEADS, n, DIM)).copy()) for p in pointers]
                for pointers, n in ((record[:2], int(record[8]) // DIM), (record[2:4], SPEC.sinks))
            )
            views.append(
                SequenceView(pages, int(folded), *sinks, *(x[:, : length - folded] for x in recent), 0, None, None)
            )
        out[:] = self.engine.attend(AttendRequest(q, k, v, scale, views))

    def attend(self, request: AttendRequest) -> Tensor:
        (view,) = request.rows
        table = [] if view.runs.table is None else view.runs.table.tolist()  # type: ignore[attr-defined]
        pages = [torch.from_numpy(at(a, np.uint8, (1, self.engine.page_bytes)).copy()) for a in table]
        return self.engine.attend(dataclasses.replace(request, rows=[dataclasses.replace(view, runs=pages)]))


@CALLS
@pytest.mark.parametrize(("block_pages", "exact_tokens"), [(1, 16), (3, 32)])
def test_what_the_kernels_are_asked_for(
    block_pages: int, exact_tokens: int, shapes: list[tuple[int, int, int]]
) -> None:
    engine = TorchEngine(SPEC, LayerShape(2, HEADS, DIM, 2), torch.float16, CPU)
    host = Host(engine, block_pages, exact_tokens, torch.float16)
    call, q, k, v, expected = request(host, shapes, torch.float16)
    out = torch.full_like(q, float("nan"))
    on_cuda.attend(Reader(engine), host.pools, call, q, k, v, 0.125, out)  # type: ignore[arg-type]
    for i, want in enumerate(expected):
        assert close(out[call.token_start[i] : call.token_start[i + 1]], want), f"sequence {i}"


def at(address: int, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An array that lies at an address."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(int(address)), dtype).reshape(shape)


def cuda_engine(spec: CacheSpec, shape: LayerShape, dtype: torch.dtype) -> CudaEngine:
    if reasons := why_not(spec, shape, dtype, GPU):
        pytest.skip("; ".join(reasons))
    return CudaEngine(spec, shape, dtype, GPU)


TRELLIS = CacheSpec(SideSpec("trellis", 3.5, "unbiased", search=1), SideSpec("trellis", 2.5, "unbiased", search=1))
COMPUTED = CacheSpec(SideSpec("computed", 3, "unbiased"), SideSpec("computed", 2, "unbiased"))


@CALLS
@pytest.mark.parametrize(("block_pages", "exact_tokens"), [(1, 16), (3, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [SPEC, TRELLIS, COMPUTED], ids=["scalar", "trellis", "computed"])
def test_pools_on_a_gpu(
    spec: CacheSpec, dtype: torch.dtype, block_pages: int, exact_tokens: int, shapes: list[tuple[int, int, int]]
) -> None:
    """Several layers of one step share its tables: each has memory and tokens of its own."""
    engine = cuda_engine(spec, LayerShape(2, HEADS, DIM, 2), dtype)
    made: dict[object, object] = {}
    for _layer in range(2):
        host = Host(engine, block_pages, exact_tokens, dtype, GPU)
        call, q, k, v, expected = request(host, shapes, dtype)
        call.made.update(made)
        out = torch.full_like(q, float("nan"))
        on_cuda.attend(engine, host.pools, call, q, k, v, 0.125, out)
        made = call.made
        for i, want in enumerate(expected):
            got = out[call.token_start[i] : call.token_start[i + 1]]
            assert close(got, want), f"sequence {i}"


@pytest.mark.parametrize("spec", [SPEC, TRELLIS, COMPUTED], ids=["scalar", "trellis", "computed"])
def test_folds_beside_the_calls(spec: CacheSpec) -> None:
    """The same bytes as a fold that is waited for, in scattered places; what cannot be folded is flagged."""
    engine = cuda_engine(spec, LayerShape(2, HEADS, DIM, 2), torch.bfloat16)
    host = Host(engine, 3, 16, torch.bfloat16, GPU)
    folding = on_cuda.Folding(engine)
    keys, values = torch.randn(2, 5, HEADS, PAGE_TOKENS, DIM, device=GPU, dtype=torch.bfloat16)
    want = torch.zeros(5, engine.page_bytes, dtype=torch.uint8, device=GPU)
    engine.fold(keys[:3], values[:3], True, list(want[:3]))
    engine.fold(keys[3:], values[3:], False, list(want[3:]))
    numbers = np.array([7, 2, 30, 11, 90])
    parts = ((slice(3), True), (slice(3, 5), False))
    folding.fold(
        [PooledFold(keys[at].clone(), values[at].clone(), first, numbers[at]) for at, first in parts], host.pools
    )
    on_cuda.join()
    assert all(torch.equal(host.pools.row(n), row) for n, row in zip(numbers.tolist(), want, strict=True))
    keys[1, 0, 3, 5] = float("nan")
    watch = Watch(GPU)
    engine.report_to(watch.flag(2))
    watch.look()
    folding.fold([PooledFold(keys, values, True, numbers)], host.pools)
    on_cuda.join()
    watch.look()
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteInput):
        watch.look()
    folding.fold([PooledFold(keys[:1], values[:1], True, numbers[:1])], host.pools)
    on_cuda.join()
    for _ in range(2):
        watch.look()
        torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_a_process_with_some_heads_folds_them_as_the_whole(name: str) -> None:
    """Tensor parallelism: seeds go by the model's own head numbers."""
    if name == "cpu" and library.missing():
        pytest.skip(library.missing())
    make = CpuEngine if name == "cpu" else TorchEngine
    keys, values = torch.randn(1, 4, PAGE_TOKENS, DIM), torch.randn(1, 4, PAGE_TOKENS, DIM)
    pages = []
    for shape, heads in ((LayerShape(1, 4, DIM, 4), slice(4)), (LayerShape(1, 2, DIM, 4, 2), slice(2, 4))):
        engine = make(SPEC, shape, torch.float32, CPU)
        row = torch.zeros(engine.page_bytes, dtype=torch.uint8)
        engine.fold(keys[:, heads], values[:, heads], True, [row], (None, None))
        pages.append(engine.to_canonical(row).view(shape.kv_heads, -1))
    assert torch.equal(pages[0][2:], pages[1])
