"""Sequences, pages and batches against a token-by-token model of what is exact and what is folded."""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import pickle
import random
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.cache.layer import FoldedAttention
from kvfold.cache.pages import PagePool
from kvfold.cache.sequence import LayerSequence
from kvfold.cache.sizes import mapped, pool_bytes_at_most
from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.engine.on_torch import TorchEngine
from kvfold.engine.request import LayerShape
from kvfold.errors import CannotTrim, NonFiniteInput

HEADS, DIM = 2, 32  # the narrowest head that every codec has a form for
CPU = torch.device("cpu")
WINDOWS, SINKS = (0, 1, 64, 128, 200), (0, 1, 4, 127)
SPLIT = SideSpec("split", 3.5, "norm", "dense")

specs = st.builds(
    lambda window, sinks, centre, seed: CacheSpec(window=window, sinks=sinks, centre=centre, seed=seed),
    st.sampled_from(WINDOWS),
    st.sampled_from(SINKS),
    st.booleans(),
    st.integers(0, 3),
)
few = settings(max_examples=25, deadline=None)


def tokens(count: int, seed: int = 0, rows: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values [H, count, D], or [rows, H, count, D]."""
    g = torch.Generator().manual_seed(seed)
    shape = (HEADS, count, DIM) if rows is None else (rows, HEADS, count, DIM)
    return torch.randn(shape, generator=g) + 2, torch.randn(shape, generator=g)


def engine_of(spec: CacheSpec, dim: int = DIM) -> TorchEngine:
    return TorchEngine(spec, LayerShape(0, HEADS, dim, 4), torch.float32, CPU)


def sequence_of(spec: CacheSpec) -> LayerSequence:
    engine = engine_of(spec)
    k, v = tokens(1)
    return LayerSequence(engine, PagePool(engine.page_bytes, CPU), k, v)


def layer_of(spec: CacheSpec) -> FoldedAttention:
    return FoldedAttention(spec, 0, lambda spec, shape, dtype, device: TorchEngine(spec, shape, dtype, device))


def feed(s: LayerSequence, k: Tensor, v: Tensor, cuts: list[int]) -> None:
    at = 0
    for stop in [*sorted({min(c, k.shape[1]) for c in cuts}), k.shape[1]]:
        s.append(k[:, at:stop], v[:, at:stop])
        at = stop


def page_bytes(s: LayerSequence) -> list[bytes]:
    return [bytes(s.pool.row(p).tolist()) for p in s.pages]


def state_of(s: LayerSequence) -> tuple[object, ...]:
    """Everything that attention can see of a sequence; the bytes of a last page that is partly valid are not."""
    view = s.view(0)
    sinks = min(s.length, s.engine.spec.sinks)
    exact = (view.recent_k, view.recent_v, s.sinks_k[:, :sinks], s.sinks_v[:, :sinks])
    whole = page_bytes(s)[: s.folded // PAGE_TOKENS]
    return (s.length, s.folded, len(s.pages), whole, *(x.tolist() for x in exact))


def valid_part(s: LayerSequence) -> tuple[Tensor, Tensor]:
    """Unfolded keys and values of the folded tokens."""
    if not s.pages:
        return torch.empty(HEADS, 0, DIM), torch.empty(HEADS, 0, DIM)
    k, v = s.engine.unfold(torch.stack([s.pool.row(p) for p in s.pages]), s.state)
    return k[:, : s.folded], v[:, : s.folded]


@dataclass
class Oracle:
    """What a sequence must be, kept token by token: which tokens it has and which of them lie in pages."""

    spec: CacheSpec
    k: Tensor = field(default_factory=lambda: torch.empty(HEADS, 0, DIM))
    v: Tensor = field(default_factory=lambda: torch.empty(HEADS, 0, DIM))
    folded: int = 0
    exact_from: int = 0  # oldest token whose exact copy still exists

    def append(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        length = self.k.shape[1]
        while self._next_page() <= length - self.spec.window:
            self.folded = self._next_page()
        held = self.spec.window + PAGE_TOKENS * (1 + -(-self.spec.window // PAGE_TOKENS))
        self.exact_from = max(self.exact_from, length - held)

    def _next_page(self) -> int:
        return (self.folded // PAGE_TOKENS + 1) * PAGE_TOKENS

    def trim(self, n: int) -> None:
        length = self.k.shape[1] - n
        self.k, self.v = self.k[:, :length], self.v[:, :length]
        if length < self.folded:
            self.folded = self.exact_from = length
        else:
            fresh = 0
            while fresh + PAGE_TOKENS <= length - self.spec.window:
                fresh += PAGE_TOKENS
            self.folded = min(self.folded, max(fresh, self.exact_from))
        if self.folded <= self.spec.sinks:
            self.folded = self.exact_from = 0

    def agrees(self, s: LayerSequence) -> None:
        length = self.k.shape[1]
        assert (s.length, s.folded) == (length, self.folded)
        assert len(s.pages) == -(-self.folded // PAGE_TOKENS)
        view = s.view(0)
        assert torch.equal(view.recent_k, self.k[:, self.folded :])
        assert torch.equal(view.recent_v, self.v[:, self.folded :])
        n = min(length, self.spec.sinks)
        assert torch.equal(s.sinks_k[:, :n], self.k[:, :n])
        assert torch.equal(s.sinks_v[:, :n], self.v[:, :n])


def close_to_truth(s: LayerSequence, k: Tensor, v: Tensor) -> None:
    """Every folded token is the quantized form of its own exact token: nearer to it than to the next one."""
    first = s.engine.spec.sinks
    if s.folded <= first + 1:
        return
    for got, exact in zip(valid_part(s), (k, v), strict=True):
        here, there = got[:, first:], exact[:, first : s.folded]
        own = (here - there).square().sum((0, 2))
        other = (here - there.roll(1, dims=1)).square().sum((0, 2))
        assert bool((own < other).all())
        assert float(own.mean()) < 0.2 * float(other.mean())


@few
@given(specs, st.lists(st.integers(1, 300), min_size=1, max_size=6))
def test_exact_and_folded_tokens_follow_the_model(spec: CacheSpec, calls: list[int]) -> None:
    s, model = sequence_of(spec), Oracle(spec)
    for i, n in enumerate(calls):
        k, v = tokens(n, seed=i)
        s.append(k, v)
        model.append(k, v)
        model.agrees(s)
    close_to_truth(s, model.k, model.v)


@few
@given(specs, st.lists(st.tuples(st.sampled_from("aatt"), st.integers(0, 290)), min_size=2, max_size=10))
def test_any_appends_and_trims_follow_the_model(spec: CacheSpec, steps: list[tuple[str, int]]) -> None:
    s, model = sequence_of(spec), Oracle(spec)
    for i, (what, n) in enumerate(steps):
        if what == "a":
            k, v = tokens(n, seed=i)
            s.append(k, v)
            model.append(k, v)
        else:
            n = min(n, s.length)
            s.trim(n)
            model.trim(n)
        model.agrees(s)
    assert s.pool.pages_used == len(s.pages)
    close_to_truth(s, model.k, model.v)


@few
@given(specs, st.integers(0, 700), st.lists(st.integers(0, 700), max_size=5))
def test_cuts_change_nothing(spec: CacheSpec, length: int, cuts: list[int]) -> None:
    k, v = tokens(length)
    whole, cut = sequence_of(spec), sequence_of(spec)
    feed(whole, k, v, [])
    feed(cut, k, v, cuts)
    assert state_of(whole) == state_of(cut)


def test_token_by_token_equals_one_call() -> None:
    for window in (0, 64):
        spec = CacheSpec(window=window)
        k, v = tokens(330)
        whole, cut = sequence_of(spec), sequence_of(spec)
        feed(whole, k, v, [])
        feed(cut, k, v, list(range(330)))
        assert state_of(whole) == state_of(cut)


@few
@given(specs, st.integers(1, 600), st.lists(st.integers(1, 400), min_size=1, max_size=3), st.data())
def test_trim_inside_the_exact_part_is_never_having_appended(
    spec: CacheSpec, length: int, drafts: list[int], data: st.DataObject
) -> None:
    """Speculation: a draft is appended and part of it, never more, is taken back; over and over."""
    k, v = tokens(length + sum(drafts))
    s, never = sequence_of(spec), sequence_of(spec)
    feed(s, k[:, :length], v[:, :length], [])
    feed(never, k[:, :length], v[:, :length], [])
    for n in drafts:
        before = s.length
        dk, dv = tokens(n, seed=n)
        feed(s, dk, dv, [n // 2])
        # What this draft folded and still has exact copies of can be taken back to the last bit.
        lowest = max(before, s.folded)
        keep = data.draw(st.integers(min(lowest, s.length), s.length)) - before
        s.trim(n - keep)
        feed(never, dk[:, :keep], dv[:, :keep], [])
        assert state_of(s) == state_of(never)
    more_k, more_v = tokens(300, seed=99)
    feed(s, more_k, more_v, [7])
    feed(never, more_k, more_v, [7])
    assert state_of(s) == state_of(never)


@few
@given(specs, st.integers(200, 700), st.data())
def test_trim_into_pages_keeps_codes_and_mean_and_encodes_nothing_twice(
    spec: CacheSpec, length: int, data: st.DataObject
) -> None:
    k, v = tokens(length)
    s = sequence_of(spec)
    feed(s, k, v, [])
    if s.folded <= spec.sinks + 1:
        return
    keep = data.draw(st.integers(spec.sinks + 1, s.folded - 1))
    old_k, old_v = valid_part(s)
    s.trim(length - keep)
    kept_k, kept_v = valid_part(s)
    assert torch.equal(kept_k, old_k[:, :keep])
    assert torch.equal(kept_v, old_v[:, :keep])
    new_k, new_v = tokens(500, seed=1)
    for n in (1, 100, 399):
        s.append(new_k[:, :n], new_v[:, :n])
        new_k, new_v = new_k[:, n:], new_v[:, n:]
        now_k, now_v = valid_part(s)
        assert torch.equal(now_k[:, :keep], old_k[:, :keep])
        assert torch.equal(now_v[:, :keep], old_v[:, :keep])
    k2, v2 = (torch.cat([a[:, :keep], b], 1) for a, b in zip((k, v), tokens(500, seed=1), strict=True))
    close_to_truth(s, k2, v2)


def test_trim_back_to_nothing_forgets_what_codecs_froze() -> None:
    spec = CacheSpec(SPLIT, SPLIT, window=64, sinks=0, centre=False)
    loud_k, loud_v = tokens(128, seed=5)  # long enough for codecs to freeze from it
    loud_k[..., :4] *= 50
    k, v = tokens(400, seed=6)
    s, fresh = sequence_of(spec), sequence_of(spec)
    s.append(k[:, :150], v[:, :150])
    s.append(loud_k, loud_v)
    assert s.folded == 128
    s.trim(128)
    assert s.folded == 0
    s.append(k[:, 150:], v[:, 150:])
    feed(fresh, k, v, [150])
    assert state_of(s) == state_of(fresh)


@pytest.mark.parametrize("n", [-1, 11])
def test_trim_refuses_what_is_not_there(n: int) -> None:
    s = sequence_of(CacheSpec())
    s.append(*tokens(10))
    with pytest.raises(CannotTrim, match="Trim between 0 and"):
        s.trim(n)
    assert s.length == 10


@few
@given(specs, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(1, 250)), min_size=1, max_size=12))
def test_forks_and_beams_never_disturb_each_other(spec: CacheSpec, steps: list[tuple[int, int, int]]) -> None:
    """Random forks, appends, trims and releases, each sequence checked against a model of its own."""
    live = [(sequence_of(spec), Oracle(spec))]
    pool = live[0][0].pool
    first = tokens(500, seed=77)
    live[0][0].append(*first)
    live[0][1].append(*first)
    for i, (pick, what, n) in enumerate(steps):
        s, model = live[pick % len(live)]
        if what == 0:
            live.append((s.fork(), copy.copy(model)))
        elif what == 1:
            k, v = tokens(n, seed=i)
            s.append(k, v)
            model.append(k, v)
        elif what == 2:
            s.trim(min(n, s.length))
            model.trim(min(n, model.k.shape[1]))
        elif len(live) > 1:
            live.remove((s, model))
            s.release()
        for each, its in live:
            its.agrees(each)
        held = [p for each, _ in live for p in each.pages]
        assert pool.pages_used == len(set(held))
        assert all(pool.references(p) == held.count(p) for p in held)
    for each, its in live:
        close_to_truth(each, its.k, its.v)
    for each, _ in live:
        each.release()
    assert pool.pages_used == 0
    assert pool.nbytes == 0


def test_a_fork_that_goes_out_of_scope_gives_its_pages_back() -> None:
    s = sequence_of(CacheSpec(window=0))
    s.append(*tokens(300))
    fork = s.fork()
    fork.append(*tokens(300, seed=1))
    assert s.pool.pages_used == 4
    del fork
    gc.collect()
    assert s.pool.pages_used == len(s.pages) == 2
    assert [s.pool.references(p) for p in s.pages] == [1, 1]


@few
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60))
def test_pool_reuses_free_pages_and_returns_empty_slabs(steps: list[int]) -> None:
    pool, held, most = PagePool(64, CPU), list[int](), 0
    for step in steps:
        if step < 20 or not held:
            before, promised = pool.nbytes, pool.growth(step + 1)
            held += [pool.allocate() for _ in range(step + 1)]
            assert pool.nbytes == before + promised
        else:
            for _ in range(min(len(held), step)):
                pool.release(held.pop(step % len(held)))
        assert pool.pages_used == len(held) == len(set(held))
        most = max(most, len(held))
        assert 64 * len(held) <= pool.nbytes <= pool_bytes_at_most(most, 64, on_cpu=True)
        assert sum(len(r) for r in pool.runs(held)) == len(held)
    rows = [pool.row(p) for p in held]
    assert len({r.data_ptr() for r in rows}) == len(held)
    for p in held:
        pool.release(p)
    assert pool.nbytes == 0
    assert not pool._where


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0, 1], [1, 1, 1], [0, 0, 2, 2, 1], [2]])
def test_select_is_what_beams_need(rows: list[int]) -> None:
    layer = layer_of(CacheSpec(window=64))
    k, v = tokens(300, rows=3)
    layer.append(k, v, [0, 5, 250])
    want = [state_of(layer.sequences[r]) for r in rows]
    layer.select(rows)
    assert [state_of(s) for s in layer.sequences] == want
    more = tokens(200, seed=9, rows=len(rows))
    layer.append(*more, [0] * len(rows))
    for b, r in enumerate(rows):
        alone = sequence_of(CacheSpec(window=64))
        pad = (0, 5, 250)[r]
        alone.append(k[r, :, pad:], v[r, :, pad:])
        alone.append(more[0][b], more[1][b])
        assert state_of(layer.sequences[b]) == state_of(alone)
    layer.clear()
    assert layer.pool.pages_used == 0


@few
@given(st.permutations(range(4)), st.sampled_from(WINDOWS))
def test_batch_order_and_page_order_change_no_bit_of_the_output(order: list[int], window: int) -> None:
    spec = CacheSpec(window=window)
    k, v = tokens(700, rows=4)
    pads = [0, 3, 300, 699]
    q = torch.randn(4, 2 * HEADS, 5, DIM, generator=torch.Generator().manual_seed(1))
    new = tokens(5, seed=2, rows=4)
    plain, mixed = layer_of(spec), layer_of(spec)
    plain.append(k, v, pads)
    # The same tokens, permuted rows, fed so that pages of different rows interleave in the pool.
    index = torch.tensor(order)
    for a, b in ((0, 299), (299, 430), (430, 700)):
        mixed.append(k[index, :, a:b], v[index, :, a:b], [min(max(pads[r] - a, 0), b - a) for r in order])
    want = plain.attend(q, *new, [0] * 4, 0.25)
    got = mixed.attend(q[index], *(x[index] for x in new), [0] * 4, 0.25)
    assert torch.equal(got, want[index])


def written(slab: Tensor) -> int:
    """Bytes of the system's pages that a slab has taken, as the system tells."""
    size = slab.untyped_storage().nbytes()
    told = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(slab.data_ptr()), ctypes.c_size_t(size), told) == 0
    return mmap.PAGESIZE * sum(x & 1 for x in told)


