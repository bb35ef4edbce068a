"""Steps planned from block tables, without vLLM: every read finds its token, every page is folded from the right ones.

Memory is modelled by numbers: a slot holds the token's position, a page the positions it was folded from. A request runs
through calls of any length, drafts that are taken back, and the loss of exact copies.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvfold.adapters.vllm.step import Geometry, Step, plan
from kvfold.config import PAGE_TOKENS
from kvfold.errors import CacheMisuse

EMPTY = -1


class Model:
    """One request's memory. exact_from: tokens before it have no exact copy (the sinks' block aside)."""

    def __init__(self, geometry: Geometry) -> None:
        self.g = geometry
        self.pages = np.full((200, PAGE_TOKENS), EMPTY)
        self.slots = np.full((601, geometry.exact_tokens), EMPTY)
        self.page_table = (1 + np.random.default_rng(0).permutation(60)).astype(np.int32)
        self.exact_table = (1 + np.random.default_rng(1).permutation(599)).astype(np.int32)
        self.length = 0

    def drop_exact(self, before: int) -> None:
        """As a scheduler does: blocks wholly before a token become null, except the sinks'."""
        first = int(self.g.sinks > 0)
        self.exact_table[first : max(first, before // self.g.exact_tokens)] = 0

    def hand_over(self, new: int) -> None:
        """As a scheduler does before a call of `new` tokens: blocks that it reads last are those of its last tokens, too."""
        size, length = self.g.exact_tokens, self.length + new
        held, first = (max(0, n - self.g.window) // PAGE_TOKENS * PAGE_TOKENS // size for n in (self.length, length))
        taken = range(-(-self.length // size), -(-length // size))
        for i in taken:
            if i < first and (i or not self.g.sinks):
                self.exact_table[i] = 0
        behind = range(max(held, int(self.g.sinks > 0)), min(first, -(-self.length // size)))
        for old, at in zip(behind, (i for i in taken if i >= first), strict=False):
            self.exact_table[at] = self.exact_table[old]

    def call(self, new: int, before: int = 3) -> Step:
        """`before` tokens of another request come first in the flat call."""
        length = self.length + new
        table, exact = (np.stack([np.zeros_like(t), t]) for t in (self.page_table, self.exact_table))
        exact[0, :] = 600  # the other request's own
        step = plan(self.g, np.array([0, before, before + new]), np.array([before, length]), table, exact)
        position = np.concatenate([np.arange(before) + 10_000, np.arange(self.length, length)])
        was = self.slots.copy()
        assert len(set(zip(step.block, step.slot, strict=True))) == len(step.slot)
        self.slots[step.block, step.slot] = position[step.token]
        for fold in step.folds:
            head = (was if fold.overwritten else self.slots)[fold.head].reshape(-1)[: fold.head_tokens]
            tokens = np.concatenate([head, position[fold.token :]])[: len(fold.numbers) * PAGE_TOKENS]
            self.pages[fold.numbers] = tokens.reshape(-1, PAGE_TOKENS)
            assert fold.starts_sequence == (tokens[0] == 0)
        self.check(step, was)
        self.length = length
        return step

    def check(self, step: Step, was: np.ndarray) -> None:
        reads = step.reads
        last = len(reads.folded) - 1
        read = [i for first, count, _ in reads.runs for i in range(first, first + count)]
        assert sorted([*read, *step.apart]) == list(range(last + 1))
        slots = was if last in step.apart else self.slots
        i = len(reads.folded) - 1  # this request is the last
        folded = int(reads.folded[i])
        numbers = reads.page_numbers[reads.page_start[i] : reads.page_start[i + 1]]
        assert np.array_equal(self.pages[numbers].reshape(-1)[:folded], np.arange(folded))
        recent = slots[reads.recent_table[reads.recent_start[i] : reads.recent_start[i + 1]]].reshape(-1)
        assert np.array_equal(recent[: reads.recent[i]], np.arange(folded, self.length))
        if folded:
            assert np.array_equal(slots[reads.sink_block[i], : self.g.sinks], np.arange(self.g.sinks))


geometries = st.builds(
    Geometry,
    st.sampled_from([0, 64, 130]),
    st.sampled_from([0, 4]),
    st.sampled_from([1, 3]),
    st.sampled_from([8, 16, 128]),
)


@settings(deadline=None, max_examples=150)
@given(geometries, st.lists(st.tuples(st.integers(1, 300), st.integers(0, 7), st.booleans()), min_size=1, max_size=12))
def test_every_read_finds_its_token(geometry: Geometry, calls: list[tuple[int, int, bool]]) -> None:
    """Calls of (new tokens, of which so many are taken back afterwards, whether exact copies behind the window go)."""
    model = Model(geometry)
    for new, rejected, drop in calls:
        model.call(new)
        model.length -= min(rejected, new - 1)
        if drop:
            model.drop_exact(max(0, model.length - geometry.window) // PAGE_TOKENS * PAGE_TOKENS)


@settings(deadline=None, max_examples=150)
@given(geometries, st.lists(st.tuples(st.integers(1, 700), st.booleans()), min_size=1, max_size=6))
def test_blocks_that_are_read_for_the_last_time_are_written(geometry: Geometry, calls: list[tuple[int, bool]]) -> None:
    """Calls of (new tokens, whether blocks are handed over)."""
    model = Model(geometry)
    for new, hand in calls:
        if hand:
            model.hand_over(new)
        model.call(new)


@settings(deadline=None, max_examples=80)
@given(geometries, st.integers(1, 5), st.integers(0, 200), st.integers(1, 200))
def test_a_prefix_without_exact_copies_is_read_from_pages(geometry: Geometry, pages: int, lost: int, new: int) -> None:
    """What the cache of prefixes still has of the exact copies may end anywhere: the rest is read from pages."""
    model = Model(geometry)
    model.call(pages * PAGE_TOKENS)
    model.drop_exact(max(0, model.length - lost))
    step = model.call(new)
    wanted = max(0, pages * PAGE_TOKENS - geometry.window) // PAGE_TOKENS * PAGE_TOKENS
    assert int(step.reads.folded[-1]) >= wanted


def test_the_window_is_exact() -> None:
    model = Model(Geometry(64, 4, 1, 16))
    model.call(1000)
    for past, folded in ((1000, 896), (1023, 896), (1024, 896), (1087, 896), (1088, 1024)):
        if past > model.length:
            model.call(past - model.length)
        assert int(model.call(1).reads.folded[-1]) == folded
        model.length -= 1


@pytest.mark.parametrize("block", ["newest", "sinks"])
def test_lost_tokens_are_refused(block: str) -> None:
    """Tokens of a page that is not full have no other copy; neither have sinks."""
    model = Model(Geometry(64, 4, 1, 16))
    model.call(300)
    model.exact_table[18 if block == "newest" else 0] = 0
    with pytest.raises(CacheMisuse, match="not in memory"):
        model.call(1)


def test_tokens_without_a_place_are_refused() -> None:
    model = Model(Geometry(64, 4, 1, 16))
    model.exact_table[16:] = 0
    with pytest.raises(CacheMisuse, match="not in memory"):
        model.call(300)
