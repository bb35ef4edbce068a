"""Layers that attend to the keys of earlier ones (Gemma 3n, Gemma 4): read by all of them, stored once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.families import ROUNDING, make, padded, prompt
from transformers import DynamicCache, StaticCache

import kvfold
from kvfold.errors import CacheMisuse

FAMILIES = ("gemma3n_text", "gemma4_text")


@torch.no_grad()
def last_logits(model: Any, cache: Any, keep: int) -> torch.Tensor:
    """Of a left-padded batch in two calls and a step, where the layers that share are run for the last tokens alone."""
    ids, mask = padded()
    model(ids[:, :90], attention_mask=mask[:, :90], past_key_values=cache, logits_to_keep=keep)
    parts = [model(ids[:, 90:], attention_mask=mask[:, : ids.shape[1]], past_key_values=cache, logits_to_keep=keep)]
    parts += [model(prompt(2, 1), attention_mask=mask[:, : ids.shape[1] + 1], past_key_values=cache)]
    return torch.cat([x.logits for x in parts], 1)


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_tokens_alone(family: str, keep: int) -> None:
    model = make(family)
    kvfold.detach(model)
    want = last_logits(model, DynamicCache(config=model.config), keep)
    kvfold.attach(model)
    for cache in (DynamicCache(config=model.config), kvfold.FoldedCache(model.config, "lossless")):
        got = last_logits(model, cache, keep)
        torch.testing.assert_close(got, want, rtol=0, atol=ROUNDING * float(want.std()))
    kvfold.detach(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_pages_are_read_and_stored_once(family: str) -> None:
    model = make(family)
    with kvfold.attach(model), torch.no_grad():
        cache = kvfold.FoldedCache(model.config, "balanced")
        model(prompt(1, 300), past_key_values=cache)
        assert [x.columns for x in cache.paged_layers if x.readers > 1] == [300] * sum(
            x.readers > 1 for x in cache.paged_layers
        )
        assert any(x.readers == 2 for x in cache.paged_layers)
        assert cache.get_seq_length() == 300
        cache.guard.check()


def test_a_call_that_fails_before_the_last_reader_is_rolled_back() -> None:
    model = make("gemma4_text")
    with kvfold.attach(model), torch.no_grad():
        cache = kvfold.FoldedCache(model.config, "balanced")
        model(prompt(1, 200), past_key_values=cache)
        want = model(prompt(1, 2, seed=5), past_key_values=cache.fork()).logits

        def stop(*_: object) -> None:
            raise RuntimeError("stopped")

        hook = model.model.layers[2].register_forward_hook(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            model(prompt(1, 5), past_key_values=cache)
        hook.remove()
        try:
            cache.guard.check()
        except CacheMisuse:
            cache.rollback()
        assert torch.equal(model(prompt(1, 2, seed=5), past_key_values=cache).logits, want)


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "gemma4_text"])
def test_static_caches_of_attached_models(family: str) -> None:
    model = make(family)
    outs = []
    for change in (kvfold.detach, kvfold.attach):
        change(model)
        cache = StaticCache(config=model.config, max_cache_len=64)
        outs.append(model.generate(prompt(1, 40), past_key_values=cache, max_new_tokens=4, do_sample=False))
    kvfold.detach(model)
    assert torch.equal(*outs)
