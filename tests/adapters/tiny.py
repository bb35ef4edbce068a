"""Tiny random-weight models of the families the adapter is tested with. No download, a few thousand parameters."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

VOCAB = 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "attn_implementation": "sdpa",
}
LATENT, ROTARY = 32, 8  # numbers per token of latent attention
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON),
    "qwen2": lambda: Qwen2Config(**COMMON),  # biased keys
    "qwen3": lambda: Qwen3Config(**COMMON),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=24),
    "gemma3": lambda: Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 4},
        sliding_window=24,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3_next": lambda: Qwen3NextConfig(
        **{**COMMON, "num_hidden_layers": 4},
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{k: v for k, v in COMMON.items() if k != "head_dim"} | {"num_key_value_heads": 4},
        kv_lora_rank=LATENT,
        q_lora_rank=24,
        qk_rope_head_dim=ROTARY,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=2,
    ),
}
FAMILIES = tuple(CONFIGS)
CONFIGS["llama64"] = lambda: LlamaConfig(**{**COMMON, "head_dim": 64})  # the narrowest head with native kernels


@functools.cache
def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in eval mode. Weights are wide enough that the next token depends on all of the context."""
    torch.manual_seed(list(CONFIGS).index(family))
    model = AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and ("proj" in name or "lm_head" in name):
                p.normal_(0, 0.25)
            elif name.endswith("bias"):
                p.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(batch: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded rows of falling length, and their mask."""
    ids, mask = prompt(batch, length, seed), torch.ones(batch, length, dtype=torch.long)
    for b in range(1, batch):
        n = b * length // (batch + 1) + 3
        ids[b, :n], mask[b, :n] = 0, 0
    return ids, mask
