"""Throughput of a real vLLM on CPUs, stock and folded: many requests of one context each, read and then continued.

    .venv-vllm/bin/python bench/vllm_cpu.py --requests 8 --context 16384 --profiles balanced,compact

Every contender is an engine in a process of its own, after one another, each with the same memory for its cache. `read_s` is
the time to the first token of all requests, `decode_tokens_per_s` what follows, with all prompts in the cache,
`tokens_per_s` both together. Rows are appended to bench/results/vllm.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import metadata, resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
FIXED = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def measure(requests: int, context: int, answer: int, model: str) -> dict[str, Any]:
    """In the engine's process."""
    from transformers import AutoTokenizer

    from kvfold.evaluation.text import haystack, stream
    from vllm import LLM, SamplingParams

    text = stream(haystack(), AutoTokenizer.from_pretrained(model))
    step = (len(text) - context) // requests
    prompts = [{"prompt_token_ids": text[i * step : i * step + context - answer]} for i in range(requests)]
    llm = LLM(model=model, enforce_eager=True, max_model_len=context + 1, max_num_batched_tokens=2048)
    seconds = []
    for tokens in (1, 1, answer):
        begin = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
    read, again, whole = seconds
    return {
        "read_s": round(read, 2),
        "decode_tokens_per_s": round(requests * (answer - 1) / (whole - again), 1),
        "tokens_per_s": round(requests * context / (read + whole - again), 1),
        "cache_tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
    }


def contender(profile: str, arguments: list[str], memory: float) -> dict[str, Any]:
    chosen = {} if profile == "stock" else {"KVFOLD_PROFILE": profile}
    env = {**os.environ, **FIXED, "VLLM_CPU_KVCACHE_SPACE": f"{memory:g}", **chosen}
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--inner"], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--requests", type=int, default=8)
    options.add_argument("--context", type=int, default=16384)
    options.add_argument("--answer", type=int, default=129)
    options.add_argument("--profiles", default="balanced,compact")
    options.add_argument("--memory", type=float, default=2, help="GiB for the cache of each engine")
    options.add_argument("--model", default=str(resources.files("kvfold.models").joinpath("recall-llama-12m")))
    options.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.inner:
        print(json.dumps(measure(given.requests, given.context, given.answer, given.model)))
        return
    import record

    arguments = sys.argv[1:]
    rows: list[dict[str, Any]] = []
    for profile in ["stock", *given.profiles.split(",")]:
        row = contender(profile, arguments, given.memory)
        rows.append(
            {
                "contender": profile,
                "requests": given.requests,
                "context": given.context,
                "memory_gib": given.memory,
                **row,
            }
        )
        rows[-1]["ratio"] = round(row["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
        rows[-1]["decode_ratio"] = round(row["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"], 3)
        print(rows[-1])
    where = {
        **record.provenance(arguments),
        "vllm": metadata.version("vllm-cpu"),
        "command": " ".join(["bench/vllm_cpu.py", *arguments]),
    }
    record.append(ROOT / "bench" / "results" / "vllm.csv", [{**where, **row} for row in rows])


if __name__ == "__main__":
    main()
