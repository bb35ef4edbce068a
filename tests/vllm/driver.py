"""One vLLM engine in a process of its own: a job as JSON on stdin, its answers as JSON in the file named as argument.

Job: {"options": arguments of LLM, "steps": [{"prompts": [[ids]], "params": arguments of SamplingParams}]}. Every step is one call
of generate; or its requests by hand, with "abort": {"number of a prompt": steps of the scheduler after which it is given up} or
"join": {"number of a prompt": steps after which it comes}. "emulated": see `emulated`, true for steps without the host.
vLLM prints what it likes, so the answers have a file.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np


def answer(output: Any) -> dict[str, Any]:
    if output is None:
        return {"ids": [], "cached": 0, "likely": []}
    (one,) = output.outputs
    likely = [{str(t): x.logprob for t, x in at.items()} for at in one.logprobs or []]
    return {"ids": list(one.token_ids), "cached": output.num_cached_tokens or 0, "likely": likely}


def log_probabilities(output: Any, vocabulary: int) -> np.ndarray:
    """float32 [prompt tokens - 1, vocabulary], of every prompt token but the first."""
    flat = output.prompt_logprobs
    table = np.full((len(flat) - 1, vocabulary), -math.inf, np.float32)
    for row, start, end in zip(table, flat.start_indices[1:], flat.end_indices[1:], strict=True):
        row[flat.token_ids[start:end]] = flat.logprobs[start:end]
    return table


def generate(llm: Any, step: dict[str, Any], params: Any) -> list[Any]:
    """One output per prompt, in order; of a prompt that was given up the last one before."""
    prompts = [{"prompt_token_ids": p} for p in step["prompts"]]
    if "abort" not in step and "join" not in step:
        return list(llm.generate(prompts, params, use_tqdm=False))
    engine, outputs, done = llm.llm_engine, {}, 0
    joins, aborts = step.get("join", {}), step.get("abort", {})
    while done == 0 or engine.has_unfinished_requests():
        for i, prompt in enumerate(prompts):
            if joins.get(str(i), 0) == done:
                engine.add_request(str(i), prompt, params)
        outputs |= {o.request_id: o for o in engine.step()}
        done += 1
        engine.abort_request([i for i, after in aborts.items() if after == done])
    return [outputs.get(str(i)) for i in range(len(prompts))]


def main() -> None:
    from vllm import LLM, SamplingParams

    job, result = json.load(sys.stdin), Path(sys.argv[1])
    launched: list[str] = []
    if "emulated" in job:
        from emulated import install

        launched = install(job["emulated"]).launched
    llm = LLM(disable_log_stats=False, **job["options"])
    steps = []
    for i, step in enumerate(job["steps"]):
        outputs = generate(llm, step, SamplingParams(**step["params"]))
        steps.append([answer(o) for o in outputs])
        if step["params"].get("prompt_logprobs"):
            vocabulary = llm.model_config.get_vocab_size()
            for n, o in enumerate(outputs):
                np.save(result.with_name(f"logprobs-{i}-{n}.npy"), log_probabilities(o, vocabulary))
    preempted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    result.write_text(json.dumps({"steps": steps, "tokens": tokens, "preempted": preempted, "launched": len(launched)}))


if __name__ == "__main__":
    main()
