"""Sessions on the disk: what comes back is what was saved, bit for bit; what cannot come back is refused by name."""

from __future__ import annotations

import copy
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from talk import FAMILIES, contents, continuation, filled, model_of, pages, runner, same, words

import kvfold
from kvfold.config import PAGE_TOKENS, CacheSpec, SideSpec
from kvfold.errors import CannotTrim, DamagedSession, SessionExists, SessionNotFound, WrongModel, WrongVersion
from kvfold.sessions import archive, files, saving
from kvfold.sessions.manifest import NAME, Manifest
from kvfold.sessions.runner import Runner
from kvfold.sessions.sampler import Sampler
from kvfold.sessions.session import Session

SPLIT = SideSpec("split", 3.5, "norm", "dense")
SPECS = {
    "balanced": None,
    "no window": CacheSpec(window=0, sinks=0, centre=False),
    "wide": CacheSpec(window=200, sinks=127),
    "raw": CacheSpec(SideSpec("raw", 16), SideSpec("raw", 16), centre=False),
    "trellis": CacheSpec(SideSpec("trellis", 2.5, "unbiased"), SideSpec("trellis", 1.5, "unbiased")),
}


def reload(s: Session, folder: Path, **how: Any) -> Session:
    s.save(folder)
    return Session.load(folder, s.runner.model, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_is_uninterrupted(family: str, tmp_path: Path) -> None:
    s = filled(runner(family), 440)
    s.sampler = Sampler(temperature=0.8, top_p=0.9, seed=5, drawn=3)
    s.notes = {"title": "ünïcode", "turns": [1, 2.5, None]}
    back = reload(s, tmp_path / "a")
    assert same(back, s)
    assert back.notes == s.notes
    assert torch.equal(continuation(back, 12), continuation(s, 12))  # a page is folded at 448 tokens
    assert same(back, s)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("length", [0, 1, 3, 127, 128, 130, 333, 700])
def test_every_length_and_spec_comes_back(name: str, length: int, tmp_path: Path) -> None:
    r = runner("llama64", spec=SPECS[name])
    s = filled(r, length) if length else Session(r)
    back = reload(s, tmp_path / "a")
    assert same(back, s)
    assert back.runner.spec == s.runner.spec
    assert torch.equal(continuation(back, 2), continuation(s, 2))


def test_frozen_codec_states_come_back(tmp_path: Path) -> None:
    s = filled(Runner(model_of("llama64"), spec=CacheSpec(SPLIT, SPLIT, 0, 0, False)), 300)
    assert any(t is not None for x in s.cache.folded_layers for t in x.folded.sequences[0].state)
    back = reload(s, tmp_path / "a")
    assert same(back, s)
    assert torch.equal(continuation(back), continuation(s))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("hybrid")).to(dtype)
    s = filled(Runner(model), 300)
    back = reload(s, tmp_path / "a")
    assert same(back, s)
    assert torch.equal(continuation(back), continuation(s))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("eestlf"), st.integers(1, 300)), min_size=2, max_size=9), st.data())
def test_any_life_with_saves_equals_the_life_without(steps: list[tuple[str, int]], data: st.DataObject) -> None:
    """Extend, trim, save, load, fork in any order, against a session of the same runner that was never saved."""
    folder = Path(data.draw(st.builds(lambda: os.fspath(_fresh()))))
    r = runner("llama64")
    s, twin = Session(r), Session(r)
    for i, (what, n) in enumerate(steps):
        if what == "e":
            for x in (s, twin):
                x.extend(words(n, i))
        elif what == "t":
            for x in (s, twin):
                x.trim(min(n, len(x.tokens)))
        elif what == "s":
            s.save(folder / f"{n % 2}")
        elif what == "l" and s.saved.folder != Path():
            s.save(s.saved.folder)
            s = Session.restored(r, s.saved.folder)
        elif what == "f":
            s = s.fork()
        assert same(s, twin)
    s.save(folder / "end")
    assert same(Session.restored(r, folder / "end"), twin)
    for x in folder.iterdir():
        archive.verify(x)
    shutil.rmtree(folder)


