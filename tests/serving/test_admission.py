"""Requests that together would not fit wait for memory: in order, never beyond the budget, and none is refused later."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvfold.cache.pages import PagePool
from kvfold.cache.sizes import pool_bytes_at_most
from kvfold.errors import ContextTooLong, OverBudget, RequestCancelled
from kvfold.loading import Loaded, load
from kvfold.serving.generation import Generation
from kvfold.serving.job import Job
from kvfold.serving.model import Model
from kvfold.serving.scheduler import Limits, Meter
from kvfold.serving.shelf import Keep
from kvfold.serving.streams import Stream

ANSWER = Generation(max_tokens=24, ignore_end=True)


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load("demo")


def tight(loaded: Loaded, memory: str, disk: Path | None = None, **how: Any) -> Model:
    return Model(loaded, keep=Keep(memory, disk), **how)


def prompt(seed: int, length: int) -> list[int]:
    return [3 + (seed * 7919 + 31 * i * (i + seed)) % 4000 for i in range(length)]


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Measure(Meter):
    """The most that caches took and were promised, and the most jobs that ran at once. order: first tokens of prompts, as their
    answers begin, and negated, as they end."""

    def __init__(self) -> None:
        self.model: Model | None = None
        self.most = self.most_promised = self.rows = 0
        self.order: list[int] = []

    def _look(self) -> None:
        if self.model is not None:
            budget = self.model.shelf.store.budget
            self.most = max(self.most, budget.nbytes)
            self.most_promised = max(self.most_promised, budget.nbytes + budget.promised_bytes)
            self.rows = max(self.rows, budget.promises)

    def read(self, tokens: int, seconds: float) -> None:
        self._look()

    def decoded(self, rows: int, seconds: float) -> None:
        self._look()

    def picked(self, job: Job, seconds: float) -> None:
        if len(job.answer) == 1:
            self.order.append(job.prompt[0])

    def finished(self, job: Job) -> None:
        self.order.append(-job.prompt[0])


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_does_not_fit_together_waits_and_nobody_fails(loaded: Loaded, tmp_path: Path, on_disk: bool) -> None:
    """Twelve requests in memory for three or four; cut alike, so equal. Prompts differ in their first token."""
    prompts = [[3 + i, *prompt(i, 300 + 30 * i)] for i in range(12)]
    with Model(loaded) as roomy:
        alone = [list(_read(roomy.stream(p, ANSWER)).job.answer) for p in prompts]
    meter = Measure()
    with tight(loaded, "24MiB", tmp_path if on_disk else None, meter=meter) as m:
        meter.model = m
        for _ in range(2):  # again, when all was read before
            streams = [m.stream(p, ANSWER) for p in prompts]
            assert [_read(s).job.answer for s in streams] == alone
        budget = m.shelf.store.budget
        assert (budget.promises, budget.promised_bytes) == (0, 0)
        assert 0 < meter.most <= meter.most_promised <= budget.limit
        assert 1 < meter.rows < 12


def _read(stream: Stream) -> Stream:
    stream.read()
    return stream


def test_a_large_request_is_not_overtaken(loaded: Loaded) -> None:
    meter = Measure()
    with tight(loaded, "20MiB", meter=meter) as m:
        first = m.stream([11, *prompt(1, 40)], Generation(max_tokens=400, ignore_end=True))
        wait_for(lambda: bool(first.job.answer))
        large = m.stream([12, *prompt(2, 500)], Generation(max_tokens=m.room(501), ignore_end=True))
        small = [m.stream([13, *prompt(3, 20)], Generation(max_tokens=2, ignore_end=True)) for _ in range(3)]
        assert m.scheduler.waiting == 4
        assert m.scheduler.waiting_bytes == sum(s.job.need for s in (large, *small))
        wait_for(lambda: bool(large.job.answer))
        assert meter.order[:2] == [11, -11]  # the small ones would have fitted beside it
        assert len(first.job.answer) == 400
        large.cancel()
        for s in small:
            assert s.read().usage.completion_tokens == 2


def test_what_can_never_fit_is_refused_at_once(loaded: Loaded) -> None:
    with tight(loaded, "24MiB") as m:
        with pytest.raises(ContextTooLong, match=r"need [\d,]+ bytes of memory, .* may take 25,165,824"):
            m.stream(prompt(0, 30), Generation(max_tokens=100_000))
        with pytest.raises(ContextTooLong, match="a prompt of 40000 tokens and 1 to follow"):
            m.stream([5] * 40_000, Generation())
        room = m.room(30)
        assert 1000 < room < m.max_context - 30
        assert m.shelf.need(30 + room, 30) <= m.shelf.limit < m.shelf.need(31 + room, 30)
        open_ended = m.stream(prompt(0, 30), Generation(ignore_end=True))
        assert open_ended.job.generation.max_tokens == room
        open_ended.cancel()


def test_who_leaves_while_waiting_gives_the_place_to_the_next(loaded: Loaded) -> None:
    with tight(loaded, "20MiB", limits=Limits(max_waiting=2)) as m:
        running = m.stream(prompt(1, 40), Generation(max_tokens=9000, ignore_end=True))
        wait_for(lambda: bool(running.job.answer))
        waits, behind = (m.stream(prompt(2, 40), Generation(max_tokens=n, ignore_end=True)) for n in (9000, 3))
        wait_for(lambda: m.scheduler._blocked is waits.job)
        waits.cancel()
        with pytest.raises(RequestCancelled):
            waits.read()
        assert behind.read().usage.completion_tokens == 3  # beside the one that runs
        assert running.job.finish is None
        running.cancel()
        wait_for(lambda: m.scheduler.jobs == [])
        assert m.shelf.store.budget.promised_bytes == 0


def test_closing_ends_those_that_wait(loaded: Loaded) -> None:
    m = tight(loaded, "20MiB")
    streams = [m.stream(prompt(i, 40), Generation(max_tokens=9000, ignore_end=True)) for i in range(4)]
    wait_for(lambda: bool(streams[0].job.answer))
    began = time.monotonic()
    m.close(grace_seconds=0.2)
    assert time.monotonic() - began < 10
    for s in streams:
        with pytest.raises(RequestCancelled):
            s.read()
    assert m.scheduler.waiting == m.shelf.store.budget.promises == 0


def test_memory_that_nobody_will_give_back_is_an_error_not_a_wait(loaded: Loaded) -> None:
    """Without a disk, a session with a name stays."""
    with tight(loaded, "20MiB") as m:
        m.session("kept").complete("The function returns", max_tokens=4)
        held = m.scheduler.call(lambda: m.shelf.store.open("kept")).result(30)
        with pytest.raises(OverBudget, match="bytes more than the 20,971,520 allowed"):
            m.stream(prompt(1, 40), Generation(max_tokens=m.room(40), ignore_end=True)).read()
        m.scheduler.call(lambda: m.shelf.store.release(held)).result(30)
        assert m.stream(prompt(1, 40), ANSWER).read().usage.completion_tokens == 24


def test_pools_stay_within_what_is_computed_for_them() -> None:
    """Pages come and go in an order that leaves slabs half empty; the bound holds for the most that were in use."""
    import random

    import torch

    for page_bytes, seed in itertools.product((1000, 4096, 25616), range(4)):
        draw = random.Random(seed)
        pool, held, most = PagePool(page_bytes, torch.device("cpu")), list[int](), 0
        for _ in range(600):
            if held and draw.random() < 0.45:
                pool.release(held.pop(draw.randrange(len(held))))
            else:
                held.append(pool.allocate())
            most = max(most, len(held))
            assert pool.nbytes <= pool_bytes_at_most(most, page_bytes, on_cpu=True)
        assert pool_bytes_at_most(most, page_bytes, on_cpu=True) < 1.3 * (most + 4) * page_bytes
        gc.collect()
