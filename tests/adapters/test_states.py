"""transformers: recurrent states of hybrids in 8-bit codes: close to exact ones, planned to the byte, through forks and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import make, prompt
from torch import Tensor

import kvfold
from kvfold.adapters.hf_coded import CodedStateLayer
from kvfold.adapters.hf_families import CODED_STATES
from kvfold.errors import InvalidConfig, Unsupported
from kvfold.loading import complete
from kvfold.planner.architecture import read
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.session import Session

CODED = load("lossless").spec.with_overrides(states="int8")


@torch.no_grad()
def logits(model: Any, cache: Any) -> Tensor:
    ids = prompt(2, 240)
    parts = [model(x, past_key_values=cache).logits for x in (ids[:, :100], ids[:, 100:200], *ids[:, 200:].split(1, 1))]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("family", CODED_STATES)
def test_close_to_exact_states_and_as_planned(family: str) -> None:
    model = make(family)
    with kvfold.attach(model):
        exact, coded = kvfold.FoldedCache(model.config, "lossless"), kvfold.FoldedCache(model.config, spec=CODED)
        want, got = logits(model, exact), logits(model, coded)
    assert 0 < float((got - want).norm() / want.norm()) < 0.05
    assert any(isinstance(x, CodedStateLayer) for x in coded.layers)
    for spec, cache in ((load("lossless").spec, exact), (CODED, coded)):
        result = plan(read(complete(model.config)), Setting(spec, 240, sessions=2, dtype_bytes=4))
        assert result["state_dtype"] == ("float32" if cache is exact else "int8")
        report = cache.report()["layers"]
        held = [r["bytes"] for r in report if r["kind"] != "folded"]
        assert [r["state_bytes"] for r in result["layers"] if not r["folds"]] == held


def test_states_in_codes_go_through_beams_forks_files_and_batches(tmp_path: Path) -> None:
    model = make("qwen3_next")
    session = Session.new(model, spec=CODED)
    session.runner.ways_back = 2
    session.extend(prompt(1, 300)[0].tolist())
    fork = session.fork()
    want = session.extend([5, 6])
    session.trim(2)
    session.save(tmp_path / "kept")
    for s in (fork, session, Session.load(tmp_path / "kept", model)):
        assert torch.equal(s.extend([5, 6]), want)
    with SessionBatch([session, fork]) as together:
        rows = together.step([7, 7])
    assert torch.equal(rows[0], rows[1])
    cache = kvfold.FoldedCache(model.config, spec=CODED)
    ids = model.generate(prompt(2, 100), past_key_values=cache, num_beams=3, max_new_tokens=4, do_sample=False)
    assert ids.shape == (2, 104)
    cache.reset()
    assert torch.equal(logits(model, cache), logits(model, kvfold.FoldedCache(model.config, spec=CODED)))
    kvfold.detach(model)


@pytest.mark.parametrize("family", ["jamba", "falcon_h1", "lfm2"])
def test_states_that_are_changed_in_place_stay_exact(family: str) -> None:
    with pytest.raises(Unsupported, match="changes its states where they lie"):
        kvfold.FoldedCache(make(family).config, spec=CODED)


def test_models_without_states_do_not_mind() -> None:
    assert kvfold.FoldedCache(make("llama").config, spec=CODED).spec.states == "int8"
    with pytest.raises(InvalidConfig, match="exact, int8"):
        CODED.with_overrides(states="int4")