def storages(x: object, seen: dict[int, object]) -> dict[int, int]:
    """Bytes of every tensor storage reachable from an object, engines (constants of the layer) left out."""
    found: dict[int, int] = {}
    if id(x) in seen or isinstance(x, TorchEngine):
        return found
    seen[id(x)] = x
    if isinstance(x, PagePool):
        return {s.data_ptr(): written(s) for s in x._slabs.values()}
    if isinstance(x, Tensor):
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}
    parts = list(x.values()) if isinstance(x, dict) else list(x) if isinstance(x, list | tuple) else []
    if hasattr(x, "__dict__") and not callable(x):
        parts += vars(x).values()
    for part in parts:
        found |= storages(part, seen)
    return found


@few
@given(specs, st.lists(st.integers(0, 400), min_size=1, max_size=4), st.booleans())
def test_nbytes_is_the_sum_of_what_is_allocated(spec: CacheSpec, calls: list[int], split: bool) -> None:
    if split:
        spec = CacheSpec(SPLIT, SPLIT, spec.window, spec.sinks, False)
    layer = layer_of(spec)
    for i, n in enumerate(calls):
        layer.append(*tokens(n, seed=i, rows=3), [0, n // 2, n])
    layer.select([0, 0, 1])
    fork = layer.fork()
    fork.append(*tokens(200, seed=50, rows=3), [0, 0, 0])
    for x in (layer, fork, pickle.loads(pickle.dumps(PickleMe(layer))).layer):
        tables = 8 * sum(len(s.pages) for s in x.sequences)
        assert x.nbytes == sum(storages(x, {}).values()) + tables
        assert x.report()["bytes"] == x.nbytes


@dataclass
class PickleMe:
    """A layer whose engine factory can be pickled."""

    layer: FoldedAttention

    def __post_init__(self) -> None:
        self.layer._make = partial(TorchEngine)


def test_copies_hold_their_own_pages_only() -> None:
    layer = layer_of(CacheSpec(window=0))
    layer.append(*tokens(300, rows=1), [0])
    fork = layer.fork()
    fork.append(*tokens(1000, seed=1, rows=1), [0])
    layer.select([0, 0])
    before = [state_of(s) for s in layer.sequences]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(PickleMe(layer))).layer):
        assert [state_of(s) for s in twin.sequences] == before
        assert twin.pool.pages_used == 2
        assert twin.sequences[0].pages == twin.sequences[1].pages
        twin.append(*tokens(300, seed=2, rows=2), [0, 0])
        twin.clear()
        assert twin.pool.pages_used == 0
    assert [state_of(s) for s in layer.sequences] == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("call", [1, 40, 500])
