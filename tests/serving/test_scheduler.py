"""Many requests on one model: equal to each alone, ended when they should be, none harmed by another."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from kvfold.errors import (
    BadPrompt,
    ContextTooLong,
    Draining,
    InvalidConfig,
    KvfoldError,
    NonFiniteInput,
    Overloaded,
    RequestCancelled,
)
from kvfold.loading import Loaded, demo_folder, load
from kvfold.serving.generation import Generation
from kvfold.serving.model import Model
from kvfold.serving.scheduler import Limits, Meter

sys.path.insert(0, str(Path(__file__).parents[1] / "adapters"))
import tiny

TEXTS = [
    f"{word} function returns an error when the {word} value is not set" for word in ("A", "The", "This", "Each", "No")
]
TINY_FAMILIES = ("llama", "gemma3", "qwen3_next")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load("demo")


@pytest.fixture(scope="module")
def model(loaded: Loaded) -> Iterator[Model]:
    with Model(loaded) as m:
        yield m


def tiny_model(family: str, **how: Any) -> Model:
    """Random weights; token ids only, for its tokenizer is the shipped model's."""
    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    tokenizer.eos_token = None
    return Model(Loaded(tiny.make(family), tokenizer, family), **how)


def ids(seed: int, length: int = 30) -> list[int]:
    return tiny.prompt(1, length, seed)[0].tolist()


def run_together(m: Model, requests: list[tuple[list[int], Generation]]) -> list[list[int]]:
    """Token ids of answers that are decoded at the same time."""
    streams = [m.stream(prompt, generation) for prompt, generation in requests]
    for s in streams:
        s.read()
    return [s.job.answer for s in streams]


def test_together_as_alone(model: Model) -> None:
    """The shipped model's matrix products in bfloat16 do not depend on the number of rows; nothing else here does."""
    asked = [
        (model.tokens(t), Generation(max_tokens=24, temperature=0.8 * (i % 2), seed=i)) for i, t in enumerate(TEXTS)
    ]
    alone = [run_together(model, [a])[0] for a in asked]
    assert run_together(model, asked) == alone
    assert len({tuple(x) for x in alone}) == len(asked)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_together_as_alone_in_other_families(family: str) -> None:
    """In float32 a batch rounds differently; greedy choices of these models do not hang on the last bit."""
    with tiny_model(family, call_tokens=16) as m:
        asked = [(ids(i, 20 + 9 * i), Generation(max_tokens=6 + i)) for i in range(4)]
        assert run_together(m, asked) == [run_together(m, [a])[0] for a in asked]


def test_a_seed_decides_the_answer(model: Model) -> None:
    def answer(seed: int | None) -> str:
        return model.complete(TEXTS[0], max_tokens=16, temperature=1.0, seed=seed).text

    assert answer(5) == answer(5)
    assert len({answer(s) for s in range(4)}) > 1


def test_streams_add_up_and_usage_counts(model: Model) -> None:
    answer = model.complete(TEXTS[1], max_tokens=12)
    stream = model.complete(TEXTS[1], max_tokens=12, stream=True)
    with pytest.raises(KvfoldError, match="not complete"):
        _ = stream.answer
    pieces = list(stream)
    assert "".join(pieces) == answer.text == stream.answer.text
    assert len(pieces) > 3
    assert str(answer) == answer.text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(model.tokens(TEXTS[1])), 12)
    assert answer.finish == "length"


def test_event_loops_get_the_same(model: Model) -> None:
    async def both() -> tuple[str, str]:
        stream = await model.acomplete(TEXTS[2], max_tokens=10, stream=True)
        text = "".join([piece async for piece in stream])
        return text, (await model.acomplete(TEXTS[2], max_tokens=10)).text

    expected = model.complete(TEXTS[2], max_tokens=10).text
    assert asyncio.run(both()) == (expected, expected)


def test_stop_strings_end_an_answer(model: Model) -> None:
    text = model.complete(TEXTS[0], max_tokens=20).text
    stop = text[8:12]
    answer = model.complete(TEXTS[0], max_tokens=20, stop=(stop,))
    assert answer.finish == "stop"
    assert answer.text == text[: text.index(stop)]


def test_end_tokens_end_an_answer(model: Model) -> None:
    end = model.tokenizer.eos_token_id
    answer = model.complete(TEXTS[0], max_tokens=8, logit_bias={end: 100.0})
    assert (answer.text, answer.finish, answer.usage.completion_tokens) == ("", "stop", 1)
    assert model.complete(TEXTS[0], max_tokens=3, logit_bias={end: 100.0}, ignore_end=True).finish == "length"


def test_logprobs_of_greedy_tokens_are_the_highest(model: Model) -> None:
    answer = model.complete(TEXTS[3], max_tokens=5, logprobs=3)
    assert len(answer.logprobs) == 5
    for x in answer.logprobs:
        assert x.top[0] == (x.token, x.logprob)


def test_what_cannot_be_served_is_refused_by_name(model: Model, loaded: Loaded) -> None:
    with pytest.raises(BadPrompt, match="no tokens"):
        model.complete("")
    with pytest.raises(InvalidConfig, match="beyond the vocabulary of 4096"):
        model.stream([5000], Generation())
    with pytest.raises(InvalidConfig, match="beyond the vocabulary"):
        model.complete("a", logit_bias={5000: 1.0})
    with pytest.raises(TypeError):
        model.complete("a", tempature=1.0)
    with Model(loaded, max_context=32) as small:
        assert small.complete("a b c", max_tokens=20).usage.completion_tokens == 20
        with pytest.raises(ContextTooLong, match="ends at 32 tokens"):
            small.complete("word " * 40)
        with pytest.raises(ContextTooLong):
            small.complete("a", max_tokens=32)
        ended = small.complete("a", ignore_end=True)
        assert (ended.finish, ended.usage.prompt_tokens + ended.usage.completion_tokens) == ("length", 32)


