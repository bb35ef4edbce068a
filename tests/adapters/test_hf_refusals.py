"""transformers: what a FoldedCache refuses, by name and with a cure, and what is left after a call that failed."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import DeepseekV3Config, LlamaConfig

import kvfold
from kvfold.errors import CacheMisuse, CannotTrim, InvalidConfig, KvfoldError, NonFiniteInput, NotAttached, Unsupported

HYBRIDS = ("gemma3", "qwen3_next")


def model_of(family: str = "llama") -> Any:
    model = tiny.make(family)
    kvfold.attach(model)
    return model


def cache_of(model: Any, profile: str = "lossless") -> kvfold.FoldedCache:
    return kvfold.FoldedCache(model.config, profile)


@torch.no_grad()
def call(model: Any, cache: Any, n: int = 8, seed: int = 0, batch: int = 1, **kwargs: Any) -> torch.Tensor:
    return model(tiny.prompt(batch, n, seed), past_key_values=cache, **kwargs).logits


# ---- refused by name ----


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen3_next"])
def test_a_model_that_is_not_attached(family: str, implementation: str) -> None:
    model = tiny.make(family)
    kvfold.detach(model)
    model.set_attn_implementation(implementation)
    try:
        cache = cache_of(model)
        with pytest.raises(NotAttached, match=r"Call kvfold\.attach\(model\) once"):
            call(model, cache)
        # The cure works, with the same cache.
        kvfold.attach(model)
        cache.rollback()
        want = call(model, cache_of(model))
        assert torch.equal(call(model, cache), want)
    finally:
        kvfold.detach(model)
        model.set_attn_implementation("sdpa")


def test_output_attentions() -> None:
    model = model_of()
    with pytest.raises(Unsupported, match="output_attentions"):
        call(model, cache_of(model), output_attentions=True)
    with pytest.raises((KvfoldError, ValueError), match="output_attentions"):
        model.generate(
            tiny.prompt(1, 8),
            past_key_values=cache_of(model),
            max_new_tokens=2,
            output_attentions=True,
            return_dict_in_generate=True,
        )


def test_gradients_and_dropout() -> None:
    model = model_of()
    cache = cache_of(model)
    with pytest.raises(Unsupported, match=r"torch\.no_grad\(\)"):
        model(tiny.prompt(1, 8), past_key_values=cache)
    call(model, cache)  # nothing was stored
    assert cache.get_seq_length() == 8
    dropping = copy.deepcopy(model).train()
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(Unsupported, match=r"model\.eval\(\)"):
        call(dropping, cache_of(model))


@pytest.mark.parametrize("family", HYBRIDS)
def test_gradients_are_refused_before_a_stock_layer_stores(family: str) -> None:
    model = model_of(family)
    cache = cache_of(model)
    with pytest.raises(Unsupported, match="gradients"):
        model(tiny.prompt(1, 8), past_key_values=cache)
    assert torch.equal(call(model, cache), call(model, cache_of(model)))


@pytest.mark.parametrize(
    ("mask", "named"),
    [
        ([[1, 1, 1, 0]], "Pad on the left"),
        ([[1, 0, 1, 1]], "Pad on the left"),
        ([[1, 1, 1]], "does not cover"),
    ],
)
def test_masks_that_are_not_left_padding(mask: list[list[int]], named: str) -> None:
    model = model_of()
    cache = cache_of(model)
    with pytest.raises(Unsupported, match=named):
        call(model, cache, 4, attention_mask=torch.tensor(mask))
    call(model, cache, 4)


def test_a_mask_that_changes_its_mind_about_the_past() -> None:
    model = model_of()
    cache = cache_of(model)
    ids, mask = tiny.padded(2, 20)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        moved = mask.clone()
        moved[1] = mask[1].roll(-1)  # as many tokens, other ones
        for wrong in (moved, torch.ones_like(mask)):
            with pytest.raises(Unsupported, match="past tokens"):
                model(ids[:, :1], attention_mask=torch.cat([wrong, mask[:, -1:]], 1), past_key_values=cache)
        with pytest.raises(Unsupported, match="Pass the attention mask"):
            model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)


def test_ready_made_4d_masks() -> None:
    model = model_of()
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with pytest.raises(Unsupported, match="4D"):
        call(model, cache_of(model), 8, attention_mask=mask)


def test_full_graph_compile() -> None:
    torch.compiler.reset()
    model = model_of()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a folded cache cannot be compiled into a full graph"):
        call(compiled, cache_of(model))
    torch.compiler.reset()


def test_static_caches_are_not_ours_and_still_work() -> None:
    model = model_of()
    assert not cache_of(model).is_compileable
    want = model.generate(tiny.prompt(1, 20), max_new_tokens=3, do_sample=False)
    got = model.generate(tiny.prompt(1, 20), max_new_tokens=3, do_sample=False, cache_implementation="static")
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(
            tiny.prompt(1, 20), past_key_values=cache_of(model), cache_implementation="static", max_new_tokens=2
        )


class Probe(nn.Module):
    """Calls the registered attention function as a model's attention layer does."""

    is_causal = True

    def forward(self, cache: kvfold.FoldedCache, mask: object = None, **kwargs: Any) -> torch.Tensor:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        k, v = cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
        out, weights = ALL_ATTENTION_FUNCTIONS["kvfold"](self, torch.ones(1, 4, 3, 16), k, v, mask, **kwargs)
        assert weights is None
        return out


