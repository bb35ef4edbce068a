"""Graded caches: layers of one cache with bits of their own, as many in all, through plans, forks, batches and files."""

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
@pytest.mark.parametrize("layers", [1, 2, 3, 32])
def test_as_many_bits_in_all(name: str, layers: int) -> None:
    plain = load(name).spec
    own = bits(graded(name), layers)
    assert sum(k for k, _ in own) == layers * plain.key.bits
    assert sum(v for _, v in own) == layers * plain.value.bits


def test_scalar_codes_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="only trellis codes are graded"):
        graded("turbo-3")


def test_layers_plans_batches_and_files_have_bits_of_their_own(tmp_path: Path) -> None:
    model = make("llama")
    spec = graded("compact")
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
        assert s.runner.spec.graded
        assert torch.equal(s.extend([5, 6]), want)
    with SessionBatch([session, fork]) as together:
        rows = together.step([7, 7])
    assert torch.equal(rows[0], rows[1])
    kvfold.detach(model)


def test_latents_and_tuned_forms_are_not_graded() -> None:
    spec = graded("compact")
    assert not spec.for_latents().graded
    assert not spec.for_windows().graded
    assert spec.for_windows().key.bits == spec.key.bits
