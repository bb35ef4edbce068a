"""GGUF metadata to the keys of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvfold.errors import UnsupportedModel

# Key of a config.json to the name of a GGUF field, without its architecture.
NAMES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "head_dim": "attention.key_length",
    "v_head_dim": "attention.value_length",
    "sliding_window": "attention.sliding_window",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts_per_tok": "expert_used_count",
    "max_position_embeddings": "context_length",
    "vocab_size": "vocab_size",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "full_attention_interval": "full_attention_interval",
    "conv_L_cache": "shortconv.l_cache",
}
# Architectures that GGUF names differently, where the reader of configs knows a rule by name.
MODEL_TYPES = {"gpt-oss": "gpt_oss", "qwen3next": "qwen3_next", "llama4": "llama4_text"}


def as_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json that describes the same model. Raises UnsupportedModel if it is not a decoder's."""
    architecture = metadata.get("general.architecture")
    own = {k.removeprefix(f"{architecture}."): v for k, v in metadata.items() if k.startswith(f"{architecture}.")}
    if "attention.head_count" not in own:
        raise UnsupportedModel(f"this GGUF file ({architecture}) describes no decoder", "Give a language model")
    config: dict[str, Any] = {k: own[v] for k, v in NAMES.items() if v in own}
    config["model_type"] = MODEL_TYPES.get(str(architecture), str(architecture))
    heads = own.get("attention.head_count_kv", own["attention.head_count"])
    if isinstance(heads, list):
        # One number per layer, 0 in layers without keys: short convolutions or state spaces.
        linear = "conv" if "shortconv.l_cache" in own else "linear_attention"
        config["layer_types"] = ["full_attention" if n else linear for n in heads]
        heads = max(heads)
    config["num_key_value_heads"] = heads
    if isinstance(config["num_attention_heads"], list):
        config["num_attention_heads"] = max(config["num_attention_heads"])
    if "kv_lora_rank" not in config:
        config.pop("qk_rope_head_dim", None)
    return config | _running(str(architecture), own)


def _running(architecture: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """State-space fields: Gated DeltaNet puts its shapes into the names of Mamba's."""
    if "ssm.state_size" not in own:
        return {}
    inner, state, groups = (own.get(f"ssm.{k}", 0) for k in ("inner_size", "state_size", "group_count"))
    kernel, heads = own.get("ssm.conv_kernel", 4), own.get("ssm.time_step_rank", 0)
    if "full_attention_interval" in own or architecture.startswith(("qwen3next", "qwen35")):
        return {
            "linear_num_key_heads": groups,
            "linear_num_value_heads": heads,
            "linear_key_head_dim": state,
            "linear_value_head_dim": inner // heads,
            "linear_conv_kernel_dim": kernel,
        }
    two = {"mamba_n_groups": groups, "mamba_n_heads": heads, "mamba_d_head": inner // heads} if groups else {}
    return {"mamba_d_state": state, "mamba_d_conv": kernel, "mamba_expand": inner / own["embedding_length"], **two}
