"""transformers: every family of tests/families.py is equal to the stock cache in lossless mode, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import FAMILIES, FOLDING, LENGTH, REFUSED, ROUNDING, STEPS, config, logits_of, make, padded
from torch import Tensor
from transformers import DynamicCache

import kvfold
from kvfold.diagnosis import layers_of
from kvfold.errors import KvfoldError

MATRIX = Path(__file__).parents[2] / "docs" / "families.md"

# Every layer of these slides, and stays as it is.
ALL_SLIDE = ("kolibri1", "ministral", "mistral", "moshi")


def generated(model: Any, cache: Any) -> Tensor:
    ids, mask = padded()
    return model.generate(
        ids, attention_mask=mask[:, :LENGTH], past_key_values=cache, max_new_tokens=STEPS, do_sample=False
    )


@pytest.mark.parametrize("family", FOLDING)
def test_lossless_is_stock(family: str) -> None:
    model = make(family)
    kvfold.detach(model)
    want, ids = (run(model, DynamicCache(config=model.config)) for run in (logits_of, generated))
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, "lossless")
        got = logits_of(model, cache)
        assert torch.equal(generated(model, kvfold.FoldedCache(model.config, "lossless")), ids)
    assert float((got - want).abs().max()) < ROUNDING * float(want.std())
    folded = [s.folded for x in cache.folded_layers for s in x.folded.sequences]
    assert all(folded)
    assert bool(folded) == (family not in ALL_SLIDE)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in REFUSED])
def test_refused_by_name(family: str) -> None:
    model = make(family)
    with pytest.raises(KvfoldError, match=REFUSED[family]), kvfold.attach(model):
        logits_of(model, kvfold.FoldedCache(config(family), "lossless"))


@pytest.mark.parametrize(("family", "named"), [("gemma2", "softcapped scores"), ("gpt_oss", "sink logits")])
def test_layers_with_another_softmax_run_where_it_is_known(family: str, named: str) -> None:
    """With heads that the native kernels have, dispatch still takes the engine that knows the softmax."""
    wide = type(config(family))(**{**config(family).to_dict(), "head_dim": 64})
    model = type(make(family))(wide).eval()
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(wide, "balanced")
        logits_of(model, cache)
        assert {x.folded.engine.name for x in cache.folded_layers if x.folded.engine} == {"torch"}
        with pytest.raises(KvfoldError, match=named):
            logits_of(model, kvfold.FoldedCache(wide, "balanced", backend="cpu"))


@pytest.mark.parametrize("family", FAMILIES)
def test_doctor_tells_what_a_cache_does(family: str) -> None:
    rows = layers_of(config(family), "balanced", "cpu")
    if family in REFUSED:
        assert all(not r["folds"] and re.search(REFUSED[family], r["why_not"]) for r in rows)
        return
    cache = kvfold.FoldedCache(make(family).config, "balanced")
    folding = [isinstance(x, kvfold.adapters.hf_transformers.FoldedLayer) for x in cache.layers]
    assert [r["folds"] for r in rows] == folding
    assert all(bool(r["engine"]) == r["folds"] != bool(r["why_not"]) for r in rows)


def test_the_matrix_in_the_docs_is_of_these_families() -> None:
    written = dict(re.findall(r"^\| `([\w-]+)` \|.*\| ([^|]+) \|$", MATRIX.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(FAMILIES) <= set(written)
    assert {f for f in FAMILIES if written[f] != "equal"} == {f for f in FAMILIES if f in REFUSED}
