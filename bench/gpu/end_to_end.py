"""Decode step of a randomly initialised model on one GPU: stock caches against folded ones.

Run: python bench/gpu/end_to_end.py [--model llama-8b|qwen-4b] [--out FOLDER] [--prefill] BxN[:CACHE,CACHE...] ... with CACHE one of stock (DynamicCache), static
(StaticCache), compiled (StaticCache, torch.compile with CUDA graphs), a profile, or PROFILE+graphs (kvfold.cuda_graphs). Writes
gpu_end_to_end.csv. Without --prefill the context is random keys and values, stored or folded without running the model over it.
step_mean_ms is the mean of STEPS steps, folds between them included; ratio is of means, against the stock cache of the same shape.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import statistics
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.cache_utils import LinearAttentionLayer

import kvfold

CHUNK = 8192  # tokens of a prefill call
WARM, STEPS = 4, 128
CACHES = "stock,balanced,turbo-3"
# Llama-3.1-8B, and Qwen3.5-4B: a hybrid in which every fourth layer has keys and values.
LLAMA: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 4,
    "head_dim": 256, "vocab_size": 248320, "max_position_embeddings": 262144, "full_attention_interval": 4,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
MODELS = {"llama-8b": ("llama", LLAMA), "qwen-4b": ("qwen3_5_text", QWEN)}
BEGINNING = 128  # tokens that a model with running states reads, so that it has some
FIELDS = ["date", "device", "torch", "transformers", "model", "batch", "tokens", "cache", "context", "prefill_s", "step_ms", "step_mean_ms",
          "step_ms_max", "peak_gb", "cache_gb", "ratio", "logits_differ"]  # fmt: skip


def fill(cache: Any, config: Any, batch: int, tokens: int) -> None:
    """The same random keys and values for every cache."""
    generator = torch.Generator("cuda").manual_seed(1)
    for i, layer in enumerate(cache.layers):
        for at in range(0, 0 if isinstance(layer, LinearAttentionLayer) else tokens, CHUNK):
            shape = (batch, config.num_key_value_heads, min(tokens - at, CHUNK), config.head_dim)
            k, v = (torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in "kv")
            if isinstance(cache, kvfold.FoldedCache):
                layer.lazy_initialization(k, v)
                layer.folded.append(k, v, [0] * batch)
                layer.columns += k.shape[2]
            else:
                cache.update(k, v, i)


@torch.inference_mode()
def run(model: Any, cache: Any, batch: int, tokens: int, prefill: bool) -> tuple[dict[str, float], torch.Tensor]:
    """(times in seconds and peak bytes, last logits). One prefill call takes CHUNK tokens in all."""
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    figures = {}
    if prefill:
        ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device="cuda")
        start = time.perf_counter()
        for at in range(0, tokens, CHUNK // batch):
            model(ids[:, at : at + CHUNK // batch], past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        figures["prefill_s"] = time.perf_counter() - start
    else:
        read = BEGINNING if any(isinstance(x, LinearAttentionLayer) for x in cache.layers) else 0
        if read:
            model(torch.arange(read, device="cuda").expand(batch, -1), past_key_values=cache, logits_to_keep=1)
        fill(cache, model.config, batch, tokens - read)
    # Every cache is fed the same tokens: greedy choices of a random model part ways at once, and logits with them.
    steps, fed = [], torch.randint(0, model.config.vocab_size, (batch, WARM + STEPS), device="cuda")
    for i in range(WARM + STEPS):
        at = torch.full((1, 1), tokens + i, device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = model(fed[:, i : i + 1], position_ids=at, past_key_values=cache, logits_to_keep=1).logits
        torch.cuda.synchronize()
        steps.append(1e3 * (time.perf_counter() - start))
    steps = steps[WARM:]
    figures |= {"step_ms": statistics.median(steps), "step_mean_ms": statistics.mean(steps), "step_ms_max": max(steps)}
    return {**figures, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}, logits.float()


@contextlib.contextmanager
def prepared(model: Any, kind: str, tokens: int) -> Iterator[Any]:
    """The cache of a contender, with the model set up for it."""
    profile, _, graphs = kind.partition("+")
    if kind == "stock":
        yield transformers.DynamicCache(config=model.config)
    elif kind in ("static", "compiled"):
        plain = model.forward
        if kind == "compiled":
            model.forward = torch.compile(plain, mode="reduce-overhead")
        yield transformers.StaticCache(config=model.config, max_cache_len=tokens + WARM + STEPS)
        model.forward = plain
    else:
        with kvfold.attach(model), kvfold.cuda_graphs(model) if graphs else contextlib.nullcontext() as captured:
            yield kvfold.FoldedCache(model.config, profile=profile)
            if graphs and captured.replays < STEPS:
                raise RuntimeError(f"only {captured.replays} steps were graphs: {captured.reasons}")


def row(model: Any, kind: str, batch: int, tokens: int, prefill: bool) -> tuple[dict[str, float], torch.Tensor]:
    with prepared(model, kind, tokens) as cache:
        figures, logits = run(model, cache, batch, tokens, prefill)
        return {**figures, "cache_gb": getattr(cache, "nbytes", 0) / 1e9}, logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=MODELS, default="llama-8b")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--prefill", action="store_true", help="run the model over the context")
    parser.add_argument("shapes", nargs="*", default=["1x32768"])
    args = parser.parse_args()
    family, sizes = MODELS[args.model]
    config = transformers.AutoConfig.for_model(family, **sizes, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with (args.out / "gpu_end_to_end.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, FIELDS, restval="")
        out.writeheader()
        for text in args.shapes:
            size, _, kinds = text.partition(":")
            batch, tokens = map(int, size.split("x"))
            stock: tuple[dict[str, float], torch.Tensor] | None = None
            for kind in (kinds or CACHES).split(","):
                try:
                    figures, logits = row(model, kind, batch, tokens, args.prefill)
                except Exception:  # noqa: BLE001 a contender that fails must not lose the others; the trace is printed
                    traceback.print_exc(limit=-4)
                    torch.cuda.empty_cache()
                    continue
                torch.cuda.empty_cache()
                stock = (figures, logits) if kind == "stock" else stock
                if stock is not None:
                    figures["ratio"] = stock[0]["step_mean_ms"] / figures["step_mean_ms"]
                    figures["logits_differ"] = float((stock[1] - logits).norm() / stock[1].norm())
                known = {"date": datetime.now(UTC).date(), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "model": args.model, "batch": batch, "tokens": tokens, "cache": kind,
                         "context": "prefilled" if args.prefill else "random"}  # fmt: skip
                out.writerow({**known, **{k: f"{v:.4g}" for k, v in figures.items()}})
                file.flush()
                print(text, kind, {k: f"{v:.4g}" for k, v in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
