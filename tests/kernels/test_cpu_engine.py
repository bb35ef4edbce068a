"""The CPU engine against the canonical encoder (exact bytes) and float64 attention over decoded pages, at every level."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvfold.codec.canonical import half_means  # noqa: E402
from kvfold.config import CacheSpec, SideSpec  # noqa: E402
from kvfold.engine.cpu import library  # noqa: E402
from kvfold.engine.cpu.engine import CpuEngine, why_not  # noqa: E402
from kvfold.engine.on_torch import TorchEngine  # noqa: E402
from kvfold.engine.request import AttendRequest, LayerShape, SequenceView  # noqa: E402
from kvfold.errors import InvalidConfig, NoImplementation, NonFiniteInput  # noqa: E402

if library.missing():
    pytest.skip(library.missing(), allow_module_level=True)

CPU = torch.device("cpu")
STATE = (None, None)
TOLERANCE = 5e-4  # of float64 attention over the same codes: queries and weights have 16 bits
SIDES = {
    "4-bit": (SideSpec("mse", 4, "unbiased"), SideSpec("mse", 4, "least-squares")),
    "3-bit": (SideSpec("mse", 3, "unbiased", search=3), SideSpec("mse", 3, "least-squares", search=3)),
    "2-bit": (SideSpec("uniform", 2, "unbiased"), SideSpec("mse", 2, "match")),
    "mixed": (SideSpec("mse", 4, "norm"), SideSpec("uniform", 2, "least-squares")),
    "mixed-odd": (SideSpec("mse", 3, "match"), SideSpec("mse", 2, "norm")),
    "trellis-2-1": (SideSpec("trellis", 2, "unbiased"), SideSpec("trellis", 1, "norm")),
    "trellis-2.5-1.5": (SideSpec("trellis", 2.5, "unbiased"), SideSpec("trellis", 1.5, "unbiased")),
    "trellis-3-3.5": (SideSpec("trellis", 3, "least-squares"), SideSpec("trellis", 3.5, "match")),
    "trellis-1.5-2": (
        SideSpec("trellis", 1.5, "unbiased", search=3),
        SideSpec("trellis", 2, "least-squares", search=3),
    ),
    "trellis-computed-3-2": (SideSpec("computed", 3, "unbiased"), SideSpec("computed", 2, "unbiased", search=3)),
    "trellis-computed-2-mse": (SideSpec("computed", 2, "least-squares"), SideSpec("mse", 4, "unbiased")),
    "trellis-3.5-mse": (SideSpec("trellis", 3.5, "unbiased"), SideSpec("mse", 3, "unbiased")),
    "mse-trellis-2.5": (SideSpec("mse", 4, "unbiased"), SideSpec("trellis", 2.5, "unbiased")),
}


DIMS = (64, 96, 128, 256)


def with_dims(names: Iterable[str]) -> list[tuple[str, int]]:
    """Every pair that has a kernel: trellis streams fill whole words at multiples of 64."""
    return [(name, dim) for name in names for dim in DIMS if dim % 64 == 0 or "trellis" not in name]


@pytest.fixture(params=[v.name for v in library.levels()])
def level(request: pytest.FixtureRequest) -> str:
    reason = next(v.reason for v in library.levels() if v.name == request.param)
    if reason:
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


def engines(sides: str, dim: int, heads: int, level: str, dtype: torch.dtype = torch.float32, **kw: object) -> tuple:
    key, value = SIDES[sides]
    spec = CacheSpec(key=key, value=value, **kw)
    shape = LayerShape(5, heads, dim, 4)
    return CpuEngine(spec, shape, dtype, CPU, level=level), TorchEngine(spec, shape, dtype, CPU)


def tokens(seed: int, *size: int) -> torch.Tensor:
    """Gaussian vectors of uneven lengths with an offset per head, as keys of real models have."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*size, generator=g) * torch.exp(0.3 * torch.randn(*size[:-1], 1, generator=g))
    return x + torch.randn(size[-3], 1, size[-1], generator=g)


def folded(
    engine: CpuEngine | TorchEngine, keys: torch.Tensor, values: torch.Tensor, first: bool = True
) -> torch.Tensor:
    rows = torch.full((len(keys), engine.page_bytes), 0xAA, dtype=torch.uint8)
    engine.fold(keys, values, first, list(rows), STATE)
    return rows


def attention64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor) -> torch.Tensor:
    """q [Hq, Q, D], k, v [H, T, D], seen [Q, T]; float64."""
    group = q.shape[0] // k.shape[0]
    k, v = k.double().repeat_interleave(group, 0), v.double().repeat_interleave(group, 0)
    scores = (q.double() @ k.mT * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("sides", "dim"), with_dims(SIDES))
