"""Needle documents are what they claim to be, and the shipped model finds them through both caches."""

from __future__ import annotations

import pytest

from kvfold.errors import EvaluationError
from kvfold.evaluation.needle import DEPTHS, documents, grid
from kvfold.loading import Options, load
from kvfold.profiles import load as profile


@pytest.fixture(scope="module")
def demo():
    return load("demo", Options(dtype="float32"))


@pytest.mark.parametrize("context", [2048, 8192])
def test_documents_hold_their_needles_at_depth(demo, context):
    kinds = ["magic_number", "key_value"]
    for d in documents(context, kinds, 1, 0, demo.tokenizer):
        longest = max(len(n.question) + len(n.answer) for n in d.needles)
        assert len(d.ids) + longest == context
        text = ",".join(map(str, d.ids))
        for n in d.needles:
            at = text.index(",".join(map(str, n.statement)))
            assert abs(text[:at].count(",") / len(d.ids) - n.depth) < 0.08
        assert {n.depth for n in d.needles} == set(DEPTHS)


def test_recall_is_that_of_the_stock_cache_unless_a_cache_forgets(demo):
    """With a sister: one bit per value without a window loses needles in the same run, so that the rest can fail."""
    balanced = profile("balanced").spec
    forgetful = balanced.with_overrides(
        key_codec="mse", key_bits=1, value_bits=1, window=0, sinks=0, centre=False, scale="norm"
    )
    rows = grid(
        demo.model, demo.tokenizer, [2048], {"balanced": balanced, "one bit": forgetful}, ["magic_number"], trials=2
    )
    assert [r["profile"] for r in rows] == ["balanced"] * len(DEPTHS) + ["one bit"] * len(DEPTHS)
    good, bad = rows[: len(DEPTHS)], rows[len(DEPTHS) :]
    for r in good:
        assert r["trials"] == 2
        assert r["recall"] == r["recall_reference"] == 1.0
        assert r["answer_nll"] < r["answer_nll_reference"] + 0.02
    assert [r["answer_nll_reference"] for r in bad] == [r["answer_nll_reference"] for r in good]
    assert sum(r["recall"] for r in bad) < len(DEPTHS)


def test_too_long_a_context_is_refused(demo):
    with pytest.raises(EvaluationError, match="131072"):
        grid(demo.model, demo.tokenizer, [200_000], {"balanced": profile("balanced").spec})
