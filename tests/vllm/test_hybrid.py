"""A hybrid of Gated DeltaNet and attention layers in a real vLLM, random weights: its attention layers are folded, blocks of
linear layers and of pages get one size."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Run, prompt, run, step
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from kvfold.config import PAGE_TOKENS

VOCABULARY = 256
LIKELY = 4
LAST_BIT = 2**-4  # of logits from 8 to 16 in bfloat16
PROMPTS = [[3 + x % (VOCABULARY - 3) for x in prompt(i, n)] for i, n in enumerate((70, 300, 900, 1500))]
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,  # vLLM's CPU kernels have no smaller ones
    "linear_value_head_dim": 64,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights wide enough that the next token depends on all of the context."""
    folder = tmp_path_factory.mktemp("hybrid")
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(Qwen3NextConfig(**SIZES))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.dim() == 2 and ("proj" in name or "lm_head" in name):
                p.normal_(0, 0.15)
    made.to(torch.bfloat16).save_pretrained(folder)
    return folder


def through(profile: str | None, model: Path, tokens: int = 512, **options: Any) -> Run:
    """tokens: of a step at most."""
    chosen = {"model": str(model), "dtype": "bfloat16", "skip_tokenizer_init": True, "max_num_batched_tokens": tokens}
    return run(profile, [step(*PROMPTS, logprobs=LIKELY), step(*PROMPTS, logprobs=LIKELY)], **chosen, **options)


@functools.cache
def expected(model: Path) -> Run:
    return through(None, model, enable_prefix_caching=False)


def parting(ours: Run, stock: Run, i: int) -> int:
    """Place of the first token in which answers to prompt i differ, or the length of both."""
    pairs = enumerate(zip(ours.ids(0)[i], stock.ids(0)[i], strict=True))
    return next((at for at, (x, y) in pairs if x != y), len(stock.ids(0)[i]))


def change(ours: Run, stock: Run, i: int) -> float:
    """The largest change of a likely token's logarithm of probability, as far as answers to prompt i are the same."""
    both = zip(ours.likely(0, i), stock.likely(0, i), strict=True)
    pairs = [
        (x[t], y[t]) for (x, y), _ in zip(both, range(parting(ours, stock, i)), strict=False) for t in x.keys() & y
    ]
    return max((abs(x - y) for x, y in pairs), default=0.0)


@functools.cache
def scatter(model: Path) -> float:
    """How much the same changes in vLLM's own cache when prompts are cut elsewhere: linear layers on a CPU run in bfloat16 alone,
    and products of other sizes are rounded in other places. At least the last bit of a logit."""
    stock = expected(model)
    others = [through(None, model, tokens=n, enable_prefix_caching=False) for n in (448, 2048)]
    return max(LAST_BIT, *(change(other, stock, i) for other in others for i in range(len(PROMPTS))))


def assert_same(ours: Run, stock: Run, i: int, tolerance: float) -> None:
    """Answers to prompt i are the same, or part where stock holds both tokens for as likely, within the tolerance. Before that
    nothing changes by more than twice: prompts may be cut elsewhere, and attention rounds in other places."""
    assert change(ours, stock, i) <= 2 * tolerance
    at = parting(ours, stock, i)
    if at < len(stock.ids(0)[i]):
        likely = stock.likely(0, i)[at]
        assert likely[stock.ids(0)[i][at]] - likely.get(ours.ids(0)[i][at], -math.inf) <= tolerance


@pytest.mark.parametrize("caching", [False, True])
def test_lossless_gives_the_tokens_of_stock(model: Path, caching: bool) -> None:
    """Up to ties: on one processor stock holds two tokens for exactly as likely."""
    folded = through("lossless", model, enable_prefix_caching=caching)
    assert scatter(model) <= 2 * LAST_BIT
    for i in range(len(PROMPTS)):
        assert_same(folded, expected(model), i, scatter(model))
    assert (max(folded.cached(1)) > 0) == caching
    if not caching:
        assert folded.ids(1) == folded.ids(0)


def test_packed_pages_run_without_prefix_caching(model: Path) -> None:
    """More tokens fit, and a prompt that fills no page is answered as by stock."""
    folded = through("balanced", model, enable_prefix_caching=False)
    assert folded.engines == {"profile balanced, engine cpu"}
    assert folded.ids(0) == folded.ids(1)
    assert_same(folded, expected(model), 0, scatter(model))
    assert folded.tokens > 2 * expected(model).tokens


def test_packed_pages_with_prefix_caching(model: Path) -> None:
    """Prompts asked for again go on from what is known of them, also within a page, and are answered as at first: all but one,
    for what lies in pages now was exact when it was read first."""
    folded = through("balanced", model)
    assert_same(folded, expected(model), 0, scatter(model))
    assert min(folded.cached(1)) > 0
    assert any(n % PAGE_TOKENS for n in folded.cached(1))
    same = [first == again for first, again in zip(*(folded.ids(i) for i in (0, 1)), strict=True)]
    assert sum(same) >= len(same) - 1
