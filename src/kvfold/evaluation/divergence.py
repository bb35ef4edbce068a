"""KL divergence, top-1 agreement and perplexity of a model through a folded cache, against the same model's stock cache.

Both caches are fed the same calls of CALL_TOKENS tokens and every position is scored: KL(reference || folded) in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvfold.adapters.hf_transformers import FoldedCache, attach
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.errors import EvaluationError

CALL_TOKENS = 64
SURE = 0.9  # probability of its most likely token above which the reference counts as sure


def compare(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(reference || folded) per position, whether both name the same most likely token); logits [n, vocabulary]."""
    # In float64: a float32 log-softmax alone shows divergences of 1e-8 between equal distributions.
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


def _exact_read(cache: FoldedCache, call: int) -> list[int]:
    """How many tokens each query of the coming call will read exactly, itself included."""
    s = cache.folded_layers[0].folded.sequences
    past = s[0].exact_tokens if s else 0
    return [past + i + 1 for i in range(call)]


@torch.no_grad()
def evaluate(
    model: Any,
    windows: list[list[int]],
    spec: CacheSpec,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """The `eval` command's figures for `windows` of equal length. Attaches the model while it runs."""
    device = model.device
    kl, same, sure, nll, nll_reference, exact = [], [], [], [], [], []
    cache: FoldedCache | None = None
    calls = sum(-(-len(w) // CALL_TOKENS) for w in windows)
    done = 0
    with attach(model):
        for window in windows:
            ids = torch.tensor([window], device=device)
            stock, cache = DynamicCache(config=model.config), FoldedCache(model.config, spec=spec)
            for start in range(0, ids.shape[1], CALL_TOKENS):
                part = ids[:, start : start + CALL_TOKENS]
                reference = model(part, past_key_values=stock).logits[0].float()
                if not bool(torch.isfinite(reference).all()):
                    raise EvaluationError("the model's own logits are not finite", "Try --dtype float32")
                exact += _exact_read(cache, part.shape[1])
                logits = model(part, past_key_values=cache).logits[0].float()
                k, s = compare(logits, reference)
                kl.append(k)
                same.append(s)
                sure.append(reference.softmax(-1).amax(-1) > SURE)
                following = ids[0, start + 1 : start + 1 + part.shape[1], None]
                n = len(following)
                nll.append(-logits[:n].log_softmax(-1).gather(-1, following)[:, 0].double())
                nll_reference.append(-reference[:n].log_softmax(-1).gather(-1, following)[:, 0].double())
                done += 1
                progress(done, calls)
    if cache is None:
        raise EvaluationError("there is no window to evaluate", "Ask for at least one window")
    result = _summary(torch.cat(kl), torch.cat(same), torch.cat(nll), torch.cat(nll_reference), exact, cache)
    return result | worst(torch.cat(kl), torch.cat(same), torch.cat(sure), [len(w) for w in windows])


def worst(kl: Tensor, same: Tensor, sure: Tensor, lengths: list[int]) -> dict[str, Any]:
    """Where it is worst. kl [n] in nats, same and sure [n] bool, over windows of `lengths` tokens, one after the other.

    `kld_max_window`, `kld_max_position`: where kld_max is. `kld_by_decile`: mean KL by tenths of a window, which shows
    errors that grow with the context. `sure_positions`, `sure_changed`: where the reference gave one token more than
    SURE, and how often the folded cache made another one the most likely there.
    """
    position = torch.cat([torch.arange(n) for n in lengths])
    tenth = torch.cat([torch.arange(n) * 10 // n for n in lengths])
    at = int(kl.argmax())
    window = next(i for i, end in enumerate(accumulate(lengths)) if at < end)
    deciles = [kl.cpu()[tenth == d] for d in range(10)]
    return {
        "kld_max_window": window,
        "kld_max_position": int(position[at]),
        "kld_by_decile": [float(x.mean()) if len(x) else 0.0 for x in deciles],
        "sure_positions": int(sure.sum()),
        "sure_changed": int((sure & ~same).sum()),
    }


def _summary(
    kl: Tensor, same: Tensor, nll: Tensor, nll_reference: Tensor, exact: list[int], cache: FoldedCache
) -> dict[str, float | int]:
    n = len(kl)
    change = math.exp(float((nll - nll_reference).mean())) - 1
    layers = [x["bits_per_value"] for x in cache.report()["layers"] if x["kind"] == "folded"]
    return {
        "kld_mean": float(kl.mean()),
        "kld_se": float(kl.std() / math.sqrt(n)),
        "kld_p99": float(kl.quantile(0.99)),
        "kld_max": float(kl.max()),
        "top1_agreement": float(same.double().mean()),
        "perplexity": math.exp(float(nll.mean())),
        "perplexity_reference": math.exp(float(nll_reference.mean())),
        "perplexity_change": change,
        "perplexity_change_se": float((nll - nll_reference).std() / math.sqrt(len(nll))) * (1 + change),
        "bits_per_value": sum(layers) / len(layers) if layers else 16.0,
        "cache_bytes": cache.nbytes,
        "reference_bytes": cache.reference_bytes,
        "exact_tokens_mean": sum(exact) / len(exact),
        "exact_tokens_max": max(exact),
        "page_tokens": PAGE_TOKENS,
        "positions": n,
    }
