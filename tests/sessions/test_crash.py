"""Processes that die, disks that are full: what was committed is there, and every store opens."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from talk import contents, filled, model_of, runner, same, words

from kvfold.errors import SessionExists, StorageFailed
from kvfold.sessions import archive, files, saving, segments
from kvfold.sessions.manifest import NAME, Manifest
from kvfold.sessions.runner import Runner
from kvfold.sessions.session import Session
from kvfold.sessions.store import SessionStore

STEP = 40  # tokens of a turn
NAMES = ("a", "b", "c")


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process, which inherits the models; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()  # os._exit would hide it
            raise
        finally:
            os._exit(code)
    return pid


def script(name: str) -> list[int]:
    """What a session of this name is told, turn by turn."""
    return words(50 * STEP, 100 + NAMES.index(name))


def store_at(disk: Path, memory: int = 700_000) -> SessionStore:
    return SessionStore(model_of("llama"), memory=memory, disk=disk, call_tokens=STEP, ways_back=2)


def talk_on(disk: Path, seed: int, told: int) -> None:
    """Turns, commits, removals until killed; every commit that returned is written to the pipe."""
    rng = random.Random(seed)
    s = store_at(disk)
    while True:
        name = rng.choice(NAMES)
        session = s.open(name)
        n = len(session.tokens)
        if n + STEP > len(script(name)):
            s.release(session)
            s.remove(name)
            os.write(told, f"{name} -1\n".encode())
            continue
        if rng.random() < 0.1 and n > 3 * STEP:
            session.trim(STEP)
            n -= STEP
        session.extend(script(name)[n : n + STEP])
        if rng.random() < 0.6:
            s.commit(session)
            os.write(told, f"{name} {len(session.tokens)}\n".encode())
        s.release(session)  # and another one may be written out for it


def killed_at(moment: float, disk: Path, seed: int) -> dict[str, int]:
    """Kill a child that talks: after `moment` of its commits, the fraction being one of the time between two. Returns the
    last length it committed by name, -1 if it removed the session after."""
    read, write = os.pipe()
    pid = in_child(lambda: talk_on(disk, seed, write))
    os.close(write)
    began = time.monotonic()
    with os.fdopen(read) as pipe:
        lines = [pipe.readline() for _ in range(int(moment))]
        gap = (time.monotonic() - began) / max(1, int(moment))
        time.sleep(moment % 1 * max(gap, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        lines += pipe.readlines()
    return {name: int(n) for name, n in map(str.split, lines)}


def check(disk: Path, before: dict[str, int], told: dict[str, int]) -> dict[str, int]:
    """Open what a killed process left. Trims are taken back by the next turn, so lengths only grow, by a step at least."""
    expected = {**before, **told}
    with store_at(disk) as s:
        now: dict[str, int] = {}
        for name in s.names:
            archive.verify(disk / name)
            session = s.open(name)
            now[name] = len(session.tokens)
            assert session.tokens == script(name)[: now[name]]
            again = Session(Runner(model_of("llama"), call_tokens=STEP))
            again.extend(session.tokens)
            assert contents(session.cache) == contents(again.cache)
            s.release(session)
    for name, n in expected.items():
        # After a removal, or the start of one, a session may be gone or begin anew.
        assert n < 0 or now.get(name, 0) >= n or now.get(name, 0) < len(script(name)) <= n + STEP
    return now


def kill_often(disk: Path, times: int) -> None:
    rng = random.Random(times)
    model_of("llama")
    before: dict[str, int] = {}
    for trial in range(times):
        before = check(disk, before, killed_at(rng.uniform(0, 8), disk, trial))


def test_killed_at_any_moment(tmp_path: Path) -> None:
    kill_often(tmp_path, 10)


@pytest.mark.slow
def test_killed_at_200_moments(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    kill_often(tmp_path, 200)
    record_property("processes killed, nothing committed lost, every store opened", 200)


def test_what_a_killed_writer_leaves_is_cleared_away(tmp_path: Path) -> None:
    """Names of our own and of safetensors, which writes beside its target; anything else is somebody's file."""
    s = filled(runner("llama"), 300)
    (tmp_path / "a").mkdir()
    for name in (f"{NAME}.tmp", ".tmpe6HGah"):
        (tmp_path / "a" / name).write_bytes(b"half")
    s.save(tmp_path / "a")
    assert not [p for p in (tmp_path / "a").iterdir() if ".tmp" in p.name]
    archive.verify(tmp_path / "a")
    for name in (".tmpfiles", "notes.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"mine")
        with pytest.raises(SessionExists):
            s.save(tmp_path / name)
        assert (tmp_path / name / name).read_bytes() == b"mine"


# Every operation on files that a save makes, and what a process killed before it would leave.

OPERATIONS = (
    (files, "sync"),
    (segments, "save_file"),
    (os, "link"),
    (Path, "replace"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "write_bytes"),
    (Path, "mkdir"),
)


def watch(patch: pytest.MonkeyPatch, before: Callable[[str, Path], None]) -> None:
    """Call `before(name, path)` ahead of every operation."""
    for owner, name in OPERATIONS:
        real = getattr(owner, name)

        def wrapped(first: Any, *args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            before(name, first if isinstance(first, Path) else args[0])
            return real(first, *args, **kwargs)

        patch.setattr(owner, name, wrapped)


def life(disk: Path, told: Callable[[int], None]) -> None:
    """Saves that create, append, merge files, drop trimmed pages, link a fork, and one that is written over."""
    s = filled(runner("llama"), 700)
    s.save(disk / "x")
    told(1)
    for i in range(3):
        s.extend(words(150, i))
        s.checkpoint()
        s.save(disk / "x")
        told(2 + i)
    s.trim(600)
    s.extend(words(200, 9))
    s.save(disk / "x")
    told(5)
    s.fork().save(disk / "y")
    told(6)
    filled(runner("llama"), 300, 5).save(disk / "y")
    told(7)
    archive.export(disk / "x", disk / "x.kvfold")
    archive.import_(disk / "x.kvfold", disk / "z")
    told(8)
    archive.remove(disk / "x")
    told(9)


def test_killed_before_every_operation(tmp_path: Path) -> None:
    """What a kill leaves opens as one of the states that were saved, and not as an older one than was told."""
    lengths = {"x": [0, 700, 850, 1000, 1150, 750], "y": [0, 750, 300], "z": [0, 750]}
    least = {"x": [0, 1, 2, 3, 4, 5, 5, 5, 0, 0], "y": [0] * 6 + [1, 2, 2, 2], "z": [0] * 8 + [1, 1]}
    told, moments = [0], list[tuple[int, Path]]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "SEGMENT_BYTES", 3 * 4200 * 2)

        def keep(name: str, path: Path) -> None:
            copy = tmp_path / f"moment{len(moments)}"
            moments.append((told[0], copy))
            # Not through the operations that are watched.
            subprocess.run(["cp", "-r", tmp_path / "disk", copy], check=True)

        (tmp_path / "disk").mkdir()
        watch(patch, keep)
        life(tmp_path / "disk", lambda n: told.__setitem__(0, n))
    assert len(moments) > 60
    for done, disk in moments:
        for name, known in lengths.items():
            at = known.index(Manifest.read(disk / name).state.length) if (disk / name / NAME).exists() else 0
            assert at >= least[name][done]
            if at:
                archive.verify(disk / name)
                assert len(Session.load(disk / name, model_of("llama")).tokens) == known[at]


def test_bytes_are_synced_before_they_get_a_name_and_names_before_the_manifest(tmp_path: Path) -> None:
    """The order that a loss of power needs; a killed process alone would not show its absence."""
    steps: list[tuple[str, str]] = []
    s = filled(runner("llama"), 700)
    with pytest.MonkeyPatch.context() as patch:
        watch(patch, lambda name, path: steps.append((name, path.name)))
        s.save(tmp_path / "x")
        s.extend(words(200, 1))
        s.save(tmp_path / "x")
    named = [i for i, (name, _) in enumerate(steps) if name == "replace"]
    assert len(named) == 6  # twice a page file, a state file, a manifest
    manifests = [i for i in named if steps[i][1].startswith(NAME)]
    for i in named:
        assert steps[i - 1] == ("sync", steps[i][1])
    for i in manifests:
        written = max(j for j in range(i) if steps[j][0] == "write_bytes")
        assert steps[written - 1] == ("sync", "x")
        assert steps[i + 1] == ("sync", "x")
    kept = {name for what, name in steps[: manifests[0]] if what == "replace"}
    gone = [(i, name) for i, (what, name) in enumerate(steps) if what == "unlink" and f"{name}.tmp" in kept]
    assert gone  # the first state file
    assert all(i > manifests[1] + 1 for i, _ in gone)


@pytest.mark.parametrize("limit", [0, 1, 1000, 20_000, 60_000])
def test_a_full_disk_is_named_and_leaves_what_was_there(limit: int, tmp_path: Path) -> None:
    s = filled(runner("llama64"), 300)
    s.save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        s.extend(words(900, 1))
        for folder in ("a", "b"):
            with pytest.raises(StorageFailed, match="could not be written") as caught:
                s.save(tmp_path / folder)
            if "Free space" not in str(caught.value):
                raise AssertionError(caught.value)

    _, status = os.waitpid(in_child(work), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == before
    assert not (tmp_path / "b").exists()
    assert same(Session.load(tmp_path / "a", s.runner.model), s)
    s.extend(words(900, 1))
    s.save(tmp_path / "a")
    assert same(Session.load(tmp_path / "a", s.runner.model), s)


def test_a_store_whose_disk_is_full_forgets_only_what_nobody_named(tmp_path: Path) -> None:
    def told(s: SessionStore, seed: int) -> None:
        session = s.admit(words(300, seed), 320)
        session.extend(words(300, seed)[len(session.tokens) :])
        s.release(session)

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        s = store_at(tmp_path, 1 << 30)
        for name in NAMES[:2]:
            session = s.open(name)
            session.extend(script(name)[: 3 * STEP])
            s.release(session)
        s.budget.limit = s.nbytes + int(1.5 * s.budget.need(320, 300))
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
        for seed in range(8):
            told(s, seed)  # finds room although nothing can be written
        report = s.report()
        assert report["dropped"] > 2
        assert report["memory_bytes"] <= report["memory_limit_bytes"]
        assert all(x["in_memory"] for x in s.sessions() if x["name"] in NAMES)
        held = s.open("c")
        s.budget.limit = 1
        with pytest.raises(StorageFailed, match="Free space"):
            held.extend(words(300, 7))  # which forgets what can be and then has to write
        s.release(held)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        s.close()

    model_of("llama")
    _, status = os.waitpid(in_child(work), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    with store_at(tmp_path) as s:
        assert {*NAMES[:2]} <= {*s.names}
        for name in NAMES[:2]:
            session = s.open(name)
            assert session.tokens == script(name)[: 3 * STEP]
            s.release(session)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageFailed, match=r"Not a directory|File exists"):
        filled(runner("llama"), 20).save(tmp_path / "file" / "a")
