"""`kvfold plan` as users run it, and where it finds models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import model_source

from kvfold.cli import main
from kvfold.cli.common import as_size, size
from kvfold.errors import InvalidConfig, ModelError, UnsupportedModel
from kvfold.evaluation.memory import peak, planned
from kvfold.loading import demo_folder, describe

CONFIGS = Path(__file__).parent / "configs"
KEYS = {
    "reference_bytes", "folded_bytes", "state_bytes", "weights_bytes", "workspace_bytes", "total_bytes",
    "total_reference_bytes", "layers", "fits", "max_context",
}  # fmt: skip
FEW_GIB = "24GiB"


Output = pytest.CaptureFixture[str]


@pytest.fixture
def run(capsys: Output) -> Callable[..., tuple[int, str]]:
    """(exit code, stdout) of a command, in this process."""

    def command(*arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["plan", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().out

    return command


Run = Callable[..., tuple[int, str]]


def plan_of(run: Run, *arguments: str) -> dict[str, Any]:
    code, out = run(*arguments, "--json")
    assert code == 0, out
    return dict(json.loads(out))


def test_the_shipped_model(run: Run) -> None:
    r = plan_of(run, "demo", "--context", "32k", "--sessions", "2", "--memory", FEW_GIB, "--profile", "compact")
    assert set(r) >= KEYS
    assert (len(r["layers"]), r["context"], r["sessions"], r["fits"]) == (6, 32_768, 2, True)
    assert r["weights_bytes"] == describe("demo").weights.bytes  # type: ignore[union-attr]
    assert r["total_bytes"] == sum(r[f"{k}_bytes"] for k in ("folded", "state", "weights", "workspace"))


def test_yes_and_no_name_the_binding_term(run: Run) -> None:
    code, out = run("demo", "--context", "1M", "--fits", "1GiB")
    assert code == 0
    assert out.rstrip().splitlines()[-1].startswith("no: the largest term is folded, ")
    code, out = run("demo", "--context", "1k", "--fits", "1GiB")
    assert code == 0
    assert out.rstrip().splitlines()[-1].startswith("yes: the largest term is ")


def test_comparison_with_a_chart(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    code, out = run("demo", "--context", "32k", "--compare", "--plot", str(picture))
    assert code == 0
    assert "█" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = plan_of(run, "demo", "--context", "32k", "--compare")["rows"]
    assert {"balanced", "compact", "lossless", "faithful-2.5"} <= {r["profile"] for r in rows}


def test_a_config_alone_counts_its_parameters() -> None:
    described = describe(str(CONFIGS / "qwen2.5-7b.json"))
    assert described.weights is not None
    assert described.weights.parameters == 7_615_616_512
    assert described.weights.bytes == 2 * 7_615_616_512


def test_a_hub_id_in_the_local_cache(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "models--some--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    shutil.copytree(demo_folder(), repo / "snapshots" / "abc123")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    r = plan_of(run, "some/model", "--context", "4k", "--offline")
    assert r == plan_of(run, "demo", "--context", "4k")
    code, out = run("some/other", "--context", "4k", "--offline", "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (1, "ModelNotFound")


NO_TORCH = """
import sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from kvfold.cli import main
main(["plan", *sys.argv[1:]])
"""


def test_without_torch() -> None:
    """NumPy and typer are enough: pages are then the canonical ones."""
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, str(CONFIGS / "kimi-linear-48b.json"), "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    r = json.loads(done.stdout)
    assert (r["weights_bytes"], r["context"]) == (0, 1_048_576)


def test_what_is_refused(run: Run, tmp_path: Path) -> None:
    for content, named in (("{", ModelError), ("{}", UnsupportedModel), ('{"hidden_size": 3}', UnsupportedModel)):
        path = tmp_path / "config.json"
        path.write_text(content)
        with pytest.raises(named):
            describe(str(path))
    shutil.copy(demo_folder() / "config.json", path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ModelError, match="not a safetensors file"):
        describe(str(tmp_path))
    for wrong in (("--weights-bits", "4", "--dtype", "int3"), ("--memory", "24"), ("--memory", "1GB", "--fits", "2GB")):
        code, out = run("demo", *wrong, "--json")
        assert (code, json.loads(out)["error"]["kind"]) == (1, "InvalidConfig") if wrong[1] != "24" else code == 0


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GiB", 24 << 30), ("24gb", 24_000_000_000), ("1.5 MiB", 3 << 19), ("7", 7), ("2k", 2000)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size(text, "--memory") == nbytes


def test_sizes_that_are_none() -> None:
    for text in ("", "GiB", "1XB", "-1GB"):
        with pytest.raises(InvalidConfig, match="24GiB"):
            size(text, "--memory")
    assert (as_size(0), as_size(1536), as_size(3 << 40)) == ("0 B", "1.50 KiB", "3.00 TiB")


def error_of_plan(source: str, context: int) -> float:
    return planned(source, context, "balanced", peak("folded", source, context, "balanced"))["plan_error"]


def test_peak_memory_of_a_process_is_the_planned_one() -> None:
    """Prefill in calls of 2,048 and 64 steps in a process of its own; within 3 %."""
    assert abs(error_of_plan("demo", 4096)) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recall-hybrid-15m", "recall-biased-12m"])
def test_peak_memory_of_other_models(name: str) -> None:
    assert abs(error_of_plan(model_source(name), 8192)) < 0.03