@pytest.mark.parametrize(
    "kwargs",
    [
        {"softcap": 30.0},
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(1)},
        {"sliding_window": 128},
        {"output_attentions": True},
        {"some_future_tensor": torch.zeros(1)},
        {"is_causal": False},
        {"dropout": 0.1},
    ],
    ids=lambda k: next(iter(k)),
)
def test_arguments_that_would_change_the_result(kwargs: dict[str, Any]) -> None:
    cache = cache_of(model_of())
    with torch.no_grad(), pytest.raises(Unsupported, match=next(iter(kwargs)).removeprefix("is_")):
        Probe()(cache, **kwargs)
    with torch.no_grad():
        out = Probe()(cache_of(model_of()), softcap=None, sliding_window=None, position_ids=torch.arange(3))
    assert torch.equal(out, torch.ones(1, 3, 4, 16))


def test_layers_that_share_keys_would_store_twice() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    cache = cache_of(model_of())
    k, v = cache.update(torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16), 0)
    q, attend = torch.ones(1, 4, 3, 16), ALL_ATTENTION_FUNCTIONS["kvfold"]
    with torch.no_grad():
        attend(Probe(), q, k, v, None)
        with pytest.raises(CacheMisuse, match="twice"):
            attend(Probe(), q, k, v, None)
    assert cache.folded_layers[0].columns == 3


class OtherLatentConfig(DeepseekV3Config):
    """A family of latent attention that nobody tested."""

    model_type = "other_latent"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lambda: OtherLatentConfig(num_hidden_layers=2), "MLA"),
        (lambda: LlamaConfig(**{**tiny.COMMON, "num_hidden_layers": 0}), "no cache layers"),
        (lambda: {"model_type": "llama"}, "not a transformers config"),
    ],
)
def test_configs(config: Any, named: str) -> None:
    with pytest.raises(KvfoldError, match=named):
        kvfold.FoldedCache(config())


def test_unknown_layer_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import cache_utils

    class Novel(cache_utils.DynamicLayer):
        pass

    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Novel)
    with pytest.raises(Unsupported, match="layer 0 has the unknown cache kind Novel"):
        cache_of(model_of())


@pytest.mark.parametrize("what", [nn.Linear(1, 1), None])
def test_attach_needs_a_transformers_model(what: object) -> None:
    with pytest.raises(InvalidConfig, match="not a transformers model"):
        kvfold.attach(what)
    with pytest.raises(InvalidConfig, match="not a transformers model"):
        kvfold.detach(what)


def test_attach_needs_a_model_whose_attention_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny.make("llama"))
    kvfold.detach(model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(Unsupported, match="attention implementation"):
        kvfold.attach(model)
    assert model.config._attn_implementation == "sdpa"


def test_offloading() -> None:
    with pytest.raises(Unsupported, match="offload"):
        cache_of(model_of()).layers[0].offload()


# ---- calls that fail half-way ----


class Fails(Exception):
    pass


def failing(model: Any, layer: int, where: str) -> Any:
    """A hook that stops the next call in a layer, before or after its attention."""

    def stop(*_: object) -> None:
        raise Fails

    part = model.model.layers[layer]
    return part.register_forward_pre_hook(stop) if where == "before" else part.mlp.register_forward_pre_hook(stop)


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral", "qwen3_next"])
@pytest.mark.parametrize("past", [0, 150])
def test_rollback_after_a_call_that_failed(family: str, layer: int, where: str, past: int) -> None:
    model = model_of(family)
    if layer >= len(model.model.layers):
        layer = len(model.model.layers) - 1
    cache, never = cache_of(model, "balanced"), cache_of(model, "balanced")
    for c in (cache, never):
        if past:
            call(model, c, past, batch=2)
    hook = failing(model, layer, where)
    try:
        with pytest.raises(Fails):
            call(model, cache, 40, seed=1, batch=2)
    finally:
        hook.remove()
    # The last layer's attention ends a call: what fails after it has left nothing half done.
    done = layer == len(model.model.layers) - 1 and where == "after"
    begun = layer > 0 or where == "after"
    if done:
        call(model, never, 40, seed=1, batch=2)
    elif begun:
        with pytest.raises(CacheMisuse, match=r"cache\.rollback\(\)"):
            call(model, cache, 5, seed=2, batch=2)
        with pytest.raises(CacheMisuse, match="did not finish"):
            cache.fork()
        with pytest.raises(CacheMisuse, match="did not finish"):
            cache.crop(-1)
    if begun and not done and family == "qwen3_next" and past:
        with pytest.raises(CannotTrim, match="linear-attention"):
            cache.rollback()
        return
    cache.rollback()
    cache.rollback()  # nothing more to do
    assert torch.equal(call(model, cache, 5, seed=2, batch=2), call(model, never, 5, seed=2, batch=2))


def test_numbers_that_are_not_finite_leave_the_cache_usable() -> None:
    model = copy.deepcopy(model_of())
    cache, never = cache_of(model, "balanced"), cache_of(model, "balanced")
    for c in (cache, never):
        call(model, c, 150)
    weight = model.model.layers[1].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteInput, match="layer 1: a value of row 0"):
        call(model, cache, 3)
    with torch.no_grad():
        weight.copy_(kept)
    cache.rollback()
    assert torch.equal(call(model, cache, 3), call(model, never, 3))


