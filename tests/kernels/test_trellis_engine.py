"""The trellis codec in torch, and the native search at every level, against NumPy: exactly."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvfold.cache.layer import FoldedAttention  # noqa: E402
from kvfold.codebook.trellis import Code, code  # noqa: E402
from kvfold.codec import torch_trellis  # noqa: E402
from kvfold.codec.trellis import quantize_inputs, read_levels, viterbi  # noqa: E402
from kvfold.config import CODEC_BITS, TRELLIS_CODECS, CacheSpec, SideSpec  # noqa: E402
from kvfold.engine import reference as engine_reference  # noqa: E402
from kvfold.engine.cpu import library  # noqa: E402
from kvfold.engine.cpu import trellis as native  # noqa: E402
from kvfold.engine.on_torch import TorchEngine  # noqa: E402
from kvfold.engine.request import LayerShape  # noqa: E402
from kvfold.engine.select import make_engine  # noqa: E402
from kvfold.errors import NoImplementation, NonFiniteInput  # noqa: E402
from kvfold.profiles import load  # noqa: E402

CPU = torch.device("cpu")
CODES = [(codec, bits) for codec in TRELLIS_CODECS for bits in CODEC_BITS[codec]]
HEADS, LAYER = 2, 3
SCALES = ("norm", "unbiased", "least-squares", "match")


def inputs(book: Code, count: int, dim: int) -> np.ndarray:
    """Gaussian, a vector of zeros, and vectors far outside what a normalised vector can be, which saturate metrics."""
    x = np.random.default_rng([sum(book.widths), dim]).standard_normal((count, dim)).astype(np.float32)
    x[0] = 0
    x[1:4] *= 9
    x[4, ::2], x[4, 1::2] = 9, -9
    return quantize_inputs(x, book)


def levels() -> list:
    return [] if library.missing() else [level.name for level in library.levels() if not level.reason]


@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_torch_searches_as_numpy_does(codec: str, bits: float) -> None:
    book = code(bits, codec)
    x = inputs(book, 21, 64)
    symbols, states = torch_trellis.viterbi(torch.from_numpy(x), book)
    for ours, theirs in zip((symbols, states), viterbi(x, book), strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.skipif(bool(native.missing()), reason="no native library")
@pytest.mark.parametrize("dim", [8, 72, 128, 256])
@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_every_native_level_searches_as_numpy_does(codec: str, bits: float, dim: int) -> None:
    book = code(bits, codec)
    x = inputs(book, 37, dim)
    expected = viterbi(x, book)
    assert levels()
    for level in levels():
        for count in (1, 16, 37):
            found = native.viterbi(torch.from_numpy(x[:count]), book, level)
            for ours, theirs in zip(found, expected, strict=True):
                np.testing.assert_array_equal(ours.numpy(), theirs[:count], err_msg=f"{level} {count}")


def test_an_old_library_is_named_and_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "missing", lambda: "it is too old")
    with pytest.raises(NoImplementation, match="too old"):
        native.viterbi(torch.zeros(1, 8), code(2))
    assert engine(SideSpec("trellis", 2), 64).key.search is torch_trellis.viterbi


@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256])
@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_levels_are_read_without_a_loop(codec: str, bits: float, dim: int) -> None:
    random = np.random.default_rng(dim)
    book = code(bits, codec)
    symbols = np.stack(
        [random.integers(0, 1 << book.widths[t % book.period], (3, 5)) for t in range(dim)], axis=-1
    ).astype(np.uint8)
    states = random.choice(book.starts, (3, 5)).astype(np.uint8)
    side = engine(SideSpec(codec, bits), dim).key
    got = side._levels(torch.from_numpy(symbols), torch.from_numpy(states))
    np.testing.assert_array_equal(got.numpy(), read_levels(symbols, states, book))


def engine(side: SideSpec, dim: int, centre: bool = True) -> TorchEngine:
    return TorchEngine(CacheSpec(side, side, centre=centre), LayerShape(LAYER, HEADS, dim, 4), torch.float32, CPU)


def nmse(bits: float, dim: int, search: int, scale: str = "least-squares", codec: str = "trellis") -> float:
    """Relative squared error of random directions through whole pages."""
    one = engine(SideSpec(codec, bits, scale, search=search), dim, centre=False)
    x = np.random.default_rng([5, dim]).standard_normal((8, HEADS, 128, dim))
    k = torch.from_numpy((x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32))
    rows = torch.zeros(len(k), one.page_bytes, dtype=torch.uint8)
    one.fold(k, k, False, list(rows), (None, None))
    hats = one.unfold(rows, (None, None))
    exact = k.transpose(0, 1).flatten(1, 2)
    return float(sum(((hat - exact) ** 2).sum(-1).mean() for hat in hats) / 2)


# At head_dim 128 and a rate of b + 1/16.
@pytest.mark.parametrize(
    ("bits", "search", "most"),
    [(2, 1, 0.0745), (2.5, 1, 0.0382), (3, 1, 0.0189), (3.5, 1, 0.0099)]
    + [(2, 3, 0.0735), (2.5, 3, 0.0375), (3, 3, 0.0184), (3.5, 3, 0.0095)],
)
def test_distortion_is_a_third_above_shannons_bound(bits: float, search: int, most: float) -> None:
    assert nmse(bits, 128, search) <= most


# The same rates; without a table, 3 % more than with one at 2 bits and 10 % more at 3.
@pytest.mark.parametrize(("bits", "search", "most"), [(2, 1, 0.0775), (2, 3, 0.077), (3, 1, 0.0209), (3, 3, 0.0203)])
def test_distortion_of_computed_codes(bits: float, search: int, most: float) -> None:
    assert nmse(bits, 128, search, codec="computed") <= most


@pytest.mark.parametrize(("dim", "search", "factor"), [(64, 1, 1.41), (64, 3, 1.37), (256, 1, 1.27), (256, 3, 1.25)])
@pytest.mark.parametrize("bits", [2, 3])
def test_distortion_is_near_shannons_bound_at_other_head_dims(bits: int, dim: int, search: int, factor: float) -> None:
    assert nmse(bits, dim, search) <= factor * 4 ** -(bits + 8 / dim)


def vectors(seed: int, *shape: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape) * np.exp(random.uniform(-1.5, 1.5, (*shape[:-1], 1)))
    x[..., 0, :], x[..., 70, :] = 50, 0
    return x.astype(np.float32)


@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128])
@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_pages_equal_the_reference_byte_for_byte(codec: str, bits: float, dim: int) -> None:
    """Sinks are on the first page, and one of them is long: it must not set the page's unit."""
    k, v = vectors(dim, HEADS, 128, dim), vectors(dim + 1, HEADS, 128, dim)
    scale = SCALES[(dim // 8 + int(2 * bits)) % 4]
    side = SideSpec(codec, bits, scale, search=1 if scale == "norm" else 3)
    ours = engine(side, dim)
    for first in (True, False):
        row = torch.full((ours.page_bytes,), 0x5A, dtype=torch.uint8)
        ours.fold(torch.from_numpy(k)[None], torch.from_numpy(v)[None], first, [row], (None, None))
        expected = engine_reference.fold(ours.spec, LAYER, k, v, first_page=first)
        np.testing.assert_array_equal(row.numpy(), expected)
        hats = ours.unfold(row[None], (None, None))
        for hat, theirs in zip(hats, engine_reference.unfold(ours.spec, LAYER, expected, k), strict=True):
            np.testing.assert_allclose(hat.numpy(), theirs, atol=2e-6 * abs(theirs).max())


def test_only_the_first_page_of_a_call_leaves_its_sinks_out() -> None:
    k = torch.from_numpy(np.stack([vectors(s, HEADS, 128, 64) for s in (1, 2)]))
    one = engine(SideSpec("trellis", 2, "unbiased"), 64)
    rows = [torch.zeros(one.page_bytes, dtype=torch.uint8) for _ in range(2)]
    one.fold(k, k, True, rows, (None, None))
    for page, (row, first) in enumerate(zip(rows, (True, False), strict=True)):
        expected = engine_reference.fold(one.spec, LAYER, k[page].numpy(), k[page].numpy(), first_page=first)
        np.testing.assert_array_equal(row.numpy(), expected)


@pytest.mark.parametrize("bits", [2, 2.5])
def test_a_refilled_page_keeps_its_head_and_its_unit(bits: float) -> None:
    one = engine(SideSpec("trellis", bits, "unbiased"), 64)
    x = torch.from_numpy(vectors(4, HEADS, 128, 64)[None])
    x[..., 0, :] /= 50
    row = torch.zeros(one.page_bytes, dtype=torch.uint8)
    one.fold(x, x, True, [row], (None, None))
    before = one.unfold(row[None], (None, None))
    kept = row.clone()
    one.refill(row, x[0, :, 100:], x[0, :, 100:], (None, None))
    assert torch.equal(row, kept)
    new = torch.from_numpy(vectors(5, HEADS, 128, 64))[:, 100:]
    one.refill(row, new, new, (None, None))
    after = one.unfold(row[None], (None, None))
    for was, now in zip(before, after, strict=True):
        assert torch.equal(was[:, :100], now[:, :100])
        assert float(((now[:, 100:] - new) ** 2).sum() / (new**2).sum()) < 0.2


@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_a_cache_round_trip(codec: str, bits: float) -> None:
    """Appended in pieces, trimmed and grown again: attention stays near the exact one, better at more bits."""
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, HEADS, 400, 64, generator=g) for _ in range(2))
    spec = CacheSpec(SideSpec(codec, bits, "unbiased"), SideSpec(codec, bits, "unbiased"), window=16)
    cache = FoldedAttention(spec, 0, partial(make_engine, "auto"))
    cache.append(k[:, :, :300], v[:, :, :300], [0])
    cache.trim([120])
    cache.append(k[:, :, 180:399], v[:, :, 180:399], [0])
    q = torch.randn(1, 2 * HEADS, 1, 64, generator=g)
    out = cache.attend(q, k[:, :, 399:], v[:, :, 399:], [0], 0.125)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.125, enable_gqa=True)
    error = float((out - exact).norm() / exact.norm())
    assert error < {1: 1.1, 1.5: 0.6, 2: 0.45, 2.5: 0.32, 3: 0.22, 3.5: 0.16, 4: 0.12}[bits]
    assert cache.report()["backend"] == ("torch" if bits == 4 or library.missing() else "cpu")
    # A byte per vector, a unit per page; for keys alone two means of 66 bytes.
    assert cache.report()["bits_per_value"] == bits + (8 + 16 / 128 + 66 / 128 * 8) / 64


@pytest.mark.parametrize(("dim", "most"), [(64, 2.2125), (128, 2.15), (256, 2.12)])
def test_the_rate_of_profile_extreme(dim: int, most: float) -> None:
    one = TorchEngine(load("extreme").spec, LayerShape(0, HEADS, dim, 4), torch.float32, CPU)
    assert 8 * one.page_bytes / (128 * 2 * HEADS * dim) <= most


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8, 1e30])
def test_vectors_that_do_not_fit_are_refused(bad: float) -> None:
    one = engine(SideSpec("trellis", 2, "unbiased"), 64, centre=False)
    x = torch.from_numpy(vectors(9, 1, HEADS, 128, 64))
    y = x.clone()
    y[0, 1, 77] = bad
    row = torch.full((one.page_bytes,), 0x33, dtype=torch.uint8)
    with pytest.raises(NonFiniteInput, match="value vector"):
        one.fold(x, y, False, [row], (None, None))
    assert (row == 0x33).all()
