"""The `distortion` command's figures: the paper's table, its bounds, and the bytes they cost."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from kvfold.codebook import solve
from kvfold.errors import InvalidConfig, UnknownCodec, UnsupportedHeadDim
from kvfold.evaluation import distortion
from kvfold.evaluation.distortion import measure, pairs

KEYS = ["codec", "bits", "bits_per_value", "mse", "lower_bound", "upper_bound", "ip_slope", "ip_variance_times_dim"]
PAPER = {1: 0.361, 2: 0.116, 3: 0.0340, 4: 0.00931}  # TurboQuant_mse at d = 128


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the vectors, for tests of anything but precision."""
    monkeypatch.setattr(distortion, "VALUES", distortion.VALUES // 16)


def test_mse_reaches_the_papers_distortion_within_one_per_cent() -> None:
    rows = measure(128, list(PAPER), "mse")
    for row, (bits, mse) in zip(rows, PAPER.items(), strict=True):
        assert list(row) == KEYS
        assert (row["codec"], row["bits"], row["bits_per_value"]) == ("mse", bits, bits + 0.125)
        assert row["mse"] == pytest.approx(mse, rel=0.01)
        assert row["lower_bound"] <= row["mse"] <= row["upper_bound"]
        assert row["ip_slope"] == pytest.approx(1 - mse, abs=0.004)


@pytest.mark.parametrize("dim", [64, 96, 256])
def test_other_head_dims_reach_their_own_table(dim: int, few: None) -> None:
    for row in measure(dim, [1, 2, 3, 4], "mse"):
        assert row["mse"] == pytest.approx(solve(int(row["bits"]), dim).mse, rel=0.015)
        assert row["bits_per_value"] == row["bits"] + 16 / dim


@pytest.mark.parametrize("dim", [64, 128])
def test_prod_and_qjl_are_unbiased_and_within_their_bounds(dim: int) -> None:
    for row in (*measure(dim, [2, 4], "prod"), *measure(dim, [], "qjl")):
        assert row["ip_slope"] == pytest.approx(1, abs=0.005)  # 2 % at four standard errors
        assert row["lower_bound"] <= row["ip_variance_times_dim"] <= row["upper_bound"]


@pytest.mark.parametrize(
    ("codec", "bits", "stored"),
    [("polar", [], [3.875]), ("split", [2.5, 3.5], [2.5, 3.5]), ("uniform", [2], [2.125]), ("qjl", [], [1.125])],
)
def test_every_stored_byte_is_counted(codec: str, bits: list[float], stored: list[float], few: None) -> None:
    rows = measure(128, bits, codec)
    assert [row["bits_per_value"] for row in rows] == stored
    assert all(row["mse"] > row["lower_bound"] for row in rows)


def test_no_bits_means_every_width(few: None) -> None:
    assert [row["bits"] for row in measure(64, [], "split")] == [2.5, 3.5]
    assert [row["bits"] for row in measure(64, [], "uniform")] == [2]


def test_figures_are_the_same_twice_and_differ_by_seed(few: None) -> None:
    assert measure(32, [2], "mse") == measure(32, [2], "mse")
    assert measure(32, [2], "mse") != measure(32, [2], "mse", seed=1)


def test_pairs_have_the_inner_products_they_claim() -> None:
    x, q, truth = pairs(2000, 24, np.random.default_rng(1))
    np.testing.assert_allclose((x * x).sum(-1), 1)
    np.testing.assert_allclose((q * q).sum(-1), 1)
    np.testing.assert_allclose((x * q).sum(-1), truth, atol=1e-12)
    assert 0.45 < truth.mean() < 0.55


@pytest.mark.parametrize(
    ("dim", "bits", "codec", "error"),
    [
        (128, [3.875], "polar", InvalidConfig),
        (128, [1], "qjl", InvalidConfig),
        (128, [3], "uniform", InvalidConfig),
        (128, [9], "mse", InvalidConfig),
        (128, [], "raw", InvalidConfig),
        (128, [2], "vq", UnknownCodec),
        (40, [], "polar", UnsupportedHeadDim),
        (6, [2], "mse", UnsupportedHeadDim),
    ],
)
def test_what_cannot_be_measured_is_refused(dim: int, bits: list[float], codec: str, error: type) -> None:
    with pytest.raises(error):
        measure(dim, bits, codec)


def test_measuring_needs_numpy_only() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['scipy'] = None\n"
        "from kvfold.evaluation.distortion import measure, VALUES\n"
        "import kvfold.evaluation.distortion as d; d.VALUES = 1 << 12\n"
        "assert measure(64, [2], 'prod') and measure(64, [3], 'mse')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
