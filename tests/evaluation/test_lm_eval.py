"""lm-evaluation-harness, the real one, on tasks in files here: its model `kvfold` is registered, and reads through pages."""

from __future__ import annotations

import json
import subprocess
import sys

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvfold.errors import InvalidConfig
from kvfold.evaluation.lm_eval import FoldedLM
from kvfold.evaluation.needle import make_needle
from kvfold.evaluation.text import haystack, stream
from kvfold.loading import Options, demo_folder, load

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {output}
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
{more}
metadata: {{version: 1}}
"""
GENERATED = """generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
SCORED = "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"


@pytest.fixture(scope="module", autouse=True)
def without_network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            patch.setenv(name, "1")
        for name in ("HF_HOME", "HF_DATASETS_CACHE"):
            patch.setenv(name, str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks over the same two prompts: a number hidden 600 and 500 tokens before its question."""
    folder = tmp_path_factory.mktemp("tasks")
    tokenizer = load("demo", Options()).tokenizer
    text = stream(haystack(), tokenizer)
    rows = []
    for i, length in enumerate((600, 500)):
        needle = make_needle(
            "magic_number",
            0.1,
            "Harbour",
            np.random.default_rng(i),
            lambda t: tokenizer(t, add_special_tokens=False).input_ids,
        )
        prompt = text[:60] + needle.statement + text[60:length] + needle.question
        rows.append({"text": tokenizer.decode(prompt), "answer": tokenizer.decode(needle.answer)})
    data = folder / "test.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    for name, output, more in (("told", "generate_until", GENERATED), ("scored", "loglikelihood", SCORED)):
        (folder / f"{name}.yaml").write_text(
            TASK.format(name=name, data=data, output=output, more=more), encoding="utf-8"
        )
    return folder


def run(model, tasks, **options):
    """(results, answers of `told`, log-likelihoods of `scored`)."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    out = lm_eval.simple_evaluate(
        model=model, tasks=["told", "scored"], task_manager=manager, batch_size=2, bootstrap_iters=0, **options
    )
    answers = [s["resps"][0][0] for s in out["samples"]["told"]]
    return out, answers, [s["resps"][0][0][0] for s in out["samples"]["scored"]]


def folded(tasks, profile):
    return run("kvfold", tasks, model_args=f"pretrained=demo,dtype=float32,profile={profile}")


def test_exact_pages_answer_as_the_harness_own_model_does_and_folded_ones_nearly(tasks):
    loaded = load("demo", Options(dtype="float32"))
    _, answers, likely = run(HFLM(loaded.model, tokenizer=loaded.tokenizer, batch_size=2), tasks)
    _, exact_answers, exact = folded(tasks, "lossless")
    assert exact_answers == answers
    assert exact == pytest.approx(likely, abs=1e-3)
    out, folded_answers, scores = folded(tasks, "balanced")
    assert folded_answers == answers
    assert scores == pytest.approx(likely, abs=0.05)
    # It did go through folded pages.
    assert all(abs(a - b) > 1e-4 for a, b in zip(scores, exact, strict=True))
    assert out["results"]["told"]["exact_match,none"] == out["results"]["scored"]["acc,none"] == 1.0
    assert out["config"]["kvfold"]["profile"] == "balanced"


def test_an_impossible_call_size_is_refused():
    with pytest.raises(InvalidConfig, match="call_tokens"):
        FoldedLM(str(demo_folder()), call_tokens=0)


@pytest.mark.slow
def test_the_harness_own_command_line_knows_the_model(tasks, tmp_path):
    command = [sys.executable, "-m", "kvfold.evaluation.lm_eval", "run", "--model", "kvfold"]
    command += ["--model_args", "pretrained=demo,dtype=float32", "--tasks", "scored", "--include_path", str(tasks)]
    done = subprocess.run([*command, "--output_path", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(next(tmp_path.rglob("results*.json")).read_text())
    assert result["results"]["scored"]["acc,none"] == 1.0
