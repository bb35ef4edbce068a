"""Many sessions under one budget: never over it, nothing lost, beginnings shared, equal to sessions that never moved."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import continuation, filled, model_of, pages, runner, same, words
from torch import Tensor

from kvfold.adapters.hf_transformers import FoldedLayer
from kvfold.errors import CacheMisuse, InvalidConfig, OverBudget, SessionExists, SessionNotFound
from kvfold.sessions import archive
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.budget import parse_bytes
from kvfold.sessions.session import Session
from kvfold.sessions.store import SessionStore

GRID = 128


def store(family: str, memory: int | str = "1GiB", disk: Path | None = None, **how: Any) -> SessionStore:
    return SessionStore(model_of(family), memory=memory, disk=disk, call_tokens=GRID, **how)


def measured(s: SessionStore) -> int:
    """Bytes of every storage that a cache of the store's sessions reaches, each once, and of all slabs."""
    storages: dict[int, int] = {}

    def add(t: Tensor) -> None:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()

    for session in s._in_memory():
        for cache in (session.cache, *session.checkpoints.values()):
            for x in cache.layers:
                if isinstance(x, FoldedLayer):
                    for q in x.folded.sequences:
                        for t in q.tensors:
                            add(t)
                else:
                    for v in vars(x).values():
                        for t in v.values() if isinstance(v, dict) else [v]:
                            if isinstance(t, Tensor):
                                add(t)
    return sum(storages.values()) + s.report()["page_bytes"]


def tell(s: SessionStore, name: str, tokens: list[int]) -> None:
    session = s.open(name)
    try:
        session.extend(tokens)
    finally:
        s.release(session)


