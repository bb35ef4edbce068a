"""The `eval` figures: exact where the cache is exact, within the promised bounds where it folds."""

from __future__ import annotations

import pytest
from tests.conftest import model_source

from kvfold.config import CacheSpec, SideSpec
from kvfold.errors import EvaluationError
from kvfold.evaluation.divergence import evaluate
from kvfold.evaluation.text import haystack, stream, windows
from kvfold.loading import Options, load
from kvfold.profiles import load as profile

# Mean KL(reference || folded) in nats, 4 windows of 2,048 tokens, 3-bit mse keys and values.
# Mean KL divergence at most, nats, and bits per value at most at head_dim 128 (.0625 more at 64).
BOUNDS = [
    ("balanced", "recall-llama-12m", 0.0013, 3.15),
    ("balanced", "recall-biased-12m", 0.0022, 3.15),
    ("balanced", "recall-hybrid-15m", 0.0010, 3.15),
    ("swift-3", "recall-llama-12m", 0.0016, 3.15),
    ("turbo-3", "recall-llama-12m", 0.0023, 3.195),
]


@pytest.fixture(scope="module")
def demo():
    return load("demo", Options(dtype="float32"))


def test_lossless_is_exact(demo):
    r = evaluate(demo.model, windows(haystack(), demo.tokenizer, 1, 512, 0), profile("lossless").spec)
    assert abs(r["kld_mean"]) < 1e-9
    assert r["kld_max"] < 1e-8
    assert r["top1_agreement"] == 1.0
    assert r["bits_per_value"] == 32.0
    assert r["positions"] == 512


@pytest.mark.parametrize(("name", "model", "kld", "bits"), BOUNDS)
def test_profiles_keep_their_bounds(name, model, kld, bits):
    loaded = load(model_source(model), Options(dtype="float32"))
    r = evaluate(loaded.model, windows(haystack(), loaded.tokenizer, 4, 2048, 0), profile(name).spec)
    assert r["kld_mean"] <= kld
    assert r["top1_agreement"] >= 0.97
    assert r["bits_per_value"] <= bits + (0.0625 if loaded.model.config.head_dim == 64 else 0)
    # Window 64, pages of 128 and calls of 64: between 64 and 191 recent tokens besides the query, and 4 sinks.
    assert r["exact_tokens_max"] == 64 + 127 + 4 + 1 - 0
    assert 100 < r["exact_tokens_mean"] < 160


def test_every_ingredient_helps(demo):
    """A sister that must be worse: without centre, window and sinks the same bits lose several times as much."""
    cut = windows(haystack(), demo.tokenizer, 1, 1024, 0)
    good = evaluate(demo.model, cut, profile("balanced").spec)
    plain = CacheSpec(key=SideSpec(), value=SideSpec(), window=0, sinks=0, centre=False)
    bad = evaluate(demo.model, cut, plain)
    assert bad["kld_mean"] > 4 * good["kld_mean"]
    assert bad["bits_per_value"] == 3.125


def test_same_seed_same_numbers(demo):
    cut = windows(haystack(), demo.tokenizer, 1, 512, 3)
    assert evaluate(demo.model, cut, profile("balanced").spec) == evaluate(demo.model, cut, profile("balanced").spec)


def test_stream_follows_the_protocol(demo):
    ids = stream("ab\0cd", demo.tokenizer)
    plain = demo.tokenizer("ab", add_special_tokens=False).input_ids
    assert ids == [*plain, 1, *demo.tokenizer("cd", add_special_tokens=False).input_ids, 1]


def test_short_text_is_an_error(demo):
    with pytest.raises(EvaluationError, match="tokens"):
        windows("too short", demo.tokenizer, 4, 2048, 0)
