"""Decode steps of the vLLM plug-in's layers alone, driven by block tables as vLLM drives them. Writes gpu_vllm_layers.csv.

    python bench/gpu/vllm_layers.py [--vllm FOLDER] [--profiles balanced,turbo-3] [--layers 8] [--workers 1,2]

A step is what an engine's step asks of its attention layers: block tables to the GPU, then in every layer tokens stored, full
pages folded, attention, and the output's projection; with two workers each holds half of the heads and every layer ends in an
all-reduce. Pages and exact tokens lie in blocks in random places. Three ways: `planned` on the host, as steps with prompts
among them are; `alone`, the kernels reading the block tables; `graph`, the same as a CUDA graph. Beside them: flash attention
over a 16-bit cache, and vLLM's TurboQuant kernels at 3 bits (--vllm: an unpacked vllm wheel). A step's time is the host's,
from call to done, the sum of all layers.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from kvfold import profiles
from kvfold.adapters.vllm.layer import PooledLayer
from kvfold.adapters.vllm.step import Geometry, plan
from kvfold.bench.cuda_decode import random_pages
from kvfold.config import PAGE_TOKENS
from kvfold.engine.cuda import pooled
from kvfold.engine.cuda.engine import CudaEngine
from kvfold.engine.cuda.steps import Requests
from kvfold.engine.pools import Pools
from kvfold.engine.request import LayerShape

HEADS, KV_HEADS, DIM, HIDDEN, EXACT = 32, 8, 128, 4096, 16
WAYS = ("planned", "alone", "graph")
STEPS = 140  # more than a page: every sequence folds one


class Tables:
    """What vLLM's scheduler hands out to sequences of one length: blocks in random places, exact ones for the newest tokens."""

    def __init__(self, batch: int, context: int, window: int) -> None:
        self.batch, self.window, self.length = batch, window, context
        rng = np.random.default_rng(0)
        pages, exact = (-(-(context + STEPS) // size) for size in (PAGE_TOKENS, EXACT))
        self.pages = (1 + rng.permutation(batch * pages)).reshape(batch, pages).astype(np.int32)
        self.held = (2 * PAGE_TOKENS + window) // EXACT + 2  # blocks in turn, the first one for the sinks
        self.exact_blocks = (1 + rng.permutation(batch * self.held)).reshape(batch, self.held).astype(np.int32)
        self.exact = np.zeros((batch, exact), np.int32)

    def step(self) -> tuple[np.ndarray, ...]:
        """starts, lengths, pages, exact, as `plan` wants them, one token further."""
        self.length += 1
        self.exact[:] = 0
        self.exact[:, 0] = self.exact_blocks[:, 0]
        first = max(0, self.length - 1 - self.window) // PAGE_TOKENS * PAGE_TOKENS // EXACT
        number = np.arange(max(1, first), -(-self.length // EXACT))
        self.exact[:, number] = self.exact_blocks[:, 1 + number % (self.held - 1)]
        return np.arange(self.batch + 1), np.full(self.batch, self.length), self.pages, self.exact


def folded_step(
    profile: str, way: str, layers: int, batch: int, context: int, rank: int, workers: int
) -> Callable[[], None]:
    """One decode step of all layers."""
    spec, heads = profiles.load(profile).spec, KV_HEADS // workers
    device = torch.device("cuda", rank)
    tables, geometry = Tables(batch, context, spec.window), Geometry(spec.window, spec.sinks, 1, EXACT)
    stack, weights = [], []
    for i in range(layers):
        engine = CudaEngine(spec, LayerShape(i, heads, DIM, 2, rank * heads), torch.bfloat16, device)
        pages = random_pages(engine, 1 + tables.pages.size)[:, None]
        exact = torch.randn(1 + tables.exact_blocks.size, heads, EXACT, 2 * DIM, device=device, dtype=torch.bfloat16)
        stack.append(PooledLayer(engine, Pools(pages, exact), batch))
        weights.append(torch.randn(HEADS // workers * DIM, HIDDEN, device=device, dtype=torch.bfloat16) / 64)
    q = torch.randn(batch, HEADS // workers, DIM, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, heads, DIM, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(q)

    def through(attend: Callable[[PooledLayer], None]) -> None:
        for layer, weight in zip(stack, weights, strict=True):
            attend(layer)
            hidden = out.flatten(1) @ weight
            if workers > 1:
                dist.all_reduce(hidden)

    def planned() -> None:
        made = plan(geometry, *tables.step())
        pooled.join()
        through(lambda layer: layer.run(made, q, k, v, DIM**-0.5, out))

    if way == "planned":
        return planned
    mine = [torch.from_numpy(x.astype(np.int32)).pin_memory() for x in tables.step()[1:]]
    requests = Requests(*(x.to(device) for x in mine), 1)
    graph = torch.cuda.CUDAGraph() if way == "graph" else None

    def alone() -> None:
        through(lambda layer: layer.steps.run(requests, q, k, v, DIM**-0.5, out))

    if graph is not None:
        alone()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            alone()

    def step() -> None:
        for on_host, on_device, x in zip(mine, (requests.lengths, requests.pages, requests.exact), tables.step()[1:], strict=True):
            on_host.numpy()[:] = x
            on_device.copy_(on_host, non_blocking=True)
        if graph is not None:
            graph.replay()
        else:
            alone()

    return step


def sixteen_bit_step(layers: int, batch: int, context: int) -> Callable[[], None]:
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(HEADS * DIM, HIDDEN, device="cuda", dtype=torch.bfloat16) / 64
    caches = [torch.randn(2, batch, KV_HEADS, context, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(layers)]

    def step() -> None:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            for k, v in caches:
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
                out.flatten(1) @ weight

    return step


def turboquant_step(folder: Path, layers: int, batch: int, context: int) -> Callable[[], None]:
    from vllm_turboquant import TurboQuant

    weight = torch.randn(HEADS * DIM, HIDDEN, device="cuda", dtype=torch.bfloat16) / 64
    calls = [TurboQuant(folder, KV_HEADS, DIM).filled((context,) * batch, HEADS // KV_HEADS)[0] for _ in range(layers)]

    def step() -> None:
        for call in calls:
            call().flatten(1).to(torch.bfloat16) @ weight

    return step


def measure(step: Callable[[], None], steps: int) -> list[float]:
    """Milliseconds of each step after a few."""
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
    return times[5:]


def worker(rank: int, workers: int, given: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    torch.manual_seed(rank)
    if workers > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511")
        dist.init_process_group("nccl", rank=rank, world_size=workers)
    size = (given.layers, given.batch, given.context)
    contenders: dict[str, Callable[[], Callable[[], None]]] = {
        f"{p} {way}": lambda p=p, way=way: folded_step(p, way, *size, rank, workers)
        for p in given.profiles.split(",")
        for way in WAYS
    }
    if workers == 1:
        contenders["16 bits, flash"] = lambda: sixteen_bit_step(*size)
        if given.vllm:
            contenders["vLLM turboquant 3 bits"] = lambda: turboquant_step(given.vllm, *size)
    for name, make in contenders.items():
        try:
            times = sorted(measure(make(), STEPS if name.split()[-1] in WAYS else 20))
        except Exception as error:  # noqa: BLE001 one that cannot run must not cost the others
            print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
            continue
        torch.cuda.empty_cache()
        if rank == 0:
            figures = (statistics.median(times), statistics.fmean(times), times[len(times) * 9 // 10])
            row = [datetime.now(UTC).date(), torch.cuda.get_device_name(), torch.__version__, name, workers, *size]
            row += [f"{x:.3f}" for x in figures]
            with (given.out / "gpu_vllm_layers.csv").open("a", newline="") as file:
                csv.writer(file).writerow(row)
            print(*row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", type=Path)
    parser.add_argument("--profiles", default="balanced,turbo-3")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--workers", default="1")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    given = parser.parse_args()
    head = "date device torch cache workers layers batch context step_ms step_mean_ms step_p90_ms"
    with (given.out / "gpu_vllm_layers.csv").open("w", newline="") as file:
        csv.writer(file).writerow(head.split())
    for workers in map(int, given.workers.split(",")):
        if workers == 1:
            worker(0, 1, given)
        else:
            torch.multiprocessing.spawn(worker, (workers, given), nprocs=workers)


if __name__ == "__main__":
    main()
