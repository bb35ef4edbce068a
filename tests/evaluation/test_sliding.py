"""Models whose layers all slide: nothing folds before the first call, and perhaps nothing ever."""

from __future__ import annotations

import pytest
import torch
from tests.families import make, prompt
from transformers import AutoModelForCausalLM, MistralConfig

import kvfold
from kvfold.evaluation.contenders import Folded
from kvfold.profiles import load


@pytest.mark.parametrize(("reach", "folds"), [(1024, True), (24, False)])
def test_windows_are_measured_as_what_they_are(reach: int, folds: bool) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, sliding_window=reach,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ours = Folded("folded", model.config, load("balanced").spec)
    cache = ours.start()
    assert (ours.exact_tokens(cache), ours.sizes(cache)["bits_per_value"]) == (0, 16.0)
    with kvfold.attach(model), torch.no_grad():
        model(prompt(1, 1500), past_key_values=cache)
    sizes = ours.sizes(cache)
    assert bool(cache.paged_layers) == folds
    assert (3.1 < sizes["bits_per_value"] < 3.3) if folds else sizes["bits_per_value"] == 16.0
    assert sizes["reference_bytes"] == (2 * 2 * 2 * 64 * reach if folds else 0)
    assert cache.report()["ratio"] == pytest.approx(sizes["reference_bytes"] / cache.nbytes if folds else 1.0)
    assert ours.exact_tokens(cache) == (cache.paged_layers[0].folded.sequences[0].exact_tokens if folds else 0)


def test_mixtures_count_both() -> None:
    model = make("gemma3_text")  # windows of 24 tokens stay exact
    cache = kvfold.FoldedCache(model.config, "balanced")
    with kvfold.attach(model), torch.no_grad():
        model(prompt(1, 300), past_key_values=cache)
    assert cache.reference_bytes == 300 * 2 * 2 * 2 * 2 * 16
