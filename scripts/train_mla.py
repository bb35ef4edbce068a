"""Train a small language model with multi-head latent attention (DeepSeek-V3's), to measure what folding latents costs.

python scripts/train_mla.py OUTPUT --minutes 8
kvfold eval OUTPUT --skip 149 --profile balanced

It reads the first four fifths of the text that ships with kvfold, in the shipped model's tokens; `--skip 149` begins in what it
never saw. Embeddings begin as the shipped model's, on their main axes: minutes on a CPU are too few to learn words.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from kvfold.evaluation.text import haystack, stream
from kvfold.loading import load

HIDDEN, LAYERS = 192, 4
SEEN = 0.8  # of the text
LENGTHS = ((0.0, 512), (0.6, 2048))  # share of the time from which sequences have this length
TOKENS = 4096  # of a step
RATE, WARM_STEPS, DECAY = 3e-3, 20, 0.1


def config(vocabulary: int) -> DeepseekV3Config:
    """Dense layers; latents of 128 numbers and rotary keys of 32 for four heads."""
    return DeepseekV3Config(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=128,
        q_lora_rank=None,
        qk_rope_head_dim=32,
        qk_nope_head_dim=48,
        v_head_dim=48,
        first_k_dense_replace=LAYERS,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def embeddings(taught: Tensor) -> Tensor:
    """The first HIDDEN principal axes of embeddings [V, D], scaled to .02 a number."""
    u, s, _ = torch.linalg.svd(taught.float(), full_matrices=False)
    x = u[:, :HIDDEN] * s[:HIDDEN]
    return x * (0.02 / x.square().mean().sqrt())


def train(model: DeepseekV3ForCausalLM, ids: Tensor, seconds: float, seed: int) -> float:
    """AdamW with a cosine over the processor's time there is; returns the last losses' mean, in nats."""
    torch.manual_seed(seed)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98))
    began, step, losses = time.process_time(), 0, [9.0]
    while (done := (time.process_time() - began) / seconds) < 1:
        length = [n for share, n in LENGTHS if done >= share][-1]
        starts = torch.randint(len(ids) - length, (TOKENS // length,))
        batch = torch.stack([ids[a : a + length] for a in starts.tolist()]).to(model.device)
        rate = RATE * min(1.0, (step + 1) / WARM_STEPS) * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            sys.stderr.write(f"step {step}, {100 * done:.0f} % of the time, {length} tokens: {losses[-1]:.3f} nats\n")
        step += 1
    last = losses[-20:]
    return sum(last) / len(last)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small model with latent attention.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="Of the processor's time.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    shipped = load("demo")
    ids = torch.tensor(stream(haystack(), shipped.tokenizer))
    torch.manual_seed(given.seed)
    model = DeepseekV3ForCausalLM(config(shipped.model.config.vocab_size)).to(given.device)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embeddings(shipped.model.get_input_embeddings().weight))
    loss = train(model, ids[: int(SEEN * len(ids))], 60 * given.minutes, given.seed)
    model.eval().to(torch.bfloat16).save_pretrained(given.output)
    shipped.tokenizer.save_pretrained(given.output)
    sys.stdout.write(f"{sum(p.numel() for p in model.parameters()):,} parameters, {loss:.3f} nats on what it saw\n")


if __name__ == "__main__":
    main()
