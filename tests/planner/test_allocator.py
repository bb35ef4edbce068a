"""The plan is what the allocator allocates, to the byte."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.families import FOLDING, make, prompt

import kvfold
from kvfold.cache.pages import PagePool
from kvfold.cache.sizes import pool_bytes
from kvfold.loading import complete, describe
from kvfold.planner.architecture import read
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load

PREFILL, STEPS = 200, 2  # tokens; a step's one token is what sliding layers shrink after


def grown(family: str, cache: Any, rows: int = 1, prefill: int = PREFILL) -> Any:
    model = make(family)
    kvfold.attach(model)
    with torch.no_grad():
        model(prompt(rows, prefill), past_key_values=cache)
        for i in range(STEPS):
            model(prompt(rows, 1, seed=i), past_key_values=cache)
    return cache


def planned(family: str, profile: str, context: int, sessions: int = 1) -> dict[str, Any]:
    model = read(complete(make(family).config))
    return plan(model, Setting(load(profile).spec, context, sessions, dtype_bytes=4))


@pytest.mark.parametrize("family", FOLDING)
def test_plan_is_what_is_allocated(family: str) -> None:
    cache = grown(family, kvfold.FoldedCache(make(family).config, "balanced"))
    result = planned(family, "balanced", PREFILL + STEPS)
    report = cache.report()
    assert [(r["bytes"] + r["state_bytes"]) for r in result["layers"]] == [r["bytes"] for r in report["layers"]]
    assert result["folded_bytes"] + result["state_bytes"] == cache.nbytes
    assert [r["folds"] for r in result["layers"]] == [r["kind"] == "folded" for r in report["layers"]]


@pytest.mark.parametrize(
    ("profile", "family"), [*itertools.product(("lossless", "compact", "extreme"), ("llama", "qwen3_next"))]
)
def test_other_profiles(profile: str, family: str) -> None:
    cache = grown(family, kvfold.FoldedCache(make(family).config, profile), prefill=700)
    result = planned(family, profile, 702)
    assert (result["folded_bytes"] + result["state_bytes"], result["reference_bytes"]) == (
        cache.nbytes,
        cache.reference_bytes,
    )


def test_sessions_are_caches_of_their_own() -> None:
    caches = [grown("llama", kvfold.FoldedCache(make("llama").config)) for _ in range(3)]
    assert planned("llama", "balanced", PREFILL + STEPS, 3)["folded_bytes"] == sum(c.nbytes for c in caches)


@pytest.mark.parametrize(
    ("family", "profile"), [("llama", "balanced"), ("gemma3_text", "compact"), ("jamba", "extreme")]
)
@pytest.mark.parametrize("rows", [2, 5])
def test_rows_of_a_batch_share_pools(family: str, profile: str, rows: int) -> None:
    cache = grown(family, kvfold.FoldedCache(make(family).config, profile), rows, prefill=333)
    setting = Setting(load(profile).spec, 335, rows=rows, dtype_bytes=4)
    result = plan(read(complete(make(family).config)), setting)
    assert result["folded_bytes"] + result["state_bytes"] == cache.nbytes


@pytest.mark.parametrize("length", [0, 1, 127, 128, 64 + 128, 64 + 127])
def test_lengths_around_a_page(length: int) -> None:
    cache = grown("llama", kvfold.FoldedCache(make("llama").config), prefill=max(1, length))
    assert planned("llama", "balanced", max(1, length) + STEPS)["folded_bytes"] == cache.nbytes


@given(st.integers(0, 3000), st.sampled_from([1, 37, 1000, 4096, 13_312, 100_000]))
@settings(max_examples=40, deadline=None)
def test_pools_grow_as_planned(pages: int, page_bytes: int) -> None:
    pool = PagePool(page_bytes, torch.device("cpu"))
    for _ in range(pages):
        pool.allocate()
    assert pool.nbytes == pool_bytes(pages, page_bytes, on_cpu=True)


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmRSS:")).split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
def test_rows_never_used_take_no_memory() -> None:
    pool = PagePool(1_000_000, torch.device("cpu"))
    first = resident()
    for _ in range(5):
        pool.row(pool.allocate()).fill_(1)
    assert pool.nbytes < 5.1e6
    assert resident() - first < 10e6


@pytest.mark.parametrize(("profile", "least"), [("balanced", 5.0), ("compact", 6.0), ("extreme", 7.3)])
@pytest.mark.parametrize("source", ["demo", "llama-3.1-8b", "llama-2-7b"])
def test_whole_caches_of_131072_tokens(profile: str, least: float, source: str) -> None:
    """Windows, tables and free space counted."""
    config = Path(__file__).parent / "configs" / f"{source}.json"
    model = describe(source if source == "demo" else str(config)).model
    assert plan(model, Setting(load(profile).spec, 131072))["ratio"] >= least
