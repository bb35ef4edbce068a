"""The TurboQuant family against the numbers of its papers: errors, bounds, unbiasedness, true size."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
from scipy import integrate
from unbiased import assert_unbiased, slope

from kvfold.codebook import angles, solve
from kvfold.codec import scalar
from kvfold.codec.fields import POLAR_BITS, fields
from kvfold.codec.polar import SECTORS, sector_boundaries, sector_centres
from kvfold.codec.qjl import sketch
from kvfold.codec.reference import build
from kvfold.config import SideSpec
from kvfold.errors import CacheMisuse, InvalidConfig, UnsupportedHeadDim
from kvfold.evaluation.distortion import PANTER_DITE, pairs
from kvfold.rotation.reference import dense_matrix, stream

HEADS = 128  # sketches to average over
PAIRS = 512  # per sketch
BOUND_QJL = math.pi / 2


def random(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def estimates(spec: SideSpec, dim: int, heads: int = HEADS, count: int = PAIRS) -> tuple[np.ndarray, ...]:
    """(estimated, true) inner products and the relative squared errors of unit vectors, over many rotations."""
    draw = random(dim, int(10 * spec.bits))
    out = []
    for head in range(heads):
        x, q, truth = pairs(count, dim, draw)
        codec = build(spec, dim, stream(11, 0, head, 0))
        # Of equal norms the first channels are outliers: a choice that does not look at x.
        state = codec.freeze(np.ones((1, dim)))
        x_hat = codec.decode(codec.encode(x, state), state)
        out.append(((q * x_hat).sum(-1), truth, ((x - x_hat) ** 2).sum(-1)))
    estimate, truth, error = (np.concatenate(part) for part in zip(*out, strict=True))
    return estimate, truth, error


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_algorithm_1_has_the_papers_distortion(bits: int, dim: int) -> None:
    x, _, _ = pairs((1 << 21) // dim, dim, random(bits, dim))
    rotation = dense_matrix(dim, 5)
    x_hat = scalar.decode_exact(*scalar.encode_exact(x, rotation, bits), rotation, bits)
    mse = float(((x - x_hat) ** 2).sum(-1).mean())
    assert mse == pytest.approx(solve(bits, dim).mse, rel=0.01)
    assert 4.0**-bits <= mse <= PANTER_DITE * 4.0**-bits


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_algorithm_1_shrinks_inner_products_by_its_distortion(bits: int) -> None:
    estimate, truth, _ = estimates(SideSpec("mse", bits), 128)
    fitted, error = slope(estimate, truth)
    assert fitted == pytest.approx(1 - solve(bits, 128).mse, abs=5 * error + 1e-3 * 4.0**-bits)


@pytest.mark.parametrize(("dim", "kind"), [(64, "gaussian"), (64, "orthogonal"), (128, "gaussian")])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5])
def test_algorithm_2_is_unbiased_and_within_its_bound(bits: int, dim: int, kind: str) -> None:
    estimate, truth, error = estimates(SideSpec("prod", bits, sketch=kind), dim)
    assert_unbiased(estimate, truth, detect=0.02)
    variance = dim * float(((estimate - truth) ** 2).mean())
    assert variance <= 2 * math.pi * PANTER_DITE * 4.0**-bits
    # Theorem 2's proof: Lemma 4 on the residual, whose squared length is the first stage's distortion.
    first = solve(bits - 1, dim).mse if bits > 1 else 1.0
    assert variance <= BOUND_QJL * first * 1.01
    if kind == "orthogonal":
        assert variance < 0.5 * BOUND_QJL * first
    else:
        # E|x - x_hat|^2 = (pi / 2) gamma^2 in the limit; the (2 / pi) of it that is known already makes it less.
        assert float(error.mean()) == pytest.approx(BOUND_QJL * first, rel=0.03)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("dim", [8, 32, 96, 256])
def test_qjl_is_unbiased_and_within_lemma_4(dim: int, kind: str) -> None:
    estimate, truth, _ = estimates(SideSpec("qjl", 1, sketch=kind), dim, heads=4096 // dim)
    if kind == "orthogonal" or dim >= 96:
        # The rows of one Gaussian sketch are 1 / (sqrt(2) D) too long or short, which fewer, longer runs would show.
        assert_unbiased(estimate, truth, detect=0.02)
    assert dim * float(((estimate - truth) ** 2).mean()) <= BOUND_QJL


def test_an_estimator_two_per_cent_too_short_is_caught() -> None:
    estimate, truth, _ = estimates(SideSpec("qjl", 1), 128)
    with pytest.raises(AssertionError, match="is not 1 within"):
        assert_unbiased(0.98 * estimate, truth, detect=0.02)


def test_a_sample_too_small_to_see_it_is_refused() -> None:
    estimate, truth, _ = estimates(SideSpec("qjl", 1), 128, heads=1)
    with pytest.raises(AssertionError, match="use at least"):
        assert_unbiased(estimate, truth, detect=0.02)


def test_the_gaussian_scale_on_an_orthogonal_sketch_would_be_biased() -> None:
    """S orthogonal with c = sqrt(pi / 2D), the limit, is 1 % off at D = 24; with c = sqrt(pi / 2) / D, by sqrt(D)."""
    _, c = sketch("orthogonal", 24, 1)
    assert math.sqrt(math.pi / 48) / c == pytest.approx(1.01, abs=0.001)


def test_one_bit_prod_is_qjl() -> None:
    x = random(3).standard_normal((5, 64))
    prod, qjl = build(SideSpec("prod", 1), 64, 9), build(SideSpec("qjl", 1), 64, 9)
    np.testing.assert_array_equal(prod.decode(prod.encode(x)), qjl.decode(qjl.encode(x)))
    assert fields(SideSpec("prod", 1), 64) == fields(SideSpec("qjl", 1), 64)


def test_polar_distortion_is_the_product_of_its_levels() -> None:
    """Radii are kept, so <x, x_hat> / |x|^2 is the product over levels of E cos(psi - psi_hat), angles being independent."""

    def cosine(centres: np.ndarray, boundaries: np.ndarray, end: float, power: int) -> float:
        ends = np.concatenate([[0], boundaries, [end]])
        total, _ = integrate.quad(lambda t: abs(np.sin(2 * t)) ** power, 0, end)
        parts = (
            integrate.quad(lambda t, c=c: np.cos(t - c) * abs(np.sin(2 * t)) ** power, a, b)[0]
            for c, a, b in zip(centres, ends, ends[1:], strict=False)
        )
        return sum(parts) / total

    books = [cosine(sector_centres(), sector_boundaries(), 2 * np.pi, 0)]
    books += [
        cosine(*angles.solve(level, POLAR_BITS[level - 1]), np.pi / 2, 2 ** (level - 1) - 1) for level in (2, 3, 4)
    ]
    expected = 2 * (1 - reduce(lambda a, b: a * b, books))
    assert len(sector_centres()) == SECTORS == 16
    _, _, error = estimates(SideSpec("polar", 3.875), 128, heads=32)
    assert float(error.mean()) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("bits", "parts"), [(2.5, (3, 2)), (3.5, (4, 3))])
def test_split_uses_the_codebook_of_each_part(bits: float, parts: tuple[int, int]) -> None:
    """Energy spread evenly: the error is the mean of the books of 32 and 96 dimensions, not of the book of 128."""
    _, _, error = estimates(SideSpec("split", bits, rotation="dense"), 128, heads=16, count=2 * PAIRS)
    expected = (32 * solve(parts[0], 32).mse + 96 * solve(parts[1], 96).mse) / 128
    assert float(error.mean()) == pytest.approx(expected, rel=0.01)


def test_split_gives_its_extra_bit_to_the_longest_channels() -> None:
    x = random(8).standard_normal((300, 128))
    hot = np.array([3, 17, 64, 127])
    x[:, hot] *= 12
    split, plain = build(SideSpec("split", 2.5), 128, 4), build(SideSpec("mse", 2), 128, 4)
    state = split.freeze(x)
    assert state.dtype == np.int16
    assert state.shape == (32,)
    assert set(hot) <= set(state)
    assert (np.diff(state) > 0).all()
    norms = np.linalg.norm(x, axis=0)
    assert norms[state].min() >= np.delete(norms, state).max()
    assert ((split.decode(split.encode(x, state), state) - x) ** 2).sum() < 0.6 * (
        (plain.decode(plain.encode(x)) - x) ** 2
    ).sum()
    with pytest.raises(CacheMisuse, match="outlier channels"):
        split.encode(x)


def test_of_equal_norms_the_lower_channel_is_an_outlier() -> None:
    state = build(SideSpec("split", 2.5), 64, 4).freeze(np.ones((128, 64)))
    np.testing.assert_array_equal(state, np.arange(16))


SIZES = {
    SideSpec("mse", 3): 3.125,
    SideSpec("mse", 4): 4.125,
    SideSpec("uniform", 2): 2.125,
    SideSpec("prod", 1): 1.125,
    SideSpec("prod", 3): 3.25,
    SideSpec("qjl", 1): 1.125,
    SideSpec("polar", 3.875): 3.875,
    SideSpec("split", 2.5): 2.5,
    SideSpec("split", 3.5): 3.5,
    SideSpec("raw", 16): 16,
}


@pytest.mark.parametrize("spec", SIZES, ids=lambda s: f"{s.codec}-{s.bits:g}")
def test_true_size_at_head_dim_128(spec: SideSpec) -> None:
    assert 8 * sum(sum(f.plane_bytes) for f in fields(spec, 128)) / 128 == SIZES[spec]


ALL = [spec for spec in SIZES if spec.codec != "raw"]


@pytest.mark.parametrize("spec", ALL, ids=lambda s: f"{s.codec}-{s.bits:g}")
def test_zero_vectors_come_back_as_zero(spec: SideSpec) -> None:
    x = np.zeros((3, 64))
    codec = build(spec, 64, 1)
    state = codec.freeze(x)
    np.testing.assert_array_equal(codec.decode(codec.encode(x, state), state), 0)


@pytest.mark.parametrize("spec", ALL, ids=lambda s: f"{s.codec}-{s.bits:g}")
def test_length_does_not_matter(spec: SideSpec) -> None:
    """Powers of two scale exactly, float16 stays normal: codes are those of the unit vector."""
    x = random(6).standard_normal((20, 64))
    codec = build(spec, 64, 1)
    state = codec.freeze(x)
    one, many = codec.encode(x, state), codec.encode(x * 64, state)
    for name, value in one.items():
        np.testing.assert_array_equal(many[name], value * 64 if value.dtype == np.float16 else value)


@pytest.mark.parametrize(
    ("codec", "bits", "dim"), [("polar", 3.875, 72), ("split", 2.5, 28), ("split", 2.5, 66), ("mse", 3, 6)]
)
def test_head_dims_without_a_form_are_refused(codec: str, bits: float, dim: int) -> None:
    with pytest.raises(UnsupportedHeadDim, match=f"{dim}"):
        build(SideSpec(codec, bits), dim, 1)


def test_raw_has_no_reference_codec() -> None:
    with pytest.raises(InvalidConfig, match="themselves"):
        build(SideSpec("raw", 16), 64, 1)
