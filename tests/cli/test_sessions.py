"""kvfold sessions: what a user types, in this process; errors and exit codes as everywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvfold.cli.main import main
from kvfold.loading import load
from kvfold.sessions.session import Session

TEXT = "A session is the tokens of one conversation and what the model made of them. " * 20


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    disk = tmp_path_factory.mktemp("sessions")
    loaded = load("demo")
    s = Session.new(loaded.model, loaded.tokenizer)
    s.notes = {"title": "about sessions"}
    s.extend(loaded.tokenizer(TEXT)["input_ids"])
    s.save(disk / "talk")
    s.save(disk / "broken")
    page_file = next((disk / "broken").glob("pages*"))
    data = bytearray(page_file.read_bytes())
    data[-1] ^= 1
    page_file.unlink()  # it was linked to
    page_file.write_bytes(data)
    return disk


@pytest.fixture
def run(saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("KVFOLD_SESSIONS", str(saved))

    def call(*arguments: object, code: int = 0, as_json: bool = True) -> Any:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["sessions", *map(str, arguments), *(["--json"] if as_json else [])])
        out = capsys.readouterr().out
        assert end.value.code == code, out
        return json.loads(out) if as_json else out

    return call


def test_ls(run: Any, saved: Path) -> None:
    rows = run("ls")["sessions"]
    assert [r["name"] for r in rows] == ["broken", "talk"]
    assert rows[1]["tokens"] > 300
    assert rows[1]["disk_bytes"] == sum(p.stat().st_size for p in (saved / "talk").iterdir())
    assert "talk" in run("ls", as_json=False)
    assert run("ls", "--disk", saved / "nowhere")["sessions"] == []


def test_info(run: Any) -> None:
    told = run("info", "talk")
    assert (told["profile"], told["architecture"], told["notes"]) == ("balanced", "llama", {"title": "about sessions"})
    assert "balanced" in run("info", "talk", as_json=False)
    assert run("info", "nobody", code=1)["error"]["kind"] == "SessionNotFound"
    assert run("info", "../talk", code=1)["error"]["kind"] == "SessionNotFound"  # a path, and there is none


def test_verify(run: Any, saved: Path) -> None:
    assert run("verify", "talk")["whole"] is True
    error = run("verify", "broken", code=1)["error"]
    assert error["kind"] == "DamagedSession"
    assert "does not agree with its checksum" in error["message"]
    told = run("verify", saved / "talk", "--model", "demo", "--full")
    assert told["model"] == "the same"
    assert "full" in told["compared"]
    error = run("verify", "talk", "--model", "demo", "--dtype", "float32", code=1)["error"]
    assert error["kind"] == "WrongModel"
    assert "tensors" in error["message"]
    assert run("verify", "talk", "--full", code=1)["error"]["kind"] == "WrongModel"


def test_export_import_rm(run: Any, tmp_path: Path) -> None:
    assert run("export", "talk", tmp_path / "one.kvfold")["bytes"] == (tmp_path / "one.kvfold").stat().st_size
    assert run("export", "talk", tmp_path / "one.kvfold", code=1)["error"]["kind"] == "SessionExists"
    run("import", tmp_path / "one.kvfold", "moved")
    assert run("info", "moved")["tokens"] == run("info", "talk")["tokens"]
    assert run("import", tmp_path / "one.kvfold", "moved", code=1)["error"]["kind"] == "SessionExists"
    assert "removed" in run("rm", "moved", as_json=False)
    assert run("rm", "moved", code=1)["error"]["kind"] == "SessionNotFound"
    run("import", tmp_path / "one.kvfold", "elsewhere", "--disk", tmp_path / "disk", as_json=False)
    assert [r["name"] for r in run("ls", "--disk", tmp_path / "disk")["sessions"]] == ["elsewhere"]
