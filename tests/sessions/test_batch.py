"""Sessions in memory: decoded together and apart, forked, trimmed, sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from talk import FAMILIES, OTHERS, continuation, filled, pages, runner, words

from kvfold.adapters.hf_batch import Batch
from kvfold.config import CacheSpec
from kvfold.errors import CacheMisuse, CannotTrim, InvalidConfig, InvalidInput
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.runner import CALL_TOKENS
from kvfold.sessions.sampler import Sampler
from kvfold.sessions.session import Session

LENGTH, STEPS = 310, 14  # a page is folded at 320 tokens


@pytest.mark.parametrize("family", [*OTHERS, "hybrid"])  # experts are given rows by their neighbours, too
def test_rows_of_a_batch_do_not_see_each_other(family: str) -> None:
    """The same session among other neighbours, of other lengths: equal logits, pages and continuation, bit for bit."""
    r = runner(family)
    out = []
    for others in ((10, 700), (333, 12)):
        mine = filled(r, LENGTH)
        sessions = [filled(r, others[0], 1), mine, filled(r, others[1], 2)]
        logits = []
        with SessionBatch(sessions) as batch:
            for t in range(STEPS):
                logits.append(batch.step([3 + t % 5, 4 + t % 7, 5 + t % 3])[1])
        assert len(mine.tokens) == mine.cache.get_seq_length() == LENGTH + STEPS
        out.append((torch.stack(logits), pages(mine), continuation(mine)))
    assert torch.equal(out[0][0], out[1][0])
    assert out[0][1] == out[1][1]
    assert torch.equal(out[0][2], out[1][2])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_one_is_the_session_itself(family: str) -> None:
    r = runner(family)
    alone, batched = filled(r, LENGTH), filled(r, LENGTH)
    with SessionBatch([batched]) as batch:
        for t in range(STEPS):
            assert torch.equal(batch.step([3 + t % 9])[0], alone.extend([3 + t % 9]))
    assert batched.tokens == alone.tokens
    assert pages(batched) == pages(alone)
    assert torch.equal(continuation(batched), continuation(alone))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_agrees_with_its_rows_alone(family: str) -> None:
    """Matrix products of another shape round differently; nothing else differs."""
    r = runner(family, profile="lossless")
    sessions = [filled(r, n, n) for n in (40, 5, 150)]
    copies = [s.fork() for s in sessions]
    with SessionBatch(sessions) as batch:
        got = torch.stack([batch.step([5 + t] * 3) for t in range(3)])
    want = torch.stack([torch.stack([s.extend([5 + t]) for s in copies]) for t in range(3)])
    assert float((got - want).abs().max()) < 2e-4 * float(want.abs().max())


def test_tokens_of_the_batch_are_tokens_of_the_sessions() -> None:
    r = runner("llama")
    a, b = filled(r, 20), filled(r, 30)
    with SessionBatch([a, b]) as batch:
        batch.step([5, 6])
        with pytest.raises(CacheMisuse, match="two calls at once"):
            a.extend([5])
        with pytest.raises(CacheMisuse, match="two calls at once"):
            b.fork()
    a.extend([9])
    assert (a.tokens[-2:], b.tokens[-1:]) == ([5, 9], [6])
    assert (a.cache.get_seq_length(), b.cache.get_seq_length()) == (22, 31)


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llama", 0), ("gemma3", 0), ("llama", -1)],  # -1: when all layers have stored the token
)
def test_a_step_that_fails_is_taken_back(family: str, layer: int) -> None:
    r = runner(family)
    sessions, copies = ([filled(r, 319), filled(r, 18)] for _ in range(2))
    block = r.model.model.layers[layer].mlp
    with SessionBatch(sessions) as batch:
        hook = block.register_forward_hook(lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.step([5, 6])
        hook.remove()
        got = batch.step([8, 9])
    with SessionBatch(copies) as batch:
        want = batch.step([8, 9])
    assert torch.equal(got, want)
    assert [s.tokens for s in sessions] == [s.tokens for s in copies]
    assert torch.equal(continuation(sessions[0]), continuation(copies[0]))


@pytest.mark.parametrize(("family", "layer"), [("hybrid", 0), ("hybrid", -1), ("gemma3", -1)])
def test_a_failed_step_that_cannot_be_taken_back_leaves_its_sessions_refused(family: str, layer: int) -> None:
    r = runner(family)
    s = filled(r, 30)
    batch = SessionBatch([s])
    hook = r.model.model.layers[layer].mlp.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(CannotTrim), batch:
        batch.step([5])
    hook.remove()
    with pytest.raises(CacheMisuse):
        s.extend([5])


def test_what_cannot_be_a_batch_is_refused() -> None:
    r = runner("llama")
    a = filled(r, 20)
    for wrong in ([], [a, a], [a, Session(r)], [a, filled(runner("llama"), 20)]):
        with pytest.raises(CacheMisuse):
            SessionBatch(wrong)
    other = filled(runner("llama", spec=CacheSpec(window=0)), 20)
    with pytest.raises(CacheMisuse, match="different kinds"):
        Batch([a.cache, other.cache])
    a.extend([5])


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_cut_on_a_grid(family: str) -> None:
    """However tokens arrive at multiples of the grid, the session is the same; feeding half a call is another cut."""
    r = runner(family)
    ids = words(2 * CALL_TOKENS + 300)
    whole, parts = Session(r), Session(r)
    want = whole.extend(ids)
    parts.extend(ids[:CALL_TOKENS])
    assert torch.equal(parts.extend(ids[CALL_TOKENS:]), want)
    assert pages(parts) == pages(whole)
    assert [len(x) for x in r.calls(CALL_TOKENS - 3, ids)] == [3, CALL_TOKENS, CALL_TOKENS, 297]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fork_continues_alone(family: str) -> None:
    r = runner(family)
    s = filled(r, 400)
    s.sampler = Sampler(temperature=1.0, seed=4, drawn=2)
    fork = s.fork()
    assert fork.sampler == s.sampler
    fork.extend([5, 6, 7])
    fork.sampler.pick(torch.zeros(10))
    assert (len(s.tokens), s.sampler.drawn) == (400, 2)
    again = filled(r, 400)
    assert torch.equal(continuation(s), continuation(again))
    for x, y in zip(fork.cache.folded_layers, s.cache.folded_layers, strict=True):
        assert x.folded.sequences[0].pages == y.folded.sequences[0].pages


def test_trim_inside_the_exact_part_is_never_having_been_told() -> None:
    r = runner("llama")
    s, never = filled(r, 330), filled(r, 330)
    s.extend([5] * 9)
    s.trim(9)
    assert s.tokens == never.tokens
    assert torch.equal(continuation(s), continuation(never))
    for n in (-1, 10**6):
        with pytest.raises(CannotTrim, match="Trim at most"):
            s.trim(n)


@pytest.mark.parametrize("family", ["hybrid", "qwen3_next", "gemma3"])
def test_trim_through_a_checkpoint_reads_only_what_follows_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    r = runner(family, ways_back=4)
    s, never = filled(r, 3 * CALL_TOKENS), filled(r, 2 * CALL_TOKENS + 70)
    fed: list[int] = []
    forward = r.forward
    monkeypatch.setattr(r, "forward", lambda cache, part: fed.append(len(part)) or forward(cache, part))
    s.trim(CALL_TOKENS - 70)
    assert sum(fed) == 70
    assert s.tokens == never.tokens
    assert max(s.checkpoints) <= len(s.tokens)
    assert torch.equal(continuation(s), continuation(never))
    s.trim(len(s.tokens))
    assert (s.tokens, s.checkpoints, s.cache.get_seq_length()) == ([], {}, 0)
    assert torch.equal(s.extend(words(130)), Session(r).extend(words(130)))


def test_without_a_checkpoint_a_hybrid_stays_as_it_was() -> None:
    r = runner("hybrid")
    s, twin = filled(r, 700), filled(r, 700)
    with pytest.raises(CannotTrim, match="fork made before"):
        s.trim(100)
    assert s.tokens == twin.tokens
    assert torch.equal(continuation(s), continuation(twin))


def test_a_second_turn_of_a_hybrid_reads_only_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs of turns do not grow with what came before: 700, then 33, then 20 tokens are read."""
    r = runner("hybrid")
    fed: list[int] = []
    forward = r.forward
    s = Session(r)
    monkeypatch.setattr(r, "forward", lambda cache, part: fed.append(len(part)) or forward(cache, part))
    for n in (700, 33, 20):
        fed.clear()
        s = s.fork()
        s.extend(words(n, n))
        assert sum(fed) == n


