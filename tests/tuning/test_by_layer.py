"""Bits by layer: never more of them than the level has, most where errors cost most, and less lost for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvfold.cli.main import main
from kvfold.config import CacheSpec
from kvfold.profiles import load
from kvfold.tuning.allocation import PLAIN_ERROR, by_layer, shared_out
from kvfold.tuning.statistics import Moments, _add

SMALL = ["--windows", "1", "--window-tokens", "640", "--json"]


@given(st.data(), st.integers(1, 48), st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0]))
def test_no_more_bits_than_there_are(data: st.DataObject, layers: int, bits: float) -> None:
    """Of any number of layers, of any sizes; all of them where sizes are alike."""
    places = [(i, side) for i in range(layers) for side in ("key", "value")]
    costs = {p: data.draw(st.floats(1e-9, 1.0)) for p in places}
    alike = data.draw(st.booleans())
    sizes = {p: 128 if alike else data.draw(st.sampled_from([64, 128, 512])) for p in places}
    widths = shared_out(costs, sizes, bits)
    spent, room = sum(widths[p] * sizes[p] for p in places), bits * sum(sizes.values())
    assert set(widths.values()) <= set(PLAIN_ERROR)
    assert spent <= room
    if alike:
        assert spent == room
        assert all(widths[a] >= widths[b] for a in places for b in places if costs[a] > costs[b])


def test_no_other_sharing_loses_less() -> None:
    costs, ladder = {"a": 1.0, "b": 0.2, "c": 0.02}, list(PLAIN_ERROR)

    def lost(widths: dict[str, float]) -> float:
        return sum(costs[p] * PLAIN_ERROR[w] for p, w in widths.items())

    found = shared_out(costs, dict.fromkeys(costs, 64), 2.0)
    others = [{"a": a, "b": b, "c": 6 - a - b} for a in ladder for b in ladder if 6 - a - b in ladder]
    assert lost(found) == min(map(lost, others))


def test_what_a_layer_loses_brings_it_bits() -> None:
    zeros = torch.zeros(2, 64, 64, dtype=torch.float64)
    lost = {(0, "key"): 0.1, (0, "value"): 0.1, (5, "key"): 20.0, (5, "value"): 500.0}
    first, last = by_layer({p: Moments(zeros, zeros, 100, 10, x) for p, x in lost.items()}, 2)
    assert first == (1, 1)
    assert last == (2.5, 3.5)


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_large_error_where_nothing_reads_it_costs_nothing(side: str) -> None:
    """Tokens with energy and tokens with gradients are others; and the other way round. Means cannot tell these apart."""
    x, g = torch.zeros(2, 1, 256, 8)
    x[0, 128:192] = torch.tensor([3.0, -3.0]).repeat(32)[:, None]  # of mean 0, as keys are when they are folded
    g[0, 192:] = 2.0
    out: dict[tuple[int, str], Moments] = {}
    _add(out, (0, side), x, g, True, CacheSpec())
    assert out[0, side].lost == 0
    _add(out, (0, side), x, x, True, CacheSpec())
    assert out[0, side].lost == pytest.approx(64 * (9 * 8) ** 2)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile made by the command from little text."""
    path = tmp_path_factory.mktemp("own") / "own.toml"
    with pytest.raises(SystemExit) as left:
        main(["tune", "demo", "--by-layer", "extreme", "--output", str(path), "--basis-windows", "1", *SMALL])
    assert not left.value.code
    return path


def test_the_command_writes_a_profile_of_the_levels_bits(own: Path) -> None:
    profile, level = load(str(own)), load("extreme")
    pairs = profile.spec.bits_by_layer
    assert (profile.base, profile.evidence, len(pairs)) == ("extreme", (), 6)
    assert sum(map(sum, pairs)) == 6 * (level.spec.key.bits + level.spec.value.bits)
    assert not list(own.parent.glob("*.safetensors"))


@pytest.mark.slow
def test_it_loses_less_at_the_same_bits(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = {}
    for name in ("extreme", str(own)):
        with pytest.raises(SystemExit):
            main(["eval", "demo", "--profile", name, *SMALL])
        results[name] = json.loads(capsys.readouterr().out)
    assert results[str(own)]["bits_per_value"] == pytest.approx(results["extreme"]["bits_per_value"], abs=0.001)
    assert results[str(own)]["kld_mean"] < 0.6 * results["extreme"]["kld_mean"]


def test_one_thing_is_asked_for_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (["--by-layer", "extreme"], ["--by-layer", "extreme", "--tuned", "extreme", "--output", "x.toml"]):
        with pytest.raises(SystemExit) as left:
            main(["tune", "demo", *wrong, "--json"])
        assert left.value.code == 1
        assert json.loads(capsys.readouterr().out)["error"]["kind"] == "InvalidConfig"
