"""Contenders timed in turns, and the record of it. Every figure kvfold quotes comes from a row written here."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kvfold.errors import InvalidConfig

CLOCKS: dict[str, Callable[[], float]] = {
    "cpu": time.process_time,  # on-CPU time of all threads: what other processes do costs nothing
    "wall": time.perf_counter,
}


@dataclass(frozen=True)
class Contender:
    """One way to do the work. step(i) does it on the i-th copy of the data; data_bytes is what one step must read."""

    name: str
    step: Callable[[int], object]
    data_bytes: int


@dataclass(frozen=True)
class Row:
    """Quantiles of one contender. ratio: its median over kvfold's; floor_fraction: the read floor's median over its own."""

    contender: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    ratio: float
    gb_per_s: float
    floor_fraction: float | None


def race(contenders: list[Contender], rounds: int, clock: str, finish: Callable[[], None] = lambda: None) -> list[Row]:
    """Run every contender once per round, the first round uncounted; `finish` waits for work still under way."""
    if clock not in CLOCKS:
        raise InvalidConfig(f"unknown clock {clock!r}", f"Use one of: {', '.join(CLOCKS)}")
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(rounds + 1):
        for c in contenders:
            finish()
            start = now()
            c.step(i)
            finish()
            if i:
                times[c.name].append(1e3 * (now() - start))
    return [_row(c, times) for c in contenders]


def _row(c: Contender, times: dict[str, list[float]]) -> Row:
    p10, median, p90 = (float(v) for v in np.quantile(times[c.name], [0.1, 0.5, 0.9]))
    floor = times.get("read-floor")
    fraction = float(np.median(floor)) / median if floor and c.name in ("kvfold", "read-floor") else None
    ratio = median / float(np.median(times["kvfold"]))
    return Row(c.name, median, p10, p90, ratio, c.data_bytes / median / 1e6, fraction)


def commit() -> str:
    """The commit of the source tree this module lies in, with + if it has changes; outside a repository, $KVFOLD_COMMIT."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "diff", "--quiet", "HEAD", "--", "src", "csrc"], cwd=here.parents[2], check=False
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("KVFOLD_COMMIT", "")
    return head.stdout.strip() + ("+" if changed.returncode else "")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def record(result: dict[str, object], path: Path) -> None:
    """Append one line per contender to a CSV file: what ran, where, and its quantiles."""
    import torch

    rows = result["rows"]
    common = {k: v for k, v in result.items() if k != "rows"}
    where = {
        "commit": commit(),
        "machine": f"{_processor()}, {platform.system()} {platform.release()}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
    }
    lines = [{**where, **common, **row} for row in rows]  # type: ignore[attr-defined]
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(lines)


def as_dict(row: Row) -> dict[str, object]:
    return asdict(row)