def test_bytes_equal_the_canonical_encoder(level: str, sides: str, dim: int) -> None:
    mine, reference = engines(sides, dim, 3, level)
    keys, values = tokens(1, 3, 3, 128, dim), tokens(2, 3, 3, 128, dim)
    keys[1, 0, 7] = 0
    values[1, 1, 9] = 0
    # A vector along one axis, and one that rotation puts on one: of coordinates as far from Gaussian as any.
    values[2, 2, 11] = 5 * torch.eye(dim)[3]
    values[2, :, 12] = reference.value.lift(torch.eye(dim)[5].expand(3, 1, dim), None)[:, 0]
    rows, expected = folded(mine, keys, values), folded(reference, keys, values)
    for row, want in zip(rows, expected, strict=True):
        canonical = mine.to_canonical(row)
        assert torch.equal(canonical, want)
        assert torch.equal(mine.from_canonical(canonical)[: mine.row_bytes], row[: mine.row_bytes])
    for got, want in zip(mine.unfold(rows, STATE), reference.unfold(expected, STATE), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sides", ["3-bit", "trellis-3-3.5"])
def test_fold_takes_every_dtype_and_any_strides(level: str, sides: str, dtype: torch.dtype) -> None:
    mine, reference = engines(sides, 128, 2, level, dtype)
    keys = tokens(3, 2, 128, 2, 128).to(dtype).transpose(1, 2)
    values = tokens(4, 2, 2, 128, 256).to(dtype)[..., ::2]
    rows, expected = folded(mine, keys, values, False), folded(reference, keys, values, False)
    assert all(torch.equal(mine.to_canonical(r), e) for r, e in zip(rows, expected, strict=True))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("centre", [True, False])
def test_sinks_set_no_unit(level: str, centre: bool, first: bool) -> None:
    """On the first page of a sequence alone a long sink leaves the unit of a trellis side to the other vectors."""
    mine, reference = engines("trellis-2.5-1.5", 64, 2, level, sinks=70, centre=centre)
    keys, values = tokens(15, 2, 2, 128, 64), tokens(16, 2, 2, 128, 64)
    keys[:, :, 69] *= 100
    values[:, :, 3] *= 100
    rows, expected = folded(mine, keys, values, first), folded(reference, keys, values, first)
    assert all(torch.equal(mine.to_canonical(r), e) for r, e in zip(rows, expected, strict=True))


def test_means_are_the_canonical_ones(level: str) -> None:
    mine, _ = engines("4-bit", 64, 2, level, sinks=70)
    keys = tokens(5, 1, 2, 128, 64)
    row = mine.to_canonical(folded(mine, keys, keys)[0]).numpy().reshape(2, -1)
    codes, scales, _ = half_means(keys[0].numpy(), 70)
    at = mine.layout.offset("mean", "codes")
    assert np.array_equal(row[:, at : at + 128].view(np.int8).reshape(codes.shape), codes)
    assert np.array_equal(row[:, at + 128 : at + 132].copy().view(np.float16), scales)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 8, 9, 16])
