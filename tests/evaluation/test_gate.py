"""The gate and the search for a profile: they pass what keeps its tolerance and fail what does not; profiles are data."""

from __future__ import annotations

import csv
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from kvfold import profiles
from kvfold.cli.main import main
from kvfold.errors import InvalidConfig
from kvfold.evaluation.divergence import worst
from kvfold.evaluation.gate import failures
from kvfold.profiles import Tolerance, levels, load, names, parsed

SMALL = ["--windows", "1", "--window-tokens", "512", "--json"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    with pytest.raises(SystemExit) as left:
        main([*arguments, *SMALL])
    return int(left.value.code or 0), json.loads(capsys.readouterr().out)


def test_the_gate_fails_what_its_profile_does_not_promise(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text('base = "extreme"\npurpose = "x"\n[tolerance]\nkld_mean = 1e-6\ntop1_agreement = 0.5\n')
    code, result = run(capsys, "eval", "demo", "--profile", str(strict), "--gate")
    assert (code, result["gate_passed"]) == (1, False)
    assert len(result["gate_failures"]) == 1
    assert result["gate_failures"][0].startswith("kld_mean ")
    code, result = run(capsys, "eval", "demo", "--profile", "balanced", "--gate")
    assert (code, result["gate_passed"], result["gate_failures"]) == (0, True, [])


def test_a_profile_without_a_tolerance_has_no_gate(capsys: pytest.CaptureFixture[str]) -> None:
    code, result = run(capsys, "eval", "demo", "--profile", "faithful-2.5", "--gate")
    assert (code, result["error"]["kind"]) == (1, "InvalidConfig")
    assert "balanced" in result["error"]["cure"]


def test_tune_finds_the_smallest_that_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    code, found = run(capsys, "tune", "demo", "--max-kld", "0.006", "--min-top1", "0.9", "--output", str(own))
    assert code == 0
    assert [r["passed"] for r in found["rows"]] == [False] * (len(found["rows"]) - 1) + [True]
    assert found["rows"][-1]["profile"] == found["profile"] == load(str(own)).base
    bits = [r["bits_per_value"] for r in found["rows"]]
    assert bits == sorted(bits)
    assert load(str(own)).spec == load(found["profile"]).spec
    assert load(str(own)).tolerance == Tolerance(0.006, 0.9)


def test_tune_finds_the_closest_that_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    arguments = ["--memory", "33MB", "--context", "32k", "--output", str(own)]
    code, found = run(capsys, "tune", "demo", *arguments)
    assert code == 0
    tried = {r["profile"]: r for r in found["rows"]}
    assert {"extreme", "ultra"} <= set(tried)
    assert "balanced" not in tried
    assert all(r["planned_bytes"] <= 33_000_000 for r in tried.values())
    assert found["profile"] == min(tried, key=lambda n: tried[n]["kld_mean"]) == load(str(own)).base
    assert load(str(own)).tolerance == load(found["profile"]).tolerance
    code, result = run(capsys, "tune", "demo", *arguments, "--max-kld", "1e-7")
    assert (code, result["error"]["kind"]) == (1, "EvaluationError")
    assert found["profile"] in result["error"]["cure"]
    code, result = run(capsys, "tune", "demo", "--memory", "1MB", "--context", "32k")
    assert (code, result["error"]["kind"]) == (1, "EvaluationError")
    code, result = run(capsys, "tune", "demo", "--context", "32k")
    assert (code, result["error"]["kind"]) == (1, "InvalidConfig")


def test_failures_name_figure_and_limit() -> None:
    figures = {"kld_mean": 0.01, "kld_se": 0.001, "top1_agreement": 0.9, "positions": 10_000}
    assert failures(figures, Tolerance(0.0081, 0.894)) == []
    broken = failures(figures, Tolerance(0.0079, 0.91))
    assert [x.split()[0] for x in broken] == ["kld_mean", "top1_agreement"]


def test_the_worst_position_is_found() -> None:
    kl = torch.zeros(30, dtype=torch.float64)
    kl[20 + 7] = 1.0
    same = torch.ones(30, dtype=torch.bool)
    same[[3, 27]] = False
    sure = torch.zeros(30, dtype=torch.bool)
    sure[[3, 4]] = True
    found = worst(kl, same, sure, [20, 10])
    assert (found["kld_max_window"], found["kld_max_position"]) == (1, 7)
    assert (found["sure_positions"], found["sure_changed"]) == (2, 1)
    # Tenths 7 hold positions 14 and 15 of the first window and 7 of the second.
    assert found["kld_by_decile"] == [pytest.approx(1 / 3) if d == 7 else 0.0 for d in range(10)]


def test_a_profile_that_differs_in_nothing_says_it_is_an_alias() -> None:
    for name in names():
        base = load(name).base
        if base is not None:
            alias = load(name).spec == load(base).spec
            assert alias == (f"alias of {base}" in load(name).purpose)
        else:
            assert name in levels()


def test_evidence_is_what_was_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["profiles", "--evidence", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {"balanced", "compact", "chat"} <= {r["profile"] for r in rows}
    path = Path(__file__).parents[2] / "bench" / "results" / "eval.csv"
    recorded = {r["command"]: r for r in csv.DictReader(path.open(encoding="utf-8"))}
    for row in rows:
        source = recorded[row["command"]]
        for field in ("kld_mean", "kld_se", "top1_agreement", "bits_per_value"):
            assert row[field] == pytest.approx(
                float(source[field]), abs=5.1e-4 if field == "bits_per_value" else 5.1e-5
            )


def test_files_have_what_was_recorded_of_needles_sizes_and_speeds() -> None:
    root = Path(__file__).parents[2]
    blocks = runpy.run_path(str(root / "scripts" / "evidence.py"))["blocks"]
    for name in names():
        text = (root / "src" / "kvfold" / "profiles" / f"{name}.toml").read_text(encoding="utf-8")
        assert text.partition("\n[[")[2] == blocks(name, name in levels()).partition("\n[[")[2]
    for level in map(load, ("balanced", "compact", "swift-3", "swift-2.5")):
        assert all(rows for rows in (level.evidence, level.needles, level.sizes, level.speeds))
        assert all({"model", "recall", "answer_nll", "command"} <= set(r) for r in level.needles)


@pytest.mark.slow
def test_a_row_of_the_evidence_is_measured_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own command, on whatever machine this is: codes are the same everywhere, a model's sums are not to the last bit."""
    stated = next(r for r in load("extreme").evidence if r["command"].startswith("kvfold eval demo "))
    with pytest.raises(SystemExit):
        main([*stated["command"].split()[1:], "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["kld_mean"] == pytest.approx(stated["kld_mean"], rel=0.02)
    assert found["kld_se"] == pytest.approx(stated["kld_se"], rel=0.1)
    assert found["top1_agreement"] == pytest.approx(stated["top1_agreement"], abs=0.002)
    assert found["bits_per_value"] == pytest.approx(stated["bits_per_value"], abs=5.1e-4)


def test_what_was_measured_is_not_claimed_of_a_changed_profile() -> None:
    assert load("chat").evidence == load("balanced").evidence != ()
    assert parsed("own", {"base": "balanced", "purpose": "x", "window": 0}).evidence == ()


def test_keys_laid_over_a_base() -> None:
    own = parsed("own", {"base": "compact", "purpose": "x", "window": 128, "key": {"bits": 4}})
    base = load("compact").spec
    assert own.spec == base.with_overrides(window=128, key_bits=4)
    assert (own.base, own.tolerance) == ("compact", load("compact").tolerance)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"base": "balancd", "purpose": "x"}, "unknown base"),
        ({"base": "chat", "purpose": "x"}, "unknown base"),
        ({"purpose": "x"}, "lacks one"),
        ({"base": "balanced", "purpose": "x", "windows": 3}, "windows"),
        ({"base": "balanced", "purpose": "x", "tolerance": {"kld_mean": 0.0}}, "says nothing"),
    ],
)
def test_profiles_that_are_wrong_are_refused(content: dict[str, Any], what: str) -> None:
    with pytest.raises(InvalidConfig, match=what):
        parsed("own", content)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot be read"):
        profiles.load(str(tmp_path / "none.toml"))
