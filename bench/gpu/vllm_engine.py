"""Decode steps of a real vLLM on GPUs: folded pages beside vLLM's own 16-bit, FP8 and TurboQuant caches. Writes gpu_vllm.csv.

    PYTHONPATH=src:SITE python bench/gpu/vllm_engine.py --contenders bf16@0,fp8@1,turboquant_3bit_nc@1,balanced@0,turbo-3@1

SITE: what vllm_site.py unpacked, or a vLLM that is installed. NAME@GPUS: a cache (bf16, a --kv-cache-dtype, or a profile of
kvfold) and the GPUs it takes, such as 0, or 01 for two workers of tensor parallelism. The model has the shape of Llama-3.1-8B
with --layers layers and random weights. Every contender is an engine in processes of its own, in vLLM's usual mode (an engine
core beside the client, scheduling ahead), with CUDA graphs of whole decode steps where its cache can be captured. All are up at once and take turns: each reads the
prompts once, then rounds let each continue them, in turn from another contender on. A step's time is what lies between the
answers of two steps in which every request got one token.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from kvfold.bench.harness import commit

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "vocab_size": 32000, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.02,
}  # fmt: skip
FIELDS = (
    "date", "device", "torch", "vllm", "cache", "gpus", "layers", "batch", "context", "graphs", "read_s", "step_ms",
    "step_mean_ms", "step_p90_ms", "tokens_per_s", "cache_tokens", "times_fp8", "commit",
)  # fmt: skip
OWN = {"bf16": "auto"}  # vLLM's own caches that are not named after their --kv-cache-dtype
FIXED = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Sums over GPUs by NCCL alone: others ask for NVLink multicast.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}


GRAPHS = ("FULL_AND_PIECEWISE", "PIECEWISE", "NONE")  # tried in turn


def is_profile(cache: str) -> bool:
    return cache not in OWN and not cache.startswith(("fp8", "turboquant"))


def serve(cache: str, given: argparse.Namespace, model: str) -> None:
    """In an engine's process: a line on stdin is a turn, and milliseconds of its steps come back, the reading step first."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints what it likes
    import numpy as np
    import torch

    from vllm import LLM, SamplingParams

    if cache.startswith("turboquant"):
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

        # vLLM leaves the first and last two layers at 16 bits, of Llama-3.1-8B's an eighth; of few layers that is too much.
        TurboQuantConfig.get_boundary_skip_layers = staticmethod(lambda *_: [])

    kv = {"kv_cache_dtype": "auto" if is_profile(cache) else OWN.get(cache, cache)}
    backend = "CUSTOM" if is_profile(cache) else "TRITON_ATTN"
    kv |= {} if cache.startswith("turboquant") else {"attention_backend": backend}
    # Memory that holds all requests.
    share = {"bf16": 1.0, "fp8": 0.6}.get(cache, 0.3)
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
        # Its later chunks of a prompt unpack all before them: whole prompts are what it reads fastest.
        max_num_batched_tokens=given.context if cache.startswith("turboquant") else given.chunk,
        gpu_memory_utilization=0.02,
        kv_cache_memory_bytes=int(share * tokens * given.layers * layer_bytes) // workers + (256 << 20),
        tensor_parallel_size=workers,
        disable_custom_all_reduce=True,
        enforce_eager=given.graphs == "NONE",
        compilation_config={
            "custom_ops": ["none"],
            **({} if given.graphs == "NONE" else {"mode": 3, "backend": "eager", "cudagraph_mode": given.graphs}),
            **({} if given.graphs == "NONE" else {"cudagraph_capture_sizes": [given.batch]}),
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
                if len(answers) == len(prompts):
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

    def __init__(self, text: str, arguments: list[str], graphs: str, logs: Path, deadline: float) -> None:
        self.name, self.arguments = text, arguments
        self.cache, _, gpus = text.partition("@")
        self.gpus = gpus or "0"
        self.log = logs / f"vllm-{text.replace('@', '-')}.log"
        self.graphs = graphs
        self.read_s: float | None = None
        self.turns: list[list[float]] = []
        self.deadline = deadline
        self.start()

    def start(self) -> None:
        chosen = {"KVFOLD_PROFILE": self.cache} if is_profile(self.cache) else {}
        source = Path(__file__).resolve().parent.parent.parent / "src"
        path = {
            "CUDA_VISIBLE_DEVICES": ",".join(self.gpus),
            "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}",
        }
        inner = ["--inner", self.cache, "--gpus", self.gpus, "--graphs", self.graphs]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *self.arguments, *inner],
            env={**os.environ, **FIXED, **chosen, **path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("a"),
            text=True,
        )

    def answer(self) -> list | None:
        """None from an engine that ended, or that has not answered by the deadline."""
        ready, _, _ = select.select([self.process.stdout], [], [], max(0, self.deadline - time.monotonic()))
        line = self.process.stdout.readline() if ready else ""  # type: ignore[union-attr]
        if not line:
            self.process.kill()
        return json.loads(line) if line else None

    def up(self) -> bool:
        """Whether it is; one that cannot be captured in such graphs is tried with lesser ones."""
        said = self.answer()
        if said is None:
            print(f"{self.name} did not start (graphs: {self.graphs}):\n{self.log.read_text()[-2000:]}", flush=True)
            if self.graphs == GRAPHS[-1] or time.monotonic() > self.deadline:
                return False
            self.graphs = GRAPHS[GRAPHS.index(self.graphs) + 1]
            self.start()
            return self.up()
        self.tokens, self.torch = said
        print(f"{self.name} is up, graphs: {self.graphs}, its cache holds {self.tokens} tokens", flush=True)
        return True

    @property
    def steps(self) -> list[float]:
        """Those after the prompts were read count until there are others."""
        return [x for turn in self.turns[1:] or self.turns for x in turn]

    def take(self) -> bool:
        """A turn; whether it came to its end."""
        try:
            self.process.stdin.write("turn\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
            times = self.answer()
        except BrokenPipeError:
            times = None
        if times is None:
            print(f"{self.name} ended:\n{self.log.read_text()[-2500:]}", flush=True)
            return False
        self.read_s = self.read_s or times[0] / 1000
        self.turns.append(times[2:-1])
        print(f"{self.name}: {times[0]:.0f} ms, then {statistics.median(times[2:-1]):.2f} ms a step", flush=True)
        return True


def read(contenders: list[Contender], given: argparse.Namespace) -> list[Contender]:
    """The prompts, which takes long and is not what is compared: GPUs do it side by side, then what needs several. Those left."""
    done: list[Contender] = []
    groups = [[c for c in contenders if c.gpus == gpu] for gpu in {c.gpus for c in contenders if len(c.gpus) == 1}]

    def one(group: list[Contender]) -> None:
        for c in group:
            if c.take():
                done.append(c)
                write(done, given)

    threads = [threading.Thread(target=one, args=[group]) for group in groups]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    one([c for c in contenders if len(c.gpus) > 1])
    return [c for c in contenders if c in done]


def write(contenders: list[Contender], given: argparse.Namespace) -> None:
    fp8 = next((statistics.median(c.steps) for c in contenders if c.cache.startswith("fp8")), None)
    with (given.out / "gpu_vllm.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, FIELDS)
        out.writeheader()
        for c in contenders:
            steps = sorted(c.steps)
            median, mean = statistics.median(steps), statistics.fmean(steps)
            row = {
                "date": datetime.now(UTC).date(), "device": given.device, "torch": c.torch, "vllm": "0.32.0", "cache": c.cache,
                "gpus": len(c.gpus), "layers": given.layers, "batch": given.batch, "context": given.context,
                "graphs": c.graphs, "read_s": f"{c.read_s:.2f}", "step_ms": f"{median:.3f}", "step_mean_ms": f"{mean:.3f}",
                "step_p90_ms": f"{steps[len(steps) * 9 // 10]:.3f}", "tokens_per_s": f"{1000 * given.batch / mean:.1f}",
                "cache_tokens": c.tokens, "times_fp8": f"{fp8 / median:.3f}" if fp8 else "",
                "commit": commit(),
            }  # fmt: skip
            out.writerow(row)
            print(*row.values(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default="bf16@0,fp8@0,turboquant_3bit_nc@0,balanced@0,turbo-3@0")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of a step at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--graphs", default=GRAPHS[0], choices=GRAPHS, help="the most that is tried")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which what is missing is left out")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    parser.add_argument("--gpus", default="0", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inner:
        serve(given.inner, given, given.model)
        return
    import torch

    given.device = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        more = {
            "num_hidden_layers": given.layers,
            "max_position_embeddings": 2 * given.context,
            "torch_dtype": "bfloat16",
        }
        Path(folder, "config.json").write_text(json.dumps({**LLAMA, **more}))
        arguments = [*sys.argv[1:], "--model", folder]
        deadline = time.monotonic() + given.limit
        contenders = [Contender(text, arguments, given.graphs, given.out, deadline) for text in given.contenders.split(",")]
        contenders = read([c for c in contenders if c.up()], given)
        up = list(contenders)
        for number in range(given.rounds):
            first = number % max(1, len(contenders))
            lost = [c for c in contenders[first:] + contenders[:first] if not c.take()]
            contenders = [c for c in contenders if c not in lost]
            write(up, given)
        for c in contenders:
            c.process.stdin.close()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
