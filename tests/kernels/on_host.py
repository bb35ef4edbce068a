"""Decode steps of the CUDA engine without a GPU: its entering kernel compiled for the host, its other kernels by the torch
engine, which reads and writes at the addresses that the entering kernel worked out."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.cuda.arguments import EnterArgs
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView

SOURCE = Path(__file__).with_name("enter_on_host.cpp")


def memory(address: int, dtype: torch.dtype, *shape: int) -> Tensor:
    """What lies at an address, as a tensor over it."""
    size = torch.Size(shape).numel() * dtype.itemsize
    raw = np.frombuffer((ctypes.c_char * size).from_address(int(address)), np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def compiled(source: Path, *flags: str) -> ctypes.CDLL:
    """A library of kernels' sources; later flags win."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.so")
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wno-unknown-pragmas", *flags]
        done = subprocess.run([compiler, *options, source, "-o", target], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return ctypes.CDLL(str(target))


class Kernels:
    """In the place of the driver. launched: names of the kernels, in order."""

    def __init__(self) -> None:
        self.library = compiled(SOURCE)
        assert self.library.enter_bytes() == ctypes.sizeof(EnterArgs)
        self.launched: list[str] = []

    def kernel(self, name: str, variant: tuple[int, ...], *_: Any) -> Any:
        def launch(grid: tuple[int, int, int], threads: int, stream: int, args: EnterArgs) -> None:
            assert (name, grid[1:]) == ("enter.cu", (args.H, 2))
            self.launched.append(name)
            self.library.enter(ctypes.byref(args), grid[0], variant[0], threads)

        return SimpleNamespace(launch=launch)


class HostEngine(TorchEngine):
    """What Steps asks of a CudaEngine."""

    capability = (9, 0)

    def __init__(self, spec: CacheSpec, shape: LayerShape, dtype: torch.dtype) -> None:
        super().__init__(spec, shape, dtype, torch.device("cpu"))
        self.dtype = dtype
        self.nonfinite = torch.zeros(1, dtype=torch.int32)

    def memory(self) -> tuple[Tensor, Tensor]:
        return self.nonfinite, self.nonfinite

    def attend_rows(self, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Tensor, out: Tensor) -> None:
        """Row by row, over what the records point to."""
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        for i, record in enumerate(sequences.numpy()):
            length, folded, pads, first, ring, _ = (int(x) for x in record[5:8].view(np.int32))
            assert (pads, ring * dim) == (0, int(record[8]))
            addresses = memory(record[4], torch.int64, -(-folded // PAGE_TOKENS)).tolist() if folded else []
            pages = [memory(a, torch.uint8, 1, self.page_bytes).clone() for a in addresses]
            recent = [
                memory(p, self.dtype, heads, ring, dim)[:, first : first + length - folded].clone() for p in record[:2]
            ]
            sinks = [memory(p, self.dtype, heads, self.spec.sinks, dim).clone() for p in record[2:4]]
            view = SequenceView(pages, folded, *sinks, *recent, 0, None, None)
            out[i] = self.attend(AttendRequest(q[i : i + 1], k[i : i + 1], v[i : i + 1], scale, [view]))[0]

    def fold_to(self, keys: Tensor, values: Tensor, addresses: Tensor) -> None:
        for k, v, address in zip(keys, values, addresses.tolist(), strict=True):
            if address:
                row = memory(address & ~1, torch.uint8, self.page_bytes)
                self.fold(k[None], v[None], bool(address & 1), [row], (None, None))
