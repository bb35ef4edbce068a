"""The CUDA engine against the references: equal bytes, attention within tolerance. Skips with why_not's reason."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from kvfold.bench.cuda_decode import side_spec
from kvfold.config import CacheSpec
from kvfold.engine import reference
from kvfold.engine.cuda.engine import CudaEngine, why_not
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView
from kvfold.errors import NonFiniteInput

# Rule: error <= 2 x that of plain attention over the unfolded pages in the model's dtype, both against float32 attention.
# FLOOR is for calls so short that plain code is luckier than its own rounding: one rounding of the output.
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def spec_of(key: str, value: str, **more: object) -> CacheSpec:
    options: dict[str, object] = {"sinks": 4, "window": 64, "seed": random.randrange(1 << 31), **more}
    search = int(options.pop("search", 3))  # type: ignore[call-overload]
    return CacheSpec(side_spec(key, "unbiased", search), side_spec(value, "least-squares", search), **options)  # type: ignore[arg-type]


def engines(
    spec: CacheSpec, heads: int, dim: int, dtype: torch.dtype, bulk: bool | None = None
) -> tuple[CudaEngine, TorchEngine]:
    shape = LayerShape(3, heads, dim, 2)
    if reasons := why_not(spec, shape, dtype, DEVICE):
        pytest.skip("; ".join(reasons))
    return CudaEngine(spec, shape, dtype, DEVICE, bulk=bulk), TorchEngine(
        spec, shape, torch.float32, torch.device("cpu")
    )


def vectors(*shape: int, dtype: torch.dtype, offset: float = 0.0) -> torch.Tensor:
    """Heavy-tailed vectors with a common offset per channel, as keys have."""
    x = torch.randn(*shape) * (0.3 + torch.rand(*shape[:-1], 1) * 2)
    return (x + offset * torch.randn(shape[-1])).to(dtype)


TRELLIS = [("a", "b"), ("c", "d"), ("b", "e"), ("d", "f"), ("e", "a"), ("f", "c"), ("c", "4"), ("3", "d")]
COMPUTED = [("g", "h"), ("h", "g"), ("g", "g"), ("h", "h"), ("g", "b"), ("h", "3"), ("u", "g")]


@pytest.mark.parametrize(("key", "value"), [*itertools.product("432u", repeat=2), *TRELLIS, *COMPUTED])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_fold_bytes_equal_the_canonical_encoder(key: str, value: str, dim: int) -> None:
    for dtype, centre, search, sinks in (
        (torch.bfloat16, True, 3, 4),
        (torch.float16, False, 1, 0),
        (torch.bfloat16, True, 1, 70),
    ):
        cuda, plain = engines(spec_of(key, value, centre=centre, search=search, sinks=sinks), 2, dim, dtype)
        k, v = vectors(3, 2, 128, dim, dtype=dtype, offset=4.0), vectors(3, 2, 128, dim, dtype=dtype)
        k[1, 0, 5], v[2, 1, 7] = 0, 0
        pages = [reference.fold(plain.spec, 3, k[p].float().numpy(), v[p].float().numpy(), p == 0) for p in range(3)]
        want = torch.from_numpy(np.stack(pages))
        got = torch.full((3, cuda.page_bytes), 0xA5, dtype=torch.uint8, device=DEVICE)
        cuda.fold(k.to(DEVICE), v.to(DEVICE), True, list(got))
        canonical = cuda.fragments.to_canonical(got).cpu()
        differ = (canonical != want).nonzero()[:4].tolist()
        assert not differ, [
            (p, at % plain.layout.head_bytes, int(canonical[p, at]), int(want[p, at])) for p, at in differ
        ]
        assert (cuda.fragments.from_canonical(want.to(DEVICE)) == got).all()


def test_fold_refuses_nan() -> None:
    cuda, _ = engines(spec_of("3", "3"), 2, 128, torch.bfloat16)
    k = vectors(1, 2, 128, 128, dtype=torch.bfloat16).to(DEVICE)
    k[0, 1, 3, 9] = float("nan")
    rows = list(torch.zeros(1, cuda.page_bytes, dtype=torch.uint8, device=DEVICE))
    with pytest.raises(NonFiniteInput):
        cuda.fold(k, k, False, rows)


def attend_both(
    cuda: CudaEngine,
    plain: TorchEngine,
    lengths: list[tuple[int, int, int]],
    groups: int,
    new: int,
    dtype: torch.dtype,
    q_scale: float = 1.0,
) -> float:
    """Error over all rows, each counted alike, as a fraction of what the rule allows. lengths: (folded, recent, pads) per row.

    Not the worst row's: of a row with one query, plain code's error is one draw, and may be a lucky one.
    """
    heads, dim, sinks = cuda.shape.kv_heads, cuda.shape.head_dim, cuda.spec.sinks
    rows, truth = [], []
    for folded, recent, pads in lengths:
        pages = -(-folded // 128)
        k, v = vectors(pages, heads, 128, dim, dtype=dtype, offset=2.0), vectors(pages, heads, 128, dim, dtype=dtype)
        order = torch.randperm(pages).tolist()  # pages scattered in memory
        store = torch.full((max(1, pages), cuda.page_bytes), 0xA5, dtype=torch.uint8, device=DEVICE)
        if pages:
            cuda.fold(k.to(DEVICE), v.to(DEVICE), True, [store[s] for s in order])
        canonical = cuda.fragments.to_canonical(store[order]) if pages else store
        ring = torch.full((2, heads, 320, dim), float("nan"), dtype=dtype, device=DEVICE)
        ring[:, :, 7 : 7 + recent] = vectors(2, heads, recent, dim, dtype=dtype).to(DEVICE)
        first = vectors(2, heads, sinks, dim, dtype=dtype).to(DEVICE)
        r = ring[:, :, 7 : 7 + recent]
        rows.append(
            SequenceView([store[s : s + 1] for s in order], folded, first[0], first[1], r[0], r[1], pads, None, None)
        )
        c = [canonical] if pages else []
        truth.append(
            SequenceView(c, folded, first[0].float(), first[1].float(), r[0].float(), r[1].float(), pads, None, None)
        )
    b = len(lengths)
    q = (vectors(b, heads * groups, new, dim, dtype=dtype) * q_scale).to(DEVICE)
    k, v = (vectors(b, heads, new, dim, dtype=dtype).to(DEVICE) for _ in range(2))
    for i, (_, _, pads) in enumerate(lengths):
        for x in (q, k, v):
            x[i, :, :pads] = float("nan")
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # as a model's projections leave it
    out = cuda.attend(AttendRequest(q, k, v, dim**-0.5, rows))
    on_gpu = TorchEngine(plain.spec, cuda.shape, torch.float32, DEVICE)
    mine, theirs = [0.0], [0.0]  # squares
    for i, (_, _, pads) in enumerate(lengths):
        assert not out[i, :, :pads].any()
        a = out[i, :, pads:].float()
        assert torch.isfinite(a).all()
        if pads < new:
            one = AttendRequest(*(x[i : i + 1].float() for x in (q, k, v)), dim**-0.5, truth[i : i + 1])
            w = on_gpu.attend(one)[0, :, pads:]
            x = plain_attention(on_gpu, truth[i], q[i, :, pads:], k[i, :, pads:], v[i, :, pads:])
            mine.append(float((a - w).norm() / w.norm()) ** 2)
            theirs.append(float((x - w).norm() / w.norm()) ** 2)
    rows_compared = max(1, len(mine) - 1)
    return math.sqrt(sum(mine) / rows_compared) / (2 * math.sqrt(sum(theirs) / rows_compared) + FLOOR[dtype])


def plain_attention(
    e: TorchEngine, view: SequenceView, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Attention over unfolded pages and exact tokens, all in the dtype of q [H * G, Q, D]."""
    sinks, dtype, new = e.spec.sinks if view.folded else 0, q.dtype, q.shape[1]
    past = [[view.sinks_k[:, :sinks]], [view.sinks_v[:, :sinks]]]
    for run in view.runs:
        for side, x in zip(past, e.unfold(run, (None, None)), strict=True):
            side.append(x[:, sinks : view.folded])
    keys, values = (
        torch.cat([x.to(dtype) for x in (*side, recent, fresh)], dim=1)
        for side, recent, fresh in zip(past, (view.recent_k, view.recent_v), (k, v), strict=True)
    )
    seen = torch.ones(new, keys.shape[1], dtype=torch.bool, device=q.device).tril(keys.shape[1] - new)
    groups = len(q) // len(keys)
    keys, values = keys.repeat_interleave(groups, 0), values.repeat_interleave(groups, 0)
    scores = (q @ keys.mT * q.shape[-1] ** -0.5).float().masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1).to(dtype) @ values).float()