def _fresh() -> Path:
    import tempfile

    return Path(tempfile.mkdtemp())


def test_a_save_writes_what_is_new(tmp_path: Path) -> None:
    s = filled(runner("llama64"), 1000)
    s.save(tmp_path / "a")
    before = {p.name: p.stat().st_ino for p in (tmp_path / "a").iterdir() if p.name.startswith("pages")}
    s.extend(words(150, 1))
    s.save(tmp_path / "a")
    after = {p.name: p.stat().st_ino for p in (tmp_path / "a").iterdir() if p.name.startswith("pages")}
    assert before.items() < after.items()
    assert len(after) == 2
    again = Session.load(tmp_path / "a", s.runner.model)
    again.save(tmp_path / "a")  # what was loaded counts as saved, too
    assert {p.name: p.stat().st_ino for p in (tmp_path / "a").iterdir() if p.name.startswith("pages")} == after
    assert same(again, s)


def test_many_small_saves_leave_few_files_and_no_leftovers(tmp_path: Path) -> None:
    s = filled(runner("llama64"), 64)
    written = 0
    for i in range(24):
        s.extend(words(PAGE_TOKENS, i))
        s.save(tmp_path / "a")
        made = Manifest.read(tmp_path / "a")
        assert {p.name for p in (tmp_path / "a").iterdir()} == made.files | {NAME}
        written += made.segments[-1].stored
        sizes = [x.pages for x in made.segments]
        assert sum(sizes) == i + 1
        assert all(a > b for a, b in pairwise(sizes))
    assert written <= 24 * 5.5  # every page a few times: 1 + log2(24) at most


def test_large_sessions_are_cut_into_segments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = filled(runner("llama64"), 1200)
    column = sum(x.folded.canonical_page_bytes for x in s.cache.folded_layers)
    monkeypatch.setattr(saving, "SEGMENT_BYTES", 3 * column)
    s.save(tmp_path / "a")
    assert [x.pages for x in Manifest.read(tmp_path / "a").segments] == [3, 3, 2]
    s.extend(words(700, 1))
    s.save(tmp_path / "a")
    assert [x.pages for x in Manifest.read(tmp_path / "a").segments] == [3, 3, 3, 3, 2]
    assert same(Session.load(tmp_path / "a", s.runner.model), s)


def test_space_of_trimmed_pages_is_given_back(tmp_path: Path) -> None:
    s = filled(runner("llama64"), 2000)
    s.save(tmp_path / "a")
    for i in range(4):
        s.trim(1500)
        s.extend(words(1500, i))
        s.save(tmp_path / "a")
        assert same(Session.load(tmp_path / "a", s.runner.model), s)
    assert sum(x.stored for x in Manifest.read(tmp_path / "a").segments) <= 15 + 5


def test_forks_share_files(tmp_path: Path) -> None:
    s = filled(runner("llama64"), 1000)
    s.save(tmp_path / "a")
    fork = s.fork()
    fork.extend(words(200, 1))
    fork.save(tmp_path / "b")
    inodes = [{p.stat().st_ino for p in (tmp_path / x).glob("pages*")} for x in "ab"]
    assert inodes[0] < inodes[1]
    archive.remove(tmp_path / "a")
    assert same(Session.load(tmp_path / "b", s.runner.model), fork)
    s.save(tmp_path / "c")  # what it had on the disk is gone: written anew
    assert same(Session.load(tmp_path / "c", s.runner.model), s)


