"""Throughput of a real vLLM on CPUs, stock and folded: many requests of one context each, read and then continued.

    .venv-vllm/bin/python bench/vllm_cpu.py --requests 8 --context 16384 --contenders stock,balanced,compact,turbo-3

Every contender is an engine in a process of its own with the same memory for its cache. All are up at once and take turns:
each reads the prompts, once, then rounds let each continue them, beginning with another contender than the round before.
`read_s` is the time to the first token of all requests, `decode_tokens_per_s` what follows with all prompts in the cache, the
median of the rounds (the slowest and fastest beside it), `tokens_per_s` both together. Rows are appended to
bench/results/vllm.csv.
"""

from __future__ import annotations

import argparse
import os
import statistics
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
    "KMP_BLOCKTIME": "0",  # the threads of engines that wait for their turn sleep
}


def serve(requests: int, context: int, answer: int, model: str) -> None:
    """In an engine's process: a line on stdin is a turn, `read` or `continue`, and seconds come back."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints what it likes
    from transformers import AutoTokenizer

    from kvfold.evaluation.text import haystack, stream
    from vllm import LLM, SamplingParams

    text = stream(haystack(), AutoTokenizer.from_pretrained(model))
    step = (len(text) - context) // requests
    prompts = [{"prompt_token_ids": text[i * step : i * step + context - answer]} for i in range(requests)]
    llm = LLM(model=model, enforce_eager=True, max_model_len=context + 1, max_num_batched_tokens=2048)

    def seconds(tokens: int) -> float:
        begin = time.perf_counter()
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)
        return time.perf_counter() - begin

    def reply(value: float) -> None:
        replies.write(f"{value}\n")
        replies.flush()

    reply(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
    for turn in sys.stdin:
        if turn.strip() == "read":
            reply(seconds(1))
        else:
            again = seconds(1)
            reply(seconds(answer) - again)


class Contender:
    """An engine that is up."""

    def __init__(self, profile: str, arguments: list[str], memory: float) -> None:
        chosen = {} if profile == "stock" else {"KVFOLD_PROFILE": profile}
        env = {**os.environ, **FIXED, "VLLM_CPU_KVCACHE_SPACE": f"{memory:g}", **chosen}
        self.profile = profile
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--inner"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.tokens = int(self._answer())
        self.turns: dict[str, list[float]] = {"read": [], "continue": []}

    def _answer(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine of {self.profile} ended")
        return float(line)

    def take(self, turn: str) -> None:
        self.process.stdin.write(turn + "\n")
        self.process.stdin.flush()
        self.turns[turn].append(self._answer())
        print(f"{self.profile} {turn} {self.turns[turn][-1]:.2f} s", flush=True)

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def row(self, requests: int, context: int, answer: int) -> dict[str, Any]:
        (read,), decodes = self.turns["read"], self.turns["continue"]
        decode = statistics.median(decodes)
        slowest, median, fastest = (requests * (answer - 1) / s for s in (max(decodes), decode, min(decodes)))
        return {
            "read_s": round(read, 2),
            "decode_tokens_per_s": round(median, 2),
            "decode_slowest": round(slowest, 2),
            "decode_fastest": round(fastest, 2),
            "tokens_per_s": round(requests * context / (read + decode), 2),
            "cache_tokens": self.tokens,
        }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--requests", type=int, default=8)
    options.add_argument("--context", type=int, default=16384)
    options.add_argument("--answer", type=int, default=129)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--contenders", default="stock,balanced,compact,turbo-3", help="ratios are to the first")
    options.add_argument("--memory", type=float, default=2, help="GiB for the cache of each engine")
    options.add_argument("--model", default=str(resources.files("kvfold.models").joinpath("recall-llama-12m")))
    options.add_argument("--inner", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.inner:
        serve(given.requests, given.context, given.answer, given.model)
        return
    import record

    arguments = sys.argv[1:]
    where = {
        **record.provenance(arguments),
        "vllm": metadata.version("vllm-cpu"),
        "command": " ".join(["bench/vllm_cpu.py", *arguments]),
    }
    contenders = [Contender(p, arguments, given.memory) for p in given.contenders.split(",")]
    for contender in contenders:
        contender.take("read")
    for number in range(given.rounds):
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender.take("continue")
    sizes = (given.requests, given.context, given.answer)
    rows = [c.row(*sizes) for c in contenders]
    for contender, row in zip(contenders, rows, strict=True):
        contender.end()
        row["ratio"] = round(row["tokens_per_s"] / rows[0]["tokens_per_s"], 3)
        row["decode_ratio"] = round(row["decode_tokens_per_s"] / rows[0]["decode_tokens_per_s"], 3)
        print(contender.profile, row)
    setting = {
        "requests": given.requests,
        "context": given.context,
        "answer": given.answer,
        "rounds": given.rounds,
        "threads": os.environ.get("OMP_NUM_THREADS", os.cpu_count()),
    }
    record.append(
        ROOT / "bench" / "results" / "vllm.csv",
        [
            {**where, "contender": c.profile, **setting, "memory_gib": given.memory, **row}
            for c, row in zip(contenders, rows, strict=True)
        ],
    )


if __name__ == "__main__":
    main()
