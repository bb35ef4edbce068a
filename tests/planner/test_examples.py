"""The worked examples of the literature and the planner's answers to them, from published configs alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from kvfold.config import CacheSpec
from kvfold.errors import UnsupportedModel
from kvfold.loading import complete
from kvfold.planner.architecture import read
from kvfold.planner.fit import fitted
from kvfold.planner.model import Model
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load

CONFIGS = Path(__file__).parent / "configs"
NAMES = sorted(p.stem for p in CONFIGS.glob("*.json"))
GIB = 2**30
K = 1024


def config(name: str) -> dict[str, Any]:
    return dict(json.loads((CONFIGS / f"{name}.json").read_text()))


def model(name: str) -> Model:
    return read(config(name))


def planned(name: str, context: int, profile: str = "balanced", **kwargs: Any) -> dict[str, Any]:
    return plan(model(name), Setting(load(profile).spec, context, **kwargs))


@pytest.mark.parametrize("name", NAMES)
def test_published_configs_mean_what_transformers_makes_of_them(name: str) -> None:
    """Without transformers, the rules for older configs derive the same layers."""
    raw = config(name)
    assert read(raw) == read(complete(CONFIG_MAPPING[raw["model_type"]].from_dict(raw)))


@pytest.mark.parametrize(
    ("name", "context", "sessions", "gib"),
    [
        ("llama-2-7b", 128 * K, 1, 64),  # multi-head attention
        ("llama-3.1-8b", 128 * K, 1, 16),
        ("llama-3.1-8b", 8 * K, 1, 1),
        ("qwen3.5-4b", 262_144, 1, 8),
        ("qwen3.5-4b", 262_144, 4, 32),
        ("mistral-7b", 1 << 20, 1, 0.5),  # every layer slides over 4,096 tokens
    ],
)
def test_sixteen_bit_sizes(name: str, context: int, sessions: int, gib: float) -> None:
    assert planned(name, context, sessions=sessions)["reference_bytes"] == gib * GIB


def test_qwen3_coder_next_at_170_000_tokens() -> None:
    m = model("qwen3-coder-next")
    linear = [x for x in m.layers if x.kind == "linear"]
    assert len(linear) == 36
    recurrent = sum(s.values for x in linear for s in x.states if s.name == "recurrent")
    assert recurrent == 18_874_368  # 18 MiB at one byte, 36 at bfloat16
    result = planned("qwen3-coder-next", 170_000)
    assert result["state_dtype"] == "float32"  # what transformers holds them in: 72 MiB
    conv = sum(s.values for x in linear for s in x.states if s.name == "conv") * 2
    assert result["state_bytes"] == recurrent * 4 + conv == 72 * 2**20 + conv
    full = [x.attention for x in m.layers if x.attention]
    assert {(len(full), a.kv_heads, a.key_dim, a.value_dim) for a in full} == {(12, 2, 256, 256)}
    assert result["reference_bytes"] == 12 * 2 * 2 * 256 * 2 * 170_000


@pytest.mark.parametrize("profile", ["faithful-3.5", "faithful-2.5", "balanced", "compact"])
@pytest.mark.parametrize(
    ("name", "context"),
    [("llama-2-7b", 128 * K), ("llama-3.1-8b", 128 * K), ("qwen3-coder-next", 170_000), ("qwen3.5-4b", 262_144)],
)
def test_folded_sizes(name: str, context: int, profile: str) -> None:
    """Pages at their bits, exact tokens, and at most 1/64 and a slab of free pages: nothing else."""
    spec, m = load(profile).spec, model(name)
    result = planned(name, context, profile)
    layers = [x.attention for x in m.layers if x.attention]
    values = sum(a.values for a in layers)
    bits = bits_per_value(spec, layers[0].key_dim)
    pages = spec.folded_tokens(context) // 128
    exact = (spec.ring_tokens() + spec.sinks) * values * 2
    floor = pages * 128 * values * bits / 8 + exact
    slack = (pages / 64 + 5) / pages + 8 * pages * len(layers) / floor
    assert floor <= result["folded_bytes"] <= floor * (1 + slack)
    assert result["ratio"] == result["reference_bytes"] / result["folded_bytes"]


def bits_per_value(spec: CacheSpec, dim: int) -> float:
    """From the profiles' own names: code bits, one scale of 16 bits per vector where the name leaves it out, means."""
    split = 32 / dim - 0.25  # two scales, which the name counts as .25
    extra = {"split": split, "trellis": 8 / dim + 16 / 128 / dim}  # a trellis page has a unit of its own
    sides = [s.bits + extra.get(s.codec, 16 / dim) for s in (spec.key, spec.value)]
    return sum(sides) / 2 + (2 * (8 * dim + 16) / (128 * 2 * dim) if spec.centre else 0)


def fit(
    name: str, memory: float, context: int, weights_bits: float, parameters: float, **kwargs: Any
) -> dict[str, Any]:
    setting = Setting(load("balanced").spec, context, weights_bytes=int(parameters * weights_bits / 8), **kwargs)
    return fitted(model(name), setting, int(memory))


def test_a_24_gb_desktop() -> None:
    """Four sessions of 262,144 tokens beside a 4-bit 4B hybrid: 32 GiB of 16-bit cache alone, not even one more folded."""
    result = fit("qwen3.5-4b", 24 * GIB, 262_144, 4.5, 4.2e9, sessions=4)
    assert result["fits"]
    assert result["total_reference_bytes"] > 24 * GIB
    assert result["binding"] == "folded"
    # Llama-3.1-8B in 16 bits leaves no room for its own 128k in 16 bits.
    llama = fit("llama-3.1-8b", 24 * GIB, 128 * K, 16, 8.03e9)
    assert (llama["fits"], llama["binding"]) == (True, "weights")
    assert llama["total_reference_bytes"] > 24 * GIB
    assert 128 * K < llama["max_context"] < 512 * K
    assert not fit("llama-3.1-8b", 24 * GIB, llama["max_context"] + 1, 16, 8.03e9)["fits"]
    assert fit("llama-3.1-8b", 24 * GIB, llama["max_context"], 16, 8.03e9)["fits"]


def test_128_gb_of_unified_memory_and_ten_million_tokens() -> None:
    coder = fit("qwen3-coder-next", 128e9, 1 << 20, 4.5, 80e9, sessions=8)
    assert (coder["fits"], coder["binding"]) == (True, "weights")
    assert coder["total_reference_bytes"] > 128e9
    scout = fit("llama-4-scout", 128e9, 10 << 20, 4.5, 109e9)
    assert (scout["fits"], scout["binding"]) == (False, "folded")
    assert 1 << 20 < scout["max_context"] < 10 << 20
    # A model whose layers all slide does not grow.
    assert fit("mistral-7b", 24 * GIB, 1 << 20, 16, 7.2e9)["max_context"] is None


def test_linear_layers_alone_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="nothing to fold"):
        read({**config("qwen3-coder-next"), "layer_types": ["linear_attention"] * 48})