def test_bad_numbers_leave_a_batch_exactly_as_it_was(bad: float, side: int, call: int) -> None:
    """One row of three fails; 3e38 is finite and only found when its page is folded."""
    layer = layer_of(CacheSpec(window=64))
    layer.append(*tokens(330, rows=3), [0, 7, 200])
    before, used = [state_of(s) for s in layer.sequences], layer.pool.pages_used
    call = max(call, 500) if bad == 3e38 else call
    kv = tokens(call, seed=3, rows=3)
    kv[side][1, 1, call // 3, 2] = bad
    q = torch.zeros(3, HEADS, call, DIM)
    with pytest.raises(NonFiniteInput, match="lossless"):
        layer.attend(q, *kv, [0, 0, 0], 1.0)
    with pytest.raises(NonFiniteInput):
        layer.append(*kv, [0, 0, 0])
    assert [state_of(s) for s in layer.sequences] == before
    assert layer.pool.pages_used == used
    # In a pad it does not matter.
    layer.append(*kv, [0, call, 0])
    assert layer.sequences[1].length == before[1][0]


def test_a_first_call_that_fails_leaves_an_empty_layer() -> None:
    layer = layer_of(CacheSpec())
    k, v = tokens(300, rows=2)
    k[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteInput, match="row 0"):
        layer.append(k, v, [0, 0])
    layer.append(*tokens(300, rows=5), [0] * 5)
    assert [s.length for s in layer.sequences] == [300] * 5


def test_lossless_pages_take_any_number_and_forget_it_with_a_trim() -> None:
    raw = SideSpec("raw", 16)
    layer = layer_of(CacheSpec(raw, raw, 0, 0, False))
    k, v = tokens(300, rows=1)
    v[0, :, 250] = float("nan")
    layer.append(k, v, [0])
    layer.trim([60])
    q, one = torch.randn(1, HEADS, 1, DIM), tokens(1, seed=4, rows=1)
    assert bool(torch.isfinite(layer.attend(q, *one, [0], 1.0)).all())


class Breaks(TorchEngine):
    """Runs out of memory at the n-th fold."""

    folds = 0

    def fold(self, *args: object) -> None:
        self.folds -= 1
        if self.folds == 0:
            raise MemoryError
        super().fold(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_memory_running_out_leaves_a_batch_exactly_as_it_was(fail_at: int) -> None:
    layer = FoldedAttention(CacheSpec(window=0), 0, Breaks)
    layer.append(*tokens(200, rows=2), [0, 0])
    layer.trim([100, 10])
    before = [state_of(s) for s in layer.sequences]
    layer.engine.folds = fail_at  # type: ignore[union-attr]
    with pytest.raises(MemoryError):
        layer.append(*tokens(2100, seed=1, rows=2), [0, 0])
    assert [state_of(s) for s in layer.sequences] == before
    assert layer.pool.pages_used == 2
    layer.append(*tokens(2100, seed=1, rows=2), [0, 0])
    whole = sequence_of(CacheSpec(window=0))
    whole.append(*(x[0] for x in tokens(200, rows=2)))
    whole.trim(100)
    whole.append(*(x[0] for x in tokens(2100, seed=1, rows=2)))
    assert state_of(layer.sequences[0]) == state_of(whole)


def test_rows_after_the_last_in_use_go_back_to_the_system() -> None:
    """Of pages released in any order, those at a slab's end take no memory, and what was kept is still there."""
    pool = PagePool(5000, torch.device("cpu"))
    pages = [pool.allocate() for _ in range(60)]
    for page in pages:
        pool.row(page).fill_(page)
    full, kept = pool.nbytes, pages[:3] + pages[32:34]
    for page in random.Random(5).sample([p for p in pages if p not in kept], 55):
        pool.release(page)
    assert pool.nbytes == mapped(3 * 5000, True) + mapped(2 * 5000, True) < full
    assert sum(written(pool.row(page)) for page in (0, 32)) == pool.nbytes
    assert pool.growth(31) == mapped(32 * 5000, True) - mapped(3 * 5000, True) + mapped(4 * 5000, True) - mapped(
        2 * 5000, True
    )
    assert all(bool((pool.row(page) == page).all()) for page in kept)
    assert pool.allocate() == 3
    copied = copy.deepcopy(pool)  # into memory of no particular alignment
    for page in (3, 2, 33):
        copied.release(page)
    assert all(bool((copied.row(page) == page).all()) for page in (0, 1, 32))
