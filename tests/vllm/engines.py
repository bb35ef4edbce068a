"""Engines of a real vLLM, each in a process of its own: jobs for `driver`, their answers, and the shipped model's text."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from kvfold.evaluation.text import haystack, stream

MODEL = str(resources.files("kvfold.models").joinpath("recall-llama-12m"))
DRIVER = Path(__file__).with_name("driver.py")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # NVLink multicast
    "OMP_NUM_THREADS": "1",
}
GREEDY = {"temperature": 0, "max_tokens": 24}
GPU = torch.cuda.is_available()
# Many engines on one GPU, where bench/gpu/vllm_site.py brings only vLLM's Python files: its models run without its kernels.
ON_GPU = {
    "gpu_memory_utilization": 0.03,
    "kv_cache_memory_bytes": 1 << 30,
    "compilation_config": {"custom_ops": ["none"]},
    "kernel_config": {"ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]}},
    "disable_custom_all_reduce": True,
}
# Rounded so little that a divergence is what the codes lose; the kernels want 16 bits.
PACKED_DTYPE = "float16" if GPU else "float32"


@dataclass(frozen=True)
class Run:
    """steps: the answers of each step, a token list and the number of prompt tokens found in the cache. tokens: what vLLM says
    its cache holds. preempted: how often a request lost its memory to another. logprobs: (step, prompt) -> float32
    [prompt tokens - 1, vocabulary]. launched: emulated kernels that entered a
    layer. engines: what kvfold logs of the engines that run its layers."""

    steps: list[list[dict[str, Any]]]
    tokens: int
    preempted: int
    launched: int
    logprobs: dict[tuple[int, int], np.ndarray]
    engines: set[str]

    def ids(self, step: int) -> list[list[int]]:
        return [x["ids"] for x in self.steps[step]]

    def likely(self, step: int, prompt: int) -> list[dict[int, float]]:
        """Of every token of an answer whose `logprobs` were asked for, the likeliest and logarithms of their probabilities."""
        return [{int(t): p for t, p in at.items()} for at in self.steps[step][prompt]["likely"]]

    def cached(self, step: int) -> list[int]:
        return [x["cached"] for x in self.steps[step]]


def environment(profile: str | None, **more: str) -> dict[str, str]:
    """Of a process that runs vLLM: stock, or folded under `profile`."""
    chosen = {} if profile is None else {"KVFOLD_PROFILE": profile}
    return {**os.environ, **ENVIRONMENT, **chosen, **more}


def step(*prompts: list[int], **params: Any) -> dict[str, Any]:
    return {"prompts": list(prompts), "params": {**GREEDY, **params}}


def run(
    profile: str | None,
    steps: list[dict[str, Any]],
    env: dict[str, str] | None = None,
    emulated: bool | None = None,
    **options: Any,
) -> Run:
    """One engine of the shipped model, or of `model`, in float32 unless told otherwise. emulated: see driver."""
    chosen = {
        "model": MODEL,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 4096,
        **place(profile),
        **options,
    }
    job = {"options": chosen, "steps": steps, **({} if emulated is None else {"emulated": emulated})}
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        with log.open("w") as out:
            done = subprocess.run(
                [sys.executable, DRIVER, result],
                input=json.dumps(job),
                text=True,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(profile, **(env or {})),
            )
        assert done.returncode == 0, log.read_text()[-6000:]
        names = [p.stem.split("-")[1:] for p in Path(folder).glob("logprobs-*.npy")]
        logprobs = {(int(i), int(n)): np.load(Path(folder, f"logprobs-{i}-{n}.npy")) for i, n in names}
        engines = set(re.findall(r"kvfold: (profile \S+, engine \S+)", log.read_text()))
        return Run(**json.loads(result.read_text()), logprobs=logprobs, engines=engines)


def place(profile: str | None) -> dict[str, Any]:
    """Options of an engine on this machine: on a GPU its attention is asked for by name."""
    return {**ON_GPU, "attention_backend": "CUSTOM" if profile else "TRITON_ATTN"} if GPU else {}


@functools.cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@functools.cache
def text() -> list[int]:
    return stream(haystack(), tokenizer())


def prompt(number: int, length: int) -> list[int]:
    """A stretch of the shipped text; numbers differ in where they begin."""
    return text()[3000 * number : 3000 * number + length]
