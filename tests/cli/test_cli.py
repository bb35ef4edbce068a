"""The commands, run as users run them: one JSON object on stdout, exit codes, errors that name the cure."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

EVAL_KEYS = {
    "kld_mean", "kld_se", "kld_p99", "kld_max", "top1_agreement", "perplexity", "perplexity_reference",
    "perplexity_change", "perplexity_change_se", "bits_per_value", "cache_bytes", "reference_bytes",
    "exact_tokens_mean", "exact_tokens_max", "page_tokens", "positions",
}  # fmt: skip
DEMO_KEYS = {
    "recall_reference", "recall", "kld_mean", "cache_bytes", "reference_bytes", "ratio", "decode_tokens_per_s",
    "decode_tokens_per_s_reference", "seconds",
}  # fmt: skip
NEEDLE_KEYS = {"context", "depth", "kind", "trials", "recall_reference", "recall", "answer_nll_reference", "answer_nll"}
DISTORTION_KEYS = {
    "codec", "bits", "bits_per_value", "mse", "lower_bound", "upper_bound", "ip_slope", "ip_variance_times_dim",
}  # fmt: skip


def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "kvfold", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def run_json(*arguments: str) -> dict:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_eval():
    r = run_json("eval", "demo", "--windows", "1", "--window-tokens", "256")
    assert set(r) >= EVAL_KEYS
    assert r["positions"] == 256


def test_eval_overrides(tmp_path):
    text = tmp_path / "t.txt"
    text.write_text("The quick brown fox. " * 200 + "\0" + "Another document. " * 100)
    r = run_json(
        "eval", "demo", "--text", str(text), "--windows", "1", "--window-tokens", "512", "--key-codec", "mse",
        "--key-bits", "4", "--value-codec", "uniform", "--window", "0", "--sinks", "0", "--no-centre", "--scale", "norm",
    )  # fmt: skip
    assert r["bits_per_value"] == (4.125 + 2.125) / 2
    assert r["exact_tokens_max"] <= 128 + 64


def test_distortion():
    r = run_json("distortion", "--dim", "64", "--bits", "1,2", "--codec", "mse")
    assert [x["bits"] for x in r["rows"]] == [1, 2]
    assert all(set(x) >= DISTORTION_KEYS for x in r["rows"])


def test_needle(tmp_path):
    picture = tmp_path / "n.png"
    r = run_json("needle", "demo", "--contexts", "2k", "--kinds", "pass_key", "--trials", "1", "--plot", str(picture))
    assert all(set(x) == NEEDLE_KEYS for x in r["rows"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_demo():
    r = run_json("demo", "--context", "4k")
    assert set(r) >= DEMO_KEYS
    assert r["recall"] == r["recall_reference"]


def test_generate():
    r = run_json("generate", "demo", "--prompt", "The borrow checker", "--max-new-tokens", "8")
    assert len(r["tokens"]) == 8
    code, out, err = run("generate", "demo", "--max-new-tokens", "4", stdin="The borrow checker")
    assert code == 0
    assert out.strip()
    assert "tokens in" in err


def test_bench():
    r = run_json("bench", "decode", "--context", "1k", "--rounds", "2")
    assert set(r) >= {"device", "threads", "level", "rows"}
    keys = {"contender", "median_ms", "p10_ms", "p90_ms", "ratio", "gb_per_s", "floor_fraction"}
    assert all(set(row) == keys for row in r["rows"])
    assert [row["ratio"] for row in r["rows"] if row["contender"] == "kvfold"] == [1.0]


def test_profiles_and_doctor():
    names = {p["name"] for p in run_json("profiles")["profiles"]}
    assert names >= {"lossless", "balanced", "compact", "faithful-3.5", "faithful-2.5"}
    r = run_json("doctor", "demo")
    assert any(e["name"] == "torch" and e["ready"] for e in r["engines"])
    assert all(x["folds"] for x in r["model"])


def test_doctor_reads_a_config_alone(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "mistral", "sliding_window": 4096, "num_hidden_layers": 2}))
    rows = run_json("doctor", str(file))["model"]
    assert [(x["kind"], x["holds"], x["folds"]) for x in rows] == [("sliding", "FoldedWindowLayer", True)] * 2
    file.write_text(json.dumps({"model_type": "nobody"}))
    code, out, _ = run("doctor", str(file), "--json")
    assert (code, json.loads(out)["error"]["kind"]) == (1, "UnsupportedModel")


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["eval", "no/such/folder"], "ModelNotFound", "folder"),
        (["eval", "demo", "--profile", "balancd"], "UnknownProfile", "balanced"),
        (["eval", "demo", "--key-codec", "zip"], "UnknownCodec", "mse"),
        (["eval", "demo", "--key-bits", "9"], "InvalidConfig", "widths"),
        (["eval", "demo", "--text", "/no/file"], "EvaluationError", "UTF-8"),
        (["eval", "demo", "--windows", "100000"], "EvaluationError", "windows"),
        (["needle", "demo", "--contexts", "lots"], "InvalidConfig", "32k"),
        (["needle", "demo", "--contexts", "1M", "--trials", "1"], "EvaluationError", "shorter"),
        (["generate", "demo", "--prompt", ""], "InvalidConfig", "--prompt"),
        (["distortion", "--codec", "polar", "--bits", "3"], "InvalidConfig", ""),
        (["distortion", "--dim", "4"], "UnsupportedHeadDim", "8"),
        (["bench", "sing"], "InvalidConfig", "decode"),
        (["nonsense"], "UsageError", "--help"),
    ],
)
def test_errors_are_one_json_object_with_the_cure(arguments, kind, words):
    code, out, _ = run(*arguments, "--json")
    assert code != 0
    error = json.loads(out)["error"]
    assert error["kind"] == kind
    assert error["message"]
    assert words in error["message"] + error["cure"]


def test_errors_without_json_go_to_stderr():
    code, out, err = run("eval", "demo", "--profile", "nope")
    assert code == 1
    assert out == ""
    assert "unknown profile 'nope'" in err


@pytest.mark.parametrize("arguments", [["demo"], ["eval", "demo"], ["bench", "decode"]])
def test_without_torch_every_verb_names_the_extra(arguments):
    block = "import sys; sys.modules['torch'] = None; from kvfold.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", block, *arguments, "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 1
    assert error["kind"] == "MissingExtra"
    assert "kvfold[transformers]" in error["cure"]
