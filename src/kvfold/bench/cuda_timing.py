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


def _elapsed_us(call: Callable[[], object]) -> float:
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    call()
    b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b) * 1000


class Captured:
    """The same work on rotating inputs as one graph, compiled, captured and warm."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = calls  # a graph does not keep its inputs alive
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which may still be making the inputs
        with torch.cuda.stream(stream):
            for call in calls[:3]:
                call()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in calls:
                call()
        for _ in range(3):
            self.graph.replay()
        torch.cuda.synchronize()

    def replay_us(self) -> float:
        """Microseconds per call of one replay."""
        return _elapsed_us(self.graph.replay) / len(self.calls)


def _quantiles(times: list[float]) -> Timing:
    times = sorted(times)
    return Timing(statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10])


def time_calls(calls: Sequence[Callable[[], object]], seconds: float = 0.05) -> Timing:
    """calls: the same work on rotating inputs, captured together."""
    captured = Captured(calls)
    times: list[float] = []
    start = time.monotonic()
    while len(times) < REPLAYS and (len(times) < 7 or time.monotonic() - start < seconds):
        times.append(captured.replay_us())
    return _quantiles(times)


def time_interleaved(contenders: Mapping[str, Captured], rounds: int = 15) -> dict[str, Timing]:
    """Several contenders in turn, `rounds` times round, so that a drift of clocks meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, captured in contenders.items():
            times[name].append(captured.replay_us())
    return {name: _quantiles(t) for name, t in times.items()}


def time_launches(call: Callable[[], object], times: int = 9) -> Timing:
    """Plain launches, for long calls that cannot be captured."""
    for _ in range(2):
        call()
    out = sorted(_elapsed_us(call) for _ in range(times))
    return Timing(statistics.median(out), out[1], out[-2])


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a device-to-device copy of 2 GB."""
    x = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    t = min(time_calls([lambda: y.copy_(x)]).median, time_calls([lambda: torch.mul(x, 1.0, out=y)]).median)
    return 4 * (1 << 30) / (t * 1e-6)
