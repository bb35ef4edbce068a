"""Folded pages in a real vLLM lose what they lose in the transformers adapter, and hold what their size says."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import GPU, MODEL, PACKED_DTYPE, run, step, text, tokenizer
from transformers import AutoModelForCausalLM

from kvfold import profiles
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.engine.request import LayerShape
from kvfold.engine.select import make_engine
from kvfold.evaluation.divergence import CALL_TOKENS, compare, evaluate
from kvfold.evaluation.needle import documents, grid

PROFILES = ("balanced", "compact")
WINDOWS = [text()[2048 * i : 2048 * (i + 1)] for i in (0, 7)]
CONTEXT, KIND, DOCUMENTS = 4096, "magic_number", 4
LONG = 131072


def page_bytes(kv_heads: int, head_dim: int, spec: CacheSpec) -> int:
    shape = LayerShape(0, kv_heads, head_dim, 2)
    device = torch.device("cuda" if GPU else "cpu")
    return make_engine("auto", spec, shape, torch.bfloat16, device).page_bytes


@functools.cache
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@functools.cache
def logprobs(profile: str | None, workers: int = 1) -> list[torch.Tensor]:
    """What vLLM says of every token of WINDOWS, read in the calls of the evaluation's protocol."""
    done = run(
        profile,
        [step(*WINDOWS, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False)],
        max_logprobs=-1,
        max_num_batched_tokens=CALL_TOKENS,
        max_num_seqs=1,
        enable_prefix_caching=False,
        dtype=PACKED_DTYPE,
        tensor_parallel_size=workers,
        env={"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(workers > 1))},
    )
    return [torch.from_numpy(done.logprobs[0, i]) for i in range(len(WINDOWS))]


@pytest.mark.parametrize(("profile", "workers"), [*((p, 1) for p in (*PROFILES, "swift-3")), ("balanced", 2)])
def test_divergence_is_that_of_the_transformers_adapter(profile: str, workers: int) -> None:
    kl = [compare(f, s)[0] for f, s in zip(logprobs(profile, workers), logprobs(None), strict=True)]
    here = float(torch.cat(kl).mean())
    there = float(evaluate(model(), WINDOWS, profiles.load(profile).spec)["kld_mean"])
    assert here == pytest.approx(there, rel=0.1)


def by_layer(folder: Path, layers: str) -> str:
    """`compact` with bits of each layer's own."""
    profile = folder / "by-layer.toml"
    profile.write_text(f'base = "compact"\npurpose = "compact, by layer"\n{layers}\n')
    return str(profile)


MEASURED = "bits_by_layer = [[3.5, 1], [3, 2.5], [2.5, 2], [3, 2], [3, 1.5], [3.5, 3]]"


@pytest.mark.parametrize("layers", ["graded = true", MEASURED], ids=["graded", "measured"])
def test_layers_with_bits_of_their_own(layers: str, tmp_path: Path) -> None:
    profile = by_layer(tmp_path, layers)
    kl = [compare(f, s)[0] for f, s in zip(logprobs(profile), logprobs(None), strict=True)]
    spec = profiles.load(profile).spec
    assert float(torch.cat(kl).mean()) == pytest.approx(float(evaluate(model(), WINDOWS, spec)["kld_mean"]), rel=0.1)


def test_capacity_with_layers_of_different_sizes(tmp_path: Path) -> None:
    """The size of the largest layer's pages counts for all."""
    profile = by_layer(tmp_path, "graded = true")
    folded, plain = (run(p, [], dtype="bfloat16", max_model_len=LONG).tokens for p in (profile, "compact"))
    spec, config = profiles.load(profile).spec, model().config
    layers = [spec.for_layer(place, config.num_hidden_layers) for place in range(config.num_hidden_layers)]
    pages = [page_bytes(config.num_key_value_heads, config.head_dim, s) for s in layers]
    unchanged = page_bytes(config.num_key_value_heads, config.head_dim, profiles.load("compact").spec)
    assert sum(pages) == len(pages) * unchanged
    assert folded / plain == pytest.approx(unchanged / max(pages), rel=0.02)


@pytest.mark.parametrize("profile", PROFILES)
def test_needles_are_found_as_through_the_transformers_adapter(profile: str) -> None:
    docs = list(documents(CONTEXT, [KIND], DOCUMENTS, 0, tokenizer()))
    asked = [(d.ids + n.question, n.answer) for d in docs for n in d.needles]
    length = max(len(answer) for _, answer in asked)
    found = run(
        profile, [step(*(q for q, _ in asked), max_tokens=length)], max_model_len=CONTEXT + 64, dtype=PACKED_DTYPE
    )
    hits = [ids[: len(a)] == a for ids, (_, a) in zip(found.ids(0), asked, strict=True)]
    rows = grid(model(), tokenizer(), [CONTEXT], {profile: profiles.load(profile).spec}, [KIND], DOCUMENTS)
    there = np.mean([r["recall"] for r in rows])
    assert np.mean(hits) >= 0.9 * there
    assert there > 0.5  # else nothing was compared


@pytest.mark.parametrize(("profile", "times"), [("balanced", 4.9), ("compact", 6.0)])
def test_capacity_at_equal_memory(profile: str, times: float) -> None:
    """Tokens that vLLM says its cache holds, exact tokens of every request counted: at 128k, those cost less than 3 %."""
    folded, stock = (run(p, [], dtype="bfloat16", max_model_len=LONG).tokens for p in (profile, None))
    config = model().config
    page = page_bytes(config.num_key_value_heads, config.head_dim, profiles.load(profile).spec)
    ratio = PAGE_TOKENS * 2 * config.num_key_value_heads * config.head_dim * 2 / page
    assert 0.97 * ratio * stock <= folded <= ratio * stock
    assert folded >= times * stock
