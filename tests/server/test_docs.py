"""The examples of docs/server.md and docs/sessions.md, run as they stand."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.server.running import Running

from kvfold.server.app import create_app
from kvfold.server.guard import Rules

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.mark.parametrize("number", range(2))
def test_clients(served: Running, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks("server.md", "python")[number].replace("http://localhost:8000", served.url), {})
    assert len(capsys.readouterr().out) > 10


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Running) -> None:
    (command,) = (b for b in blocks("server.md", "sh") if b.startswith("curl"))
    done = subprocess.run(
        command.replace("http://localhost:8000", served.url), shell=True, capture_output=True, text=True
    )
    assert done.stdout.endswith("data: [DONE]\n\n"), done.stderr


@pytest.mark.parametrize("number", range(2))
def test_sessions(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(blocks("sessions.md", "python")[number], {})
    assert list(tmp_path.glob("*/*/manifest.jsonl"))


def test_every_endpoint_is_told() -> None:
    no_service: object = None
    told = (DOCS / "server.md").read_text()
    for path in create_app(no_service, Rules()).openapi()["paths"]:  # type: ignore[arg-type]
        known = re.sub(r"\{\w+(:path)?\}", "{", path).split("{")[0].rstrip("/")
        assert known in told, path
