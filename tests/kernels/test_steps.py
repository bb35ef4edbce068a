"""Decode steps that the host takes no part in leave the same bytes and give the same answers as steps that it plans."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from on_host import HostEngine, Kernels
from torch import Tensor

from kvfold.adapters.vllm.layer import PooledLayer
from kvfold.adapters.vllm.step import Geometry, Step, plan
from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.engine.cuda import driver
from kvfold.engine.cuda import pooled as on_cuda
from kvfold.engine.cuda.engine import CudaEngine, why_not
from kvfold.engine.cuda.steps import LOST, Requests, Steps, Workspace
from kvfold.engine.pools import Pools
from kvfold.engine.request import LayerShape

HEADS, GROUP, DIM, SINKS = 2, 3, 64, 4
DTYPE, SCALE = torch.float16, 0.125
CPU = torch.device("cpu")
GPU = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
TOLERANCE = {"cpu": 0.0, "cuda": 2**-9}
MOST = 900  # tokens of a request
TOKENS = 75  # that each takes in steps
PAGE_BLOCKS, EXACT_BLOCKS = 90, 600


class Owner:
    """Hands out blocks as vLLM's scheduler does: pages for all tokens, exact blocks for the window, the page being filled and the
    sinks. Blocks that fall behind are given up, or, in the step that reads them last, to the tokens that it writes."""

    def __init__(self, window: int, block_pages: int, exact_tokens: int, requests: int, seed: int) -> None:
        self.window, self.block_pages, self.size = window, block_pages, exact_tokens
        self.rng = np.random.default_rng(seed)
        self.lengths = np.zeros(requests, np.int64)
        self.pages = np.zeros((requests, -(-MOST // (PAGE_TOKENS * block_pages))), np.int32)
        self.exact = np.zeros((requests, -(-MOST // exact_tokens)), np.int32)
        self.free_pages, self.free_exact = (
            list(self.rng.permutation(np.arange(1, n))) for n in (PAGE_BLOCKS, EXACT_BLOCKS)
        )
        self.handed = 0

    def first_exact(self, tokens: int) -> int:
        return max(0, tokens - self.window) // PAGE_TOKENS * PAGE_TOKENS // self.size

    def take(self, i: int, new: int) -> None:
        """Blocks for so many more tokens of request i."""
        exact, past, now = self.exact[i], int(self.lengths[i]), int(self.lengths[i]) + new
        self.lengths[i] = now
        for n in range(-(-now // (PAGE_TOKENS * self.block_pages))):
            self.pages[i, n] = self.pages[i, n] or self.free_pages.pop()
        for n in range(1, min(self.first_exact(past), -(-past // self.size))):  # nothing reads these any more
            if exact[n] and exact[n] not in exact[n + 1 :]:
                self.free_exact.append(exact[n])
            exact[n] = 0
        behind = [n for n in range(max(1, self.first_exact(past)), self.first_exact(now)) if exact[n]]
        for n in range(-(-now // self.size)):
            if exact[n] == 0 and n >= -(-past // self.size) and (n == 0 or n >= self.first_exact(now)):
                self.handed += bool(behind)
                exact[n] = exact[behind.pop(0)] if behind else self.free_exact.pop()

    def forget(self, i: int, blocks: int) -> None:
        """Exact blocks of whole pages that were found by prefix are not all there."""
        stop = int(self.lengths[i]) // PAGE_TOKENS * PAGE_TOKENS // self.size
        self.exact[i, max(1, stop - blocks) : stop] = 0


class Beside:
    """Requests in two memories: one planned by the host, one whose steps need nothing of it. The host plans all prompts."""

    def __init__(
        self, engine: HostEngine | CudaEngine, geometry: Geometry, capacity: int, device: torch.device, seed: int
    ) -> None:
        self.engine, self.geometry, self.device = engine, geometry, device
        self.ours, self.theirs = self.pools(), self.pools()
        self.planned = PooledLayer(engine, self.ours, 8)  # type: ignore[arg-type]
        self.steps = Steps(engine, self.theirs, Workspace(engine, capacity))  # type: ignore[arg-type]
        prompts = [1, 3, 127, 128, 130, 333, 64]
        self.live, self.rows = len(prompts), len(prompts) + 2
        self.owner = Owner(geometry.window, geometry.block_pages, geometry.exact_tokens, self.rows, seed)
        for i, n in enumerate(prompts):
            self.owner.take(i, n)
            step = self.plan(np.cumsum([0, *(n * (j == i) for j in range(self.live))]))
            for layer in (self.planned, PooledLayer(engine, self.theirs, 8)):  # type: ignore[arg-type]
                q, k, v = self.fused(n, 1000 + i)
                layer.run(step, q, k, v, SCALE, torch.empty_like(q))
        on_cuda.join()
        self.owner.forget(4, 1)
        self.owner.forget(5, 2)

    def pools(self) -> Pools:
        m, t = self.geometry.block_pages, self.geometry.exact_tokens
        pages = torch.zeros(PAGE_BLOCKS, m * self.engine.page_bytes + 48, dtype=torch.uint8, device=self.device)
        exact = torch.zeros(EXACT_BLOCKS, HEADS, t + 3, 2 * DIM, dtype=DTYPE, device=self.device)
        return Pools(pages[:, :-48].unflatten(1, (m, -1)), exact[:, :, :t])

    def fused(self, tokens: int, seed: int) -> tuple[Tensor, ...]:
        """q, k, v as a model cuts them out of one product."""
        flat = torch.randn(tokens, (GROUP + 2) * HEADS, DIM, generator=torch.Generator().manual_seed(seed))
        return flat.to(self.device, DTYPE).split([GROUP * HEADS, HEADS, HEADS], dim=1)

    def plan(self, starts: NDArray[np.int64]) -> Step:
        o, live = self.owner, self.live
        return plan(self.geometry, starts, o.lengths[:live], o.pages[:live], o.exact[:live])

    def requests(self, new: int, fills: bool = True) -> Requests:
        o = self.owner
        tables = (torch.from_numpy(x.astype(np.int32)).to(self.device) for x in (o.lengths, o.pages, o.exact))
        return Requests(*tables, new, fills)

    def step(self, new: int, seed: int) -> tuple[bool, tuple[Tensor, ...], Tensor]:
        """Every request takes so many tokens, as the host plans it: whether a page fills, q, k, v of all rows, the answers."""
        for i in range(self.live):
            self.owner.take(i, new)
        step = self.plan(np.arange(self.live + 1) * new)
        qkv = self.fused(self.rows * new, seed)
        q, k, v = (x[: self.live * new] for x in qkv)
        out = torch.empty_like(q)
        self.planned.run(step, q, k, v, SCALE, out)
        on_cuda.join()
        return bool(step.folds), qkv, out

    def check(self, got: Tensor, want: Tensor, where: int) -> None:
        """got: of all rows."""
        assert torch.equal(self.ours.pages, self.theirs.pages), where
        assert torch.equal(self.ours.exact[1:], self.theirs.exact[1:]), where
        assert bool(got.isfinite().all()), where
        assert float((got[: len(want)] - want).abs().max()) <= TOLERANCE[self.device.type], where


def two_bits(window: int) -> CacheSpec:
    return CacheSpec(SideSpec("uniform", 2, "unbiased"), SideSpec("uniform", 2, "unbiased"), window=window, sinks=SINKS)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    made = Kernels()
    monkeypatch.setattr(driver, "kernel", made.kernel)
    stream = SimpleNamespace(cuda_stream=0, wait_stream=lambda _other: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: stream)
    return made


@pytest.mark.parametrize(("new", "capacity"), [(1, 3), (5, 9)])
@pytest.mark.parametrize(("block_pages", "exact_tokens"), [(1, 16), (3, 32), (2, 128)])
@pytest.mark.parametrize("window", [64, 200])
def test_steps_equal_planned_ones(
    kernels: Kernels, window: int, block_pages: int, exact_tokens: int, new: int, capacity: int
) -> None:
    """Prompts of all lengths, then steps through the ends of pages, with rows that are no requests."""
    engine = HostEngine(two_bits(window), LayerShape(2, HEADS, DIM, 2), DTYPE)
    both = Beside(engine, Geometry(window, SINKS, block_pages, exact_tokens), capacity, CPU, seed=new)
    for n in range(TOKENS // new):
        fills, (q, k, v), want = both.step(new, seed=n)
        got = torch.empty_like(q)
        both.steps.run(both.requests(new, fills), q, k, v, SCALE, got)
        both.check(got, want, n)
    assert int(engine.nonfinite) == 0
    assert both.owner.handed or (window, exact_tokens, new) != (64, 16, 5)
    assert kernels.launched == ["enter.cu"] * (TOKENS // new) * -(-both.rows // capacity)


TRELLIS = CacheSpec(SideSpec("trellis", 3.5, "unbiased", search=1), SideSpec("trellis", 2.5, "unbiased", search=1))


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("spec", [two_bits(64), TRELLIS], ids=["scalar", "trellis"])
def test_a_graph_of_a_step_equals_planned_ones(spec: CacheSpec, new: int) -> None:
    """The first step runs as it is, the second is captured, and replayed for all others."""
    shape = LayerShape(2, HEADS, DIM, 2)
    if reasons := why_not(spec, shape, DTYPE, GPU):
        pytest.skip("; ".join(reasons))
    engine = CudaEngine(spec, shape, DTYPE, GPU)
    both = Beside(engine, Geometry(spec.window, spec.sinks, 3, 16), 9, GPU, seed=new)
    held, graph = both.requests(new), torch.cuda.CUDAGraph()
    inputs = both.fused(both.rows * new, 0)
    got = torch.empty_like(inputs[0])
    for n in range(TOKENS // new):
        _, qkv, want = both.step(new, seed=n)
        now = both.requests(new)
        for into, x in zip(
            (held.lengths, held.pages, held.exact, *inputs), (now.lengths, now.pages, now.exact, *qkv), strict=True
        ):
            into.copy_(x)
        if n == 1:
            with torch.cuda.graph(graph):
                both.steps.run(held, *inputs, SCALE, got)
        if n == 0:
            both.steps.run(held, *inputs, SCALE, got)
        else:
            graph.replay()
        both.check(got, want, n)
    assert int(engine.nonfinite) == 0


def test_lost_tokens_are_told(kernels: Kernels) -> None:
    engine = HostEngine(two_bits(64), LayerShape(2, HEADS, DIM, 2), DTYPE)
    for lost in (0, 17, 20):  # the sinks' block; one of a page that is not full; that of the new token
        both = Beside(engine, Geometry(64, SINKS, 1, 16), 4, CPU, seed=0)
        fills, (q, k, v), _ = both.step(1, seed=0)
        both.steps.run(both.requests(1, fills), q, k, v, SCALE, torch.empty_like(q))
        assert int(engine.nonfinite) == 0
        both.owner.exact[5, lost] = 0  # of a request with 334 tokens
        both.steps.run(both.requests(1, fills), q, k, v, SCALE, torch.empty_like(q))
        assert int(engine.nonfinite) == LOST
        engine.nonfinite.zero_()
