"""Needle retrieval: facts hidden in a long text, asked for at its end, answered through a folded and through a stock cache.

A document holds needles at five depths. It is read once in calls of PREFILL_TOKENS; every question continues a fork of
that cache, so a question never sees another. An answer counts when the model's most likely token is the right one at
every position of the answer, which is when greedy decoding would print exactly it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvfold.adapters.hf_transformers import FoldedCache, attach
from kvfold.config import CacheSpec
from kvfold.errors import EvaluationError
from kvfold.evaluation.divergence import compare
from kvfold.evaluation.text import haystack, stream, templates, words

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
PREFILL_TOKENS = 2048
# Below this many tokens twenty needles would crowd out the text, so a document holds one kind only.
ALL_KINDS_FROM = 8192


@dataclass(frozen=True)
class Needle:
    """A fact: ids of the statement to hide, of the question, and of the answer."""

    kind: str
    depth: float
    statement: list[int]
    question: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Document:
    """ids: the text with its needles, short of one question and answer of the full context length."""

    ids: list[int]
    needles: list[Needle]


@dataclass
class Cell:
    """Answers of one (profile, context, depth, kind): pairs of (stock, folded) hits and answer NLLs."""

    hits: list[tuple[bool, bool]]
    nll: list[tuple[float, float]]


def make_needle(
    kind: str, depth: float, word: str, rng: np.random.Generator, encode: Callable[[str], list[int]]
) -> Needle:
    """One needle from the kind's template; digits, hex and words drawn from rng."""
    t = templates()[kind]
    filled = {
        "word": word,
        "digits": "".join(map(str, rng.integers(0, 10, 7))),
        "hex12": "".join("0123456789abcdef"[i] for i in rng.integers(0, 16, 12)),
        "a": words()[rng.integers(len(words()))],
        "b": words()[rng.integers(len(words()))],
    }
    statement, question, answer = (encode(t[part].format(**filled)) for part in ("statement", "question", "answer"))
    return Needle(kind, depth, statement, question, answer)


def documents(context: int, kinds: list[str], count: int, seed: int, tokenizer: Any) -> Iterator[Document]:
    """`count` documents per group of kinds that share one, each with every depth and kind of its group once."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    text = stream(haystack(), tokenizer)
    if len(text) < context:
        raise EvaluationError(
            f"the shipped text has {len(text)} tokens, {context} are asked for", "Use shorter contexts"
        )
    groups = [kinds] if context >= ALL_KINDS_FROM else [[k] for k in kinds]
    for g, group in enumerate(groups):
        for i in range(count):
            rng = np.random.default_rng([seed, context, g, i])
            names = rng.choice(len(words()), len(DEPTHS) * len(group), replace=False)
            needles = [
                make_needle(kind, depth, words()[names[j]].capitalize(), rng, encode)
                for j, (depth, kind) in enumerate((d, k) for d in DEPTHS for k in group)
            ]
            room = (
                context - sum(len(n.statement) for n in needles) - max(len(n.question) + len(n.answer) for n in needles)
            )
            if room < context // 4:
                raise EvaluationError(
                    f"context {context} is too short for {len(needles)} needles", "Use 2048 tokens or more"
                )
            start = int(rng.integers(0, len(text) - room))
            hay = text[start : start + room]
            ids: list[int] = []
            at = 0
            for n in needles:
                cut = max(at, min(room, int(n.depth * room + rng.integers(0, room // 50 + 1))))
                ids += hay[at:cut] + n.statement
                at = cut
            yield Document(ids + hay[at:], needles)


def fork_stock(cache: DynamicCache) -> DynamicCache:
    """A continuation of a stock cache: growing layers share their tensors (they are never written), others are copied."""
    other = copy.copy(cache)
    other.layers = [copy.copy(x) if type(x) is DynamicLayer else copy.deepcopy(x) for x in cache.layers]
    return other


@torch.no_grad()
def prefill(model: Any, ids: list[int], cache: Any, tick: Callable[[int], None] = lambda tokens: None) -> Any:
    """Read ids into the cache in calls of PREFILL_TOKENS; only the last position's logits are computed."""
    x = torch.tensor([ids], device=model.device)
    for start in range(0, x.shape[1], PREFILL_TOKENS):
        part = x[:, start : start + PREFILL_TOKENS]
        model(part, past_key_values=cache, logits_to_keep=1)
        tick(part.shape[1])
    return cache


