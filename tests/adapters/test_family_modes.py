"""transformers: what every family of tests/families.py goes through besides plain calls: beams, turns, sessions."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import FOLDING, LENGTH, ROUNDING, STEPS, make, padded, prompt
from torch import Tensor
from transformers import DynamicCache

import kvfold
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.runner import Runner
from kvfold.sessions.session import Session

pytestmark = pytest.mark.slow
SESSION_TOKENS = 300


def stock(model: Any) -> Any:
    return DynamicCache(config=model.config)


def lossless(model: Any) -> Any:
    return kvfold.FoldedCache(model.config, "lossless")


def beams(model: Any, cache: Any) -> Tensor:
    ids, mask = padded()
    options = {"max_new_tokens": STEPS, "num_beams": 3, "do_sample": False}
    return model.generate(ids, attention_mask=mask[:, :LENGTH], past_key_values=cache, **options)


def turns(model: Any, cache: Any) -> Tensor:
    """Two turns with one cache: the second one gives the model all ids and the cache decides what is new."""
    options = {"max_new_tokens": STEPS, "do_sample": False, "past_key_values": cache}
    first = prompt(1, LENGTH)
    for more in (prompt(1, 70, seed=5), prompt(1, 0)):
        first = torch.cat([model.generate(first, attention_mask=torch.ones_like(first), **options), more], 1)
    return first


NOT_BY_STOCK = {("mpt", turns)}  # transformers itself fails: it gives the model a call without tokens


@pytest.mark.parametrize(
    ("family", "run"), [x for x in itertools.product(FOLDING, (beams, turns)) if x not in NOT_BY_STOCK]
)
def test_ids_are_those_of_the_stock_cache(family: str, run: Any) -> None:
    model = make(family)
    kvfold.detach(model)
    want = run(model, stock(model))
    with kvfold.attach(model):
        assert torch.equal(run(model, lossless(model)), want)


@torch.no_grad()
@pytest.mark.parametrize("family", FOLDING)
def test_second_turns_read_new_tokens_only(family: str) -> None:
    model = make(family)
    ids = prompt(1, SESSION_TOKENS)

    def second(cache: Any) -> Tensor:
        model(ids[:, :-70], past_key_values=cache)
        return model(ids[:, -70:], past_key_values=cache).logits

    want = second(stock(model))
    with kvfold.attach(model):
        got = second(lossless(model))
    assert float((got - want).abs().max()) < ROUNDING * float(want.std())


@pytest.mark.parametrize("family", FOLDING)
def test_sessions(family: str, tmp_path: Path) -> None:
    """Saved and loaded, gone back and forked, decoded in one call with another: the same bits as never interrupted."""
    model = make(family)
    runner = Runner(model, None, "balanced")
    runner.ways_back = 4
    tokens = prompt(1, SESSION_TOKENS)[0].tolist()
    session = Session(runner)
    session.extend(tokens)
    fork = session.fork()
    want = session.extend([5, 6, 7])
    assert torch.equal(fork.extend([5, 6, 7]), want)
    session.trim(3)
    session.save(tmp_path / "kept")
    again = Session.load(tmp_path / "kept", model)
    assert again.tokens == tokens
    assert torch.equal(again.extend([5, 6, 7]), session.extend([5, 6, 7]))
    with SessionBatch([session, fork]) as together:
        together.step([8, 8])
    assert session.tokens == fork.tokens
    kvfold.detach(model)