@pytest.mark.parametrize("family", ["llama64", "gemma3", "hybrid"])
def test_the_coldest_go_to_the_disk_and_come_back_as_they_were(family: str, tmp_path: Path) -> None:
    base = store(family)
    tell(base, "x", words(300))
    limit = int(2.5 * base.nbytes)
    s = store(family, limit, tmp_path)
    for i in range(4):
        tell(s, f"s{i}", words(300, i))
        assert measured(s) <= s.nbytes <= limit
    assert s.report()["written_out"] >= 2
    assert {x["name"]: x["in_memory"] for x in s.sessions()}["s3"]
    for i in (0, 2, 1, 3):
        back = s.open(f"s{i}")
        alone = Session(runner(family, call_tokens=GRID))
        alone.extend(words(300, i))
        assert same(back, alone)
        assert torch.equal(continuation(back, 3), continuation(alone, 3))
        assert measured(s) <= s.nbytes <= limit
        s.release(back)
    assert s.report()["brought_back"] >= 2


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from("eetfpcr"), st.integers(1, 400)), min_size=3, max_size=12))
def test_any_use_stays_within_the_budget_and_loses_nothing(steps: list[tuple[int, str, int]]) -> None:
    """Extends, trims, forks, prefixes, commits, removals over five names, against the tokens they must hold."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, store("llama64", 5_000_000, Path(folder)) as s:
        truth: dict[str, list[int]] = {}
        for i, (who, what, n) in enumerate(steps):
            name = f"s{who}"
            if what == "r" and name in truth:
                s.remove(name)
                del truth[name]
                continue
            session = s.longest_prefix(truth.get(name, []) + [1]) if what == "p" else s.open(name)
            if what == "p":
                assert session.tokens == truth.get(name, [])[: len(session.tokens)]
                session.extend(words(n, i))
            else:
                assert session.tokens == truth.get(name, [])
                if what == "t":
                    session.trim(min(n, len(session.tokens)))
                elif what == "f" and f"f{i}" not in truth:
                    fork = s.fork(session, f"f{i}")
                    truth[f"f{i}"] = list(fork.tokens)
                    s.release(fork)
                else:
                    session.extend(words(n, i))
                truth[name] = list(session.tokens)
                if what == "c":
                    s.commit(session)
            s.release(session)
            assert measured(s) <= s.nbytes <= 5_000_000
        assert s.names == sorted(truth)


def test_everything_is_there_after_close_and_reopen(tmp_path: Path) -> None:
    with store("llama64", disk=tmp_path) as s:
        for i in range(3):
            tell(s, f"s{i}", words(200 + i, i))
    with store("llama64", disk=tmp_path) as s:
        assert s.names == ["s0", "s1", "s2"]
        assert [x["tokens"] for x in s.sessions()] == [200, 201, 202]
        back = s.open("s1")
        assert back.tokens == words(201, 1)
        s.release(back)
    for i in range(3):
        archive.verify(tmp_path / f"s{i}")


@pytest.mark.parametrize("family", ["llama64", "gemma3", "hybrid"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_reused_prefix_equals_a_fresh_run_cut_there(family: str, where: str, tmp_path: Path) -> None:
    document, questions = words(900), [words(40, i) for i in range(1, 4)]
    s = store(family, disk=tmp_path)
    first = s.longest_prefix(document + questions[0])
    assert first.tokens == []
    first.extend(document + questions[0])
    s.release(first)
    if where == "disk":
        s.close()
        s = store(family, disk=tmp_path)
    for q in questions[1:]:
        reused = s.longest_prefix(document + q)
        assert len(reused.tokens) == 896  # the last end of a call in the document
        fresh = Session(runner(family, call_tokens=GRID))
        want = fresh.extend(document + q)
        got = reused.extend((document + q)[896:])
        assert torch.equal(got, want)
        assert same(reused, fresh)
        assert torch.equal(continuation(reused), continuation(fresh))
        s.release(reused)
    report = s.report()
    assert (report["hits"], report["reused_tokens"]) == (2, 2 * 896)


def test_where_prompts_part_a_checkpoint_is_kept() -> None:
    """A system prompt far from the end is found by the third conversation at the latest."""
    s = store("llama64", ways_back=2)
    found = []
    for i in range(4):
        prompt = words(400) + words(900, 10 + i)
        session = s.longest_prefix(prompt)
        found.append(len(session.tokens))
        session.extend(prompt[len(session.tokens) :])
        s.release(session)
    assert found == [0, 128, 384, 384]


def test_a_conversation_without_a_name_is_kept_once() -> None:
    s = store("llama64")
    prompt = words(200)
    for i in range(4):
        session = s.longest_prefix(prompt)
        session.extend(prompt[len(session.tokens) :])
        answer = words(30, i)
        with SessionBatch([session]) as batch:
            for t in answer:
                batch.step([t])
        s.release(session)
        prompt = prompt + answer + words(20, 10 + i)
        assert s.report()["sessions"] == 1
    assert s.report()["reused_tokens"] == 230 + 280 + 330


def test_pages_of_equal_content_are_stored_once() -> None:
    """Also those of sessions that know nothing of each other."""
    s = store("llama64", ways_back=0)
    for name in "abc":
        tell(s, name, words(1000))
    pools = [x.folded.pool for x in s.open("a").cache.folded_layers]
    assert [p.pages_used for p in pools] == [7, 7]
    b = s.open("b")
    b.extend(words(500, 1))  # goes its own way from here
    c = s.open("c")
    assert pages(c) == [layer[:7] for layer in pages(b)]
    s.release(b)
    assert [p.pages_used for p in pools] == [11, 11]
    s.remove("b")
    s.release(c)
    s.remove("c")
    assert [p.pages_used for p in pools] == [7, 7]


def test_shared_pages_are_shared_again_after_the_disk(tmp_path: Path) -> None:
    with store("llama64", disk=tmp_path, ways_back=0) as s:
        for i, name in enumerate("ab"):
            tell(s, name, words(1000) + words(50, i))
    s = store("llama64", disk=tmp_path, ways_back=0)
    sessions = [s.open(name) for name in "ab"]
    assert [x.folded.pool.pages_used for x in sessions[0].cache.folded_layers] == [7, 7]
    for x in sessions:
        assert same(x, sessions[0]) == (x is sessions[0])


def test_without_a_disk_unnamed_sessions_go_first_and_named_ones_stay() -> None:
    base = store("llama64")
    tell(base, "x", words(300))
    s = store("llama64", int(2.3 * base.nbytes))
    tell(s, "a", words(300))
    for i in range(3):
        session = s.longest_prefix(words(300, 5 + i))
        session.extend(words(300, 5 + i)[len(session.tokens) :])
        s.release(session)
    assert s.report()["dropped"] >= 1
    tell(s, "b", words(300, 1))
    with pytest.raises(OverBudget, match="more memory, a disk folder"):
        tell(s, "c", words(300, 2))
    for name, seed in (("a", 0), ("b", 1)):
        session = s.open(name)
        assert session.tokens == words(300, seed)
        s.release(session)


def test_a_call_over_the_budget_changes_nothing(tmp_path: Path) -> None:
    s = store("llama64", 2_000_000, tmp_path, ways_back=0)
    session = s.open("a")
    session.extend(words(300))
    with pytest.raises(OverBudget):
        session.extend(words(20_000, 1))
    n = len(session.tokens)
    assert n % GRID == 0
    assert s.nbytes <= 2_000_000
    alone = Session(runner("llama64", call_tokens=GRID))
    alone.extend(words(300))
    alone.extend(words(20_000, 1)[: n - 300])
    assert same(session, alone)
    s.release(session)
    tell(s, "b", words(300))


def test_a_session_belongs_to_one_caller() -> None:
    s = store("llama64")
    a = s.open("a")
    for wrong in (lambda: s.open("a"), lambda: s.remove("a"), lambda: s.release(Session(s.runner))):
        with pytest.raises(CacheMisuse):
            wrong()
    with pytest.raises(SessionExists):
        s.fork(a, "a")
    a.extend([5, 6])
    s.release(a)
    with pytest.raises(CacheMisuse):
        s.release(a)
    with pytest.raises(InvalidConfig, match="no disk folder"):
        s.commit(s.open("a"))
    with pytest.raises(SessionNotFound):
        s.remove("nobody")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101, "a\n", "x.tmp", "ü", "a\0b"])
def test_names_do_not_leave_the_folder(name: str, tmp_path: Path) -> None:
    s = store("llama64", disk=tmp_path)
    with pytest.raises(InvalidConfig, match="not a session's name"):
        s.open(name)
    assert not list(tmp_path.iterdir())


def test_rename_moves_what_is_on_the_disk(tmp_path: Path) -> None:
    with store("llama64", disk=tmp_path) as s:
        a = s.longest_prefix(words(200))
        a.extend(words(200))
        s.commit(a)
        s.rename(a, "kept")
        a.extend([5])
        s.commit(a)
        s.release(a)
        with pytest.raises(SessionExists):
            s.rename(s.open("other"), "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert archive.info(tmp_path / "kept")["tokens"] == 201


def test_what_is_given_up_is_as_the_disk_has_it(tmp_path: Path) -> None:
    s = store("llama64", disk=tmp_path)
    a = s.open("a")
    a.extend(words(200))
    s.commit(a)
    a.extend([5])
    s.discard(a)
    assert s.open("a").tokens == words(200)
    b = s.open("b")
    b.extend([5])
    s.discard(b)
    assert s.names == ["a"]


def test_unnamed_sessions_take_only_spare_disk(tmp_path: Path) -> None:
    base = store("llama64")
    tell(base, "x", words(300))
    with store("llama64", int(1.2 * base.nbytes), tmp_path, spare_disk=2_500_000) as s:
        for i in range(5):
            session = s.longest_prefix(words(300, i))
            session.extend(words(300, i)[len(session.tokens) :])
            s.release(session)
        assert s.report()["dropped"] >= 1
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 2_500_000 + 2_000_000


def test_one_store_per_folder(tmp_path: Path) -> None:
    with store("llama64", disk=tmp_path), pytest.raises(SessionExists, match="another store"):
        store("llama64", disk=tmp_path)
    store("llama64", disk=tmp_path).close()


def test_sessions_of_other_models_are_left_alone(tmp_path: Path) -> None:
    with store("llama", disk=tmp_path) as s:
        tell(s, "theirs", words(300))
    with store("llama64", disk=tmp_path) as s:
        assert s.names == ["theirs"]
        assert s.longest_prefix(words(300)).tokens == []
        with pytest.raises(Exception, match="another model"):
            s.open("theirs")
        assert s.names == ["theirs"]
    assert filled(runner("llama"), 5)
    archive.verify(tmp_path / "theirs")


def test_threads_share_a_store(tmp_path: Path) -> None:
    """Eight threads, six names, a budget for three: every session ends with the tokens its users gave it, in some order."""
    base = store("llama64")
    tell(base, "x", words(300))
    limit = int(9 * base.nbytes)
    s = store("llama64", limit, tmp_path)
    given: dict[str, list[int]] = {}
    failures: list[BaseException] = []
    forward = threading.Lock()  # one model, one thread at a time, as servers run it

    def work(me: int) -> None:
        try:
            for i in range(6):
                name = f"s{(me * 7 + i * 5) % 6}"
                try:
                    session = s.open(name)
                except CacheMisuse:
                    continue
                if session.tokens != given.get(name, []):
                    raise AssertionError(name)
                with forward:
                    session.extend(words(60, me * 10 + i))
                given[name] = list(session.tokens)
                s.release(session)
                if s.nbytes > limit:
                    raise AssertionError("over budget")
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert failures == []
    s.close()
    for name, tokens in given.items():
        assert Session.load(tmp_path / name, s.runner.model).tokens == tokens


@pytest.mark.parametrize(
    ("text", "size"), [("8GiB", 8 << 30), ("512MB", 512_000_000), (7, 7), ("1.5 kiB", 1536), ("10B", 10), ("2K", 2000)]
)
def test_amounts_of_memory(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "8 apples", "-1", 0, "GiB", "1e9"])
def test_senseless_amounts(text: int | str) -> None:
    with pytest.raises(InvalidConfig, match="8GiB"):
        parse_bytes(text)
