"""transformers: every family of tests/families.py is equal to the stock cache in lossless mode, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import FAMILIES, FOLDING, REFUSED, config, make, prompt
from torch import Tensor
from transformers import DynamicCache

import kvfold
from kvfold.errors import KvfoldError

BATCH, LENGTH, STEPS = 2, 200, 3
CHUNKS = (70, LENGTH)  # ends of the prefill's calls; the second row's pads end within the first
# Of the spread of the logits: what float32 sums in other orders come to through four layers of wide weights.
ROUNDING = 2e-4
# Every layer of these slides, and stays as it is.
ALL_SLIDE = ("ministral", "mistral")


def padded() -> tuple[Tensor, Tensor]:
    ids, mask = prompt(BATCH, LENGTH), torch.ones(BATCH, LENGTH + STEPS, dtype=torch.long)
    ids[1, :63], mask[1, :63] = 0, 0
    return ids, mask


@torch.no_grad()
def logits_of(model: Any, cache: Any) -> Tensor:
    """Of a left-padded batch, prefilled in two calls and continued by single tokens: [real tokens, vocabulary]."""
    ids, mask = padded()
    ids = torch.cat([ids, prompt(BATCH, STEPS, seed=1)], 1)
    parts, start = [], 0
    for stop in (*CHUNKS, *range(LENGTH + 1, LENGTH + STEPS + 1)):
        part = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        parts.append(part.logits)
        start = stop
    return torch.cat(parts, 1)[mask.bool()]


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