@pytest.mark.parametrize("family", ["llama64", "gemma3", "hybrid"])
def test_checkpoints_come_back_and_lead_back(family: str, tmp_path: Path) -> None:
    r = runner(family)
    s = filled(r, 400)
    s.checkpoint()
    s.extend(words(300, 1))
    s.checkpoint()
    s.extend(words(30, 2))
    back = reload(s, tmp_path / "a")
    assert sorted(back.checkpoints) == [400, 700]
    for x in (s, back):
        there = x.prefix(699)
        assert there is not None
        assert same(there, filled(r, 400))
        assert sorted(there.checkpoints) == [400]
        assert x.prefix(399) is None
        assert torch.equal(continuation(there), continuation(filled(r, 400)))
    part = Session.restored(r, tmp_path / "a", upto=400)
    assert same(part, filled(r, 400))
    before = {p.name: p.stat().st_ino for p in (tmp_path / "a").iterdir() if p.name.startswith("state-0000000[47]00")}
    back.extend([5])
    back.save(tmp_path / "a")
    assert before.items() <= {p.name: p.stat().st_ino for p in (tmp_path / "a").iterdir()}.items()


def test_a_checkpoint_of_other_tokens_is_not_taken_for_the_saved_one(tmp_path: Path) -> None:
    r = runner("llama64")
    s = filled(r, 300)
    s.checkpoint()
    s.save(tmp_path / "a")
    s.trim(200)
    s.extend(words(200, 9))
    s.checkpoint()
    s.extend([5])
    back = reload(s, tmp_path / "a")
    assert contents(back.checkpoints[300]) == contents(s.checkpoints[300])


