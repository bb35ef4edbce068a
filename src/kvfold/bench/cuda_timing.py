"""Time calls on a GPU: one CUDA graph of rotating inputs, replayed; quantiles of the time per call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ROTATE_BYTES = 250_000_000  # inputs of one replay: several times the second-level cache (50-60 MB on H100 and H200)
REPLAYS = 30


@dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median: float
    p10: float
    p90: float


def rotations(call_bytes: int) -> int:
    """How many different inputs a measurement needs so that none is found in cache."""
    return max(1, -(-ROTATE_BYTES // call_bytes))


def _captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """The calls as one graph, compiled, captured and warm."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:3]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    graph.replay()
    b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b) * 1000


def _quantiles(times: list[float]) -> Timing:
    times = sorted(times)
    return Timing(statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10])


def time_calls(calls: Sequence[Callable[[], object]], seconds: float = 0.05) -> Timing:
    """calls: the same work on rotating inputs, captured together."""
    graph = _captured(calls)
    times: list[float] = []
    start = time.monotonic()
    while len(times) < REPLAYS and (len(times) < 7 or time.monotonic() - start < seconds):
        times.append(_replay_us(graph) / len(calls))
    return _quantiles(times)


def time_interleaved(contenders: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 15) -> dict[str, Timing]:
    """Several contenders in turn, `rounds` times round, so that a drift of clocks meets all of them alike."""
    graphs = {name: _captured(calls) for name, calls in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(_replay_us(graph) / len(contenders[name]))
    return {name: _quantiles(t) for name, t in times.items()}


def time_launches(call: Callable[[], object], times: int = 9) -> Timing:
    """Plain launches, for long calls that cannot be captured."""
    for _ in range(2):
        call()
    out = []
    for _ in range(times):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        call()
        b.record()
        torch.cuda.synchronize()
        out.append(a.elapsed_time(b) * 1000)
    out.sort()
    return Timing(statistics.median(out), out[1], out[-2])


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a device-to-device copy of 2 GB."""
    x = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    t = min(time_calls([lambda: y.copy_(x)]).median, time_calls([lambda: torch.mul(x, 1.0, out=y)]).median)
    return 4 * (1 << 30) / (t * 1e-6)
