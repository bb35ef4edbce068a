"""Layers of one cache with bits of their own, graded or by a list: as many in all, through plans, forks, batches and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.families import make, prompt

import kvfold
from kvfold.config import CacheSpec
from kvfold.errors import InvalidConfig
from kvfold.loading import complete
from kvfold.planner.architecture import read
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.session import Session


def graded(name: str) -> CacheSpec:
    return load(name).spec.with_overrides(graded=True)


def bits(spec: CacheSpec, layers: int) -> list[tuple[float, float]]:
    own = [spec.for_layer(place, layers) for place in range(layers)]
    return [(s.key.bits, s.value.bits) for s in own]


def test_steps_by_place_and_number_of_layers() -> None:
    assert bits(graded("compact"), 5) == [(2.5, 1.5), (3, 1.5), (3, 2), (3, 2), (3.5, 3)]
    assert bits(graded("compact"), 2) == [(2.5, 1.5), (3.5, 2.5)]
    assert bits(graded("compact"), 1) == [(3, 2)]
    assert bits(graded("balanced"), 3) == [(3.5, 2), (3.5, 2), (3.5, 3.5)]  # keys have no room above
    assert bits(load("compact").spec, 3) == [(3, 2)] * 3


@pytest.mark.parametrize("name", ["balanced", "compact", "extreme", "ultra"])
@pytest.mark.parametrize("layers", range(1, 49))
def test_as_many_bits_in_all(name: str, layers: int) -> None:
    plain = load(name).spec
    own = bits(graded(name), layers)
    assert sum(k for k, _ in own) == layers * plain.key.bits
    assert sum(v for _, v in own) == layers * plain.value.bits


def test_scalar_codes_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="only trellis codes are graded"):
        graded("turbo-3")


def listed(layers: int) -> CacheSpec:
    pairs = [(3.5, 1), (1.5, 2.5), (1, 3.5), (2, 3)]
    return load("compact").spec.with_overrides(bits_by_layer=[pairs[i % 4] for i in range(layers)])


@pytest.mark.parametrize("spec", [graded("compact"), listed(4)], ids=["graded", "listed"])
def test_layers_plans_batches_and_files_have_bits_of_their_own(spec: CacheSpec, tmp_path: Path) -> None:
    model = make("llama")
    session = Session.new(model, spec=spec)
    layers = session.cache.folded_layers
    session.extend(prompt(1, 500)[0].tolist())
    assert [x.folded.spec for x in layers] == [spec.for_layer(i, len(layers)) for i in range(len(layers))]
    assert len({x.folded.pool.page_bytes for x in layers}) > 1
    planned = plan(read(complete(model.config)), Setting(spec, 500, dtype_bytes=4))
    assert [r["bytes"] for r in planned["layers"]] == [r["bytes"] for r in session.cache.report()["layers"]]
    fork = session.fork()
    session.save(tmp_path / "kept")
    want = session.extend([5, 6])
    for s in (fork, Session.load(tmp_path / "kept", model)):
        assert s.runner.spec == spec
        assert torch.equal(s.extend([5, 6]), want)
    with SessionBatch([session, fork]) as together:
        rows = together.step([7, 7])
    assert torch.equal(rows[0], rows[1])
    kvfold.detach(model)


@pytest.mark.parametrize("spec", [graded("compact"), listed(3)], ids=["graded", "listed"])
def test_latents_and_windows_have_the_bits_of_the_sides(spec: CacheSpec) -> None:
    assert spec.by_place
    for other in (spec.for_latents(), spec.for_windows()):
        assert not other.by_place
        assert other.key.bits == spec.key.bits


def test_bits_by_layer_are_of_every_layer_or_refused() -> None:
    assert bits(listed(3), 3) == [(3.5, 1), (1.5, 2.5), (1, 3.5)]
    with pytest.raises(InvalidConfig, match="names 3 layers, and 2 fold"):
        listed(3).for_layer(0, 2)
    for wrong, what in (([3, 2], "pairs"), ([[3, 2, 1]], "pairs"), ("ab", "pairs"), ([[3, 2.3]], "no width 2.3")):
        with pytest.raises(InvalidConfig, match=what):
            load("compact").spec.with_overrides(bits_by_layer=wrong)
    with pytest.raises(InvalidConfig, match="one place only"):
        CacheSpec(key=listed(1).key, value=listed(1).value, graded=True, bits_by_layer=((3, 2),))


def test_what_is_asked_of_a_side_takes_the_place_of_bits_by_layer() -> None:
    assert listed(3).with_overrides(window=0).bits_by_layer
    for changes in ({"key_bits": 2}, {"value_codec": "mse"}, {"graded": True}):
        assert not listed(3).with_overrides(**changes).bits_by_layer
