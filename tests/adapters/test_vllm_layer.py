"""A layer of the vLLM plug-in over blocks, without vLLM: where the host puts them makes no difference to what comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_vllm_step import Model

from kvfold.adapters.vllm.layer import PooledLayer
from kvfold.adapters.vllm.step import Geometry, plan
from kvfold.config import CacheSpec, SideSpec
from kvfold.engine.cpu import library
from kvfold.engine.cpu.engine import CpuEngine
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.pools import Pools
from kvfold.engine.request import LayerShape

HEADS, GROUP, DIM = 2, 2, 64
SPEC = CacheSpec(SideSpec("mse", 3, "unbiased"), SideSpec("mse", 3, "least-squares"))
GEOMETRY = Geometry(SPEC.window, SPEC.sinks, 1, 16)
CALLS = (70, 300, 1, 1, 500, 200, 2, 700, 130, 1)


@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_blocks_handed_over_within_a_step(name: str) -> None:
    if name == "cpu" and library.missing():
        pytest.skip(library.missing())
    outs = [list(outputs(name, hand)) for hand in (False, True)]
    assert [sum(apart for _, apart in out) for out in outs] == [0, 5]
    for (plain, _), (moved, apart) in zip(*outs, strict=True):
        # The native library reads what lies apart with another grouping of the sums.
        assert torch.equal(plain, moved) or (apart and (plain - moved).abs().max() < 2e-6 * plain.abs().max())


def outputs(name: str, hand: bool):
    """(output, sequences read apart) of each call."""
    engine = (CpuEngine if name == "cpu" else TorchEngine)(
        SPEC, LayerShape(1, HEADS, DIM, 4), torch.float32, torch.device("cpu")
    )
    pages = torch.zeros(61, 1, engine.page_bytes, dtype=torch.uint8)
    layer = PooledLayer(engine, Pools(pages, torch.full((601, HEADS, 16, 2 * DIM), float("nan"))), 1)
    tables = Model(GEOMETRY)
    rng = torch.Generator().manual_seed(0)
    for new in CALLS:
        if hand:
            tables.hand_over(new)
        tables.length += new
        starts, lengths = np.array([0, new]), np.array([tables.length])
        step = plan(GEOMETRY, starts, lengths, tables.page_table[None], tables.exact_table[None])
        q = torch.randn(new, HEADS * GROUP, DIM, generator=rng)
        k, v = torch.randn(2, new, HEADS, DIM, generator=rng)
        out = torch.full_like(q, float("nan"))
        layer.run(step, q, k, v, DIM**-0.5, out)
        yield out, len(step.apart)
