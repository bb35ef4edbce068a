"""Fragment order of the CUDA pages: a bijection of canonical bytes, and the order that its maps promise. Runs without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvfold.codebook.trellis import STATES, code
from kvfold.config import CacheSpec, SideSpec
from kvfold.engine.cuda.computed import pack_starts, pack_words, unpack_starts, unpack_words
from kvfold.engine.cuda.fields import from_words, index, to_words
from kvfold.engine.cuda.formats import bits_of, format_of
from kvfold.engine.cuda.fragments import Fragments
from kvfold.engine.cuda.streams import pack_streams, unpack_streams
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import LayerShape

CODECS = [("mse", 4), ("mse", 3), ("mse", 2), ("uniform", 2)]
TRELLIS = [("trellis", b) for b in (1, 1.5, 2, 2.5, 3, 3.5)]
COMPUTED = [("computed", b) for b in (2, 3)]


PAIRS = [
    *itertools.product(CODECS, repeat=2),
    *itertools.pairwise(TRELLIS),
    (TRELLIS[5], CODECS[1]),
    (CODECS[0], TRELLIS[0]),
    *itertools.product(COMPUTED, repeat=2),
    (COMPUTED[1], TRELLIS[2]),
    (CODECS[1], COMPUTED[0]),
]


@pytest.mark.parametrize(("key", "value"), PAIRS)
@pytest.mark.parametrize(("dim", "centre"), [(64, True), (128, True), (128, False), (256, True)])
def test_round_trip(key: tuple[str, float], value: tuple[str, float], dim: int, centre: bool) -> None:
    spec = CacheSpec(SideSpec(*key, "unbiased"), SideSpec(*value, "least-squares"), centre=centre)
    plain = TorchEngine(spec, LayerShape(0, 2, dim, 2), torch.float32, torch.device("cpu"))
    fragments = Fragments(plain.layout, format_of(*key), format_of(*value))
    rows = torch.zeros(3, plain.page_bytes, dtype=torch.uint8)
    k = torch.randn(3, 2, 128, dim) + 3 * torch.randn(dim)
    plain.fold(k, torch.randn(3, 2, 128, dim), True, list(rows), (None, None))
    native = fragments.from_canonical(rows)
    assert native.shape[1] == fragments.page_bytes
    assert torch.equal(fragments.to_canonical(native), rows)
    assert len(native.unique(dim=0)) == 3


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_words_of_computed_codes_hold_every_bit(width: int, value: bool, dim: int) -> None:
    """Words to symbols and back: with the round trip above, each word of a half page is another one's."""
    words = torch.randint(0, 256, (5, 8 * dim * width), dtype=torch.uint8)
    assert torch.equal(pack_words(unpack_words(words, dim, width, value), width, value), words)
    states = torch.randint(0, STATES, (5, 64), dtype=torch.uint8)
    assert torch.equal(unpack_starts(pack_starts(states, width, value), width, value), states)


@pytest.mark.parametrize("fmt", [4, 3, 2, 1])
def test_words_hold_every_bit(fmt: int) -> None:
    words = torch.randint(0, 1 << 32, (50, bits_of(fmt)))
    assert torch.equal(to_words(from_words(words, fmt), fmt), words)


@pytest.mark.parametrize("fmt", [4, 1])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_index_is_a_permutation(fmt: int, value: bool, dim: int) -> None:
    assert torch.equal(index(dim, fmt, value).sort().values, torch.arange(64 * dim))


@pytest.mark.parametrize("bits", [1, 1.5, 2, 2.5, 3, 3.5])
@pytest.mark.parametrize(("dim", "value"), [(64, False), (128, True), (256, False), (256, True)])
def test_streams_hold_runs_most_significant_bit_first(bits: float, dim: int, value: bool) -> None:
    """Lane 4 g + t of keys: coordinates (D/4) t .. of tokens 8 i + g; of values: (D/8) g .. of tokens 8 (4 f + b) + t + 4 r."""
    book = code(bits)
    symbols = torch.stack([torch.randint(0, 1 << book.widths[i % book.period], (64,)) for i in range(dim)], dim=1)
    packed = pack_streams(symbols.to(torch.uint8), book, value)
    assert torch.equal(unpack_streams(packed, dim, book, value), symbols.to(torch.uint8))
    words = packed.view(torch.int32).long() & 0xFFFFFFFF
    piece = 2 if len(words) // 32 % 4 else 4
    for lane in (0, 5, 31):
        g, t = divmod(lane, 4)
        own = [int(w) for w in words.view(-1, 32, piece)[:, lane].flatten()]
        stream = "".join(f"{w:032b}" for w in own)
        run = dim // 8 if value else dim // 4
        start = (g if value else t) * run
        order = [(f, r, b) for f in (0, 1) for r in (0, 1) for b in range(4)]
        tokens = [8 * (4 * f + b) + t + 4 * r for f, r, b in order] if value else [8 * i + g for i in range(8)]
        want = "".join(
            f"{int(symbols[token, c]):0{book.widths[c % book.period]}b}"
            for token in tokens
            for c in range(start, start + run)
        )
        assert stream == want
