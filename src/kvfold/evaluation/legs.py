"""What one pass over a text does not show: long generation, a reused prefix, several turns, exact copies, errors by layer.

A stock and a folded cache run in step.

Both caches always hold the same tokens: continuations are the stock cache's own most likely tokens. So a folded cache's
free continuation is the same text up to its first diverging token, which is the first place where its own choice differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from kvfold.adapters.hf_transformers import FoldedCache, attach
from kvfold.config import PAGE_TOKENS, CacheSpec
from kvfold.errors import EvaluationError, InvalidConfig
from kvfold.evaluation.divergence import CALL_TOKENS, compare

TURNS = 4
Leg = dict[str, Any]


class _Pair:
    """A stock and a folded cache that read the same calls, and what was found since the last `figures`."""

    def __init__(self, model: Any, spec: CacheSpec) -> None:
        self.model = model
        self.stock, self.folded = DynamicCache(config=model.config), FoldedCache(model.config, spec=spec)
        self.next = 0  # the stock cache's choice after what was read
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []
        self.choices: list[Tensor] = []  # int64 [2, n]: most likely tokens of the stock and of the folded cache

    def read(self, ids: Sequence[int]) -> None:
        """Feed token ids in calls of CALL_TOKENS and compare at every one."""
        for start in range(0, len(ids), CALL_TOKENS):
            part = torch.tensor([ids[start : start + CALL_TOKENS]], device=self.model.device)
            reference = self.model(part, past_key_values=self.stock).logits[0].float()
            logits = self.model(part, past_key_values=self.folded).logits[0].float()
            kl, same = compare(logits, reference)
            self.kl.append(kl.cpu())
            self.same.append(same.cpu())
            self.choices.append(torch.stack((reference.argmax(-1), logits.argmax(-1))).cpu())
            self.next = int(reference[-1].argmax())

    def go_on(self, tokens: int) -> None:
        """Feed the stock cache's greedy continuation, token by token."""
        for _ in range(tokens):
            self.read([self.next])

    def forget(self) -> None:
        self.kl, self.same, self.choices = [], [], []

    def figures(self) -> Leg:
        """Of what was read since `forget`: tokens, kld_mean, kld_max, top1_agreement, and first_divergence, the number of
        tokens before the first whose choice differed (None if none)."""
        kl, same = torch.cat(self.kl), torch.cat(self.same)
        changed = (~same).nonzero()
        return {
            "tokens": len(kl),
            "kld_mean": float(kl.mean()),
            "kld_max": float(kl.max()),
            "top1_agreement": float(same.double().mean()),
            "first_divergence": int(changed[0]) if len(changed) else None,
        }


def generation(model: Any, window: list[int], spec: CacheSpec, tokens: int) -> Leg:
    """The window as a prompt, then `tokens` greedy ones."""
    pair = _Pair(model, spec)
    pair.read(window)
    pair.forget()
    pair.go_on(tokens)
    return {"prompt_tokens": len(window), **pair.figures()}


def prefix(model: Any, window: list[int], spec: CacheSpec, tokens: int) -> Leg:
    """Three quarters of the window are read once and forked; a fork goes on with the rest, then greedily.

    equal_to_fresh: whether the fork's logits are, bit by bit, those of a cache that read everything itself.
    """
    cut = len(window) * 3 // 4 // PAGE_TOKENS * PAGE_TOKENS
    if not cut:
        raise EvaluationError(
            f"a window of {len(window)} tokens has no page to reuse", "Use --window-tokens 256 or more"
        )
    pair, fresh = _Pair(model, spec), FoldedCache(model.config, spec=spec)
    pair.read(window[:cut])
    pair.forget()
    shared = pair.folded
    pair.folded = shared.fork()
    again = shared.fork()
    pair.read(window[cut:])
    equal = True
    for start in range(0, len(window), CALL_TOKENS):
        part = torch.tensor([window[start : start + CALL_TOKENS]], device=model.device)
        own = model(part, past_key_values=fresh).logits
        if start >= cut:
            equal = equal and torch.equal(own, model(part, past_key_values=again).logits)
    pair.go_on(tokens)
    return {"prefix_tokens": cut, "equal_to_fresh": equal, **pair.figures()}


def multiturn(model: Any, window: list[int], spec: CacheSpec, tokens: int) -> Leg:
    """The window in TURNS parts, each followed by its share of the greedy tokens; kld_by_turn is of the answers."""
    pair = _Pair(model, spec)
    part, by_turn = -(-len(window) // TURNS), []
    kl: list[Tensor] = []
    same: list[Tensor] = []
    for turn in range(TURNS):
        pair.read(window[turn * part : (turn + 1) * part])
        pair.forget()
        pair.go_on(max(1, tokens // TURNS))
        by_turn.append(pair.figures()["kld_mean"])
        kl += pair.kl
        same += pair.same
    pair.kl, pair.same = kl, same
    return {"turns": TURNS, **pair.figures(), "kld_by_turn": by_turn}


def copy(model: Any, window: list[int], spec: CacheSpec, tokens: int) -> Leg:
    """Half a window of tokens in a shuffled order, twice: the second time each token can be known by looking back only.

    accuracy_reference, accuracy: share of the second reading's tokens that the stock and the folded cache name. `tokens`
    of greedy text are not asked for.
    """
    half = len(window) // 2
    order = torch.randperm(half, generator=torch.Generator().manual_seed(spec.seed)).tolist()
    passage = [window[i] for i in order]
    pair = _Pair(model, spec)
    pair.read(passage)
    pair.forget()
    pair.read(passage)
    expected = torch.tensor(passage[1:])
    stock, folded = (float((x[:-1] == expected).double().mean()) for x in torch.cat(pair.choices, 1))
    return {"accuracy_reference": stock, "accuracy": folded, **pair.figures()}


def layers(model: Any, window: list[int], spec: CacheSpec, tokens: int) -> Leg:
    """The window once, with every folded page compared as it is folded: the calls' last queries over its exact and its
    folded keys and values. layers: layer, samples, score_error (rms, nats), output_error (rms, relative), folded_mass (the
    share of attention that falls on folded tokens). No greedy `tokens`.
    """
    pair = _Pair(model, spec)
    pair.folded.watch(1)
    pair.read(window)
    rows = [{"layer": r["layer"], **r["fidelity"]} for r in pair.folded.report()["layers"] if "fidelity" in r]
    return {**pair.figures(), "layers": rows}


LEGS: dict[str, Callable[[Any, list[int], CacheSpec, int], Leg]] = {
    "generation": generation,
    "prefix": prefix,
    "multiturn": multiturn,
    "copy": copy,
    "layers": layers,
}


def named(names: Sequence[str]) -> list[str]:
    """The names as they are known. Raises InvalidConfig for others."""
    known = [n.strip() for n in names]
    for n in known:
        if n not in LEGS:
            raise InvalidConfig(f"there is no leg {n!r}", f"Use some of: {', '.join(LEGS)}")
    return known


@torch.no_grad()
def run(
    model: Any,
    window: list[int],
    spec: CacheSpec,
    names: Sequence[str],
    tokens: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Leg]:
    """The legs of those names on one window of token ids, with `tokens` greedy tokens each. Attaches the model meanwhile."""
    out = {}
    with attach(model):
        for done, name in enumerate(names):
            progress(done, len(names))
            out[name] = LEGS[name](model, window, spec, tokens)
    return out
