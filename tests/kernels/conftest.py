"""Triton's interpreter for machines without a GPU (tests/conftest.py asks for it)."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _interpret(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the Triton engine run on the CPU in tests that name it; elsewhere it would be the choice of nobody."""
    values = getattr(getattr(request.node, "callspec", None), "params", {}).values()
    if "triton" in values and os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("kvfold.engine.triton.engine.DEVICES", ("cpu",))
