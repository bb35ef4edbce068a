"""Planned workspace against the tensors that are alive at once in a prefill call."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import kvfold
from kvfold.loading import complete
from kvfold.planner.architecture import read
from kvfold.planner.plan import Setting, plan
from kvfold.profiles import load

TOKENS = 1024  # of a call
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "q_lora_rank": None,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 2,
    "head_dim": 32,  # of rotary keys
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "torch engine": ("llama", {"head_dim": 80}),
    "windows": ("mistral", {"sliding_window": 1024}),
    "exact windows": ("mistral", {"sliding_window": 64}),
    "exact windows with sinks": ("gpt_oss", {"sliding_window": 64}),
    "latents": ("deepseek_v3", LATENT),
    "mamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 16,
            "use_mamba_kernels": False,
        },
    ),
    "sinks that are masked in place": ("mimo_v2_flash", {"sliding_window": 64, "head_dim": 96, "v_head_dim": 64}),
    "exact windows with softcaps": ("gemma2", {"sliding_window": 64}),
    "experts": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "activations in steps": ("gpt2", {"n_embd": 256, "n_head": 4, "n_layer": 2, "n_positions": 8192}),
    "delta rule": (
        "qwen3_next",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 32,
            "num_experts": 2,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "delta rule with decays": (
        "kimi_linear",
        {**LATENT, "layer_types": ["linear_attention", "full_attention"], "linear_num_heads": 4, "linear_head_dim": 32},
    ),
    "experts that see all tokens": (
        "llama4_text",
        {
            "attention_chunk_size": 1024,
            "num_local_experts": 4,
            "interleave_moe_layer_step": 1,
            "intermediate_size_mlp": 512,
        },
    ),
    "streams": (
        "gemma3n_text",
        {
            "hidden_size": 512,
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 512,
            "hidden_size_per_layer_input": 32,
            "laurel_rank": 16,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    "attention of the model's own": ("bloom", {}),
    "mamba 2": (
        "bamba",
        {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1},
    ),
}


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations make, while they live; `peak`: the most at one time. What operations are given and
    did not make, weights and the cache's own memory, counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._know((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._know(out, made=True)
        self.peak = max(self.peak, sum(self.known.values()))
        return out

    def _know(self, tensors: Any, made: bool) -> None:
        for x in tree_leaves(tensors):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.known:
                self.known[storage._cdata] = storage.nbytes() if made else 0
                weakref.finalize(storage, self.known.pop, storage._cdata)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "rows", "tokens"), [(torch.float32, 1, TOKENS), (torch.bfloat16, 3, TOKENS // 2)])
def test_a_call_needs_what_is_planned(case: str, dtype: torch.dtype, rows: int, tokens: int) -> None:
    kind, own = CASES[case]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SIZES, **own})
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    cache = kvfold.FoldedCache(model.config, "balanced")
    ids = torch.randint(3, 512, (rows, 3 * tokens))
    with kvfold.attach(model), torch.no_grad():
        for start in (0, tokens):
            model(ids[:, start : start + tokens], past_key_values=cache, logits_to_keep=1)
        with Alive() as alive:
            model(ids[:, 2 * tokens :], past_key_values=cache, logits_to_keep=1)
    setting = Setting(load("balanced").spec, 3 * tokens, dtype_bytes=dtype.itemsize, prefill_tokens=tokens, rows=rows)
    planned = plan(read(complete(config)), setting)["workspace_bytes"]
    # Blocks of an engine, of which native ones are no tensors, and what Python holds a little longer: not planned to the byte.
    assert abs(planned - alive.peak) < 0.1 * alive.peak + (8 << 20), (planned >> 20, alive.peak >> 20)