class Steps(Meter):
    """Counts what the scheduler does, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []

    def read(self, tokens: int, seconds: float) -> None:
        self.events.append(("read", tokens))

    def decoded(self, rows: int, seconds: float) -> None:
        self.events.append(("decode", rows))


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


def test_answers_go_on_while_a_long_prompt_is_read(loaded: Loaded) -> None:
    steps = Steps()
    with Model(loaded, meter=steps, call_tokens=64) as m:
        first = m.stream(m.tokens("The value"), Generation(max_tokens=400, ignore_end=True))
        wait_for(lambda: len(first.job.answer) > 2)
        long = m.stream([5] * 640, Generation(max_tokens=2))
        short = m.stream([7] * 40, Generation(max_tokens=2))
        short.read()
        assert long.job.answer == []  # a short prompt does not wait for a long one
        long.read()
        first.cancel()
    events = steps.events
    reads = [i for i, (what, n) in enumerate(events) if what == "read" and n == 64]
    assert len(reads) == 10
    for a, b in itertools.pairwise(reads):
        assert any(what == "decode" for what, _ in events[a + 1 : b])  # never two calls without a step between


def test_rows_and_the_queue_are_limited(loaded: Loaded) -> None:
    steps = Steps()
    with Model(loaded, limits=Limits(max_rows=2, max_waiting=3), meter=steps) as m:
        streams = [m.stream([5, 6, 7], Generation(max_tokens=300, ignore_end=True)) for _ in range(2)]
        wait_for(lambda: all(s.job.answer for s in streams))
        streams += [m.stream([5, 6, 7], Generation(max_tokens=4, ignore_end=True)) for _ in range(3)]
        assert m.scheduler.waiting == 3
        with pytest.raises(Overloaded, match="3 requests are waiting") as refused:
            m.stream([5, 6, 7], Generation())
        assert 1 <= refused.value.retry_seconds <= 60
        for s in streams[:2]:
            s.cancel()
        for s in streams[2:]:
            assert s.read().usage.completion_tokens == 4
    assert max(n for what, n in steps.events if what == "decode") == 2


def test_cancelled_requests_leave_and_the_others_stay(model: Model) -> None:
    expected = model.complete(TEXTS[4], max_tokens=40).text
    staying = model.complete(TEXTS[4], max_tokens=40, stream=True)
    leaving = model.complete(TEXTS[1], max_tokens=4000, ignore_end=True, stream=True)
    assert next(iter(leaving))
    leaving.cancel()
    with pytest.raises(RequestCancelled):
        leaving.read()
    assert staying.read().text == expected
    wait_for(lambda: model.scheduler.jobs == [])


def test_a_reader_that_goes_away_ends_its_request(model: Model) -> None:
    for piece in model.complete(TEXTS[1], max_tokens=4000, ignore_end=True, stream=True):
        assert piece
        break
    wait_for(lambda: model.scheduler.jobs == [])

    async def abandoned() -> None:
        stream = await model.acomplete(TEXTS[1], max_tokens=4000, ignore_end=True, stream=True)
        await asyncio.wait_for(stream.read(), 0.2)

    with pytest.raises(TimeoutError):
        asyncio.run(abandoned())
    wait_for(lambda: model.scheduler.jobs == [])


def test_a_row_that_fails_does_not_harm_its_neighbours() -> None:
    """A token whose embedding is not a number: picked by one answer while three others are decoded beside it."""
    with tiny_model("llama", call_tokens=16) as m:
        poison = 7
        with torch.no_grad():
            m.model.get_input_embeddings().weight[poison] = torch.nan
        try:
            prompts = [[i for i in ids(s, 40) if i != poison] for s in range(4)]
            ban = {poison: -100.0}
            asked = [(p, Generation(max_tokens=12, logit_bias=ban)) for p in prompts[:3]]
            alone = [run_together(m, [a])[0] for a in asked]
            streams = [m.stream(*a) for a in asked]
            bad = m.stream(prompts[3], Generation(max_tokens=50, logit_bias={poison: 100.0}))
            with pytest.raises(NonFiniteInput):
                bad.read()
            assert [s.read() and s.job.answer for s in streams] == alone
            with pytest.raises(NonFiniteInput):  # and when it is read
                m.stream([5, 6, poison], Generation(max_tokens=2)).read()
            assert run_together(m, asked[:1]) == alone[:1]
        finally:
            tiny.make.cache_clear()


def test_work_between_steps_runs_on_the_models_thread(model: Model) -> None:
    assert model.scheduler.call(threading.current_thread).result(10).name == "kvfold-model"
    with pytest.raises(ZeroDivisionError):
        model.scheduler.call(lambda: 1 // 0).result(10)
    assert model.complete("a", max_tokens=1).finish == "length"


def test_closing_ends_what_runs_and_refuses_what_comes(loaded: Loaded) -> None:
    m = Model(loaded)
    quick = m.stream([5, 6, 7], Generation(max_tokens=3, ignore_end=True))
    endless = m.stream([5, 6, 7], Generation(max_tokens=100_000, ignore_end=True))
    m.close(grace_seconds=0.5)
    assert quick.read().usage.completion_tokens == 3
    with pytest.raises(RequestCancelled):
        endless.read()
    with pytest.raises(Draining):
        m.complete("a")
    with pytest.raises(Draining):
        m.scheduler.call(list)
    m.close()  # and again
