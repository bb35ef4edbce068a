"""Decode step of a randomly initialised Llama-3.1-8B shape, folded against stock, on one GPU.

Run: python bench/gpu/end_to_end.py BxN ...
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
import transformers

import kvfold

CHUNK = 8192  # tokens of a prefill call
STEPS = 12


@torch.inference_mode()
def run(model: torch.nn.Module, cache: object, batch: int, tokens: int) -> tuple[float, float, torch.Tensor]:
    """(median seconds of a decode step, peak bytes, last logits)."""
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    for at in range(0, tokens, CHUNK):
        model(ids[:, at : at + CHUNK], past_key_values=cache, logits_to_keep=1)
    # Both caches are fed the same tokens: greedy choices of a random model part ways at once, and logits with them.
    steps, fed = [], torch.randint(0, model.config.vocab_size, (batch, STEPS), device="cuda")
    for i in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        logits = model(fed[:, i : i + 1], past_key_values=cache, logits_to_keep=1).logits
        torch.cuda.synchronize()
        steps.append(time.perf_counter() - start)
    return statistics.median(steps), torch.cuda.max_memory_allocated(), logits.float()


def main() -> None:
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for text in sys.argv[1:] or ["1x32768"]:
        batch, tokens = map(int, text.split("x"))
        stock, stock_peak, a = run(model, transformers.DynamicCache(config=config), batch, tokens)
        torch.cuda.empty_cache()
        with kvfold.attach(model):
            cache = kvfold.FoldedCache(config, profile="turbo-3")
            folded, folded_peak, b = run(model, cache, batch, tokens)
            kv = cache.nbytes
        del cache
        torch.cuda.empty_cache()
        print(
            f"{text}: stock {stock * 1e3:.1f} ms, {stock_peak / 1e9:.1f} GB peak; folded {folded * 1e3:.1f} ms, "
            f"{folded_peak / 1e9:.1f} GB peak, cache {kv / 1e9:.2f} GB; ratio {stock / folded:.2f}; "
            f"logits differ by {float((a - b).norm() / a.norm()):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
