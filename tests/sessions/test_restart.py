"""A process saves a session and goes on; another loads it and goes on: the same tokens and logits, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import SHIPPED, model_source


def run(*arguments: object) -> str:
    command = [sys.executable, Path(__file__).with_name("resume.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=500).stdout


@pytest.mark.parametrize("name", [SHIPPED, "recall-hybrid-15m"])
def test_a_restart_changes_nothing(name: str, tmp_path: Path) -> None:
    source = model_source(name)
    uninterrupted = run(source, tmp_path / "a", "save")
    assert run(source, tmp_path / "a", "continue") == uninterrupted
