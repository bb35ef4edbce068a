"""Attention over pools of blocks equals attention over the same tokens in order, wherever the host put the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.engine import pools
from kvfold.engine.cpu import library, pooled
from kvfold.engine.cpu.engine import CpuEngine
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.pools import PooledCall, Pools
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView

CPU = torch.device("cpu")
HEADS, GROUP, DIM = 2, 3, 64
SPEC = CacheSpec(SideSpec("mse", 3, "unbiased"), SideSpec("uniform", 2, "unbiased"))


class Host:
    """Pools with blocks in random order, and sequences cut into them as a server's block manager would."""

    def __init__(
        self, engine: CpuEngine | TorchEngine, block_pages: int, exact_tokens: int, dtype: torch.dtype
    ) -> None:
        self.engine, self.block_pages, self.exact_tokens = engine, block_pages, exact_tokens
        self.rng = np.random.default_rng(block_pages + exact_tokens)
        pages = torch.full((40, block_pages * engine.page_bytes + 48), 0xAA, dtype=torch.uint8)  # padded, as vLLM may
        exact = torch.full((60, HEADS, exact_tokens + 3, 2 * DIM), float("nan"), dtype=dtype)
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
        keys, values = (torch.randn(HEADS, past + new, DIM, generator=g).to(dtype) for _ in range(2))
        query = torch.randn(new, HEADS * GROUP, DIM, generator=g).to(dtype)
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


@pytest.mark.parametrize(
    "shapes",
    [
        [(391, 256, 1), (77, 0, 1), (512, 384, 1), (0, 0, 1)],
        [(150, 0, 5), (391, 256, 5)],
        [(391, 256, 130), (200, 128, 1), (0, 0, 40)],
        [(256, 256, 3), (384, 352, 2)],  # without exact tokens, and with those of half a page
    ],
    ids=["decode", "drafts", "mixed", "few-exact"],
)
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
    eps = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[got.dtype]
    return bool((got - want).abs().max() <= eps * want.abs().max())


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
