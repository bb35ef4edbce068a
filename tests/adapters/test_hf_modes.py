"""transformers: every way of generating, equal to the stock cache in lossless pages; and the promises of folded ones."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import kvfold
from kvfold.config import CacheSpec
from kvfold.engine.select import make_engine
from kvfold.errors import NoImplementation

FAMILIES = tiny.FAMILIES
FOLDING = tuple(f for f in FAMILIES if f != "mistral")  # Mistral's layers all slide; they stay stock
NEW = 9  # tokens generated


def attached(family: str, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny.make(family, dtype)
    kvfold.attach(model)
    return model


def lossless(model: Any) -> kvfold.FoldedCache:
    return kvfold.FoldedCache(model.config, "lossless")


def stock(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def both(family: str, ids: Tensor, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[Tensor, Any]:
    """Generate with the stock cache in a plain model and with a lossless one in the attached model; ids must be equal."""
    model = tiny.make(family, dtype)
    kvfold.detach(model)
    options = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    torch.manual_seed(3)
    want = model.generate(ids, past_key_values=stock(model), **options)
    kvfold.attach(model)
    cache = lossless(model)
    torch.manual_seed(3)
    got = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(got, want)
    if family in FOLDING:
        assert any(s.folded for x in cache.folded_layers for s in x.folded.sequences)
    return got, cache


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy(family: str) -> None:
    both(family, tiny.prompt(1, 150))


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_with_a_streamed_mask(family: str) -> None:
    ids, mask = tiny.padded(3, 200)
    both(family, ids, attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling(family: str) -> None:
    ids, mask = tiny.padded(2, 140)
    both(family, ids, attention_mask=mask, do_sample=True, temperature=1.3, top_k=20)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams(family: str) -> None:
    ids, mask = tiny.padded(2, 140)
    both(family, ids, attention_mask=mask, num_beams=3, num_return_sequences=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_num_return_sequences(family: str) -> None:
    both(family, tiny.prompt(1, 140), do_sample=True, num_return_sequences=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [50, 128])
def test_chunked_prefill(family: str, chunk: int) -> None:
    ids, mask = tiny.padded(3, 200)  # the shortest row's first chunk is padding only
    both(family, ids, attention_mask=mask, prefill_chunk_size=chunk)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family: str, dtype: torch.dtype) -> None:
    ids, mask = tiny.padded(2, 150)
    model = attached(family, dtype)
    want = model(ids, attention_mask=mask, past_key_values=stock(model)).logits.detach()
    with torch.no_grad():
        got = model(ids, attention_mask=mask, past_key_values=lossless(model)).logits
        truth = tiny.make(family)(ids, attention_mask=mask).logits
    # Both round differently; neither may be further from the float32 model than the other by more than half.
    real = mask.bool()
    error, stock_error = ((x.float() - truth)[real].square().mean().sqrt() for x in (got, want))
    assert float(error) < 1.5 * float(stock_error)


def speculative(family: str, **kwargs: Any) -> None:
    model = tiny.make(family)
    # The second prompt repeats itself, so that drafts are accepted, some in part.
    for ids, tokens in ((tiny.prompt(1, 140), NEW), (tiny.prompt(1, 20).repeat(1, 8), 25)):
        kvfold.detach(model)
        try:
            model.generate(ids, past_key_values=stock(model), max_new_tokens=tokens, do_sample=False, **kwargs)
        except ValueError as error:
            if family != "qwen3_next" or "stateful" not in str(error):
                raise
            return  # transformers refuses models with running states, for every cache
        except RuntimeError as error:
            pytest.skip(f"this transformers fails with its own cache: {error}")
        both(family, ids, max_new_tokens=tokens, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup(family: str) -> None:
    speculative(family, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_generation(family: str) -> None:
    assistant = copy.deepcopy(tiny.make(family))
    kvfold.detach(assistant)
    with torch.no_grad():
        for p in assistant.parameters():
            p.mul_(1 + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    speculative(family, assistant_model=assistant)


@pytest.mark.parametrize("family", FAMILIES)
def test_multi_turn_reuse_of_one_cache(family: str) -> None:
    model = tiny.make(family)
    outs = []
    for attach, make in ((kvfold.detach, stock), (kvfold.attach, lossless)):
        attach(model)
        cache, ids = make(model), torch.empty(1, 0, dtype=torch.long)
        for turn in range(4):
            ids = torch.cat([ids, tiny.prompt(1, 60, seed=turn)], 1)
            mask = torch.ones_like(ids)  # else generate() takes generated tokens with the pad's id for padding
            ids = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
        outs.append(ids)
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", FAMILIES)
def test_multi_turn_with_padding_in_the_middle(family: str) -> None:
    """Two rows, padded to equal length in every turn: pads end up between tokens."""
    model = tiny.make(family)
    turns = [tiny.padded(2, n, seed=n) for n in (140, 40, 20)]
    outs = []
    for attach, make in ((kvfold.detach, stock), (kvfold.attach, lossless)):
        attach(model)
        cache, mask, logits = make(model), torch.empty(2, 0, dtype=torch.long), []
        for ids, own in turns:
            mask = torch.cat([mask, own], 1)
            with torch.no_grad():
                out = model(ids, attention_mask=mask, past_key_values=cache).logits
            logits.append(out[own.bool()])
        outs.append(torch.cat(logits))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_uneven_cuts(family: str) -> None:
    model = attached(family)
    ids, mask = tiny.padded(3, 200)
    outs = []
    for cache in (stock(model), lossless(model)):
        parts = []
        for a, b in ((0, 1), (1, 131), (131, 133), (133, 199), (199, 200)):
            with torch.no_grad():
                out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
            assert out.past_key_values is cache
            parts.append(out.logits)
        outs.append(torch.cat(parts, 1)[mask.bool()])
    torch.testing.assert_close(*outs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_and_embeddings_as_input(family: str) -> None:
    model = attached(family)
    ids = tiny.prompt(2, 150)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        want = model(ids, past_key_values=stock(model)).logits
        got = model(inputs_embeds=embeds, past_key_values=lossless(model)).logits
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


def test_streamers() -> None:
    streamer = Collect()
    model = attached("llama")
    out = model.generate(
        tiny.prompt(1, 130), past_key_values=lossless(model), max_new_tokens=NEW, do_sample=False, streamer=streamer
    )
    assert streamer.ids == [*out[0].tolist(), -1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("profile", ["lossless", "balanced"])
def test_deepcopy_pickle_and_fork_continue_alike(family: str, profile: str) -> None:
    model = attached(family)
    ids = tiny.prompt(2, 330)
    cache = kvfold.FoldedCache(model.config, profile)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    twins = [cache.fork(), copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    assert [(x.nbytes, x.get_seq_length()) for x in twins] == [(cache.nbytes, 330)] * 3
    other = tiny.prompt(2, 300, seed=5)
    disturbed = cache.fork()
    with torch.no_grad():
        model(other, past_key_values=disturbed)
        want = [model(other[:, i : i + 1], past_key_values=cache).logits for i in range(3)]
        for twin in twins:
            got = [model(other[:, i : i + 1], past_key_values=twin).logits for i in range(3)]
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_every_engine_in_chunked_padded_calls_copies_and_other_engines(backend: str) -> None:
    """Pages travel in canonical bytes, so a pickled cache continues on another engine."""
    model = attached("llama64")
    ids, mask = tiny.padded(3, 400)
    more = torch.cat([mask, mask[:, -1:]], 1)
    cache = kvfold.FoldedCache(model.config, "balanced", backend=backend)
    with torch.no_grad():
        try:
            for a, b in ((0, 50), (50, 300), (300, 400)):
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache)
        except NoImplementation as error:
            pytest.skip(str(error))
        blob = pickle.dumps(cache)
        twins = [cache.fork(), copy.deepcopy(cache), pickle.loads(blob)]
        want = model(ids[:, :1], attention_mask=more, past_key_values=cache).logits
        for twin in twins:
            assert torch.equal(model(ids[:, :1], attention_mask=more, past_key_values=twin).logits, want)
        moved = pickle.loads(blob)
        for x in moved.folded_layers:
            state = x.folded.__getstate__() | {"_make": functools.partial(make_engine, "torch")}
            x.folded.__setstate__(state)
            assert x.folded.report()["backend"] == "torch"
        got = model(ids[:, :1], attention_mask=more, past_key_values=moved).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_forks_give_their_pages_back() -> None:
    model = attached("llama")
    cache = kvfold.FoldedCache(model.config, spec=CacheSpec(window=0))
    with torch.no_grad():
        model(tiny.prompt(2, 260), past_key_values=cache)
        before = cache.nbytes
        fork = cache.fork()
        model(tiny.prompt(2, 300), past_key_values=fork)
        assert cache.folded_layers[0].folded.pool is fork.folded_layers[0].folded.pool
        assert cache.nbytes > before
        del fork
    assert cache.nbytes == before
    cache.reset()
    assert cache.nbytes == 0


def test_device_map_through_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = copy.deepcopy(tiny.make("llama"))
    kvfold.detach(model)
    ids = tiny.prompt(1, 150)
    want = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    kvfold.attach(model)
    got = model.generate(ids, past_key_values=lossless(model), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(got, want)


# ---- folded profiles ----


@pytest.mark.parametrize("family", FOLDING)
@pytest.mark.parametrize("profile", ["balanced", "compact"])
def test_same_tokens_and_cuts_give_the_same_bits(family: str, profile: str) -> None:
    model = attached(family)
    ids, mask = tiny.padded(2, 400)
    outs = []
    for _ in range(2):
        cache, logits = kvfold.FoldedCache(model.config, profile), []
        with torch.no_grad():
            for a, b in ((0, 300), (300, 399), (399, 400)):
                logits.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache).logits)
        outs.append(torch.cat(logits, 1))
    assert torch.equal(*outs)


@pytest.mark.parametrize("family", FOLDING)
def test_a_fork_at_a_page_boundary_is_a_fresh_run_cut_there(family: str) -> None:
    model = attached(family)
    prefix, tail = tiny.prompt(1, 384), tiny.prompt(1, 150, seed=1)
    shared = kvfold.FoldedCache(model.config, "balanced")
    fresh = kvfold.FoldedCache(model.config, "balanced")
    with torch.no_grad():
        model(prefix, past_key_values=shared)
        for seed in (7, 8):  # other continuations, which interleave their pages with ours
            model(tiny.prompt(1, 200, seed), past_key_values=shared.fork())
        fork = shared.fork()
        held = shared.fork()
        model(tiny.prompt(1, 200, 9), past_key_values=held)
        got = model(tail, past_key_values=fork).logits
        model(prefix, past_key_values=fresh)
        want = model(tail, past_key_values=fresh).logits
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_generation_stays_close_to_the_stock_cache(family: str) -> None:
    model = attached(family)
    ids, mask = tiny.padded(2, 400)
    cache = kvfold.FoldedCache(model.config, "balanced")
    with torch.no_grad():
        want = model(ids, attention_mask=mask, past_key_values=stock(model)).logits
        model(ids[:, :399], attention_mask=mask[:, :399], past_key_values=cache)
        got = model(ids[:, 399:], attention_mask=mask, past_key_values=cache).logits
    p, q = want[:, -1].log_softmax(-1), got[:, -1].log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).max()) < 0.3
    report = cache.report()
    assert report["cache_bytes"] == cache.nbytes
    assert report["tokens"] == 400
    per_token = tiny.LATENT + tiny.ROTARY if family == "deepseek_v3" else 2 * 2 * 16
    assert report["reference_bytes"] == sum(2 * per_token * int(mask.sum()) for _ in cache.folded_layers)


def test_speculation_on_folded_pages_is_a_run_without_it() -> None:
    """Rejected drafts leave no trace, also where they pushed a page out of the window."""
    model = attached("llama")
    ids = tiny.prompt(1, 190)
    plain, drafted = (kvfold.FoldedCache(model.config, "balanced") for _ in range(2))
    with torch.no_grad():
        for cache in (plain, drafted):
            model(ids, past_key_values=cache)
        for i in range(6):
            token = tiny.prompt(1, 1, seed=i)
            model(torch.cat([token, tiny.prompt(1, 8, seed=50 + i)], 1), past_key_values=drafted)
            drafted.crop(-8)
            model(token, past_key_values=plain)
        out = [model(tiny.prompt(1, 1, seed=9), past_key_values=c).logits for c in (plain, drafted)]
    a, b = (x.folded.sequences[0] for x in (plain.folded_layers[0], drafted.folded_layers[0]))
    assert (a.length, a.folded) == (b.length, b.folded)
    torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)


# ---- attaching ----


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_caches_in_an_attached_model_are_unchanged_bit_for_bit(family: str, before: str) -> None:
    model = tiny.make(family)
    kvfold.detach(model)
    model.set_attn_implementation(before)
    try:
        ids, mask = tiny.padded(2, 80)
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "output_logits": True}
        options["return_dict_in_generate"] = True
        want = model.generate(ids, **options)
        with kvfold.attach(model):
            got = model.generate(ids, **options)
            folded = model.generate(ids, past_key_values=lossless(model), **options)
        assert model.config._attn_implementation == before
        assert torch.equal(got.sequences, want.sequences)
        assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
        assert torch.equal(folded.sequences, want.sequences)
        assert torch.equal(torch.stack(model.generate(ids, **options).logits), torch.stack(want.logits))
    finally:
        model.set_attn_implementation("sdpa")


def test_attach_detach_and_with_nest() -> None:
    model = tiny.make("llama")
    kvfold.detach(model)
    with kvfold.attach(model) as same:
        assert same is model
        with kvfold.attach(model):
            pass
        assert model.config._attn_implementation == "kvfold"
    assert model.config._attn_implementation == "sdpa"
    kvfold.detach(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(RuntimeError, match="on purpose"), kvfold.attach(model):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == "sdpa"


def test_attn_implementation_by_name() -> None:
    config = tiny.CONFIGS["llama"]()
    config._attn_implementation = "kvfold"
    torch.manual_seed(0)
    model = type(tiny.make("llama"))(config).eval()
    ids = tiny.prompt(1, 150)
    got = model.generate(ids, past_key_values=lossless(model), max_new_tokens=NEW, do_sample=False)
    kvfold.detach(model)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(got, model.generate(ids, max_new_tokens=NEW, do_sample=False))


def test_a_copy_of_an_attached_model_can_be_detached() -> None:
    model = copy.deepcopy(attached("llama"))
    kvfold.detach(model)
    assert model.config._attn_implementation == "sdpa"


def test_compiled_models_break_the_graph_at_attention_and_agree() -> None:
    torch.compiler.reset()
    model = attached("llama")
    ids = tiny.prompt(1, 150)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        cache, plain = lossless(model), lossless(model)
        for a, b in ((0, 149), (149, 150)):
            got = compiled(ids[:, a:b], past_key_values=cache).logits
            want = model(ids[:, a:b], past_key_values=plain).logits
    torch.testing.assert_close(got, want)