def test_crop_is_all_or_nothing() -> None:
    model = model_of("gemma3")
    cache = cache_of(model)
    call(model, cache, 100)
    with pytest.raises(CannotTrim, match="Continue from a fork"):
        cache.crop(-3)
    assert [x.get_seq_length() for x in cache.layers] == [100] * 4
    short = cache_of(model)
    call(model, short, 10)
    short.crop(-3)
    assert [x.get_seq_length() for x in short.layers] == [7] * 4
    full = cache_of(model_of())
    call(model_of(), full, 10)
    with pytest.raises(CannotTrim, match="cannot remove 11 of 10"):
        full.crop(-11)
    full.crop(4)  # a length to keep, as it once was
    assert full.get_seq_length() == 4


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_reset_makes_a_new_cache(family: str) -> None:
    model = model_of(family)
    cache = cache_of(model, "balanced")
    call(model, cache, 200, batch=2)
    cache.reset()
    assert cache.get_seq_length() == 0
    got = [call(model, cache, n, batch=3) for n in (150, 2)]
    fresh = cache_of(model, "balanced")
    want = [call(model, fresh, n, batch=3) for n in (150, 2)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- threads ----


def test_one_cache_in_two_threads_at_once() -> None:
    """A second call that comes while another is under way is refused; the first finishes as if alone."""
    model = model_of()
    cache, alone = cache_of(model, "balanced"), cache_of(model, "balanced")
    for c in (cache, alone):
        call(model, c, 150)
    inside, go = threading.Event(), threading.Event()
    result: list[torch.Tensor] = []

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            go.wait(20)

    hook = model.model.layers[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: result.append(call(model, cache, 3)))
    try:
        thread.start()
        assert inside.wait(20)
        with pytest.raises(CacheMisuse, match="one cache per concurrent generation"):
            call(model, cache, 4)
        go.set()
        thread.join(20)
    finally:
        go.set()
        hook.remove()
    assert torch.equal(result[0], call(model, alone, 3))


def test_a_call_during_attention_is_refused() -> None:
    model = model_of()
    cache = cache_of(model)
    layer = cache.folded_layers[0]
    call(model, cache, 3)
    run = layer.folded.attend
    seen: list[str] = []

    def reentrant(*args: Any) -> torch.Tensor:
        for use in (lambda: call(model, cache, 2), cache.rollback, lambda: cache.crop(-1), cache.fork, cache.reset):
            with pytest.raises(CacheMisuse, match="two calls at once") as caught:
                use()
            seen.append(str(caught.value))
        return run(*args)

    layer.folded.attend = reentrant  # type: ignore[method-assign]
    out = call(model, cache, 3, seed=1)
    assert len(seen) == 5
    fresh = cache_of(model)
    call(model, fresh, 3)
    assert torch.equal(out, call(model, fresh, 3, seed=1))


def test_forks_in_threads_of_their_own() -> None:
    """They share pools of pages; many folds, forks and releases at once must not mix them up."""
    model = model_of()
    base = cache_of(model, "balanced")
    call(model, base, 300)
    want, got, errors = {}, {}, []

    def work(seed: int, out: dict[int, list[torch.Tensor]]) -> None:
        try:
            fork, logits = base.fork(), []
            for i in range(4):
                logits.append(call(model, fork, 130, seed=seed * 10 + i))
                fork = fork.fork()
            out[seed] = logits
        except BaseException as error:  # noqa: BLE001 - handed to the main thread
            errors.append(error)

    for seed in range(4):
        work(seed, want)
    threads = [threading.Thread(target=work, args=(seed, got)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    for seed in range(4):
        assert all(torch.equal(a, b) for a, b in zip(got[seed], want[seed], strict=True))
    assert base.folded_layers[0].folded.pool.pages_used == len(base.folded_layers[0].folded.sequences[0].pages)
