"""Long generation, reused prefixes and turns: exact where the cache is exact, equal where equality is promised."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from kvfold import FoldedCache, attach
from kvfold.cli.main import main
from kvfold.errors import EvaluationError, InvalidConfig
from kvfold.evaluation.legs import LEGS, TURNS, named, run
from kvfold.evaluation.text import haystack, windows
from kvfold.loading import Options, load
from kvfold.profiles import load as profile


@pytest.fixture(scope="module")
def demo():
    return load("demo", Options(dtype="float32"))


@pytest.fixture(scope="module")
def window(demo):
    return windows(haystack(), demo.tokenizer, 1, 320, 0)[0]


def test_lossless_never_diverges(demo, window):
    legs = run(demo.model, window, profile("lossless").spec, list(LEGS), 8)
    for leg in legs.values():
        assert leg["kld_max"] < 1e-8
        assert (leg["top1_agreement"], leg["first_divergence"]) == (1.0, None)
    assert legs["prefix"]["equal_to_fresh"] is True
    assert [legs[n]["tokens"] for n in LEGS] == [8, 320 - 128 + 8, 8, 160, 320]
    assert legs["copy"]["accuracy"] == legs["copy"]["accuracy_reference"] > 0.5


def test_a_prefix_is_reused_to_the_bit_and_turns_are_counted(demo, window):
    legs = run(demo.model, window, profile("extreme").spec, ["prefix", "multiturn"], 8)
    assert legs["prefix"]["prefix_tokens"] == 128
    assert legs["prefix"]["equal_to_fresh"] is True
    assert legs["prefix"]["kld_mean"] > 1e-5
    turns = legs["multiturn"]["kld_by_turn"]
    assert len(turns) == TURNS
    assert legs["multiturn"]["kld_mean"] == pytest.approx(sum(turns) / TURNS)
    # 80 tokens of the first part and 2 of the answer: nothing has left the window yet.
    assert turns[0] < 1e-8 < turns[-1]


def test_errors_by_layer_and_copies_fall_with_the_bits(demo, window):
    fine, coarse = (run(demo.model, window, profile(n).spec, ["copy", "layers"], 4) for n in ("balanced", "ultra"))
    assert len(fine["layers"]["layers"]) == demo.model.config.num_hidden_layers
    for a, b in zip(fine["layers"]["layers"], coarse["layers"]["layers"], strict=True):
        assert a["layer"] == b["layer"]
        assert a["samples"] == 1 + (320 - 64 - 128) // 128
        assert 0 < a["output_error"] < b["output_error"] < 1
        assert 0 < a["score_error"] < b["score_error"]
    assert fine["copy"]["kld_mean"] < coarse["copy"]["kld_mean"]
    assert fine["copy"]["accuracy_reference"] == coarse["copy"]["accuracy_reference"]


@torch.no_grad()
def test_the_first_divergence_is_that_of_free_generation(demo, window):
    """The rough profile's own greedy text parts from the stock cache's exactly where the leg says."""
    tokens = 48
    spec = profile("ultra").spec
    found = run(demo.model, window, spec, ["generation"], tokens)["generation"]["first_divergence"]
    prompt = torch.tensor([window])
    with attach(demo.model):
        texts = []
        for cache in (DynamicCache(config=demo.model.config), FoldedCache(demo.model.config, spec=spec)):
            for start in range(0, 320, 64):
                logits = demo.model(prompt[:, start : start + 64], past_key_values=cache).logits
            text = [int(logits[0, -1].argmax())]
            while len(text) <= tokens:
                logits = demo.model(torch.tensor([[text[-1]]]), past_key_values=cache).logits
                text.append(int(logits[0, -1].argmax()))
            texts.append(text)
    stock, folded = texts
    assert stock[0] == folded[0], "choose a window whose prompt ends alike"
    parted = next((i for i in range(tokens) if stock[i + 1] != folded[i + 1]), None)
    assert found == parted


def test_wrong_legs_are_told(demo):
    with pytest.raises(InvalidConfig, match="generation, prefix, multiturn, copy, layers"):
        named(["generation", "prefixes"])
    with pytest.raises(EvaluationError, match="no page"):
        run(demo.model, [5] * 128, profile("balanced").spec, ["prefix"], 4)


def test_eval_runs_legs(capsys, tmp_path):
    with pytest.raises(SystemExit) as left:
        main(
            ["eval", "demo", "--windows", "1", "--window-tokens", "256", "--legs", "generation,multiturn"]
            + ["--leg-tokens", "8", "--report", str(tmp_path), "--json"]
        )
    assert not left.value.code
    legs = json.loads(capsys.readouterr().out)["legs"]
    assert "Leg multiturn" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert sorted(legs) == ["generation", "multiturn"]
    assert legs["generation"]["tokens"] == 8
