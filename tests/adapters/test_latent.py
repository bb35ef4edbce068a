"""Latent attention: what is kept, and attention over it, against the same attention over everything expanded."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache

import kvfold
from kvfold.cache.layer import FoldedAttention
from kvfold.engine.select import make_engine
from kvfold.engine.variant import Variant
from kvfold.errors import NoImplementation, Unsupported
from kvfold.profiles import load

LATENT, ROTARY, HEADS, PAST, NEW = 64, 16, 4, 600, 9


def filled(profile: str, backend: str = "auto") -> tuple[FoldedAttention, torch.Tensor, torch.Tensor]:
    spec = load(profile).spec.for_latents()
    layer = FoldedAttention(spec, 0, functools.partial(make_engine, backend), Variant(latent=True))
    latents, rotary = torch.randn(1, 1, PAST, LATENT) + 0.5, torch.randn(1, 1, PAST, ROTARY)
    layer.append(latents, rotary, [0])
    return layer, latents, rotary


@pytest.mark.parametrize("profile", ["lossless", "balanced", "faithful-2.5", "turbo-3"])
def test_attention_over_latents_is_attention_over_what_pages_hold(profile: str) -> None:
    layer, latents, rotary = filled(profile)
    (s,) = layer.sequences
    unfolded, kept = layer.engine.unfold(torch.stack([s.pool.row(p) for p in s.pages]), s.state)
    assert torch.equal(kept[:, : s.folded], rotary[0, :, : s.folded])
    held = latents.clone()
    at = slice(layer.spec.sinks, s.folded)
    held[0, :, at] = unfolded[:, at]
    q = torch.randn(1, HEADS, NEW, LATENT + ROTARY)
    k, v = torch.randn(1, 1, NEW, LATENT), torch.randn(1, 1, NEW, ROTARY)
    got = layer.attend(q, k, v, [0], 0.2)
    values = torch.cat([held, k], 2)
    keys = torch.cat([values, torch.cat([rotary, v], 2)], -1)
    scores = 0.2 * q @ keys.mT
    hidden = torch.arange(PAST + NEW) > PAST + torch.arange(NEW)[:, None]
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_fewer_bits_are_further_from_the_exact_latents() -> None:
    errors = []
    for profile in ("lossless", "balanced", "compact", "ultra"):
        torch.manual_seed(0)
        layer, latents, _ = filled(profile)
        (s,) = layer.sequences
        unfolded, _ = layer.engine.unfold(torch.stack([s.pool.row(p) for p in s.pages]), s.state)
        at = slice(layer.spec.sinks, s.folded)
        exact = latents[0, :, at]
        errors.append(float((unfolded[:, at] - exact).square().mean() / exact.var()))
    assert errors[0] == 0
    assert errors == sorted(errors)
    assert errors[1] < 0.02


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_engines_without_it_say_so(backend: str) -> None:
    with pytest.raises(NoImplementation, match="latent keys"):
        filled("balanced", backend)


def test_quantized_expansion_is_refused_by_name() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny.make("deepseek_v3", torch.bfloat16)
    config = model.config
    own = type(model)(config).eval().to(torch.bfloat16)
    quantization.quantize_(own, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: "kv_b_proj" in name)
    with torch.no_grad(), kvfold.attach(own), pytest.raises(Unsupported, match="kv_b_proj"):
        own(tiny.prompt(1, 20), past_key_values=kvfold.FoldedCache(config))


def test_the_expanding_step_stays_what_it_was_for_stock_caches() -> None:
    model: Any = tiny.make("deepseek_v3")
    with torch.no_grad():
        kvfold.attach(model)
        attention = model.model.layers[0].self_attn
        x = torch.randn(1, 1, 3, tiny.LATENT), torch.randn(1, 1, 3, tiny.ROTARY)
        keys, values = attention.expand_kv(*x)
        assert keys.shape == (1, 4, 3, 16 + tiny.ROTARY)
        assert values.shape == (1, 4, 3, 16)
        kvfold.detach(model)
        ids = tiny.prompt(1, 30)
        want = model(ids).logits
        torch.testing.assert_close(model(ids, past_key_values=DynamicCache(config=model.config)).logits, want)
