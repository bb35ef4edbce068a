"""The C++ engine beyond its Python tests: sanitizers, another processor under qemu, and the compilers of other systems."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDS = {
    "sanitize": ("cmake",),
    "aarch64": ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64"),
    "zig": ("cmake", "qemu-aarch64"),
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("leg", NEEDS)
def test_levels_agree(leg: str) -> None:
    """Builds with warnings as errors, then every level against the scalar one, with buffers that end at guard pages."""
    # cmake and ziglang come with the development environment, whose scripts may not be on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    for tool in NEEDS[leg]:
        if not shutil.which(tool, path=path):
            pytest.skip(f"{tool} is not installed")
    done = subprocess.run(
        [ROOT / "scripts" / "ci-native", leg],
        env={**os.environ, "PATH": path, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=2400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SKIP" not in done.stdout
    assert "all levels agree" in done.stdout
