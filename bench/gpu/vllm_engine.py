"""Decode steps of a real vLLM on GPUs: folded pages beside vLLM's own 16-bit, FP8 and TurboQuant caches. Writes gpu_vllm.csv.

    PYTHONPATH=src:SITE python bench/gpu/vllm_engine.py --contenders bf16@0,fp8@1,turboquant_3bit_nc@1,balanced@0,turbo-3@1

SITE: what vllm_site.py unpacked, or a vLLM that is installed. NAME@GPUS: a cache (bf16, a --kv-cache-dtype, or a profile of
kvfold) and the GPUs it takes, such as 0, or 01 for two workers of tensor parallelism. The model has the shape of Llama-3.1-8B
with --layers layers and random weights. Every contender is an engine in processes of its own, in vLLM's usual mode (an engine
core beside the client, scheduling ahead), with CUDA graphs around attention. All are up at once and take turns: each reads the
prompts once, then rounds let each continue them, in turn from another contender on. A step's time is what lies between the
answers of two steps in which every request got one token.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "vocab_size": 32000, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.02,
}  # fmt: skip
OWN = {"bf16": "auto"}  # vLLM's own caches that are not named after their --kv-cache-dtype
FIXED = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
}


def is_profile(cache: str) -> bool:
    return cache not in OWN and not cache.startswith(("fp8", "turboquant"))


def serve(cache: str, given: argparse.Namespace, model: str) -> None:
    """In an engine's process: a line on stdin is a turn, and milliseconds of its steps come back, the reading step first."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints what it likes
    import numpy as np
    import torch

    from vllm import LLM, SamplingParams

    kv = {"kv_cache_dtype": "auto" if is_profile(cache) else OWN.get(cache, cache)}
    backend = "CUSTOM" if is_profile(cache) else "TRITON_ATTN"
    kv |= {} if cache.startswith("turboquant") else {"attention_backend": backend}
    share = 1.0 if cache == "bf16" else 0.6 if cache.startswith("fp8") else 0.4
    tokens = given.batch * (given.context + 512)
    workers = len(given.gpus)
    layer_bytes = 2 * LLAMA["num_key_value_heads"] * LLAMA["head_dim"] * 2  # type: ignore[operator]
    llm = LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=given.context + given.answer + 1,
        max_num_seqs=given.batch,
        max_num_batched_tokens=given.chunk,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=int(share * tokens * given.layers * layer_bytes) // workers + (256 << 20),
        tensor_parallel_size=workers,
        disable_custom_all_reduce=True,
        enforce_eager=given.eager,
        compilation_config={
            "custom_ops": ["none"],
            **({} if given.eager else {"mode": 3, "backend": "eager", "cudagraph_mode": "PIECEWISE"}),
            **({} if given.eager else {"cudagraph_capture_sizes": [given.batch]}),
        },
        kernel_config={"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}},
        **kv,
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, LLAMA["vocab_size"], (given.batch, given.context)).tolist()  # type: ignore[arg-type]
    params = SamplingParams(temperature=0, max_tokens=given.answer, ignore_eos=True, detokenize=False)

    def turn(number: int) -> list[float]:
        engine, out, first = llm.llm_engine, [], set()
        for i, prompt in enumerate(prompts):
            engine.add_request(f"{number}-{i}", {"prompt_token_ids": prompt}, params)
        begin = time.perf_counter()
        while engine.has_unfinished_requests():
            answers = engine.step()
            now = time.perf_counter()
            if len(first) == len(prompts):
                out.append(1000 * (now - begin))
                begin = now
            else:
                first |= {a.request_id for a in answers}
                if len(first) == len(prompts):  # read
                    out.append(1000 * (now - begin))
                    begin = now
        return out

    replies.write(json.dumps([llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens, torch.__version__]) + "\n")
    replies.flush()
    for number, _ in enumerate(sys.stdin):
        replies.write(json.dumps(turn(number)) + "\n")
        replies.flush()


