"""Attention of every engine against a float64 softmax over the unfolded values.

Tolerance: an engine's error may be twice that of plain float32 code over the same unfolded values, beyond one rounding
of the largest score and what its own precision (PRECISION) adds.
"""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from kvfold.cache.layer import AttendingEngine, FoldedAttention
from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.dispatch import ENGINES as IMPLEMENTATIONS
from kvfold.dispatch import explain
from kvfold.engine import reference, select
from kvfold.engine.request import LayerShape
from kvfold.engine.variant import Variant
from kvfold.errors import InvalidConfig, NoImplementation, ShapeMismatch, Unsupported

# One test body for all; an engine that cannot run here skips with its reasons. Triton's interpreter takes minutes.
ENGINES = ("torch", "cpu", "cuda", pytest.param("triton", marks=pytest.mark.slow))
HEADS = 2
MSE = CacheSpec()
RAW = CacheSpec(SideSpec("raw", 16), SideSpec("raw", 16), 0, 0, False)
# What an engine's own arithmetic adds, relative to the largest value: `cpu` rounds queries and weights to 16 bits, `triton`
# weights, `cuda` multiplies in the model's 16-bit dtype.
DTYPES = {"cuda": torch.bfloat16}  # float32 elsewhere
PRECISION = {"torch": 0.0, "cpu": 5e-4, "triton": 5e-4, "cuda": 4e-3}
FLOOR = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-12}


def place(name: str, dtype: torch.dtype | None = None) -> tuple[torch.device, torch.dtype]:
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available())
    return torch.device("cuda" if on_gpu else "cpu"), dtype or DTYPES.get(name, torch.float32)


def build(name: str, spec: CacheSpec, dim: int, dtype: torch.dtype | None = None) -> FoldedAttention:
    device, dtype = place(name, dtype)
    try:
        engine = select.make_engine(name, spec, LayerShape(3, HEADS, dim, dtype.itemsize), dtype, device)
    except (InvalidConfig, NoImplementation) as error:
        pytest.skip(str(error))
    assert engine.name == name

    def make(*_: object) -> AttendingEngine:
        return engine

    return FoldedAttention(spec, 3, make)


