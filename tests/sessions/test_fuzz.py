"""Session files with anything done to them: loaded as they were, or refused by name. No crash, no hang, no wrong load."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from talk import contents, filled, runner, words

from kvfold.errors import KvfoldError, SessionError
from kvfold.sessions import archive, files, saving
from kvfold.sessions.manifest import NAME
from kvfold.sessions.session import Session

Files = dict[str, bytes]
SECONDS = 20  # a load of these sessions takes a hundredth


def flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 20))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray) -> None:
    at, n = rng.randrange(len(data)), rng.randrange(1, 200)
    data[at : at + n] = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))[: len(data) - at]


def cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.randbytes(rng.randrange(1, 50))


def remove(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randrange(1, 100)]


def swap_blocks(rng: random.Random, data: bytearray) -> None:
    n = rng.randrange(1, max(2, len(data) // 3))
    a, b = rng.randrange(len(data) - n + 1), rng.randrange(len(data) - n + 1)
    data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]


def header(rng: random.Random, data: bytearray) -> None:
    """Digits of the first kilobyte, where safetensors keeps sizes and offsets and manifests their counts."""
    digits = [i for i, c in enumerate(data[:1000]) if 48 <= c < 58]
    for i in rng.sample(digits, min(len(digits), 3)):
        data[i] = 48 + rng.randrange(10)


BYTES: tuple[Callable[[random.Random, bytearray], None], ...] = (
    flip_bits,
    overwrite,
    cut,
    insert,
    remove,
    swap_blocks,
    header,
)


def mutate(rng: random.Random, original: Files, other: Files) -> Files:
    """One thing done to one file, or to the folder."""
    changed = dict(original)
    name = rng.choice(sorted(changed))
    what = rng.random()
    if what < 0.8:
        data = bytearray(changed[name])
        rng.choice(BYTES)(rng, data)
        changed[name] = bytes(data)
    elif what < 0.85:
        del changed[name]
    elif what < 0.9:
        changed[name] = rng.choice(sorted(other.values()))  # a file of another session under this name
    elif what < 0.95:
        second = rng.choice(sorted(changed))
        changed[name], changed[second] = changed[second], changed[name]
    else:
        changed[NAME] = sealed(rng, changed[NAME])
    return changed


def sealed(rng: random.Random, manifest: bytes) -> bytes:
    """A manifest that says something else and has the right seal: made on purpose, not by damage."""
    data = json.loads(manifest.split(b"\n")[0])
    owner = data
    while True:
        key = rng.choice(sorted(owner)) if isinstance(owner, dict) else rng.randrange(len(owner))
        if isinstance(owner[key], dict | list) and owner[key] and rng.random() < 0.8:
            owner = owner[key]
            continue
        owner[key] = rng.choice((None, -1, 0, 1, 2**70, 1e300, "", "x" * 300, [], {}, [[]], True, "../a", 129))
        break
    line = json.dumps(data).encode()
    return line + b"\n" + json.dumps({"xxh3_128": files.digest(line)}).encode() + b"\n"


def read(folder: Path) -> Files:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def write(folder: Path, content: Files, there: Files) -> None:
    """Make a folder hold `content` where it held `there`."""
    folder.mkdir(exist_ok=True)
    for name in there.keys() - content.keys():
        (folder / name).unlink()
    for name, data in content.items():
        if there.get(name) != data:
            (folder / name).write_bytes(data)


def fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, times: int) -> tuple[int, int]:
    """How many mutations were loaded, and how many refused."""
    r = runner(family)
    monkeypatch.setattr(saving, "SEGMENT_BYTES", 1 << 14)  # several page files
    s = filled(r, 400)
    s.checkpoint()
    s.extend(words(60, 1))
    s.save(tmp_path / "a")
    filled(r, 460, 2).save(tmp_path / "b")
    original, other = read(tmp_path / "a"), read(tmp_path / "b")
    whole = contents(s.cache)
    beginnings = {n: contents(c) for n, c in ((460, s.cache), *s.checkpoints.items())}
    rng = random.Random(times)
    there: Files = {}
    back = part = None
    loaded = refused = 0
    for _ in range(times):
        changed = mutate(rng, original, other)
        write(tmp_path / "x", changed, there)
        there = changed
        began = time.monotonic()
        on_purpose = changed[NAME] != original[NAME] if NAME in changed else False
        try:
            back = Session.restored(r, tmp_path / "x")
            loaded += 1
            if not on_purpose:
                assert (back.tokens, contents(back.cache)) == (s.tokens, whole)
        except SessionError as error:
            refused += 1
            prefix = getattr(error, "prefix_tokens", 0)
            if prefix and not on_purpose:
                part = Session.restored(r, tmp_path / "x", undamaged=True)
                assert part.tokens == s.tokens[:prefix]
                if prefix in beginnings:
                    assert contents(part.cache) == beginnings[prefix]
        except KvfoldError:
            assert on_purpose
        assert time.monotonic() - began < SECONDS
        if changed == original:
            assert archive.verify(tmp_path / "x")["whole"]
    assert refused > 0.7 * times
    del back, part
    gc.collect()
    assert {p: x.folded.pool.pages_used for p, x in enumerate(s.cache.folded_layers)} == {
        p: len(x.folded.sequences[0].pages) for p, x in enumerate(s.cache.folded_layers)
    }  # no load, failed or not, kept a page
    return loaded, refused


@pytest.mark.parametrize("family", ["llama", "hybrid"])
def test_mutations(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuzz(tmp_path, monkeypatch, family, 200)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "hybrid"])
def test_ten_thousand_mutations(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    loaded, refused = fuzz(tmp_path, monkeypatch, family, 10_000)
    record_property("mutations", 10_000)
    record_property("mutations without effect on what is loaded", loaded)
    record_property("mutations refused by name", refused)


def test_archives_with_anything_done_to_them(tmp_path: Path) -> None:
    s = filled(runner("llama"), 300)
    s.save(tmp_path / "a")
    archive.export(tmp_path / "a", tmp_path / "one")
    original, wanted = (tmp_path / "one").read_bytes(), read(tmp_path / "a")
    rng = random.Random(0)
    for i in range(150):
        data = bytearray(original)
        BYTES[i % len(BYTES)](rng, data)
        (tmp_path / "x").write_bytes(data)
        try:
            archive.import_(tmp_path / "x", tmp_path / "in")
        except SessionError:
            assert not (tmp_path / "in").exists()
        else:
            assert read(tmp_path / "in") == wanted
            archive.remove(tmp_path / "in")
