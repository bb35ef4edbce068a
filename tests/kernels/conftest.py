"""Triton's interpreter for machines without a GPU. It must be asked for before triton is imported, by whomever."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _interpret(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the Triton engine run on the CPU in tests that name it; elsewhere it would be the choice of nobody."""
    values = getattr(getattr(request.node, "callspec", None), "params", {}).values()
    if "triton" in values and os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr("kvfold.engine.triton.engine.DEVICES", ("cpu",))
