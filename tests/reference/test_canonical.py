"""The float32 encoder every backend equals, against the same quantizer in float64."""

from __future__ import annotations

import numpy as np
import pytest

from kvfold.codebook import solve, table
from kvfold.codec.canonical import half_means, normalise, tree_sum
from kvfold.codec.heads import Canonical, Exact
from kvfold.rotation.reference import matrix

VALUES = 1 << 21  # at least 2 * 10^6 codes per case
SCALES = ("norm", "unbiased", "least-squares", "match")


def both(codec: str, bits: int, dim: int, scale: str = "norm", search: int = 1) -> tuple[dict, dict, np.ndarray]:
    x = np.random.default_rng([bits, dim]).standard_normal((VALUES // dim + 1, dim)).astype(np.float32)
    book = table(codec, bits, dim)
    canonical = Canonical(book, dim, 77, scale, search)
    exact = Exact(book, matrix("hadamard", dim, 77), scale, search)
    return canonical.encode(x), exact.encode(x.astype(np.float64)), canonical.decode(canonical.encode(x)) - x


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize(("codec", "bits"), [("mse", 1), ("mse", 2), ("uniform", 2), ("mse", 3), ("mse", 4)])
def test_fewer_than_one_code_in_a_million_differs_from_float64(codec: str, bits: int, dim: int) -> None:
    canonical, exact, error = both(codec, bits, dim)
    codes = canonical["codes"].size
    assert codes > 2_000_000
    assert (canonical["codes"] != exact["codes"]).sum() < codes / 1e6
    # Scales are rounded to float16: a rounding tie decided by the last float32 bit is one unit of its last place.
    np.testing.assert_array_max_ulp(canonical["scale"], exact["scale"], maxulp=1)
    assert (canonical["scale"] != exact["scale"]).mean() < 1e-3
    nmse = float((error**2).sum(-1).mean() / dim)
    assert nmse == pytest.approx(solve(bits, dim).mse, rel=0.014 if codec == "uniform" else 0.01)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_books_of_many_thresholds_differ_in_proportion(bits: int) -> None:
    """An input lies within float32's rounding of a threshold as often as there are thresholds: 255 of them, not 15."""
    canonical, exact, _ = both("mse", bits, 128)
    assert (canonical["codes"] != exact["codes"]).mean() < 5e-8 * 2**bits


@pytest.mark.parametrize(("codec", "bits"), [("mse", 3), ("mse", 4), ("uniform", 2)])
def test_searched_grids_differ_only_where_they_are_equally_good(codec: str, bits: int) -> None:
    canonical, exact, _ = both(codec, bits, 128, "least-squares", search=3)
    differ = (canonical["codes"] != exact["codes"]).any(-1)
    # Most of these choose another grid whose cosine agrees to float32 precision; then many codes of one vector differ.
    assert differ.mean() < 1e-3
    book = table(codec, bits, 128)
    x = np.random.default_rng([bits, 128]).standard_normal((VALUES // 128 + 1, 128)).astype(np.float32)[differ]
    y = x.astype(np.float64) @ matrix("hadamard", 128, 77).T
    cosines = []
    for codes in (canonical["codes"][differ], exact["codes"][differ]):
        levels = book.levels[codes]
        cosines.append((y * levels).sum(-1) ** 2 / (levels**2).sum(-1) / (y**2).sum(-1))
    # One step of one code on a threshold moves it by less than this, too.
    np.testing.assert_allclose(*cosines, rtol=1e-4)


def test_search_lowers_the_error_and_never_raises_a_vectors() -> None:
    _, _, one = both("mse", 3, 128, "least-squares")
    _, _, three = both("mse", 3, 128, "least-squares", search=3)
    assert (three**2).sum() < 0.97 * (one**2).sum()
    # float16 scales may cost a searched vector a few parts in 10^4 of its error, never more.
    assert ((three**2).sum(-1) <= (one**2).sum(-1) * 1.001).all()


def test_scales_do_what_they_are_named_for() -> None:
    dim, bits = 128, 3
    x = np.random.default_rng(2).standard_normal((4000, dim)).astype(np.float32)
    book = table("mse", bits, dim)
    hats = {}
    for scale in SCALES:
        codec = Canonical(book, dim, 5, scale)
        hats[scale] = codec.decode(codec.encode(x))
    square = (x.astype(np.float64) ** 2).sum(-1)
    half = 2.0**-10  # float16's spacing relative to a number, and twice its rounding error
    np.testing.assert_allclose((x * hats["unbiased"]).sum(-1), square, rtol=half)
    np.testing.assert_allclose((hats["match"] ** 2).sum(-1), square, rtol=2 * half)
    np.testing.assert_allclose((x * hats["least-squares"]).sum(-1), (hats["least-squares"] ** 2).sum(-1), rtol=half)
    errors = {scale: ((x - hat) ** 2).sum(-1) for scale, hat in hats.items()}
    for scale in ("norm", "unbiased", "match"):
        assert (errors["least-squares"] <= errors[scale] * 1.001).all()


def test_a_value_on_a_threshold_takes_the_lower_code() -> None:
    book = table("uniform", 2, 8)
    below, above = np.nextafter(book.thresholds, -np.inf), np.nextafter(book.thresholds, np.inf)
    for values, codes in ((book.thresholds, [0, 1, 2]), (below, [0, 1, 2]), (above, [1, 2, 3])):
        np.testing.assert_array_equal(np.searchsorted(book.thresholds, values, side="left"), codes)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 80, 96, 128])
def test_tree_sum_adds_halves(n: int) -> None:
    """Written out for one order of additions: any other order rounds these numbers differently."""
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32) * np.float32(1e3)
    padded = [np.float32(v) for v in x] + [np.float32(0)] * ((1 << (n - 1).bit_length()) - n)
    while len(padded) > 1:
        half = len(padded) // 2
        padded = [a + b for a, b in zip(padded[:half], padded[half:], strict=True)]
    assert tree_sum(x) == padded[0]


def test_normalise_of_zero_and_of_infinity() -> None:
    y = np.zeros((2, 8), np.float32)
    y[1] = np.float32(1e30)  # squares overflow
    u, r = normalise(y)
    np.testing.assert_array_equal(u, 0)
    np.testing.assert_array_equal(r, [0, np.inf])


@pytest.mark.parametrize("sinks", [0, 4, 63, 64, 65, 127])
def test_half_means_leave_out_the_sinks(sinks: int) -> None:
    k = np.random.default_rng(sinks).standard_normal((128, 16)).astype(np.float32) + 3
    k[:sinks] = 1e6
    codes, scales, means = half_means(k, sinks)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float16
    for half, tokens in enumerate((k[min(sinks, 64) : 64], k[max(sinks, 64) :])):
        if len(tokens) == 0:
            np.testing.assert_array_equal(means[half], 0)
            continue
        mean = tokens.astype(np.float64).mean(0)
        # Half a step of an int8 code whose largest is 127, and the float16 rounding of the scale.
        assert abs(means[half] - mean).max() <= abs(mean).max() * (0.5 / 127 + 2.0**-10)
