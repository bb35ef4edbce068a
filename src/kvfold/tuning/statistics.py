"""What errors in a layer's keys and values cost, and how these are spread: moments from one pass over a text.

An error e of a token's key changes what the model predicts at later positions; to second order the divergence is half of
e F e, F being the mean of g g over predictions drawn from the model, g the gradient of their log-probability with respect
to the key (the Fisher information). Only queries count that would read the token from a page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from kvfold.config import MEAN_TOKENS, PAGE_TOKENS, CacheSpec
from kvfold.errors import Unsupported

NAME = "kvfold-tuning"


@dataclass
class Moments:
    """Of one side of one layer, float64 [H, D, D], summed: spread over `tokens` tokens, cost over `positions` predictions. lost:
    products of a token's energy and its cost, which their means do not tell: what everybody attends to is often small."""

    spread: Tensor
    cost: Tensor
    tokens: int = 0
    positions: int = 0
    lost: float = 0.0


class Watch:
    """Adds zeros that gradients can be taken for to the keys and values that queries would read from pages."""

    def __init__(self, spec: CacheSpec) -> None:
        self.spec = spec
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def nudge(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x, requires_grad=True)

    def attention(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **others: Any
    ) -> tuple[Tensor, None]:
        if any(others.get(n) is not None for n in ("sliding_window", "softcap", "s_aux")) or k.shape != v.shape:
            raise Unsupported("attention with windows, softcaps, sinks or latents has no tuned form", "Use a level")
        nudge_k, nudge_v = self.nudge(k), self.nudge(v)
        self.seen[module.layer_idx] = (k.detach(), v.detach(), nudge_k, nudge_v)
        groups = q.shape[1] // k.shape[1]
        wide = [x.repeat_interleave(groups, 1) for x in (k, v, nudge_k, nudge_v)]
        n = q.shape[2]
        at = torch.arange(n, device=q.device)
        folded = (at - self.spec.window).clamp(min=0) // PAGE_TOKENS * PAGE_TOKENS
        far = (at < folded[:, None]) & (at >= self.spec.sinks)
        scores = q @ wide[0].mT + (q @ wide[2].mT).masked_fill(~far, 0.0)
        weights = (scores * scaling).masked_fill(at > at[:, None], -torch.inf).softmax(-1)
        out = weights @ wide[1] + weights.masked_fill(~far, 0.0) @ wide[3]
        return out.transpose(1, 2).contiguous(), None


@contextmanager
def watching(model: Any, watch: Watch) -> Iterator[None]:
    before = model.config._attn_implementation
    AttentionInterface.register(NAME, watch.attention)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No gradients of weights, which nobody asks for, are kept."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def collect(
    model: Any,
    windows: Sequence[list[int]],
    spec: CacheSpec,
    draws: int = 2,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[int, str], Moments]:
    """Moments by (layer, side) over windows of token ids; `draws` predictions are drawn for every position."""
    watch = Watch(spec)
    random = torch.Generator().manual_seed(seed)
    out: dict[tuple[int, str], Moments] = {}
    with watching(model, watch), _frozen(model), torch.enable_grad():
        for done, window in enumerate(windows):
            logits = model(torch.tensor([window], device=model.device), use_cache=False).logits[0].float()
            likely = logits.log_softmax(-1)
            nudges = [n for seen in watch.seen.values() for n in seen[2:]]
            for draw in range(draws):
                drawn = torch.multinomial(likely.detach().exp().cpu(), 1, generator=random).to(model.device)
                grads = torch.autograd.grad(likely.gather(-1, drawn).sum(), nudges, retain_graph=draw < draws - 1)
                for i, (layer, seen) in enumerate(watch.seen.items()):
                    for j, side in enumerate(("key", "value")):
                        _add(out, (layer, side), seen[j][0], grads[2 * i + j][0], draw == 0, spec)
            for moments in out.values():
                moments.positions += len(window)
            watch.seen.clear()
            progress(done + 1, len(windows))
    for moments in out.values():
        moments.cost /= draws
        moments.lost /= draws
    return out


def _add(
    out: dict[tuple[int, str], Moments],
    place: tuple[int, str],
    x: Tensor,
    g: Tensor,
    first: bool,
    spec: CacheSpec,
) -> None:
    """x, g [H, T, D]: vectors and gradients of one window."""
    heads, tokens, dim = x.shape
    if place not in out:
        zeros = torch.zeros(heads, dim, dim, dtype=torch.float64)
        out[place] = Moments(zeros, zeros.clone())
    moments = out[place]
    g = g.double().cpu()
    moments.cost += g.mT @ g
    halves = x[:, : tokens // MEAN_TOKENS * MEAN_TOKENS].double().cpu().unflatten(1, (-1, MEAN_TOKENS))
    if spec.centre and place[1] == "key":
        first_mean = halves[:, :1, min(spec.sinks, MEAN_TOKENS - 1) :].mean(2, keepdim=True)
        halves = halves - torch.cat([first_mean, halves[:, 1:].mean(2, keepdim=True)], 1)
    x = halves.flatten(1, 2)
    moments.lost += float((x.square().sum(-1) * g[:, : x.shape[1]].square().sum(-1)).sum())
    if first:
        x = x[:, MEAN_TOKENS:]  # without the sinks
        moments.spread += x.mT @ x
        moments.tokens += x.shape[1]
