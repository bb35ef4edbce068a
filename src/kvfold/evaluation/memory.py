"""Peak memory of prefill and decode, each cache in a process of its own.

The baseline process makes the same calls without any cache: what it needs is the model and its activations. What a
cache's process needs beyond that is the cache's doing: its bytes, its workspace and its allocator's waste. The planner's
answer stands beside the measured one: what the process holds beside its weights after a first call, plus the plan.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvfold.errors import EvaluationError
from kvfold.loading import describe
from kvfold.planner.model import FLOAT32_BYTES
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load as load_profile

PREFILL_TOKENS = 2048
DECODE_TOKENS = 64
WARM_TOKENS = PREFILL_TOKENS  # libraries take what they need, and keep it, with a first call: 20 to 45 MB, by processor


def peak(kind: str, source: str, context: int, profile: str) -> dict[str, int]:
    """Run in a fresh process: peak resident bytes with `kind` of cache (none, stock or folded), and the cache's bytes."""
    command = [sys.executable, "-m", __name__, kind, source, str(context), profile]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EvaluationError(f"the process with {kind} cache ended with: {last}", "Try the model with kvfold generate")
    return json.loads(done.stdout.splitlines()[-1])


def measure(source: str, context: int, profile: str) -> dict[str, float | int]:
    """What each cache needs beyond model and activations, in bytes and as shares of the 16-bit cache."""
    if context < 1:
        raise EvaluationError(f"a prompt of {context} tokens needs no memory", "Use 2048 tokens or more")
    load_profile(profile), describe(source)  # what cannot be is said before processes start
    none, stock, folded = (peak(kind, source, context, profile) for kind in ("none", "stock", "folded"))
    # Where nothing folds, shares are of what is kept all the same.
    reference = folded["reference_bytes"] or folded["cache_bytes"]
    beyond = {k: r["peak"] - none["peak"] for k, r in (("stock", stock), ("folded", folded))}
    return {
        "context": context,
        "baseline_peak_bytes": none["peak"],
        "stock_beyond_bytes": beyond["stock"],
        "folded_beyond_bytes": beyond["folded"],
        "cache_bytes": folded["cache_bytes"],
        "reference_bytes": reference,
        "stock_share": beyond["stock"] / reference,
        "folded_share": beyond["folded"] / reference,
        "over_cache_share": (beyond["folded"] - folded["cache_bytes"]) / reference,
        **planned(source, context, profile, folded),
    }


def planned(source: str, context: int, profile: str, folded: dict[str, int]) -> dict[str, float | int]:
    """The plan for what a folded process did, and by how much its peak misses the one that `peak` measured."""
    setting = Setting(
        spec=load_profile(profile).spec,
        context=context + DECODE_TOKENS,
        weights_bytes=folded["weights_bytes"],
        dtype_bytes=FLOAT32_BYTES,
        prefill_tokens=PREFILL_TOKENS,
    )
    total = folded["runtime"] + plan(describe(source).model, setting)["total_bytes"]
    return {"peak_bytes": folded["peak"], "planned_peak_bytes": total, "plan_error": total / folded["peak"] - 1}


def _held(what: str) -> int:
    """VmRSS or VmHWM, what this process holds now or at most, in bytes. Not getrusage: that keeps the peak of the parent."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024


def _child(kind: str, source: str, context: int, profile: str) -> dict[str, int]:
    import torch
    from transformers import DynamicCache

    from kvfold.adapters.hf_transformers import FoldedCache, attach
    from kvfold.adapters.hf_weights import weights_bytes
    from kvfold.cache.memory import return_large_blocks
    from kvfold.evaluation.text import haystack, stream
    from kvfold.loading import Options, load

    return_large_blocks()  # a folded cache does so; without it the other processes' peaks vary by 80 MB from run to run
    loaded = load(source, Options(dtype="float32"))
    model = loaded.model
    ids = torch.tensor([stream(haystack(), loaded.tokenizer, context)[:context]])
    caches: dict[str, Any] = {"none": lambda: None, "stock": lambda: DynamicCache(config=model.config)}
    cache = caches[kind]() if kind in caches else FoldedCache(model.config, profile=profile)
    attach(model)
    weights = weights_bytes(model)
    with torch.no_grad():
        model(ids[:, :WARM_TOKENS], past_key_values=FoldedCache(model.config, profile=profile), logits_to_keep=1)
        runtime = _held("VmRSS") - weights
        for start in range(0, context, PREFILL_TOKENS):
            part = ids[:, start : start + PREFILL_TOKENS]
            out = model(part, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
        for _ in range(DECODE_TOKENS):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    result = {"runtime": runtime, "weights_bytes": weights, "peak": _held("VmHWM")}
    if isinstance(cache, FoldedCache):
        result |= {"cache_bytes": cache.nbytes, "reference_bytes": cache.reference_bytes}
    return result


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_child(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])) + "\n")
