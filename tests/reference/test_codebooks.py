"""Codebooks against published tables, closed forms and the conditions of optimality."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from kvfold.codebook import angles, solve, table
from kvfold.codec.qjl import mean_abs_coordinate
from kvfold.errors import InvalidConfig, UnsupportedHeadDim

# (dim, bits) -> (expected squared error, positive levels in units of 1 / sqrt(dim)). The rows of dim None are the Gaussian
# limit as Max printed it (1960); the others were solved on a grid and agree with two published codebooks to three digits.
TABLE = {
    (None, 1): (0.3634, [0.7980]),
    (None, 2): (0.1175, [0.4528, 1.510]),
    (None, 3): (0.03454, [0.2451, 0.7560, 1.344, 2.152]),
    (None, 4): (0.009497, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    (32, 3): (0.03226, [0.24238, 0.74527, 1.31492, 2.07186]),
    (32, 4): (0.00877, [0.12624, 0.38121, 0.64401, 0.92127, 1.22259, 1.56412, 1.97913, 2.56470]),
    (64, 2): (0.11453, [0.45211, 1.49995]),
    (64, 3): (0.03339, [0.24371, 0.75056, 1.32922, 2.11120]),
    (64, 4): (0.00913, [0.12726, 0.38446, 0.65012, 0.93144, 1.23891, 1.59035, 2.02284, 2.64596]),
    (96, 2): (0.11551, [0.45233, 1.50342]),
    (96, 3): (0.03377, [0.24416, 0.75234, 1.33406, 2.12460]),
    (128, 1): (0.36089, [0.79944]),
    (128, 2): (0.11600, [0.45244, 1.50516]),
    (128, 3): (0.03397, [0.24437, 0.75320, 1.33643, 2.13132]),
    (128, 4): (0.00931, [0.12772, 0.38597, 0.65302, 0.93638, 1.24699, 1.60355, 2.04517, 2.68820]),
    (256, 2): (0.11674, [0.45260, 1.50776]),
    (256, 3): (0.03426, [0.24469, 0.75449, 1.34004, 2.14150]),
    (256, 4): (0.00941, [0.12798, 0.38678, 0.65455, 0.93895, 1.25117, 1.61032, 2.05660, 2.70986]),
}
GAUSSIAN_DIM = 10**7
DIMS = (8, 64, 80, 96, 112, 128, 256)


def density(x: np.ndarray, dim: int) -> np.ndarray:
    """Lemma 1 of TurboQuant, in units of 1 / sqrt(dim)."""
    log = math.lgamma(dim / 2) - math.lgamma((dim - 1) / 2) - 0.5 * math.log(math.pi * dim)
    return np.exp(log + 0.5 * (dim - 3) * np.log(np.clip(1 - x * x / dim, 1e-300, None)))


@pytest.mark.parametrize(("dim", "bits"), TABLE)
def test_codebook_equals_the_table(dim: int | None, bits: int) -> None:
    mse, levels = TABLE[dim, bits]
    book = solve(bits, dim or GAUSSIAN_DIM)
    np.testing.assert_allclose(book.centroids[1 << bits - 1 :], levels, atol=1e-3)
    np.testing.assert_allclose(book.centroids, -book.centroids[::-1], atol=0)
    assert book.mse == pytest.approx(mse, abs=5e-5 if dim is None else 6e-6)


@pytest.mark.parametrize("dim", [8, 9, 33, 64, 128, 256, 1000])
def test_one_bit_is_the_closed_form(dim: int) -> None:
    mean = math.sqrt(dim) * mean_abs_coordinate(dim)
    book = solve(1, dim)
    assert book.centroids[1] == pytest.approx(mean, rel=1e-9)
    assert book.mse == pytest.approx(1 - mean**2, rel=1e-9)


@pytest.mark.parametrize(("dim", "bits"), [(8, 3), (64, 8), (80, 5), (128, 4), (256, 6)])
def test_levels_are_centroids_and_boundaries_are_midpoints(dim: int, bits: int) -> None:
    book = solve(bits, dim)
    edge = math.sqrt(dim)
    np.testing.assert_allclose(book.boundaries, (book.centroids[1:] + book.centroids[:-1]) / 2, atol=1e-14)
    ends = np.concatenate([[-edge], book.boundaries, [edge]])
    # Outermost and middle cells: the first are where a solver stops too early.
    for cell in (0, 1, (1 << bits) // 2):
        mass, _ = integrate.quad(density, ends[cell], ends[cell + 1], args=(dim,), epsabs=1e-15)
        first, _ = integrate.quad(lambda x: x * density(x, dim), ends[cell], ends[cell + 1], epsabs=1e-15)
        assert book.centroids[cell] == pytest.approx(first / mass, abs=1e-7)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("codec", "bits"), [("mse", b) for b in range(1, 9)] + [("uniform", 2)])
def test_integer_tables_cost_less_than_one_per_cent(codec: str, bits: int, dim: int) -> None:
    book = table(codec, bits, dim)
    assert book.levels.dtype == np.int32
    assert book.step.dtype == book.thresholds.dtype == np.float32
    assert (book.levels == -book.levels[::-1]).all()
    assert (np.diff(book.levels) > 0).all()
    if bits <= 4:
        assert abs(book.levels).max() <= 63
    middle = (book.levels[1:] + book.levels[:-1]).astype(np.float32) / 2
    np.testing.assert_array_equal(book.thresholds, middle * book.step)
    # Expected squared error by the midpoint rule, fine enough for 8 bits: 2^17 points.
    edge = min(math.sqrt(dim), 9.0)
    x = np.linspace(-edge, edge, 1 << 17, endpoint=False) + edge / (1 << 17)
    weight = density(x, dim)
    error = (x - float(book.step) * book.levels[np.searchsorted(book.thresholds, x)]) ** 2
    mse = float((error * weight).sum() / weight.sum())
    limit = 1.014 if codec == "uniform" else 1.01
    assert solve(bits, dim).mse * 0.9999 <= mse <= solve(bits, dim).mse * limit


@pytest.mark.parametrize("level", [2, 3, 4])
def test_polar_angles_are_centroids_of_the_sine_density(level: int) -> None:
    centres, boundaries = angles.solve(level, 2)
    power = 2 ** (level - 1) - 1
    np.testing.assert_allclose(centres + centres[::-1], np.pi / 2, atol=1e-8)
    ends = np.concatenate([[0], boundaries, [np.pi / 2]])
    for cell, centre in enumerate(centres):
        mass, _ = integrate.quad(lambda t: np.sin(2 * t) ** power, ends[cell], ends[cell + 1])
        first, _ = integrate.quad(lambda t: t * np.sin(2 * t) ** power, ends[cell], ends[cell + 1])
        assert centre == pytest.approx(first / mass, abs=1e-8)


def test_what_has_no_codebook_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="9 bits"):
        solve(9, 128)
    with pytest.raises(UnsupportedHeadDim, match="head_dim 4"):
        solve(3, 4)
    with pytest.raises(InvalidConfig, match="2 bits only"):
        table("uniform", 3, 128)
    with pytest.raises(InvalidConfig, match="no scalar table"):
        table("polar", 4, 128)
