"""Shared fixtures, and the rule that a skip must be on the list where that rule is switched on."""

from __future__ import annotations

import os
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    # Before anything imports triton, as transformers and torchao do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHIPPED = "recall-llama-12m"
# Tests of engines that live in environments of their own: `make test-vllm` runs these.
collect_ignore = [] if find_spec("vllm") else ["vllm"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--allowed-skips", help="file of skip reasons, one per line; any other skip fails the run")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(int(os.environ.get("KVFOLD_TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def _own_seed(request: pytest.FixtureRequest) -> None:
    """A test's inputs depend on its name alone, not on what ran before it in the same worker."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


def model_source(name: str) -> str:
    """`demo` for the shipped model; a folder of KVFOLD_TEST_MODELS for the others, or a skip."""
    if name == SHIPPED:
        return "demo"
    folder = os.environ.get("KVFOLD_TEST_MODELS")
    if not folder:
        pytest.skip("KVFOLD_TEST_MODELS is not set")
    return str(Path(folder) / name)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    allowed_file = session.config.getoption("--allowed-skips")
    if not allowed_file:
        return
    allowed = [x.strip() for x in Path(allowed_file).read_text().splitlines() if x.strip() and not x.startswith("#")]
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    surprises = set()
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(a in reason for a in allowed):
            surprises.add(f"{report.nodeid}: {reason}")
    if surprises:
        reporter.write_line("skips that are not on the list:\n  " + "\n  ".join(sorted(surprises)), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
