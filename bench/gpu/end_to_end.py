"""Decode step of a randomly initialised Llama-3.1-8B shape on one GPU: the stock cache against folded ones.

Run: python bench/gpu/end_to_end.py [--out FOLDER] BxN[:CACHE,CACHE...] ... with CACHE stock or a profile. Writes gpu_end_to_end.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

import kvfold

CHUNK = 8192  # tokens of a prefill call
STEPS = 12
CACHES = "stock,balanced,turbo-3"


@torch.inference_mode()
def run(model: torch.nn.Module, cache: object, batch: int, tokens: int) -> tuple[dict[str, float], torch.Tensor]:
    """(times in seconds and peak bytes, last logits). One prefill call takes CHUNK tokens in all."""
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for at in range(0, tokens, CHUNK // batch):
        model(ids[:, at : at + CHUNK // batch], past_key_values=cache, logits_to_keep=1)
    torch.cuda.synchronize()
    prefill = time.perf_counter() - start
    # Every cache is fed the same tokens: greedy choices of a random model part ways at once, and logits with them.
    steps, fed = [], torch.randint(0, model.config.vocab_size, (batch, STEPS), device="cuda")
    for i in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = model(fed[:, i : i + 1], past_key_values=cache, logits_to_keep=1).logits
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
    times = {"prefill_s": prefill, "step_ms": 1e3 * statistics.median(steps), "step_ms_max": 1e3 * max(steps)}
    return {**times, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}, logits.float()


def row(model: torch.nn.Module, kind: str, batch: int, tokens: int) -> tuple[dict[str, float], torch.Tensor]:
    if kind == "stock":
        return run(model, transformers.DynamicCache(config=model.config), batch, tokens)
    with kvfold.attach(model):
        cache = kvfold.FoldedCache(model.config, profile=kind)
        figures, logits = run(model, cache, batch, tokens)
        return {**figures, "cache_gb": cache.nbytes / 1e9}, logits


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("shapes", nargs="*", default=["1x32768"])
    args = parser.parse_args()
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    fields = ["date", "device", "torch", "transformers", "batch", "tokens", "cache", "prefill_s", "step_ms", "step_ms_max",
              "peak_gb", "cache_gb", "ratio", "logits_differ"]  # fmt: skip
    with (args.out / "gpu_end_to_end.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, fields, restval="")
        out.writeheader()
        for text in args.shapes:
            size, _, kinds = text.partition(":")
            batch, tokens = map(int, size.split("x"))
            stock: tuple[dict[str, float], torch.Tensor] | None = None
            for kind in (kinds or CACHES).split(","):
                figures, logits = row(model, kind, batch, tokens)
                torch.cuda.empty_cache()
                stock = (figures, logits) if kind == "stock" else stock
                if stock is not None:
                    figures["ratio"] = stock[0]["step_ms"] / figures["step_ms"]
                    figures["logits_differ"] = float((stock[1] - logits).norm() / stock[1].norm())
                known = {"date": datetime.now(UTC).date(), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
                         "transformers": transformers.__version__, "batch": batch, "tokens": tokens, "cache": kind}  # fmt: skip
                out.writerow({**known, **{k: f"{v:.4g}" for k, v in figures.items()}})
                file.flush()
                print(text, kind, {k: f"{v:.4g}" for k, v in figures.items()}, flush=True)


if __name__ == "__main__":
    main()
