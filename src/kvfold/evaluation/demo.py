"""The main job on the shipped model in one go: a long document through both caches; recall, memory and speed of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from kvfold.adapters.hf_transformers import FoldedCache, attach
from kvfold.evaluation.needle import divergence_of_answers, documents, fork_stock, prefill
from kvfold.loading import Options, load
from kvfold.profiles import load as load_profile

DECODE_TOKENS = 12
DECODE_ROUNDS = 3


@torch.no_grad()
def _decode_seconds(model: Any, cache: Any, first: int) -> float:
    """Seconds for DECODE_TOKENS greedy steps."""
    token = torch.tensor([[first]], device=model.device)
    began = time.perf_counter()
    for _ in range(DECODE_TOKENS):
        token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
    return time.perf_counter() - began


def run(profile: str, context: int, progress: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """The `demo` command's figures. Decode speeds are medians of rounds that alternate between the two caches."""
    began = time.perf_counter()
    loaded = load("demo", Options())
    model, spec = loaded.model, load_profile(profile).spec
    document = next(documents(context, ["magic_number", "pass_key", "key_value", "best_thing"], 1, 0, loaded.tokenizer))
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, 2 * len(document.ids))

    with attach(model):
        stock = prefill(model, document.ids, DynamicCache(config=model.config), tick)
        folded = prefill(model, document.ids, FoldedCache(model.config, spec=spec), tick)
        answers = divergence_of_answers(model, document, stock, folded)
        seconds: dict[str, list[float]] = {"stock": [], "folded": []}
        for _ in range(DECODE_ROUNDS):
            seconds["stock"].append(_decode_seconds(model, fork_stock(stock), document.ids[-1]))
            seconds["folded"].append(_decode_seconds(model, folded.fork(), document.ids[-1]))
    median = {k: sorted(v)[len(v) // 2] for k, v in seconds.items()}
    return {
        **answers,
        "cache_bytes": folded.nbytes,
        "reference_bytes": folded.reference_bytes,
        "ratio": folded.reference_bytes / folded.nbytes,
        "decode_tokens_per_s": DECODE_TOKENS / median["folded"],
        "decode_tokens_per_s_reference": DECODE_TOKENS / median["stock"],
        "seconds": time.perf_counter() - began,
        "context": context,
        "profile": profile,
        "backend": folded.report()["layers"][0]["backend"],
    }