class Contender:
    """An engine that is up, or the reason why not."""

    def __init__(self, text: str, arguments: list[str], logs: Path) -> None:
        self.name = text
        self.cache, _, gpus = text.partition("@")
        self.gpus = gpus or "0"
        self.log = logs / f"vllm-{text.replace('@', '-')}.log"
        chosen = {"KVFOLD_PROFILE": self.cache} if is_profile(self.cache) else {}
        here = Path(__file__).resolve().parent.parent.parent / "src"
        where = {
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
            "PYTHONPATH": f"{here}:{os.environ.get('PYTHONPATH', '')}",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--inner", self.cache, "--gpus", self.gpus],
            env={**os.environ, **FIXED, **chosen, **where},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.read_ms: float | None = None
        self.steps: list[float] = []

    def answer(self) -> list[float] | None:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        return json.loads(line) if line else None

    def up(self) -> bool:
        said = self.answer()
        if said is None:
            print(f"{self.name} did not start:\n{self.log.read_text()[-2500:]}", flush=True)
            return False
        self.tokens, self.torch = said  # type: ignore[assignment]
        print(f"{self.name} is up, its cache holds {self.tokens} tokens", flush=True)
        return True

    def take(self) -> bool:
        self.process.stdin.write("turn\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        times = self.answer()
        if times is None:
            print(f"{self.name} ended:\n{self.log.read_text()[-2500:]}", flush=True)
            return False
        self.read_ms = self.read_ms or times[0]
        self.steps += times[2:-1]
        print(f"{self.name}: {times[0]:.0f} ms, then {statistics.median(times[2:-1]):.2f} ms a step", flush=True)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default="bf16@0,fp8@0,turboquant_3bit_nc@0,balanced@0,turbo-3@0")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=32768, help="tokens of a step at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", default="0", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inner:
        serve(given.inner, given, given.model)
        return
    import torch

    with tempfile.TemporaryDirectory() as folder:
        config = {
            **LLAMA,
            "num_hidden_layers": given.layers,
            "max_position_embeddings": 2 * given.context,
            "torch_dtype": "bfloat16",
        }
        Path(folder, "config.json").write_text(json.dumps(config))
        arguments = [*sys.argv[1:], "--model", folder]
        contenders = [Contender(text, arguments, given.out) for text in given.contenders.split(",")]
        contenders = [c for c in contenders if c.up()]
        alive = list(contenders)
        lock = threading.Lock()

        def read(mine: list[Contender]) -> None:
            for c in mine:
                if not c.take():
                    with lock:
                        alive.remove(c)

        # Reading takes long and is not what is compared: GPUs do it side by side. Contenders of several GPUs come last.
        one = {
            gpu: [c for c in contenders if c.gpus == gpu] for gpu in {c.gpus for c in contenders if len(c.gpus) == 1}
        }
        threads = [threading.Thread(target=read, args=[mine]) for mine in one.values()]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        read([c for c in contenders if len(c.gpus) > 1])
        for c in contenders:
            c.steps = []
        for number in range(given.rounds):
            for c in alive[number % len(alive) :] + alive[: number % len(alive)]:
                if not c.take():
                    raise SystemExit(f"{c.name} ended")
        for c in contenders:
            c.process.stdin.close()  # type: ignore[union-attr]
    fp8 = next((statistics.median(c.steps) for c in alive if c.cache.startswith("fp8")), None)
    with (given.out / "gpu_vllm.csv").open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(
            [
                "date",
                "device",
                "torch",
                "vllm",
                "cache",
                "gpus",
                "layers",
                "batch",
                "context",
                "eager",
                "read_s",
                "step_ms",
                "step_mean_ms",
                "step_p90_ms",
                "tokens_per_s",
                "cache_tokens",
                "times_fp8",
            ]
        )
        for c in alive:
            steps = sorted(c.steps)
            median, mean = statistics.median(steps), statistics.fmean(steps)
            row = [datetime.now(UTC).date(), torch.cuda.get_device_name(), c.torch, "0.32.0", c.cache, len(c.gpus)]
            row += [given.layers, given.batch, given.context, int(given.eager), f"{(c.read_ms or 0) / 1000:.2f}"]
            row += [
                f"{median:.3f}",
                f"{mean:.3f}",
                f"{steps[len(steps) * 9 // 10]:.3f}",
                f"{1000 * given.batch / mean:.1f}",
            ]
            row += [c.tokens, f"{fp8 / median:.3f}" if fp8 else ""]
            out.writerow(row)
            print(*row, flush=True)


if __name__ == "__main__":
    main()
