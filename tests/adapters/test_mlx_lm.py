"""mlx-lm models over folded layers, on MLX's CPU device."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from mlx_lm import load, stream_generate
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache, RotatingKVCache, save_prompt_cache, trim_prompt_cache

from kvfold.adapters.mlx_lm import FoldedLayer, attach, make_cache, to_mlx, to_torch
from kvfold.errors import CacheMisuse, NotAttached, Unsupported
from kvfold.evaluation.text import haystack, stream


@functools.cache
def loaded() -> tuple[Any, Any, list[int]]:
    """The shipped model in float32, its tokenizer, and text."""
    mx.set_default_device(mx.cpu)
    folder = resources.files("kvfold.models").joinpath("recall-llama-12m")
    model, tokenizer = load(str(folder))
    model.set_dtype(mx.float32)
    return model, tokenizer, stream(haystack()[:20_000], tokenizer._tokenizer)


def generated(cache: list[Any] | None, ids: list[int], count: int = 8, **how: Any) -> list[int]:
    model, tokenizer, _ = loaded()
    steps = stream_generate(model, tokenizer, ids, max_tokens=count, prompt_cache=cache, prefill_step_size=200, **how)
    return [s.token for s in steps]


def test_lossless_gives_the_tokens_of_mlx_own_cache() -> None:
    model, _, text = loaded()
    cache = make_cache(model, "lossless")
    with attach():
        folded = generated(cache, text[:300])
        more = generated(cache, text[300:400])
        stock = generated(None, text[:300])  # mlx's own caches still work
    assert folded == stock
    assert more == generated(None, text[:300] + folded + text[300:400])
    assert cache[0].offset == cache[0].size() == 400 + 2 * len(folded)


def test_balanced_is_small_and_close() -> None:
    model, _, text = loaded()
    ids = mx.array([text[:384]])
    cache, stock = make_cache(model, "balanced"), [KVCache() for _ in model.layers]
    with attach():
        folded = [model(ids[:, i : i + 192], cache=cache) for i in range(0, 384, 192)]
    exact = [model(ids[:, i : i + 192], cache=stock) for i in range(0, 384, 192)]
    p, q = (to_torch(mx.concatenate(x, axis=1)).double().log_softmax(-1) for x in (exact, folded))
    divergence = float((p.exp() * (p - q)).sum(-1).mean())
    assert 0 < divergence < 0.01
    layer = cache[0].folded.report()
    assert layer["folded_tokens"] == 256
    assert layer["bits_per_value"] < 3.3


def test_two_rows() -> None:
    model, _, text = loaded()
    ids = mx.array([text[:130], text[500:630]])
    with attach():
        both = model(ids, cache=make_cache(model, "lossless"))
    assert mx.allclose(both, model(ids, cache=[KVCache() for _ in model.layers]), atol=1e-4)


def test_trimmed_tokens_were_never_there() -> None:
    model, _, text = loaded()
    cache = make_cache(model, "balanced")
    with attach():
        before = model(mx.array([text[:140]]), cache=cache)
        model(mx.array([text[700:730]]), cache=cache)
        assert trim_prompt_cache(cache, 30) == 30
        after = model(mx.array([text[140:150]]), cache=cache)
        fresh = make_cache(model, "balanced")
        assert mx.array_equal(before, model(mx.array([text[:140]]), cache=fresh))
        assert mx.array_equal(after, model(mx.array([text[140:150]]), cache=fresh))


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    model, _, text = loaded()
    cache = make_cache(model, "balanced")
    ids = mx.array([text[:20]])
    with pytest.raises((NotAttached, TypeError)):
        model(ids, cache=cache)
    with pytest.raises(CacheMisuse, match="never ran"), attach():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="not serializable"):
        save_prompt_cache(str(tmp_path / "x.safetensors"), cache)
    with pytest.raises(Unsupported):
        cache[0].make_mask(3, window_size=2)
    x = mx.zeros((1, 2, 4, 128))
    keys, values = make_cache(model)[0].update_and_fetch(x, x)
    with attach(), pytest.raises(Unsupported):
        llama.scaled_dot_product_attention(x, keys, values, cache=None, scale=1.0, mask=mx.zeros((4, 4)))


def test_windows_stay_what_they_are() -> None:
    class Model:
        def make_cache(self) -> list[Any]:
            return [RotatingKVCache(64), KVCache()]

    rotating, folded = make_cache(Model())
    assert isinstance(rotating, RotatingKVCache)
    assert isinstance(folded, FoldedLayer)
    assert folded.empty()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arrays_keep_their_bits(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5).to(dtype)
    assert torch.equal(to_torch(to_mlx(x)), x)
    assert torch.equal(to_torch(to_mlx(x)[:, 1:, ::2]), x[:, 1:, ::2])