VARIED = [(3968, 130, 0), (0, 5, 0), (128, 64, 0), (1000, 0, 0), (256, 191, 0), (8064, 64, 0)]


@pytest.mark.parametrize(
    ("key", "value"),
    [("4", "4"), ("3", "3"), ("2", "2"), ("u", "u"), ("4", "3"), ("3", "u"), ("u", "4"), *TRELLIS, *COMPUTED],
)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("bulk", [True, False])
def test_decode(key: str, value: str, dim: int, bulk: bool) -> None:
    for dtype, groups in ((torch.bfloat16, 4), (torch.float16, 1), (torch.bfloat16, 7)):
        cuda, plain = engines(spec_of(key, value), 2, dim, dtype, bulk)
        for q_scale in (1.0, 6.0):
            assert attend_both(cuda, plain, VARIED, groups, 1, dtype, q_scale) < 1


@pytest.mark.parametrize(("groups", "new"), [(1, 4), (2, 2), (8, 1), (16, 1), (4, 4), (5, 6), (4, 16)])
def test_several_queries(groups: int, new: int) -> None:
    rows = [(3968, 130, 0), (0, 0, 0), (128, 64, new - 1), (1024, 7, new // 2), (0, 3, new)]
    for key, centre, sinks in (("4", True, 4), ("3", False, 0), ("u", True, 70), ("a", True, 4), ("d", False, 0)):
        cuda, plain = engines(spec_of(key, key, centre=centre, sinks=sinks), 2, 128, torch.bfloat16)
        assert attend_both(cuda, plain, rows, groups, new, torch.bfloat16) < 1


@pytest.mark.parametrize(
    ("key", "value"), [("4", "3"), ("3", "u"), ("u", "2"), ("2", "4"), *TRELLIS[:4], *COMPUTED[:2]]
)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_prefill_over_pages(key: str, value: str, dim: int) -> None:
    rows = [(0, 0, 0), (3968, 130, 0), (1000, 7, 30), (128, 64, 199), (256, 9, 200)]
    for dtype, centre in ((torch.bfloat16, True), (torch.float16, False)):
        cuda, plain = engines(spec_of(key, value, centre=centre), 2, dim, dtype)
        assert attend_both(cuda, plain, rows, 3, 200, dtype) < 1


def test_one_long_sequence_and_many_short() -> None:
    cuda, plain = engines(spec_of("3", "3"), 1, 128, torch.bfloat16)
    assert attend_both(cuda, plain, [(40000, 100, 0)], 4, 1, torch.bfloat16) < 1
    many = [(128 * random.randrange(0, 9), random.randrange(64, 191), 0) for _ in range(150)]
    assert attend_both(cuda, plain, many, 4, 1, torch.bfloat16) < 1


def test_same_call_same_bits() -> None:
    cuda, _ = engines(spec_of("3", "3"), 2, 128, torch.bfloat16)
    store = torch.randint(0, 120, (70, cuda.page_bytes), dtype=torch.uint8, device=DEVICE)
    x = [vectors(2, n, 128, dtype=torch.bfloat16).to(DEVICE) for n in (4, 4, 90, 90)]
    row = SequenceView([store], 70 * 128, *x, 0, None, None)
    q, k, v = (vectors(1, h, 1, 128, dtype=torch.bfloat16).to(DEVICE) for h in (8, 2, 2))
    outs = [cuda.attend(AttendRequest(q, k, v, 0.09, [row])) for _ in range(20)]
    assert all(torch.equal(o, outs[0]) for o in outs)


def test_graph_replay_reads_new_tables() -> None:
    cuda, plain = engines(spec_of("3", "3"), 2, 128, torch.bfloat16)
    from kvfold.engine.cuda.arguments import sequence_words

    # Vectors of a model's kind: random bytes would be scales so large that rounding decides which token is seen.
    store = torch.zeros(40, cuda.page_bytes, dtype=torch.uint8, device=DEVICE)
    cuda.fold(*(vectors(40, 2, 128, 128, dtype=torch.bfloat16).to(DEVICE) for _ in "kv"), False, list(store))
    pages = (torch.arange(40, device=DEVICE) * cuda.page_bytes + store.data_ptr()).flip(0).contiguous()
    x = [vectors(2, n, 128, dtype=torch.bfloat16).to(DEVICE) for n in (320, 320, 4, 4)]
    q, k, v = (vectors(1, h, 1, 128, dtype=torch.bfloat16).to(DEVICE) for h in (8, 2, 2))
    table, out = torch.zeros(1, 9, dtype=torch.int64, device=DEVICE), torch.empty_like(q)

    def words(folded: int, length: int) -> torch.Tensor:
        first = folded % 320
        return torch.from_numpy(sequence_words(*x, pages, length, folded, 0, first, 320))[None]

    table.copy_(words(1280, 1400))
    cuda.attend_rows(q, k, v, 0.09, table, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.attend_rows(q, k, v, 0.09, table, out)
    for folded, length in ((1280, 1400), (3840, 4000), (0, 17)):
        table.copy_(words(folded, length))
        graph.replay()
        slots = (torch.arange(folded, length, device=DEVICE)) % 320
        canonical = cuda.fragments.to_canonical(torch.stack([store[39 - p] for p in range(max(1, folded // 128))]))
        row = SequenceView(
            [canonical] if folded else [],
            folded,
            x[2].float(),
            x[3].float(),
            x[0][:, slots].float(),
            x[1][:, slots].float(),
            0,
            None,
            None,
        )
        on_gpu = TorchEngine(plain.spec, cuda.shape, torch.float32, DEVICE)
        want = on_gpu.attend(AttendRequest(q.float(), k.float(), v.float(), 0.09, [row]))
        assert float((out - want).norm() / want.norm()) < 2 * FLOOR[torch.bfloat16]


@pytest.mark.parametrize(("key", "value"), [("4", "4"), ("3", "u"), ("2", "4"), ("u", "3"), ("a", "b"), ("d", "4")])
@pytest.mark.parametrize(("dim", "groups", "new"), [(64, 4, 1), (128, 1, 1), (256, 2, 3), (128, 7, 2)])
@pytest.mark.parametrize("bulk", [True, False])
def test_logits(key: str, value: str, dim: int, groups: int, new: int, bulk: bool) -> None:
    """Scores over pages against those over unfolded keys; what a row does not have is minus infinity."""
    for dtype, centre, sinks in ((torch.bfloat16, True, 4), (torch.float16, False, 70)):
        cuda, _ = engines(spec_of(key, value, centre=centre, sinks=sinks), 2, dim, dtype, bulk)
        rows = []
        for folded in (3968, 0, 1000, 128):
            pages = -(-folded // 128)
            store = torch.full((max(1, pages), cuda.page_bytes), 0xA5, dtype=torch.uint8, device=DEVICE)
            k, v = (vectors(pages, 2, 128, dim, dtype=dtype, offset=2.0).to(DEVICE) for _ in "kv")
            order = torch.randperm(pages).tolist()
            if pages:
                cuda.fold(k, v, True, [store[s] for s in order])
            exact = [torch.full((2, n, dim), float("nan"), dtype=dtype, device=DEVICE) for n in (sinks, sinks, 9, 9)]
            rows.append(SequenceView([store[s : s + 1] for s in order], folded, *exact, 0, None, None))
        q = vectors(len(rows), 2 * groups, new, dim, dtype=dtype).to(DEVICE)
        out = cuda.logits(q, dim**-0.5, rows)
        assert out.shape == (*q.shape[:3], 3968)
        for b, row in enumerate(rows):
            seen = slice(min(sinks, row.folded), row.folded)
            hidden = torch.ones(3968, dtype=torch.bool, device=DEVICE)
            hidden[seen] = False
            assert (out[b][..., hidden] == float("-inf")).all()
            if row.folded:
                keys = cuda.unfold(torch.cat(row.runs))[0][:, seen].repeat_interleave(groups, 0)
                want = q[b].double() @ keys.double().mT * dim**-0.5
                assert float((out[b][..., seen] - want).norm() / want.norm()) < 1e-4