@pytest.mark.parametrize("sides", SIDES)
def test_decode_matches_float64(level: str, sides: str, group: int) -> None:
    attends(level, sides, 128, 2, group, 1, 5 * 128, 37, torch.float32, sharpness=3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sides", "dim"), with_dims(["3-bit", "trellis-2.5-1.5"]))
def test_head_dims_and_dtypes(level: str, sides: str, dim: int, dtype: torch.dtype) -> None:
    attends(level, sides, dim, 2, 4, 3, 3 * 128, 130, dtype)


@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("sides", ["4-bit", "2-bit"])
def test_head_dim_96_at_every_group(level: str, sides: str, group: int) -> None:
    attends(level, sides, 96, 2, group, 1, 3 * 128, 37, torch.float32, sharpness=3.0)
    attends(level, sides, 96, 1, group, 70, 2 * 128, 5, torch.float32)


@pytest.mark.parametrize("new", [2, 17, 100])
@pytest.mark.parametrize("folded_tokens", [0, 128, 300, 4 * 128])
@pytest.mark.parametrize("sides", ["2-bit", "trellis-3-3.5"])
def test_prefill_is_causal_and_masks_stale_tokens(level: str, sides: str, new: int, folded_tokens: int) -> None:
    attends(level, sides, 64, 2, 3, new, folded_tokens, 5, torch.float32)


def attends(
    level: str, sides: str, dim: int, heads: int, group: int, new: int, folded_tokens: int, recent: int, dtype: torch.dtype,
    sharpness: float = 1.0,
) -> None:  # fmt: skip
    mine, reference = engines(sides, dim, heads, level, dtype, sinks=4)
    pages = -(-folded_tokens // 128)
    keys, values = (
        tokens(6, max(1, pages), heads, 128, dim).to(dtype),
        tokens(7, max(1, pages), heads, 128, dim).to(dtype),
    )
    rows = folded(mine, keys, values)
    k_hat, v_hat = reference.unfold(folded(reference, keys, values), STATE)
    recent_k, recent_v = tokens(8, heads, recent, dim).to(dtype), tokens(9, heads, recent, dim).to(dtype)
    q = (torch.randn(2, heads * group, new, dim) * sharpness).to(dtype)
    k, v = tokens(10, 2, heads, new, dim).to(dtype), tokens(11, 2, heads, new, dim).to(dtype)
    pads = [0, new // 3]
    runs = [rows[:1], rows[1:pages]] if pages > 1 else [rows] if pages else []
    sinks = (keys[0, :, :4], values[0, :, :4])
    views = [SequenceView(runs, folded_tokens, *sinks, recent_k, recent_v, p, None, None) for p in pads]
    scale = dim**-0.5
    out = mine.attend(AttendRequest(q, k, v, scale, views))
    assert out.dtype == dtype
    past = 4 if folded_tokens else 0
    for b, p in enumerate(pads):
        assert not out[b, :, :p].any()
        all_k = torch.cat([keys[0, :, :past], k_hat[:, past:folded_tokens], recent_k, k[b, :, p:]], 1)
        all_v = torch.cat([values[0, :, :past], v_hat[:, past:folded_tokens], recent_v, v[b, :, p:]], 1)
        seen = torch.ones(new - p, all_k.shape[1], dtype=torch.bool).tril(all_k.shape[1] - (new - p))
        want = attention64(q[b, :, p:], all_k, all_v, scale, seen)
        rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]  # of the output
        error = float((out[b, :, p:].double() - want).norm() / want.norm())
        assert error < TOLERANCE + rounding


@pytest.mark.parametrize("sides", ["3-bit", "trellis-3-3.5"])
def test_threads_do_not_change_a_bit(level: str, sides: str) -> None:
    outs = []
    for threads in (1, 2, 5):
        mine, _ = engines(sides, 128, 2, level)
        mine.threads = threads
        keys = tokens(12, 40, 2, 128, 128)
        rows = folded(mine, keys, keys)
        sink = keys[0, :, :4]
        view = SequenceView([rows], 40 * 128, sink, sink, keys[0, :, :9], keys[0, :, :9], 0, None, None)
        one = keys[1, None, :, :1]
        outs.append(mine.attend(AttendRequest(torch.ones(1, 8, 1, 128), one, one, 0.1, [view])))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_threads_are_those_of_torch_and_are_told(level: str) -> None:
    mine, _ = engines("3-bit", 128, 2, level)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert mine.running() == {"level": level, "threads": threads, "bits_depend_on": ["level"]}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("sides", ["4-bit", "trellis-2-1"])
def test_non_finite_vectors_are_refused(level: str, sides: str, bad: float) -> None:
    mine, _ = engines(sides, 64, 1, level)
    for side in (0, 1):
        pair = [torch.randn(1, 1, 128, 64), torch.randn(1, 1, 128, 64)]
        pair[side][0, 0, 99, 3] = bad
        with pytest.raises(NonFiniteInput):
            folded(mine, *pair)


def test_a_query_that_is_not_finite_gives_nan_in_its_row_only(level: str) -> None:
    mine, _ = engines("4-bit", 64, 1, level)
    keys = tokens(13, 2, 1, 128, 64)
    rows = folded(mine, keys, keys)
    q = torch.randn(1, 2, 1, 64)
    q[0, 1, 0, 0] = torch.nan
    view = SequenceView([rows], 256, keys[0, :, :4], keys[0, :, :4], keys[0, :, :0], keys[0, :, :0], 0, None, None)
    out = mine.attend(AttendRequest(q, keys[:1, :, :1], keys[:1, :, :1], 0.1, [view]))
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()


def test_refusals_name_their_reasons() -> None:
    shape = LayerShape(0, 2, 80, 4)
    spec = CacheSpec(key=SideSpec("mse", 5), value=SideSpec("mse", 3, rotation="dense"))
    reasons = why_not(spec, shape, torch.float64, CPU)
    assert len(reasons) == 4
    with pytest.raises(NoImplementation, match="head_dim 80"):
        CpuEngine(spec, shape, torch.float32, CPU)
    streams = CacheSpec(key=SideSpec("trellis", 2.5), value=SideSpec("mse", 3))
    assert why_not(streams, LayerShape(0, 2, 96, 4), torch.float32, CPU) == [
        "key codec 'trellis' has kernels for multiples of 64, not 96"
    ]
    with pytest.raises(InvalidConfig, match="unknown CPU level"):
        library.choose_level("mmx")


def test_the_environment_forces_a_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.LEVEL_VARIABLE, "scalar")
    assert library.choose_level().name == "scalar"


def test_a_library_of_other_sources_is_told(tmp_path: Path) -> None:
    """A checkout whose library is older than its sources would run, and measure, what nobody sees."""
    (tmp_path / "csrc" / "levels").mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").write_text("project(x)")
    for name in ("levels.cpp", "levels/avx2.cpp", "levels.h"):
        (tmp_path / "csrc" / name).write_text(name)
    names = ("CMakeLists.txt", "csrc/levels.cpp", "csrc/levels.h", "csrc/levels/avx2.cpp")
    hashes = "".join(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names)
    built_from = hashlib.sha256(hashes.encode()).hexdigest()
    assert not library.differs(built_from, tmp_path)
    (tmp_path / "csrc" / "levels.h").write_text("another")
    assert library.differs(built_from, tmp_path)
    assert not library.differs("", tmp_path)
    assert not library.differs(built_from, tmp_path / "csrc")
