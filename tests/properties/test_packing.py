"""Codes to bytes and back: every width, odd counts, both implementations, and no byte shared between tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.config import PAGE_TOKENS
from kvfold.packing import reference
from kvfold.packing.layout import HEAD_ALIGN, MEANS, Field, PageLayout, planes

torch = pytest.importorskip("torch")

from kvfold.codec.on_torch import LevelReader  # noqa: E402
from kvfold.packing import on_torch  # noqa: E402

WIDTHS = range(1, 9)
COUNTS = (1, 7, 31, 32, 33, 63, 64, 96, 127, 128, 129, 256)
# Shapes are few and drawn values many: a case is a seed, so that a failure prints something short.
seeds = st.integers(0, 2**32 - 1)
ODD_DIMS = st.sampled_from([8, 10, 24, 80, 128])


def codes_of(seed: int, bits: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, size=shape, dtype=np.uint8)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=8, deadline=None)
@given(seed=seeds)
def test_codes_come_back_and_torch_writes_the_same_bytes(bits: int, count: int, seed: int) -> None:
    codes = codes_of(seed, bits, 3, count)
    parts = reference.pack(codes, bits)
    assert [p.shape[-1] for p in parts] == list(Field("codes", "codes", bits, count).plane_bytes)
    np.testing.assert_array_equal(reference.unpack(parts, bits, count), codes)
    for ours, theirs in zip(on_torch.pack(torch.from_numpy(codes), bits), parts, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    back = on_torch.unpack([torch.from_numpy(p) for p in parts], bits, count)
    np.testing.assert_array_equal(back.numpy(), codes)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", WIDTHS)
@settings(max_examples=4, deadline=None)
@given(seed=seeds)
def test_level_reader_is_levels_of_unpacked_codes(bits: int, count: int, seed: int) -> None:
    codes = codes_of(seed, bits, 2, 5, count)
    levels = torch.from_numpy(np.random.default_rng(seed).standard_normal(1 << bits).astype(np.float32))
    parts = [torch.from_numpy(p) for p in reference.pack(codes, bits)]
    got = LevelReader(levels, bits, count)(parts)
    assert torch.equal(got, levels[torch.from_numpy(codes).long()])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_bit_lies_where_the_format_says(bits: int, count: int) -> None:
    """Value j of a plane of width w: byte j * w // 8, shift j * w % 8."""
    for j in {0, count // 2, count - 1}:
        for bit in range(bits):
            codes = np.zeros((1, count), np.uint8)
            codes[0, j] = 1 << bit
            for part, (width, shift) in zip(reference.pack(codes, bits), planes(bits), strict=True):
                expected = np.zeros(part.shape[-1], np.uint8)
                if shift <= bit < shift + width:
                    expected[j * width // 8] = 1 << (bit - shift + j * width % 8)
                np.testing.assert_array_equal(part[0], expected)


@pytest.mark.parametrize("bits", range(1, 33))
def test_planes_are_the_binary_digits_of_the_width(bits: int) -> None:
    widths = [width for width, _ in planes(bits)]
    assert sum(widths) == bits
    assert widths == sorted(set(widths), reverse=True)
    assert [shift for _, shift in planes(bits)] == [sum(widths[:i]) for i in range(len(widths))]


fields = st.builds(
    Field,
    name=st.just("codes"),
    kind=st.just("codes"),
    bits=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8]),
    count=st.sampled_from([1, 7, 14, 33, 96, 128]),
)


@settings(max_examples=60, deadline=None)
@given(key=fields, value=fields, heads=st.integers(1, 3), dim=ODD_DIMS, mean=st.booleans(), token=st.integers(0, 127))
def test_a_token_shares_no_byte_with_another(
    key: Field, value: Field, heads: int, dim: int, mean: bool, token: int
) -> None:
    """Writing one token again changes none of the bytes that decide another, a mean or the padding."""
    scale = Field("scale", "half", 16, 1)
    layout = PageLayout((key, scale), (value, scale), heads, dim, mean)
    assert layout.head_bytes % HEAD_ALIGN == 0
    assert 0 <= layout.head_bytes - layout.used_bytes < HEAD_ALIGN
    pages = on_torch.PageCodec(layout)
    random = np.random.default_rng(token)

    def content(f: Field) -> torch.Tensor:
        if f.kind == "half":
            return torch.from_numpy(random.standard_normal((1, heads, PAGE_TOKENS, 1)).astype(np.float16))
        return torch.from_numpy(random.integers(0, 1 << f.bits, (1, heads, PAGE_TOKENS, f.count), dtype=np.uint8))

    row = torch.full((1, layout.page_bytes), 0xA5, dtype=torch.uint8)
    for side in ("key", "value"):
        held = {f.name: content(f) for f in getattr(layout, side)}
        pages.write(row, side, held)
        before = row.clone()
        for f in getattr(layout, side):
            held[f.name] = held[f.name].clone()
            held[f.name][:, :, token] = content(f)[:, :, token]
        pages.write(row, side, held)
        changed = (row != before)[0].reshape(heads, -1).any(0).nonzero().flatten().tolist()
        own = set()
        for f in getattr(layout, side):
            at = layout.offset(side, f.name)
            for n in f.plane_bytes if f.kind == "codes" else (sum(f.plane_bytes),):
                own.update(range(at + token * n, at + (token + 1) * n))
                at += PAGE_TOKENS * n
        assert set(changed) <= own
        for f in getattr(layout, side):
            assert torch.equal(pages.read(row, side, f), held[f.name])


@settings(max_examples=30, deadline=None)
@given(key=fields, value=fields, heads=st.integers(1, 3), dim=ODD_DIMS, seed=seeds)
def test_numpy_and_torch_write_the_same_page(key: Field, value: Field, heads: int, dim: int, seed: int) -> None:
    scale = Field("scale", "half", 16, 3)
    layout = PageLayout((key, scale), (scale, value), heads, dim, True)
    random = np.random.default_rng(seed)
    ours, theirs = np.zeros(layout.page_bytes, np.uint8), torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
    pages = on_torch.PageCodec(layout)
    regions = ours.reshape(heads, -1)
    for side, field in (("key", key), ("value", value)):
        codes = random.integers(0, 1 << field.bits, (heads, PAGE_TOKENS, field.count), dtype=np.uint8)
        halves = random.standard_normal((heads, PAGE_TOKENS, 3)).astype(np.float16)
        pages.write(theirs, side, {"codes": torch.from_numpy(codes)[None], "scale": torch.from_numpy(halves)[None]})
        for region, c, s in zip(regions, codes, halves, strict=True):
            reference.write(region, layout, side, {"codes": c, "scale": s})
            back = reference.read(region, layout, side, np.dtype(np.float32))
            np.testing.assert_array_equal(back["codes"], c)
            np.testing.assert_array_equal(back["scale"], s)
    codes = random.integers(-127, 128, (heads, MEANS, dim)).astype(np.int8)
    scales = random.random((heads, MEANS)).astype(np.float16)
    pages.write_means(theirs, torch.from_numpy(codes)[None], torch.from_numpy(scales)[None])
    for region, c, s in zip(regions, codes, scales, strict=True):
        reference.write_means(region, layout, c, s)
    np.testing.assert_array_equal(theirs[0].numpy(), ours)
    means = pages.read_means(theirs)[0].numpy()
    for h, region in enumerate(regions):
        np.testing.assert_array_equal(reference.read_means(region, layout), means[h])