def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def filled(
    name: str, spec: CacheSpec, dim: int, past: list[int], trim: int = 0, dtype: torch.dtype | None = None
) -> tuple[FoldedAttention, list[tuple[Tensor, Tensor]]]:
    """A layer with one row per entry of `past`, trimmed, and what each row's tokens are read as: float64 [H, T, D]."""
    layer = build(name, spec, dim, dtype)
    device, dtype = place(name, dtype)
    longest = max(past)
    k = (numbers((len(past), HEADS, longest, dim), 1) + 1.5 * numbers((1, HEADS, 1, dim), 2)).to(device, dtype)
    v = numbers((len(past), HEADS, longest, dim), 3).to(device, dtype)
    layer.append(k, v, [longest - n for n in past])
    layer.trim([min(trim, n) for n in past])
    read = []
    for row, s in enumerate(layer.sequences):
        exact_k = k[row, :, longest - past[row] :][:, : s.length].double()
        exact_v = v[row, :, longest - past[row] :][:, : s.length].double()
        if s.pages:
            got_k, got_v = s.engine.unfold(torch.stack([s.pool.row(p) for p in s.pages]), s.state)  # type: ignore[attr-defined]
            exact_k[:, spec.sinks : s.folded] = got_k[:, spec.sinks : s.folded].double()
            exact_v[:, spec.sinks : s.folded] = got_v[:, spec.sinks : s.folded].double()
        read.append((exact_k.cpu(), exact_v.cpu()))
    return layer, read


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [H * G, Q, D], k and v [H, T, D] of past and call -> [H * G, Q, D], causal, in the dtype of q."""
    groups = len(q) // len(k)
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = (q * scale) @ k.mT
    hidden = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def worst(x: Tensor) -> float:
    return float(x.abs().max())


def check(
    name: str,
    spec: CacheSpec,
    dim: int,
    past: list[int],
    new: int,
    groups: int,
    *,
    trim: int = 0,
    pads: list[int] | None = None,
    std: float = 2.0,
    dtype: torch.dtype | None = None,
) -> None:
    """One call. std: standard deviation of the scores, by the length of the queries."""
    layer, read = filled(name, spec, dim, past, trim, dtype)
    device, dtype = place(name, dtype)
    pads = pads or [0] * len(past)
    scale = dim**-0.5
    batch = len(past)
    q = (numbers((batch, HEADS * groups, new, dim), 4) * std).to(dtype)
    k, v = (numbers((batch, HEADS, new, dim), s).to(dtype) for s in (5, 6))
    out = layer.attend(q.to(device), k.to(device), v.to(device), pads, scale).cpu()
    assert (out.dtype, out.shape) == (dtype, q.shape)
    for b, p in enumerate(pads):
        assert not out[b, :, :p].any()
        if p == new:
            continue
        keys, values = (
            torch.cat([read[b][0], k[b, :, p:].double()], 1),
            torch.cat([read[b][1], v[b, :, p:].double()], 1),
        )
        truth = softmax_attention(q[b, :, p:].double(), keys, values, scale)
        plain = softmax_attention(q[b, :, p:].float(), keys.float(), values.float(), scale).to(dtype)
        # One rounding of the largest score, which moves every weight, and one of the output.
        score = scale * float(q[b, :, p:].double().norm(dim=-1).max() * keys.norm(dim=-1).max())
        least = (2**-24 * score + FLOOR[dtype]) * worst(values)
        allowed = 2 * worst(plain - truth) + least + PRECISION[name] * worst(values)
        assert worst(out[b, :, p:] - truth) <= allowed


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("new", [1, 37])
def test_head_dims(name: str, dim: int, new: int) -> None:
    check(name, MSE, dim, [450], new, 4)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("groups", range(1, 17))
def test_queries_per_head(name: str, groups: int) -> None:
    check(name, MSE, 64, [300], 1, groups)
    check(name, MSE, 64, [300], 6, groups)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(("window", "sinks"), list(itertools.product([0, 1, 64, 128, 200], [0, 1, 4, 127])))
def test_windows_and_sinks(name: str, window: int, sinks: int) -> None:
    spec = CacheSpec(window=window, sinks=sinks)
    check(name, spec, 64, [400, 128, 129, 1], 3, 2, pads=[0, 1, 0, 2])


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("trim", [1, 63, 64, 65, 128, 200, 330, 390, 396, 399])
def test_a_partly_valid_last_page(name: str, trim: int) -> None:
    check(name, CacheSpec(window=0), 64, [400], 2, 2, trim=trim)
    check(name, CacheSpec(window=64), 128, [400], 2, 2, trim=trim)


@pytest.mark.parametrize("name", ENGINES)
def test_pads_and_rows_of_any_length(name: str) -> None:
    check(name, MSE, 64, [700, 5, 330, 128], 9, 3, pads=[0, 8, 9, 4])


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("std", [0.0, 0.5, 3.0, 6.0])
def test_peaked_and_flat_scores(name: str, std: float) -> None:
    check(name, MSE, 128, [900], 1, 4, std=std)
    check(name, MSE, 64, [900], 20, 2, std=std)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check(name, MSE, 64, [500, 20], 5, 4, dtype=dtype)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        (SideSpec("mse", 4), SideSpec("mse", 4)),
        (SideSpec("mse", 2), SideSpec("uniform", 2)),
        (SideSpec("uniform", 2), SideSpec("mse", 3)),
        (SideSpec("mse", 6), SideSpec("mse", 1)),
        (SideSpec("mse", 4, rotation="dense"), SideSpec("mse", 3, rotation="dense")),
        (SideSpec("split", 2.5, "norm", "dense"), SideSpec("split", 3.5, "norm", "dense")),
        (SideSpec("prod", 3), SideSpec("mse", 3)),
        (SideSpec("trellis", 2.5), SideSpec("trellis", 2)),
        (SideSpec("polar", 3.875), SideSpec("polar", 3.875)),
    ],
    ids=lambda s: f"{s.codec}{s.bits:g}",
)
@pytest.mark.parametrize("centre", [True, False])
def test_codecs(name: str, key: SideSpec, value: SideSpec, centre: bool) -> None:
    check(name, CacheSpec(key, value, 64, 4, centre), 64, [450], 3, 2)


@pytest.mark.parametrize("name", ENGINES)
def test_raw_pages_are_exact_attention(name: str) -> None:
    check(name, RAW, 64, [450], 7, 3)


@pytest.mark.parametrize("name", ["torch", "cpu", "cuda"])
def test_a_long_prefill_call_is_tiled(name: str) -> None:
    """Tiles of queries, of new keys and of pages, none of which divides the others."""
    check(name, MSE, 64, [1100], 700, 2)
    check(name, CacheSpec(window=0), 64, [1], 1100, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_an_empty_past_and_a_call_of_pads(name: str) -> None:
    layer = build(name, MSE, 64)
    device, dtype = place(name)
    q, k, v = (numbers((2, HEADS, 4, 64), s).to(device, dtype) for s in range(3))
    out = layer.attend(q, k, v, [0, 4], 0.125).cpu()
    want = softmax_attention(*(x[0].cpu().double() for x in (q, k, v)), 0.125)
    assert worst(out[0] - want) < 1e-6 + (PRECISION[name] + FLOOR[dtype]) * worst(v)
    assert not out[1].any()
    assert [s.length for s in layer.sequences] == [4, 0]


@pytest.mark.parametrize("name", ENGINES)
def test_same_tokens_and_cuts_give_the_same_bits(name: str) -> None:
    """Wherever pages lie: a fork between other forks' pages against a fresh run."""
    spec, outs = CacheSpec(window=64), []
    device, dtype = place(name)
    k, v = numbers((1, HEADS, 1500, 64), 1), numbers((1, HEADS, 1500, 64), 2)
    q = numbers((1, HEADS * 2, 1, 64), 3)
    for scattered in (False, True):
        layer = build(name, spec, 64)
        forks = []
        for start in range(0, 1500, 300):
            call = [x[:, :, start : start + 300].to(device, dtype) for x in (k, v)]
            layer.append(*call, [0])
            if scattered:
                forks.append(layer.fork())
                forks[-1].append(*call, [0])
                if start == 600:
                    layer = layer.fork()
        outs.append(layer.attend(*(x.to(device, dtype) for x in (q, k[:, :, :1], v[:, :, :1])), [0], 0.125).cpu())
    assert torch.equal(*outs)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("poison", [0x00, 0x55, 0x7B])  # as float16: 0, 85 and 61,280
