"""The page loop of the CUDA decode kernel as it is written, compiled for this machine: one warp over half a page. Needs no GPU.

What a GPU adds is checked there by test_cuda_engine.py: copies, rings, blocks, merges. Formats that are looked up in tables are
left to it, too.
"""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from on_host import compiled

from kvfold.config import CacheSpec, SideSpec
from kvfold.engine.cuda import driver
from kvfold.engine.cuda.arguments import levels_of
from kvfold.engine.cuda.formats import format_of
from kvfold.engine.cuda.fragments import Fragments
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import LayerShape
from kvfold.rotation.reference import matrix, stream

HERE = Path(__file__).parent
LAYER = 3
CASES = [
    (("computed", 2), ("computed", 3), 128, 1, True),
    (("computed", 3), ("computed", 2), 64, 1, False),
    (("computed", 3), ("computed", 3), 256, 1, True),
    (("computed", 2), ("computed", 2), 128, 2, True),
    (("mse", 3), ("computed", 2), 128, 1, True),
    (("computed", 3), ("uniform", 2), 128, 1, True),
    (("uniform", 2), ("mse", 4), 64, 1, True),
    (("mse", 4), ("mse", 2), 256, 1, False),
]

pytestmark = pytest.mark.slow


def build(variant: tuple[int, ...], folder: Path) -> ctypes.CDLL:
    words = (driver.SOURCES / "ptx.cuh").read_text().replace("#pragma once\n", "")
    text = driver.source("merge.cuh")
    assert words in text
    chosen = f"using Chosen = Cfg<{', '.join(map(str, variant))}>;\n"
    program = folder / "chunk.cpp"
    program.write_text(text.replace(words, '#include "warp.h"\n') + chosen + (HERE / "chunk_on_host.cpp").read_text())
    return compiled(program, "-std=c++20", "-ffp-contract=off", "-w", "-pthread", f"-I{HERE}")


@pytest.mark.parametrize(("key", "value", "dim", "groups", "centre"), CASES)
def test_half_a_page(
    key: tuple[str, float],
    value: tuple[str, float],
    dim: int,
    groups: int,
    centre: bool,
    tmp_path: Path,
) -> None:
    """Scores, and outputs of tokens that are shown, against float64 over what the same pages unfold to."""
    spec = CacheSpec(SideSpec(*key, "unbiased"), SideSpec(*value, "unbiased"), sinks=0, seed=7, centre=centre)
    plain = TorchEngine(spec, LayerShape(LAYER, 1, dim, 1), torch.float32, torch.device("cpu"))
    g = torch.Generator().manual_seed(dim + groups)
    k, v = (
        torch.randn(1, 1, 128, dim, generator=g) * (0.2 + torch.rand(1, 1, 128, 1, generator=g)) + offset
        for offset in (2 * torch.randn(dim, generator=g), torch.zeros(dim))
    )
    rows = torch.zeros(1, plain.page_bytes, dtype=torch.uint8)
    plain.fold(k, v, True, list(rows), (None, None))
    keys, values = (x.reshape(128, dim).double().numpy() for x in plain.unfold(rows, (None, None)))
    formats = (format_of(*key), format_of(*value))
    fragments = Fragments(plain.layout, *formats)
    page = fragments.from_canonical(rows)[0].numpy()
    library = build((dim, *formats, int(centre), groups, 8, 2, 1, 0, 0), tmp_path)
    turn_k, turn_v = (matrix("hadamard", dim, stream(spec.seed, LAYER, 0, side)) for side in (0, 1))
    q = torch.randn(4 * groups, dim, generator=g).numpy()
    rotated = np.ascontiguousarray((q @ turn_k.T).astype(np.float32))
    for half, (hidden, shown) in enumerate(((3, 64), (0, 50))):
        scores, out = np.zeros((4 * groups, 64), np.float32), np.zeros((4 * groups, dim), np.float32)
        part = np.ascontiguousarray(page[half * fragments.half_bytes : (half + 1) * fragments.half_bytes])
        arrays = (part, rotated, q)
        library.run(
            *(ctypes.c_void_p(x.ctypes.data) for x in arrays),
            ctypes.c_float(dim**-0.5),
            hidden,
            shown,
            *(levels_of(s, dim) for s in (spec.key, spec.value)),
            *(ctypes.c_void_p(x.ctypes.data) for x in (scores, out)),
        )
        tokens = slice(64 * half, 64 * half + 64)
        exact = q.astype(np.float64) @ keys[tokens].T / math.sqrt(dim)
        np.testing.assert_allclose(scores * math.log(2), exact, atol=6e-4)
        seen = np.exp(exact - exact.max(-1, keepdims=True))
        seen[:, :hidden] = seen[:, shown:] = 0
        want = seen / seen.sum(-1, keepdims=True) @ values[tokens] @ turn_v.T
        assert np.linalg.norm(out - want) < 2e-3 * np.linalg.norm(want)
