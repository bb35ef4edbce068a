"""CSV rows that the programs of this folder write, and the shapes that they are asked for."""

from __future__ import annotations

import csv
from datetime import UTC, datetime
from pathlib import Path

import torch

from kvfold.bench import cuda_decode as cd
from kvfold.bench.cuda_timing import Timing
from kvfold.bench.harness import commit

FIELDS = [
    "date", "device", "torch", "batch", "tokens", "lengths", "heads", "kv_heads", "dim", "key",
    "value", "contender", "median_us", "p10_us", "p90_us", "bytes", "gb_per_s", "copy_fraction", "ratio", "variant",
    "commit",
]  # fmt: skip


class Rows:
    """CSV rows of one file, flushed one by one so that a crash loses one row only."""

    def __init__(self, folder: Path, name: str, copy: float, more: tuple[str, ...] = ()) -> None:
        """copy: bytes per second of this run's device-to-device copy. more: columns beside FIELDS."""
        self.file = (folder / name).open("w", newline="")
        self.out = csv.DictWriter(self.file, [*FIELDS, *more], restval="")
        self.out.writeheader()
        self.common = {
            "date": datetime.now(UTC).date(),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        self.copy = copy

    def add(self, shape: cd.Shape, contender: str, t: Timing, nbytes: int, **more: object) -> None:
        rate = nbytes / t.median * 1e6
        lengths = (
            "scattered " * shape.scattered + "equal"
            if len(set(shape.lengths)) == 1
            else f"{min(shape.lengths)}-{max(shape.lengths)}"
        )
        self.out.writerow(
            {
                **self.common,
                "batch": len(shape.lengths),
                "tokens": max(shape.lengths),
                "lengths": lengths,
                "heads": shape.heads,
                "kv_heads": shape.kv_heads,
                "dim": shape.dim,
                "contender": contender,
                "median_us": f"{t.median:.2f}",
                "p10_us": f"{t.p10:.2f}",
                "p90_us": f"{t.p90:.2f}",
                "bytes": nbytes,
                "gb_per_s": f"{rate / 1e9:.0f}",
                "copy_fraction": f"{rate / self.copy:.3f}",
                **more,
            }
        )
        self.file.flush()


def shape_of(text: str) -> cd.Shape:
    """BxN[v][s][:heads/kv_heads/dim]; v: lengths from N / 8 to N, s: pages scattered."""
    size, _, model = text.partition(":")
    b, n = map(int, size.rstrip("sv").split("x"))
    lengths = tuple(n - n * 7 // 8 * i // (b - 1) for i in range(b)) if "v" in size else (n,) * b
    heads, kv_heads, dim = map(int, model.split("/")) if model else (32, 8, 128)
    return cd.Shape(lengths, "s" in size, heads, kv_heads, dim)
