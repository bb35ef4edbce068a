"""Trellis codes: the search finds the best path, the decoder reads what it stored, the codes earn their place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from kvfold.codebook import solve
from kvfold.codebook.trellis import ERROR_TOP, STATE_BITS, STATES, Code, code, parities
from kvfold.codec.fields import fields
from kvfold.codec.reference import build
from kvfold.codec.trellis import FULL, quantize_inputs, read_levels, viterbi
from kvfold.config import CODEC_BITS, PAGE_TOKENS, TRELLIS_CODECS, SideSpec
from kvfold.errors import InvalidConfig, UnsupportedHeadDim

# A computed code's X and Y, of the step's symbol and those before it (kernels/computed.cuh).
FIELDS = {
    2: lambda s: (s[0] ^ s[1] ^ s[3], s[1] ^ (s[2] << 1 & 2)),
    3: lambda s: (s[0] ^ s[1] ^ s[2], s[1] ^ (s[1] << 2 & 4)),
}
CODES = [(codec, bits) for codec in TRELLIS_CODECS for bits in CODEC_BITS[codec]]


def directions(count: int, dim: int, seed: int) -> np.ndarray:
    x = np.random.default_rng([seed, dim]).standard_normal((count, dim))
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def metric(x: np.ndarray, levels: np.ndarray, book: Code) -> np.ndarray:
    """What the search minimises, without saturation."""
    error = np.minimum(abs(x - levels * book.grid), ERROR_TOP)
    return (error**2 >> book.shift).sum(-1)


@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_no_path_is_better_than_the_one_found(codec: str, bits: float) -> None:
    """Every start state and every string of symbols, over as many steps as make a few thousand paths."""
    book = code(bits, codec)
    steps = {1: 9, 1.5: 6, 2: 5, 2.5: 4, 3: 3, 3.5: 3, 4: 2}[bits]
    x = quantize_inputs(np.random.default_rng(3).standard_normal((40, steps)).astype(np.float32), book)
    choices = [range(1 << book.widths[t % book.period]) for t in range(steps)]
    paths = np.array(list(itertools.product(book.starts, *choices)), np.uint8)
    all_levels = read_levels(paths[:, 1:], paths[:, 0], book)
    symbols, states = viterbi(x, book)
    assert set(states.tolist()) <= set(book.starts)
    found = metric(x, read_levels(symbols, states, book), book)
    for row, best in zip(x, found, strict=True):
        assert best == metric(row, all_levels, book).min()


@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_symbols_and_a_start_state_are_all_a_decoder_needs(codec: str, bits: float) -> None:
    """A decoder on strings of bits: no register, no tables of windows."""
    book = code(bits, codec)
    symbols, states = viterbi(quantize_inputs(directions(6, 64, 1) * 8, book), book)
    for row, state, levels in zip(symbols, states, read_levels(symbols, states, book), strict=True):
        held = f"{state:06b}"
        for t, symbol in enumerate(row):
            width = book.widths[t % book.period]
            held += f"{symbol:0{width}b}"
            window = int(held[-(STATE_BITS + width) :], 2)
            index = int("".join(str((window & m).bit_count() % 2) for m in book.masks[t % book.period]), 2)
            assert levels[t] == book.levels[index]


@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_books_are_what_the_format_says(codec: str, bits: float) -> None:
    book = code(bits, codec)
    assert np.mean(book.widths) == bits
    assert max(book.levels) == (sum(book.weights) * ((1 << int(bits)) - 1) if book.weights else 63)
    assert [-v for v in reversed(book.levels)] == list(book.levels)
    assert len(book.starts) == 4
    assert list(book.starts) == sorted(set(book.starts))
    for width, masks, index in zip(book.widths, book.masks, book.index, strict=True):
        assert all(mask < 1 << (STATE_BITS + width) for mask in masks)
        assert 1 << len(masks) == len(book.levels)
        # From any state the 2^width symbols give different levels.
        assert all(len(set(index[s << width : (s + 1) << width])) == 1 << width for s in range(STATES))
    # Every state is reached while no allowed path has saturated.
    assert (-(-STATE_BITS // max(book.widths))) * (ERROR_TOP**2 >> book.shift) < 65535


@pytest.mark.parametrize("bits", CODEC_BITS["computed"])
def test_computed_levels_are_sums_of_words(bits: int) -> None:
    """As a kernel makes them of whole words: the fields X and Y of 3 (2 X - M) + 2 (2 Y - M)."""
    book, top = code(bits, "computed"), (1 << bits) - 1
    window = np.arange(1 << STATE_BITS + bits)
    back = [window >> bits * i & top for i in range(1 + -(-STATE_BITS // bits))]
    x, y = FIELDS[bits](back)
    np.testing.assert_array_equal(book.by_window[0], 3 * (2 * x - top) + 2 * (2 * y - top))


def test_parities() -> None:
    assert parities(3, (0b100, 0b111)).tolist() == [0, 1, 1, 0, 3, 2, 2, 3]


@pytest.mark.parametrize(("codec", "bits"), [c for c in CODES if c[1] in (1, 2, 3)])
def test_the_trellis_beats_nearest_levels_at_the_same_rate(codec: str, bits: int) -> None:
    """By a fifth and more, against the optimal scalar book given its scale for nothing."""
    x = directions(256, 128, 5)
    one = build(SideSpec(codec, bits, "least-squares"), 128, 7)
    error = ((one.decode(one.encode(x)) - x) ** 2).sum(-1).mean()
    assert error < 0.8 * solve(bits, 128).mse


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.99), (2.5, 0.985), (3, 0.975), (3.5, 0.965)])
def test_a_search_on_three_grids_loses_less(bits: float, gain: float) -> None:
    x = directions(256, 128, 5)
    errors = []
    for search in (1, 3):
        codec = build(SideSpec("trellis", bits, "least-squares", search=search), 128, 7)
        errors.append(((codec.decode(codec.encode(x)) - x) ** 2).sum(-1))
    assert errors[1].mean() < gain * errors[0].mean()
    assert (errors[1] < errors[0] * 1.05).all()  # but for the rounding of scales, no vector is worse


def test_a_trellis_that_constrains_nothing_does_not_beat_them() -> None:
    """Sister of the test above: an index of the newest symbol alone is nearest-level coding, and is seen to be."""
    real = code(2)
    idle = replace(real, masks=((2, 1),), levels=(-45, -13, 13, 45))
    x = directions(256, 128, 5) * np.float32(128**0.5)
    errors = []
    for book in (real, idle):
        levels = read_levels(*viterbi(quantize_inputs(x, book), book), book)
        errors.append(1 - ((x * levels).sum(-1) ** 2 / (levels**2).sum(-1)).mean() / 128)
    assert errors[0] < 0.8 * solve(2, 128).mse < 0.99 * solve(2, 128).mse < errors[1]


@pytest.mark.parametrize("scale", ["norm", "unbiased", "least-squares", "match"])
def test_stored_scales_are_within_half_a_code_of_what_they_are_named_for(scale: str) -> None:
    x = directions(300, 128, 2) * np.exp(np.random.default_rng(1).uniform(-1, 1, (300, 1))).astype(np.float32)
    hat = (codec := build(SideSpec("trellis", 2, scale), 128, 5)).decode(codec.encode(x))
    got = {
        "unbiased": (x * hat).sum(-1) / (x**2).sum(-1),
        "least-squares": (hat**2).sum(-1) / (x * hat).sum(-1),
        "match": np.sqrt((hat**2).sum(-1) / (x**2).sum(-1)),
        "norm": np.ones(1),
    }[scale]
    code = build(SideSpec("trellis", 2, scale), 128, 5).encode(x)["header"][:, 0] & 63
    assert (abs(got - 1) <= 0.6 / code).all()
    assert abs(got.mean() - 1) < 0.01


def test_scale_codes_are_linear_under_the_longest() -> None:
    x = directions(50, 64, 3) * np.linspace(0.02, 1, 50, dtype=np.float32)[:, None]
    held = build(SideSpec("trellis", 3, "norm"), 64, 1).encode(x)
    codes = (held["header"][:, 0] & 63).astype(int)
    assert codes.tolist() == (np.arange(50) + 1).tolist()
    assert FULL == 50


def test_short_vectors_become_zero_and_sinks_leave_the_unit_alone() -> None:
    x = directions(8, 64, 3)
    x[0] *= 1e3
    x[1:3] *= [[1e-3], [0]]
    codec = build(SideSpec("trellis", 3, "unbiased"), 64, 1)
    with_sink, without = codec.encode(x), codec.encode(x, skip=1)
    np.testing.assert_array_equal(codec.decode(with_sink)[1:], 0)
    hat = codec.decode(without)
    np.testing.assert_array_equal(hat[1:3], 0)
    assert ((hat[3:] - x[3:]) ** 2).sum(-1).max() < 0.05


@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256])
@pytest.mark.parametrize(("codec", "bits"), CODES)
def test_true_size(codec: str, bits: float, dim: int) -> None:
    """Symbols, one byte, and one float16 per page."""
    stored = sum(f.page_bytes for f in fields(SideSpec(codec, bits), dim))
    widths = code(bits, codec).widths
    rows = sum(-(-int(w) * (dim // len(widths)) // 8) for w in widths)
    assert stored == PAGE_TOKENS * (rows + 1) + 2
    if dim >= 64:
        assert rows == bits * dim / 8


def test_what_has_no_form_is_refused() -> None:
    with pytest.raises(UnsupportedHeadDim, match="multiple of 8"):
        build(SideSpec("trellis", 2), 84, 1)
    with pytest.raises(InvalidConfig, match="dense"):
        SideSpec("trellis", 2, rotation="dense")
    with pytest.raises(InvalidConfig, match="no width"):
        SideSpec("trellis", 5)
    with pytest.raises(InvalidConfig, match="search"):
        SideSpec("trellis", 2, "norm", search=3)
    with pytest.raises(InvalidConfig, match=r"2\.25"):
        code(2.25)
    with pytest.raises(InvalidConfig, match=r"computed code of 2\.5 bits"):
        code(2.5, "computed")
