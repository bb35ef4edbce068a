"""Decode steps as CUDA graphs against the same calls without, on a GPU. Skips with the reason where there is none."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3NextConfig

import kvfold
from kvfold.engine.cuda.engine import why_not
from kvfold.engine.request import LayerShape
from kvfold.errors import CacheMisuse, NonFiniteInput
from kvfold.profiles import load

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
}  # fmt: skip
MIXED = {
    "layer_types": ["linear_attention", "full_attention"] * 2, "num_experts": 0, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip


@pytest.fixture(autouse=True)
def gpu() -> None:
    if reasons := why_not(load("turbo-3").spec, LayerShape(0, 2, 64, 2), torch.bfloat16, DEVICE):
        pytest.skip("; ".join(reasons))


def made(config: type = LlamaConfig, **more: object) -> torch.nn.Module:
    torch.manual_seed(5)
    config = config(**SIZES, num_hidden_layers=4, **more)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().to(DEVICE)
    kvfold.attach(model)
    return model


def tokens(batch: int, n: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (batch, n), device=DEVICE)


@torch.no_grad()
def prefilled(model: torch.nn.Module, ids: torch.Tensor, profile: str, **more: object) -> kvfold.FoldedCache:
    cache = kvfold.FoldedCache(model.config, profile)
    model(ids, past_key_values=cache, **more)
    return cache


@torch.no_grad()
def decode(model: torch.nn.Module, cache: kvfold.FoldedCache, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(x, past_key_values=cache).logits for x in ids.split(1, dim=1)])


def same_pages(a: kvfold.FoldedCache, b: kvfold.FoldedCache) -> None:
    assert a.get_seq_length() == b.get_seq_length()
    for x, y in zip(a.folded_layers, b.folded_layers, strict=True):
        for s, t in zip(x.folded.sequences, y.folded.sequences, strict=True):
            assert (s.length, s.folded, s.exact_start) == (t.length, t.folded, t.exact_start)
            pages = [torch.stack([f.folded.pool.row(p) for p in q.pages]) for f, q in ((x, s), (y, t))]
            assert torch.equal(*pages)
            assert all(torch.equal(i, j) for i, j in zip(s.exact(), t.exact(), strict=True))


def replayed(model: torch.nn.Module, plain: kvfold.FoldedCache, steps: int) -> None:
    """Steps from the second on are replays, with the logits, pages and rings of plain calls."""
    mine, ids = plain.fork(), tokens(len(plain.folded_layers[0].folded.sequences), steps)
    want = decode(model, plain, ids)
    with kvfold.cuda_graphs(model) as graphs:
        got = decode(model, mine, ids)
    assert graphs.replays == steps - 1, graphs.reasons
    assert torch.equal(got, want)
    same_pages(mine, plain)


@pytest.mark.parametrize("profile", ["turbo-3", "swift-3", "balanced"])
@pytest.mark.parametrize("batch", [1, 3])
def test_replays_equal_plain_steps(profile: str, batch: int) -> None:
    """Over more tokens than a page holds, from before the first fold."""
    model = made()
    replayed(model, prefilled(model, tokens(batch, 150), profile), 330)


def test_hybrid_models_replay_their_states() -> None:
    model = made(Qwen3NextConfig, **MIXED)
    replayed(model, prefilled(model, tokens(2, 300), "turbo-3"), 200)


def test_caches_of_one_kind_share_a_step_and_may_fork_trim_and_interleave() -> None:
    model = made()
    first, second = (prefilled(model, tokens(1, n), "turbo-3") for n in (400, 700))
    plain = [first.fork(), second.fork()]
    ids = tokens(1, 60)
    with kvfold.cuda_graphs(model) as graphs:
        for at in range(0, 60, 20):
            for mine, other in zip((first, second), plain, strict=True):
                got = decode(model, mine, ids[:, at : at + 20])
                before, seen = model.forward, graphs.replays
                with torch.no_grad():
                    want = torch.stack(
                        [graphs.plain(x, past_key_values=other).logits for x in ids[:, at : at + 20].split(1, dim=1)]
                    )
                assert (model.forward, graphs.replays) == (before, seen)
                assert torch.equal(got, want)
                for cache in (mine, other):
                    cache.crop(-7)
            first, plain[0] = first.fork(), plain[0].fork()
    assert graphs.replays == 6 * 20 - 1
    same_pages(first, plain[0])
    same_pages(second, plain[1])


def test_generate_with_left_padding() -> None:
    model = made()
    ids, mask = tokens(2, 260), torch.ones(2, 260, dtype=torch.long, device=DEVICE)
    mask[0, :57] = 0
    asked = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 150, "pad_token_id": 0, "eos_token_id": None}
    caches = [kvfold.FoldedCache(model.config, "turbo-3") for _ in range(2)]
    want = model.generate(ids, past_key_values=caches[0], **asked)
    with kvfold.cuda_graphs(model) as graphs:
        got = model.generate(ids, past_key_values=caches[1], **asked)
    assert graphs.replays >= 140, graphs.reasons
    assert torch.equal(got, want)
    same_pages(*caches)


def test_nan_is_refused_and_nothing_of_the_call_stays() -> None:
    model = made()
    cache = prefilled(model, tokens(1, 300), "turbo-3")
    ids = tokens(1, 12)
    with kvfold.cuda_graphs(model) as graphs, torch.no_grad():
        decode(model, cache, ids)
        kept = cache.fork()
        weight = model.model.layers[2].self_attn.k_proj.weight
        good = weight.clone()
        weight.fill_(float("nan"))
        with pytest.raises(NonFiniteInput):
            model(ids[:, :1], past_key_values=cache)
        weight.copy_(good)
        assert graphs.replays == 12
        want = decode(model, kept, ids)
        assert torch.equal(decode(model, cache, ids), want)


def test_states_of_a_hybrid_cannot_go_back_and_the_cache_says_so() -> None:
    model = made(Qwen3NextConfig, **MIXED)
    cache = prefilled(model, tokens(1, 300), "turbo-3")
    with kvfold.cuda_graphs(model), torch.no_grad():
        decode(model, cache, tokens(1, 4))
        model.model.layers[3].self_attn.v_proj.weight.fill_(float("nan"))
        with pytest.raises(NonFiniteInput):
            model(tokens(1, 1), past_key_values=cache)
        with pytest.raises(CacheMisuse):
            model(tokens(1, 1), past_key_values=cache)


def test_other_calls_run_as_before_and_say_why() -> None:
    model = made()
    cache = prefilled(model, tokens(1, 300), "turbo-3")
    with kvfold.cuda_graphs(model) as graphs, torch.no_grad():
        model(tokens(1, 2), past_key_values=cache)
        assert graphs.reasons == ["the call does not bring one token per row"]
        model(tokens(1, 1))
        assert graphs.reasons == ["the cache is not a FoldedCache"]
        cache.watch()
        model(tokens(1, 1), past_key_values=cache)
        assert "watched" in graphs.reasons[0]
    assert graphs.replays == 0
    assert "forward" not in vars(model)


def test_a_model_that_waits_for_the_gpu_is_not_captured() -> None:
    model = made()
    cache = prefilled(model, tokens(1, 300), "turbo-3")
    plain, ids = cache.fork(), tokens(1, 6)
    waits = model.model.layers[1].register_forward_pre_hook(lambda *_: torch.cuda.synchronize())
    with kvfold.cuda_graphs(model) as graphs:
        got = decode(model, cache, ids)
    waits.remove()
    assert graphs.replays == 0
    assert "capture failed" in graphs.reasons[0]
    assert torch.equal(got, decode(model, plain, ids))


def test_larger_calls_between_do_not_move_what_a_graph_points_to() -> None:
    model = made()
    cache = prefilled(model, tokens(1, 300), "turbo-3")
    plain, ids = cache.fork(), tokens(1, 40)
    want = decode(model, plain, ids)
    with kvfold.cuda_graphs(model):
        got = [decode(model, cache, ids[:, :20])]
        many = prefilled(model, tokens(100, 140), "turbo-3")
        decode(model, many, tokens(100, 1))
        del many
        torch.cuda.empty_cache()
        got.append(decode(model, cache, ids[:, 20:]))
    assert torch.equal(torch.cat(got), want)
    same_pages(cache, plain)