def test_stale_and_free_memory_is_never_read(name: str, poison: int) -> None:
    """Bytes beyond a trimmed page's tokens, ring slots beyond the length, and free pages, filled with junk."""
    layer, _ = filled(name, CacheSpec(window=0, sinks=0), 64, [400], trim=200)
    s = layer.sequences[0]
    device, dtype = place(name)
    q, k, v = (numbers((1, HEADS, 1, 64), i).to(device, dtype) for i in range(3))
    want = layer.fork().attend(q, k, v, [0], 1.0)
    used = {t % s.ring for t in range(s.folded, s.length)}
    for slot in set(range(s.ring)) - used:
        s.ring_k[:, slot] = s.ring_v[:, slot] = math.nan
    canonical = s.engine.to_canonical(s.pool.row(s.pages[-1])).clone()  # type: ignore[attr-defined]
    layout = s.engine.layout  # type: ignore[attr-defined]
    regions = canonical.unflatten(0, (HEADS, layout.head_bytes))
    valid = s.folded % PAGE_TOKENS
    for side in ("key", "value"):
        for f in getattr(layout, side):
            at = layout.offset(side, f.name)
            for width in f.plane_bytes:
                regions[:, at + valid * width : at + PAGE_TOKENS * width] = poison
                at += PAGE_TOKENS * width
    s.pool.row(s.pages[-1]).copy_(s.engine.from_canonical(canonical))  # type: ignore[attr-defined]
    assert torch.equal(layer.attend(q, k, v, [0], 1.0), want)


