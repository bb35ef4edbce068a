"""Fragment order of the CUDA pages: a bijection of canonical bytes, and the order that its maps promise. Runs without a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvfold.config import CacheSpec, SideSpec
from kvfold.engine.cuda.fragments import Fragments, bits_of, format_of, from_words, index, to_words
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import LayerShape

CODECS = [("mse", 4), ("mse", 3), ("mse", 2), ("uniform", 2)]


@pytest.mark.parametrize(("key", "value"), list(itertools.product(CODECS, repeat=2)))
@pytest.mark.parametrize(("dim", "centre"), [(64, True), (128, True), (128, False), (256, True)])
def test_round_trip(key: tuple[str, int], value: tuple[str, int], dim: int, centre: bool) -> None:
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


@pytest.mark.parametrize("fmt", [4, 3, 2, 1])
def test_words_hold_every_bit(fmt: int) -> None:
    words = torch.randint(0, 1 << 32, (50, bits_of(fmt)))
    assert torch.equal(to_words(from_words(words, fmt), fmt), words)


@pytest.mark.parametrize("fmt", [4, 1])
@pytest.mark.parametrize("value", [False, True])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_index_is_a_permutation(fmt: int, value: bool, dim: int) -> None:
    assert torch.equal(index(dim, fmt, value).sort().values, torch.arange(64 * dim))
