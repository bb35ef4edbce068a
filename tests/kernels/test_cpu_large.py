"""More than 2 GB of pages in one layer: addresses and sums hold."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from kvfold.config import CacheSpec, SideSpec  # noqa: E402
from kvfold.engine.cpu import library  # noqa: E402
from kvfold.engine.cpu.engine import CpuEngine  # noqa: E402
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView  # noqa: E402

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

TOKENS, DISTINCT, HEADS, GROUP, DIM = 4_194_304, 64, 8, 4, 128
TOLERANCE = 5e-4  # as at any other length


@pytest.mark.slow
def test_four_million_tokens_match_float64() -> None:
    """64 distinct pages repeated 512 times weigh as the 64 pages with log 512 added to their scores."""
    spec = CacheSpec(SideSpec("uniform", 2, "unbiased"), SideSpec("uniform", 2, "least-squares"), sinks=0)
    engine = CpuEngine(spec, LayerShape(0, HEADS, DIM, 4), torch.float32, torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(DISTINCT, HEADS, 128, DIM, generator=g) for _ in range(2))
    source = torch.empty(DISTINCT, engine.page_bytes, dtype=torch.uint8)
    engine.fold(keys, values, True, list(source), (None, None))
    slab = source.repeat(TOKENS // 128 // DISTINCT, 1)
    assert slab.nbytes > 2**31
    q = torch.randn(1, HEADS * GROUP, 1, DIM, generator=g) * 2
    new = torch.randn(1, HEADS, 1, DIM, generator=g)
    none = new[0, :, :0]
    view = SequenceView([slab], TOKENS, none, none, none, none, 0, None, None)
    out = engine.attend(AttendRequest(q, new, new, DIM**-0.5, [view]))[0, :, 0].double()
    k, v = (x.double().repeat_interleave(GROUP, 0) for x in engine.unfold(source, (None, None)))
    scores = (k @ q[0, :, 0, :, None].double())[..., 0] * DIM**-0.5 + math.log(TOKENS // 128 // DISTINCT)
    last = new[0].double().repeat_interleave(GROUP, 0)
    scores = torch.cat([scores, (last @ q[0, :, 0, :, None].double())[..., 0] * DIM**-0.5], 1)
    want = (scores.softmax(-1)[:, None] @ torch.cat([v, last], 1))[:, 0]
    assert float((out - want).norm() / want.norm()) < TOLERANCE