@pytest.mark.parametrize("spec", [MSE, RAW], ids=["mse", "raw"])
@pytest.mark.parametrize("new", [1, 37])
@pytest.mark.parametrize("variant", [Variant(3.0), Variant(None, True), Variant(3.0, True)], ids=str)
def test_softcaps_and_sink_logits(variant: Variant, new: int, spec: CacheSpec) -> None:
    """Against the definitions in float64. The second row has no pages, the third no past."""
    layer, read = filled("torch", spec, 64, [450, 5, 0])
    layer.variant = variant
    groups = 3
    q = 5 * numbers((3, HEADS * groups, new, 64), 4)
    k, v = (numbers((3, HEADS, new, 64), s) for s in (5, 6))
    logits = 2 * numbers((HEADS * groups,), 7) if variant.sink_logits else None
    out = layer.attend(q, k, v, [0] * 3, 0.125, variant.softcap, logits)
    for b in range(3):
        keys, values = (
            torch.cat([read[b][i], x[b].double()], 1).repeat_interleave(groups, 0) for i, x in ((0, k), (1, v))
        )
        scores = (q[b].double() * 0.125) @ keys.mT
        if variant.softcap:
            scores = variant.softcap * torch.tanh(scores / variant.softcap)
        hidden = torch.ones(new, keys.shape[1], dtype=torch.bool).triu(keys.shape[1] - new + 1)
        weights = scores.masked_fill(hidden, -math.inf).exp()
        mass = weights.sum(-1, keepdim=True)
        if logits is not None:
            mass = mass + logits.double().exp()[:, None, None]
        assert worst(out[b] - weights / mass @ values) < 1e-5


WIDTHS = ((64, 32), (24, 40), (192, 128))


@pytest.mark.parametrize(
    "spec", [MSE, RAW, CacheSpec(SideSpec("trellis", 3), SideSpec("mse", 2))], ids=["mse", "raw", "mixed"]
)
@pytest.mark.parametrize(("dim", "value_dim"), WIDTHS)
def test_values_of_another_width(dim: int, value_dim: int, spec: CacheSpec) -> None:
    """Attention over what pages unfold to, in float64; pages are bytes as the reference lays them out."""
    past, new = 300, 5
    layer = FoldedAttention(spec, 3, functools.partial(select.make_engine, "auto"))
    k, v, q = (
        numbers((1, h, past + new, d), s) for s, h, d in ((1, HEADS, dim), (2, HEADS, value_dim), (3, 2 * HEADS, dim))
    )
    layer.append(k[:, :, :past], v[:, :, :past], [0])
    out = layer.attend(q[:, :, past:], k[:, :, past:], v[:, :, past:], [0], dim**-0.5)
    s = layer.sequences[0]
    read_k, read_v = k[0].double(), v[0].double()
    got_k, got_v = s.engine.unfold(torch.stack([s.pool.row(p) for p in s.pages]), s.state)  # type: ignore[attr-defined]
    read_k[:, spec.sinks : s.folded], read_v[:, spec.sinks : s.folded] = (
        x[:, spec.sinks :].double() for x in (got_k, got_v)
    )
    assert worst(out[0] - softmax_attention(q[0, :, past:].double(), read_k, read_v, dim**-0.5)) < 1e-5
    page = reference.fold(spec, 3, k[0, :, :PAGE_TOKENS].numpy(), v[0, :, :PAGE_TOKENS].numpy(), True)
    assert torch.equal(s.pool.row(s.pages[0]), torch.from_numpy(page))
    assert layer.report()["bits_per_value"] == 8 * len(page) / (PAGE_TOKENS * HEADS * (dim + value_dim))
    with pytest.raises(ShapeMismatch, match="do not continue"):
        layer.append(k, k[..., :8], [0])


def test_engines_without_such_kernels_say_so() -> None:
    shape = LayerShape(0, HEADS, 64, 4, variant=Variant(30.0, True), value_dim=128)
    request = (MSE, shape, torch.float32, torch.device("cpu"))
    reasons = dict(explain(IMPLEMENTATIONS, *request))
    unusual = ("softcapped scores", "sink logits", "keys of 64 and values of 128 numbers")
    for name in ("cpu", "cuda"):
        assert {f"no kernel for {x}" for x in unusual} <= set(reasons[name])
        with pytest.raises(NoImplementation, match="sink logits"):
            select.make_engine(name, *request)
    assert select.make_engine("auto", *request).name == "torch"


def test_calls_that_ask_for_more_than_the_layer_announced() -> None:
    layer = build("torch", MSE, 64)
    q, k, v = (numbers((1, HEADS, 4, 64), s) for s in range(3))
    with pytest.raises(Unsupported, match="softcap"):
        layer.attend(q, k, v, [0], 1.0, 30.0)
    with pytest.raises(Unsupported, match="s_aux"):
        layer.attend(q, k, v, [0], 1.0, None, torch.zeros(HEADS))
    assert layer.sequences[0].length == 0
