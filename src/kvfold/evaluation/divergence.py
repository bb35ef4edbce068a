"""KL divergence, top-1 agreement and perplexity of a model through a folded cache, or another contender, against its stock cache.

All caches are fed the same calls of CALL_TOKENS tokens and every position is scored: KL(reference || folded) in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvfold.adapters.hf_transformers import attach
from kvfold.config import CacheSpec
from kvfold.errors import EvaluationError
from kvfold.evaluation.contenders import Contender, Folded

Progress = Callable[[int, int], None]

CALL_TOKENS = 64
SURE = 0.9  # probability of its most likely token above which the reference counts as sure


def compare(logits: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """(KL(reference || folded) per position, whether both name the same most likely token); logits [n, vocabulary]."""
    # In float64: a float32 log-softmax alone shows divergences of 1e-8 between equal distributions.
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), p.argmax(-1) == q.argmax(-1)


@dataclass
class Scores:
    """What one contender did, position by position, over windows of `lengths` tokens, one after the other.

    On the CPU, [n]: kl, nll and nll_reference float64 (the last token of a window has no nll), same and sure bool, top
    and top_reference int64 (most likely tokens). exact: tokens that each query read exactly, itself included. sizes: of
    its last cache.
    """

    kl: Tensor
    same: Tensor
    sure: Tensor
    top: Tensor
    top_reference: Tensor
    nll: Tensor
    nll_reference: Tensor
    exact: list[int]
    sizes: dict[str, float | int]
    lengths: list[int]


class _Tally:
    """A contender's scores while they are made."""

    def __init__(self, contender: Contender) -> None:
        self.contender, self.cache = contender, contender.start()
        self.parts: list[tuple[Tensor, ...]] = []
        self.exact: list[int] = []

    def call(self, model: Any, ids: Tensor, following: Tensor, reference: Tensor) -> None:
        """Feed ids [1, n] and score logits against reference [n, vocabulary]; following [m, 1] are the next tokens."""
        past = self.contender.exact_tokens(self.cache)
        self.exact += [past + i + 1 for i in range(ids.shape[1])]
        logits = model(ids, past_key_values=self.cache).logits[0].float()
        kl, same = compare(logits, reference)
        sure = reference.softmax(-1).amax(-1) > SURE
        tops = logits.argmax(-1), reference.argmax(-1)
        self.parts.append((kl, same, sure, *tops, _nll(logits, following), _nll(reference, following)))

    def scores(self, lengths: list[int]) -> Scores:
        kl, same, sure, top, top_reference, nll, nll_reference = (
            torch.cat(x).cpu() for x in zip(*self.parts, strict=True)
        )
        sizes = self.contender.sizes(self.cache)
        return Scores(kl, same, sure, top, top_reference, nll, nll_reference, self.exact, sizes, lengths)


def _nll(logits: Tensor, following: Tensor) -> Tensor:
    return -logits[: len(following)].log_softmax(-1).gather(-1, following)[:, 0].double()


@torch.no_grad()
def score(
    model: Any,
    windows: list[list[int]],
    contenders: Sequence[Contender],
    progress: Progress = lambda done, total: None,
) -> list[Scores]:
    """Every contender on `windows` of token ids, all against one run of the stock cache. Attaches the model while it runs.

    Raises EvaluationError if there is no window or the model's own logits are not finite.
    """
    if not windows:
        raise EvaluationError("there is no window to evaluate", "Ask for at least one window")
    calls = sum(-(-len(w) // CALL_TOKENS) for w in windows)
    done = 0
    tallies = [_Tally(c) for c in contenders]
    with attach(model):
        for window in windows:
            ids = torch.tensor([window], device=model.device)
            stock = DynamicCache(config=model.config)
            for tally in tallies:
                tally.cache = tally.contender.start()
            for start in range(0, ids.shape[1], CALL_TOKENS):
                part = ids[:, start : start + CALL_TOKENS]
                following = ids[0, start + 1 : start + 1 + part.shape[1], None]
                reference = model(part, past_key_values=stock).logits[0].float()
                if not bool(torch.isfinite(reference).all()):
                    raise EvaluationError("the model's own logits are not finite", "Try --dtype float32")
                for tally in tallies:
                    tally.call(model, part, following, reference)
                done += 1
                progress(done, calls)
    return [t.scores([len(w) for w in windows]) for t in tallies]


def evaluate(
    model: Any, windows: list[list[int]], spec: CacheSpec, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """The `eval` command's figures of a folded cache for `windows` of equal length; see `score`."""
    return figures(score(model, windows, [Folded("folded", model.config, spec)], progress)[0])


def figures(scores: Scores) -> dict[str, Any]:
    """The `eval` command's figures of one contender."""
    return _summary(scores) | worst(scores.kl, scores.same, scores.sure, scores.lengths)


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


def _summary(scores: Scores) -> dict[str, float | int]:
    kl, nll, exact = scores.kl, scores.nll, scores.exact
    n = len(kl)
    change = math.exp(float((nll - scores.nll_reference).mean())) - 1
    sizes = scores.sizes
    return {
        "kld_mean": float(kl.mean()),
        "kld_se": float(kl.std() / math.sqrt(n)),
        "kld_p99": float(kl.quantile(0.99)),
        "kld_max": float(kl.max()),
        "top1_agreement": float(scores.same.double().mean()),
        "perplexity": math.exp(float(nll.mean())),
        "perplexity_reference": math.exp(float(scores.nll_reference.mean())),
        "perplexity_change": change,
        "perplexity_change_se": float((nll - scores.nll_reference).std() / math.sqrt(len(nll))) * (1 + change),
        "bits_per_value": sizes["bits_per_value"],
        "cache_bytes": sizes["cache_bytes"],
        "reference_bytes": sizes["reference_bytes"],
        "exact_tokens_mean": sum(exact) / len(exact),
        "exact_tokens_max": max(exact),
        "page_tokens": sizes["page_tokens"],
        "positions": n,
    }
