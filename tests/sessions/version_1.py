"""The session that tests/vectors/session-1 holds. `python tests/sessions/version_1.py` writes it anew, for a new version."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen3NextConfig

from kvfold.config import CacheSpec, SideSpec
from kvfold.sessions.runner import Runner
from kvfold.sessions.sampler import Sampler
from kvfold.sessions.session import Session

FOLDER = Path(__file__).parents[1] / "vectors" / "session-1"
SPEC = CacheSpec(
    key=SideSpec("mse", 3, "unbiased", search=3), value=SideSpec("trellis", 2, "unbiased"), window=20, sinks=4, seed=7
)
TOKENS = [3 + (i * i + i // 7) % 50 for i in range(300)]
CHECKPOINT = 160
SAMPLER = Sampler(temperature=0.5, top_p=0.75, seed=9, drawn=2)
NOTES = {"title": "a session of version 1"}


def model() -> Any:
    """A hybrid of two layers whose weights are arithmetic: no generator, no library decides them."""
    config = Qwen3NextConfig(
        vocab_size=53,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        num_experts=0,
        num_experts_per_tok=0,
        mlp_only_layers=[0, 1],
        layer_types=["linear_attention", "full_attention"],
        tie_word_embeddings=False,
    )
    out = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in out.named_parameters():
            n = np.arange(p.numel(), dtype=np.uint64) * np.uint64(2654435761) + np.uint64(zlib.crc32(name.encode()))
            unit = ((n % np.uint64(1 << 20)).astype(np.float64) / (1 << 20) - 0.5) * 1.5
            p.copy_(torch.from_numpy(unit).float().reshape(p.shape))
    return out


def session() -> Session:
    s = Session(Runner(model(), spec=SPEC, backend="torch"), sampler=SAMPLER)
    s.notes = NOTES
    s.extend(TOKENS[:CHECKPOINT])
    s.checkpoint()
    s.extend(TOKENS[CHECKPOINT:])
    return s


if __name__ == "__main__":
    session().save(FOLDER)
