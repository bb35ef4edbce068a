"""The paper's profiles through the cache that users run: true rate, frozen channels, counted state."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kvfold.cache.layer import FoldedAttention
from kvfold.engine.select import make_engine
from kvfold.profiles import load

HEADS, DIM = 2, 128
NAMES = ("faithful-2.5", "faithful-3.5")


def layer(name: str) -> FoldedAttention:
    return FoldedAttention(load(name).spec, 0, partial(make_engine, "torch"))


def tokens(count: int, seed: int) -> torch.Tensor:
    """[1, H, count, D] with four hot channels per head, different ones."""
    x = torch.randn(1, HEADS, count, DIM, generator=torch.Generator().manual_seed(seed))
    x[:, 0, :, [5, 40, 41, 100]] *= 10
    x[:, 1, :, [0, 7, 64, 127]] *= 10
    return x


@pytest.mark.parametrize("name", NAMES)
def test_rate_is_the_profiles_name_and_nothing_is_kept_exact_but_the_open_page(name: str) -> None:
    cache = layer(name)
    cache.append(tokens(512, 1), tokens(512, 2), [0])
    assert cache.report()["bits_per_value"] == float(name.removeprefix("faithful-"))
    assert cache.sequences[0].exact_tokens == 0
    cache.append(tokens(5, 3), tokens(5, 4), [0])
    assert cache.sequences[0].exact_tokens == 5


@pytest.mark.parametrize("name", NAMES)
def test_channels_are_frozen_by_the_first_long_call_per_head_and_counted(name: str) -> None:
    cache = layer(name)
    cache.append(tokens(100, 1), tokens(100, 2), [0])
    before = cache.sequences[0]
    exact = sum(t.nbytes for t in before.tensors)
    assert before.state == (None, None)
    cache.append(tokens(200, 3), tokens(200, 4), [0])
    sequence = cache.sequences[0]
    for state, x in zip(sequence.state, (tokens(200, 3), tokens(200, 4)), strict=True):
        expected = x[0].norm(dim=1).topk(DIM // 4).indices.sort(dim=-1).values
        assert torch.equal(state.long(), expected)
    assert {5, 40, 41, 100} <= set(sequence.state[0][0].tolist())
    assert {0, 7, 64, 127} <= set(sequence.state[0][1].tolist())
    assert sum(t.nbytes for t in sequence.tensors) == exact + 2 * HEADS * (DIM // 4) * 2
    frozen = [s.clone() for s in sequence.state]
    cache.append(tokens(300, 5).flip(-1), tokens(300, 6).flip(-1), [0])
    assert all(torch.equal(a, b) for a, b in zip(cache.sequences[0].state, frozen, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_short_calls_freeze_from_the_first_page(name: str) -> None:
    k, v = tokens(130, 1), tokens(130, 2)
    cache = layer(name)
    for t in range(0, 130, 13):
        cache.append(k[:, :, t : t + 13], v[:, :, t : t + 13], [0])
    expected = k[0, :, :128].norm(dim=1).topk(DIM // 4).indices.sort(dim=-1).values
    assert torch.equal(cache.sequences[0].state[0].long(), expected)


def test_a_fork_reads_its_pages_with_the_channels_they_were_written_with() -> None:
    cache = layer("faithful-2.5")
    cache.append(tokens(256, 1), tokens(256, 2), [0])
    q, k, v = tokens(1, 3).repeat(1, 2, 1, 1), tokens(1, 4), tokens(1, 5)
    other = cache.fork()
    assert torch.equal(other.attend(q, k, v, [0], 0.1), cache.attend(q, k, v, [0], 0.1))


@pytest.mark.parametrize("name", NAMES)
def test_hot_channels_keep_their_share_of_precision(name: str) -> None:
    """With four channels ten times as long, the split beats one codebook over all channels at its regular width."""
    cache = layer(name)
    k = tokens(256, 1)
    cache.append(k, tokens(256, 2), [0])
    sequence = cache.sequences[0]
    rows = torch.stack([cache.pool.row(p) for p in sequence.pages])
    k_hat, _ = cache.engine.unfold(rows, sequence.state)
    error = float(((k_hat - k[0]) ** 2).sum() / (k**2).sum())
    assert error < {"faithful-2.5": 0.07, "faithful-3.5": 0.02}[name]