@torch.no_grad()
def ask(model: Any, needle: Needle, cache: Any) -> tuple[Tensor, bool, float]:
    """(logits that predict the answer [n, vocabulary], exact match, mean NLL of the answer's tokens)."""
    ids = torch.tensor([needle.question + needle.answer], device=model.device)
    n = len(needle.answer)
    logits = model(ids[:, :-1], past_key_values=cache, logits_to_keep=n).logits[0].float()
    answer = ids[0, -n:]
    nll = -logits.log_softmax(-1).gather(-1, answer[:, None]).mean()
    return logits, bool((logits.argmax(-1) == answer).all()), float(nll)


def grid(
    model: Any,
    tokenizer: Any,
    contexts: list[int],
    specs: Mapping[str, CacheSpec],
    kinds: list[str] | None = None,
    trials: int = 20,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """One row per (profile, context, depth, kind) with `trials` paired answers each; the `needle` command's rows.

    specs: caches to measure, by the names of their profiles; all of them against one reading through the stock cache.
    """
    kinds = kinds or list(templates())
    unknown = [k for k in kinds if k not in templates()]
    if unknown:
        raise EvaluationError(f"unknown needle kind {unknown[0]!r}", f"Use: {', '.join(templates())}")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit and max(contexts) > limit:
        raise EvaluationError(
            f"the model ends at {limit} tokens, {max(contexts)} are asked for", "Use shorter contexts"
        )
    cells: dict[tuple[str, int, float, str], Cell] = {}
    total = sum((1 + len(specs)) * c * trials * (1 if c >= ALL_KINDS_FROM else len(kinds)) for c in contexts)
    done = 0

    def tick(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(min(done, total), total)

    with attach(model):
        for context in contexts:
            for document in documents(context, kinds, trials, seed, tokenizer):
                stock = prefill(model, document.ids, DynamicCache(config=model.config), tick)
                expected = [ask(model, n, fork_stock(stock))[1:] for n in document.needles]
                del stock
                for profile, spec in specs.items():
                    folded = prefill(model, document.ids, FoldedCache(model.config, spec=spec), tick)
                    for n, (hit_stock, nll_stock) in zip(document.needles, expected, strict=True):
                        _, hit, nll = ask(model, n, folded.fork())
                        cell = cells.setdefault((profile, context, n.depth, n.kind), Cell([], []))
                        cell.hits.append((hit_stock, hit))
                        cell.nll.append((nll_stock, nll))
                    del folded
    order = list(specs)
    return [_row(key, cells[key]) for key in sorted(cells, key=lambda k: (order.index(k[0]), *k[1:]))]


def _row(key: tuple[str, int, float, str], cell: Cell) -> dict[str, Any]:
    n = len(cell.hits)
    return {
        "profile": key[0],
        "context": key[1],
        "depth": key[2],
        "kind": key[3],
        "trials": n,
        "recall_reference": sum(s for s, _ in cell.hits) / n,
        "recall": sum(f for _, f in cell.hits) / n,
        "answer_nll_reference": sum(s for s, _ in cell.nll) / n,
        "answer_nll": sum(f for _, f in cell.nll) / n,
    }


def divergence_of_answers(model: Any, document: Document, stock: DynamicCache, folded: FoldedCache) -> dict[str, float]:
    """Recall of both caches over a document's needles and the mean KL of the folded answers' logits, for the demo."""
    kl, hits = [], []
    for n in document.needles:
        reference, hit_stock, _ = ask(model, n, fork_stock(stock))
        logits, hit, _ = ask(model, n, folded.fork())
        kl.append(compare(logits, reference)[0])
        hits.append((hit_stock, hit))
    return {
        "recall_reference": sum(s for s, _ in hits) / len(hits),
        "recall": sum(f for _, f in hits) / len(hits),
        "kld_mean": float(torch.cat(kl).mean()),
    }