@pytest.mark.parametrize("layer", [0, -1])
def test_a_call_that_fails_leaves_the_calls_before_it(layer: int) -> None:
    r = runner("llama")
    s = Session(r)
    ids = words(CALL_TOKENS + 50)
    list(r.calls(0, ids)), r.new_cache()
    calls: list[int] = []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError

    hook = r.model.model.layers[layer].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError):
        s.extend(ids)
    hook.remove()
    assert s.tokens == ids[:CALL_TOKENS]
    whole = Session(r)
    assert torch.equal(s.extend(ids[CALL_TOKENS:]), whole.extend(ids))
    with pytest.raises(InvalidInput, match="no tokens"):
        s.extend([])


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_a_session_are_its_own(family: str) -> None:
    r = runner(family)
    s = filled(r, 600)
    before = s.nbytes
    pools = [x.folded.pool for x in s.cache.folded_layers]
    assert s.cache.nbytes - before == sum(p.nbytes - p.pages_used * p.page_bytes for p in pools)
    others = [filled(r, 600, 1), s.fork()]
    assert s.nbytes == before == others[0].nbytes == others[1].nbytes
    assert s.report()["tokens"] == 600
    assert all(
        x.folded.pool is y.folded.pool
        for x, y in zip(s.cache.folded_layers, others[0].cache.folded_layers, strict=True)
    )


def test_sampling_follows_its_distribution_and_its_count() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5])
    n = 20_000
    s = Sampler(temperature=0.7, seed=3)
    picks = torch.tensor([s.pick(logits) for _ in range(n)])
    want = (logits.double() / 0.7).softmax(-1)
    got = torch.bincount(picks, minlength=5) / n
    # Four standard errors of each share; a share that is off by .02 is seen.
    assert bool(((got - want).abs() < 4 * (want * (1 - want) / n).sqrt()).all())
    later = Sampler(**Sampler(temperature=0.7, seed=3, drawn=500).state())
    assert [later.pick(logits) for _ in range(50)] == picks[500:550].tolist()


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {1}),
        ({"top_p": 0.77}, {1, 2}),
        ({"min_p": 0.3}, {1, 2}),
        ({"top_p": 1e-9}, {1}),
    ],
)
def test_cut_off_tokens_are_never_picked(options: dict[str, Any], allowed: set[int]) -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 0.5], dtype=torch.bfloat16)
    s = Sampler(temperature=1.0, **options)
    assert {s.pick(logits) for _ in range(400)} == allowed
    assert Sampler(**options).pick(logits) == 1


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}, {"seed": -1}, {"min_p": 2}],
)
def test_samplers_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match="temperature >= 0"):
        Sampler(**wrong)