@pytest.mark.parametrize("way", [("cpu", "torch"), ("torch", "cpu"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_engines_read_each_others_sessions(way: tuple[str, str], tmp_path: Path) -> None:
    """Codes, means, scales and exact tokens are the same bytes; logits agree as engines do."""
    if "cuda" in way and not torch.cuda.is_available():
        pytest.skip("device is cpu, not cuda")
    sessions = []
    for backend in way:
        model = copy.deepcopy(model_of("llama64")).to("cuda" if backend == "cuda" else "cpu")
        if not sessions:
            s = filled(Runner(model, backend=backend), 700)
            s.save(tmp_path / "a")
            sessions.append(s)
        else:
            sessions.append(Session.load(tmp_path / "a", model, backend=backend))
    a, b = sessions
    assert {x.folded.engine.name for x in b.cache.folded_layers} == {way[1]}
    assert pages(a) == pages(b)
    assert contents(a.cache) == contents(b.cache)
    b.fork().save(tmp_path / "b")
    names = [sorted(p.name for p in (tmp_path / x).glob("pages*")) for x in "ab"]
    assert names[0] == names[1]  # names hold digests of the checksums
    got, want = (continuation(x).cpu() for x in (b, a))
    assert float((got - want).abs().max()) < 1e-3 * float(want.abs().max())


# Refusals


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    model = model_of("llama")
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SessionNotFound, match="no session at"):
            Session.load(path, model)
    with pytest.raises(SessionNotFound):
        archive.verify(tmp_path / "none")
    with pytest.raises(SessionNotFound):
        archive.remove(tmp_path / "none")


def test_what_is_not_a_session_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(SessionExists, match="cat"):
        filled(runner("llama"), 20).save(tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_saved_session_can_be_replaced_by_another(tmp_path: Path) -> None:
    filled(runner("llama"), 700).save(tmp_path / "a")
    s = filled(runner("llama"), 300, 1)
    s.save(tmp_path / "a")
    assert same(Session.load(tmp_path / "a", s.runner.model), s)
    assert {p.name for p in (tmp_path / "a").iterdir()} == Manifest.read(tmp_path / "a").files | {NAME}


def _other_weights(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1
    return model


def _other_config(model: Any) -> Any:
    model.config.rms_norm_eps *= 2
    return model


class OtherTokenizer:
    """Numbers words otherwise."""

    def __init__(self, shift: int) -> None:
        self.shift = shift

    def get_vocab(self) -> dict[str, int]:
        return {w: i + self.shift for i, w in enumerate("abc")}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(text) + self.shift]}


@pytest.mark.parametrize(
    ("change", "named"),
    [(_other_weights, "weights"), (_other_config, "config"), (lambda m: m.to(torch.bfloat16), "tensors")],
)
def test_another_model_is_refused_by_name(change: Any, named: str, tmp_path: Path) -> None:
    filled(runner("llama"), 300).save(tmp_path / "a")
    with pytest.raises(WrongModel, match=rf"another model: .*{named}"):
        Session.load(tmp_path / "a", change(copy.deepcopy(model_of("llama"))))


def test_another_tokenizer_is_refused_and_an_unknown_one_is_not(tmp_path: Path) -> None:
    model = model_of("llama")
    filled(Runner(model, OtherTokenizer(0)), 30).save(tmp_path / "a")
    with pytest.raises(WrongModel, match="another model: tokenizer"):
        Session.load(tmp_path / "a", model, OtherTokenizer(1))
    assert len(Session.load(tmp_path / "a", model).tokens) == 30
    assert len(Session.load(tmp_path / "a", model, OtherTokenizer(0)).tokens) == 30


def test_settings_that_change_nothing_change_no_fingerprint() -> None:
    model = copy.deepcopy(model_of("llama"))
    before = Runner(model).fingerprint
    model.config.use_cache, model.config.pad_token_id, model.config._name_or_path = False, 5, "elsewhere"
    kvfold.detach(model)
    assert Runner(model).fingerprint == before


def test_adapters_are_part_of_the_model() -> None:
    class Setting:
        def __init__(self, alpha: int) -> None:
            self.alpha = alpha

        def to_dict(self) -> dict[str, int]:
            return {"lora_alpha": self.alpha}

    prints = []
    for alpha in (8, 16):
        model = copy.deepcopy(model_of("llama"))
        model.peft_config, model.active_adapters = {"default": Setting(alpha)}, ["default"]
        prints.append(Runner(model).fingerprint)
    assert [k for k in prints[0] if prints[0][k] != prints[1][k]] == ["adapters"]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    filled(runner("llama"), 300).save(tmp_path / "a")
    with pytest.raises(WrongModel, match=r"profile 'balanced' .*Load it with profile 'balanced'"):
        Session.restored(runner("llama", profile="compact"), tmp_path / "a")


def resign(folder: Path, **changes: Any) -> None:
    """Change a manifest and its seal."""
    line = (folder / NAME).read_bytes().split(b"\n")[0]
    data = {**json.loads(line), **changes}
    line = json.dumps(data).encode()
    (folder / NAME).write_bytes(line + b"\n" + json.dumps({"xxh3_128": files.digest(line)}).encode() + b"\n")


@pytest.mark.parametrize("name", ["version", "page_version"])
def test_a_newer_format_is_refused(name: str, tmp_path: Path) -> None:
    filled(runner("llama"), 30).save(tmp_path / "a")
    resign(tmp_path / "a", **{name: 2}, writer="9.9", news="?")
    with pytest.raises(WrongVersion, match=r"reads up to 1\. Upgrade kvfold .*9\.9"):
        Session.load(tmp_path / "a", model_of("llama"))


@pytest.mark.parametrize("family", ["llama64", "hybrid"])
def test_a_session_in_use_or_broken_is_not_saved(family: str, tmp_path: Path) -> None:
    s = filled(runner(family), 30)
    s.cache.guard.hold()
    with pytest.raises(kvfold.KvfoldError, match="two calls at once"):
        s.save(tmp_path / "a")
    s.cache.guard.free()
    s.save(tmp_path / "a")
    hook = s.runner.model.model.layers[0].mlp.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises((ZeroDivisionError, CannotTrim)):
        s.extend([5])
    hook.remove()
    if family == "hybrid":
        with pytest.raises(kvfold.KvfoldError, match="did not finish"):
            s.save(tmp_path / "a")
    assert len(Session.load(tmp_path / "a", s.runner.model).tokens) == 30


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Session, Path]:
    s = filled(runner("llama64"), 1000)
    column = sum(x.folded.canonical_page_bytes for x in s.cache.folded_layers)
    monkeypatch.setattr(saving, "SEGMENT_BYTES", 3 * column)
    s.save(tmp_path / "a")
    return s, tmp_path / "a"


def segment(folder: Path, number: int) -> Path:
    return folder / Manifest.read(folder).segments[number].file


def test_a_damaged_page_is_named_and_what_is_before_it_can_be_had(damaged: tuple[Session, Path]) -> None:
    s, folder = damaged
    flip(segment(folder, 1), -1)  # the last byte of the last layer's page 5
    with pytest.raises(DamagedSession, match=r"page 5 of layer 1 .* first 640 tokens") as caught:
        Session.load(folder, s.runner.model)
    assert caught.value.prefix_tokens == 640
    with pytest.raises(DamagedSession, match="page 5 of layer 1"):
        archive.verify(folder)
    part = Session.load(folder, s.runner.model, undamaged=True)
    s.trim(1000 - 640)
    assert same(part, s)
    assert torch.equal(continuation(part), continuation(s))
    part.save(folder)
    archive.verify(folder)
    assert same(Session.load(folder, s.runner.model), part)


@pytest.mark.parametrize("how", ["header", "tokens", "cut", "gone", "empty", "foreign"])
def test_a_damaged_page_file_costs_its_pages(how: str, damaged: tuple[Session, Path]) -> None:
    s, folder = damaged
    path = segment(folder, 1)
    data = path.read_bytes()
    if how == "header":
        flip(path, 3)
    elif how == "tokens":
        flip(path, data.index(torch.tensor(s.tokens[384:400], dtype=torch.int32).numpy().tobytes()))
    elif how == "cut":
        path.write_bytes(data[:-5])
    elif how == "gone":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(segment(folder, 0).read_bytes())
    with pytest.raises(DamagedSession, match="first 384 tokens"):
        Session.load(folder, s.runner.model)
    assert Session.load(folder, s.runner.model, undamaged=True).tokens == s.tokens[:384]


@pytest.mark.parametrize("how", ["flip", "cut", "gone", "empty"])
def test_a_damaged_state_file_costs_the_exact_tokens(how: str, damaged: tuple[Session, Path]) -> None:
    s, folder = damaged
    path = folder / Manifest.read(folder).state.file
    if how == "flip":
        flip(path, path.stat().st_size // 2)
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(DamagedSession, match="first 896 tokens"):
        Session.load(folder, s.runner.model)
    assert Session.load(folder, s.runner.model, undamaged=True).tokens == s.tokens[:896]


def test_a_damaged_hybrid_goes_back_to_a_checkpoint(tmp_path: Path) -> None:
    r = runner("hybrid")
    s = filled(r, 400)
    s.checkpoint()
    s.extend(words(500, 1))
    s.save(tmp_path / "a")
    flip(segment(tmp_path / "a", 0), -1)
    with pytest.raises(DamagedSession, match="first 400 tokens"):
        Session.load(tmp_path / "a", r.model)
    part = Session.load(tmp_path / "a", r.model, undamaged=True)
    assert same(part, filled(r, 400))
    bare = filled(r, 400)
    bare.save(tmp_path / "b")
    flip(tmp_path / "b" / Manifest.read(tmp_path / "b").state.file, -1)
    for undamaged in (False, True):  # nothing to go back to
        with pytest.raises(DamagedSession, match="prefill it again"):
            Session.load(tmp_path / "b", r.model, undamaged=undamaged)


@pytest.mark.parametrize("content", [b"", b"\n", b"{}\n{}\n", b"\x00" * 100, b"[" * 100_000])
def test_a_damaged_manifest_is_named(content: bytes, damaged: tuple[Session, Path]) -> None:
    s, folder = damaged
    (folder / NAME).write_bytes(content)
    with pytest.raises(DamagedSession, match=NAME):
        Session.load(folder, s.runner.model)


@pytest.mark.parametrize(
    "changes",
    [
        {"state": None},
        {"segments": [{"file": "../../x", "first": 0, "pages": 7, "stored": 7, "index": ""}]},
        {"segments": []},
        {"layers": []},
        {"sampler": {"heat": 1}},
        {"spec": {"key": {}, "value": {}, "window": -1}},
        {"spec": {}},
        {"version": "1"},
        {"layers": [{"kind": "folded", "kv_heads": 1.5, "head_dim": 1, "dtype": "x", "page_bytes": 1}] * 2},
    ],
)
def test_a_sealed_but_senseless_manifest_is_refused(changes: dict[str, Any], damaged: tuple[Session, Path]) -> None:
    s, folder = damaged
    resign(folder, **changes)
    with pytest.raises(kvfold.KvfoldError):
        Session.load(folder, s.runner.model)


# One file


@pytest.mark.parametrize("family", ["llama64", "hybrid"])
def test_export_and_import_make_the_same_session(family: str, tmp_path: Path) -> None:
    s = filled(runner(family), 500)
    s.save(tmp_path / "a")
    archive.export(tmp_path / "a", tmp_path / "one.kvfold")
    archive.import_(tmp_path / "one.kvfold", tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
    assert same(Session.load(tmp_path / "b", s.runner.model), s)
    archive.export(tmp_path / "b", tmp_path / "two.kvfold")
    assert (tmp_path / "one.kvfold").read_bytes() == (tmp_path / "two.kvfold").read_bytes()
    with pytest.raises(SessionExists):
        archive.export(tmp_path / "a", tmp_path / "one.kvfold")
    with pytest.raises(SessionExists):
        archive.import_(tmp_path / "one.kvfold", tmp_path / "a")


@pytest.mark.parametrize("how", ["flip", "cut", "text", "gone"])
def test_a_damaged_archive_makes_no_session(how: str, tmp_path: Path) -> None:
    filled(runner("llama"), 300).save(tmp_path / "a")
    one = tmp_path / "one.kvfold"
    archive.export(tmp_path / "a", one)
    if how == "flip":
        flip(one, one.stat().st_size // 2)
    elif how == "cut":
        one.write_bytes(one.read_bytes()[:-500])
    elif how == "text":
        one.write_text("hello")
    else:
        one.unlink()
    with pytest.raises((DamagedSession, SessionNotFound)):
        archive.import_(one, tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["a"]


@pytest.mark.parametrize(
    "name", ["../evil", "/evil", "manifest.jsonl/../../evil", "other.txt", "state-0/../../x.safetensors"]
)
def test_archives_write_only_files_of_a_session(name: str, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.kvfold", "w") as out:
        out.writestr(name, b"evil")
    with pytest.raises(DamagedSession, match="not of a session"):
        archive.import_(tmp_path / "x.kvfold", tmp_path / "in" / "b")
    assert [p.name for p in tmp_path.rglob("*")] == ["x.kvfold", "in"] or not list((tmp_path / "in").iterdir())


def test_info_tells_without_a_model(tmp_path: Path) -> None:
    s = filled(runner("llama64"), 700)
    s.save(tmp_path / "a")
    told = archive.info(tmp_path / "a")
    size = sum(p.stat().st_size for p in (tmp_path / "a").iterdir())
    assert (told["tokens"], told["folded_tokens"], told["disk_bytes"], told["profile"]) == (700, 512, size, "balanced")
    assert told["page_bytes"] == sum(len(b) for layer in pages(s) for b in layer)
    assert told["bits_per_value"] == pytest.approx(s.report()["layers"][0]["bits_per_value"], rel=0.01)
