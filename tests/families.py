"""Tiny random-weight models of many transformers families: a few thousand parameters each, no download.

A family is a model_type. Its config gets every size below that its class knows, and what OVERRIDES says. Types that the
installed transformers does not have are left out.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

VOCABULARY = 61
WINDOW = 24
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "sliding_window": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_num_experts": 4,
    "moe_k": 2,
    "num_shared_experts": 1,
    "expert_ffn_hidden_size": 16,
    # multi-head latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "index_topk": 40,  # sparse attention: fewer than the tokens there are
    "v_head_dim": 16,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    # older names
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 4096,
    "n_layers": 4,
    "n_heads": 4,
    "d_model": 32,
    "max_seq_len": 4096,
    "decoder_layers": 4,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "ffn_dim": 48,
}
BATCH, LENGTH, STEPS = 2, 200, 3
CHUNKS = (70, LENGTH)  # ends of the prefill's calls; the second row's pads end within the first
# Of the spread of the logits: what float32 sums in other orders come to through four layers of wide weights.
ROUNDING = 2e-4
HALF_LINEAR = ["linear_attention", "full_attention"] * 2
BERTS = (  # decoders if asked to be
    *(
        "bert",
        "bert-generation",
        "big_bird",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
    ),
    *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl"),
)
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": {"topk_method": "greedy"},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 10000.0} for k in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"dim_head": 8, "dim_ff": 48, "segment_types": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
    },
    "bailing_hybrid": {"layer_types": HALF_LINEAR},
    **{k: {"is_decoder": True} for k in BERTS},
    "deepseek_v2": {"topk_method": "greedy"},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "gemma3n_text": {
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 32,
        "head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "gpt_bigcode": {"multi_query": True},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": HALF_LINEAR, "shared_intermediate_size": 16},
    "helium": {"head_dim": 8},
    "hrm_text": {"num_hidden_layers": 1},  # which runs eight times
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "kimi_linear": {"layer_types": HALF_LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "llama4_text": {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 0, 1, 0]},
    **{t: {"sliding_window": None} for t in ("doge", "ministral3", "mixtral", "phi3", "phimoe", "starcoder2")},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 48, "zero_expert_num": 2, "moe_topk": 2, "head_dim": 8},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "mlp", "full_attention"]},
    "olmo_hybrid": {"layer_types": HALF_LINEAR},
    "qwen3_5_moe_text": {"layer_types": HALF_LINEAR},
    "qwen3_5_text": {"layer_types": HALF_LINEAR},
    "prophetnet": {
        "num_decoder_layers": 4,
        "num_decoder_attention_heads": 4,
        "num_encoder_layers": 4,
        "is_decoder": True,
    },
    "qwen3_next": {"layer_types": HALF_LINEAR},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 100,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
    },
    "whisper": {"num_key_value_heads": 4, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
}
MLA_HEADS = {"num_key_value_heads": 4}  # what is left of grouping where every head reads one latent
FAMILIES = tuple(
    t
    for t in (
        *("apertus", "arcee", "aria_text", "bitnet", "bloom", "cohere", "ctrl", "diffllama", "doge", "ernie4_5"),
        *("falcon", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "helium", "hunyuan_v1_dense"),
        *("jais2", "llama", "ministral3", "mpt", "nanochat", "nemotron", "olmo", "olmo2", "opt", "persimmon"),
        *("phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm"),
        *("ernie4_5_moe", "flex_olmo", "glm4_moe", "granitemoe", "granitemoeshared", "hunyuan_v1_moe", "hy_v3"),
        *("jetmoe", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open"),
        *("afmoe", "cohere2", "cwm", "exaone4", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss"),
        *("granite_swa", "llama4_text", "mimo_v2_flash", "ministral", "mistral", "olmo3", "vaultgemma"),
        *("biogpt", "cohere2_moe", "dots1", "exaone_moe", "flint", "granitemoe_swa", "internlm3", "laguna", "mellum"),
        *("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"),
        *("bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe"),
        *("nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba", "zamba2"),
        *(
            "axk1",
            "bart",
            "blenderbot",
            "codegen",
            "gemma4_unified_text",
            "gpt_neo",
            "gptj",
            "hyperclovax",
            "inkling_text",
        ),
        *(
            "iquestcoder",
            "kolibri1",
            "lfm3",
            "longcat_flash",
            "mamba",
            "marian",
            "mbart",
            "minimax",
            "minimax_m3_vl_text",
        ),
        *("modernbert-decoder", "moshi", "pegasus", "plbart", "recurrent_gemma", "whisper", "zaya"),
        *("axk2", "blenderbot-small", "deepseek_v32", "deepseek_v4", "falcon_mamba"),
        *("glm_moe_dsa", "gpt_neox_japanese", "hy_v4", "inkling2_text", "mvp", "openai-gpt"),
        *("rwkv", "trocr", "xlstm"),
        *("beam", *BERTS, "cohere_compass_text", "dbrx", "dots3_note_text", "git", "hrm_text", "qwen4_exp_text"),
    )
    if t in CONFIG_MAPPING
)
# Refused by name, and what the refusal says.
REFUSED = {
    **dict.fromkeys(("openai-gpt", "rwkv"), "has no cache in transformers"),
    "deepseek_v4": "unknown cache kind",
    **dict.fromkeys(("mamba", "falcon_mamba"), "keeps keys and values"),
    "xlstm": "running states outside",
    "minimax": "no cache but one of its own kind",
    "recurrent_gemma": "running states in its modules",
}
FOLDING = tuple(f for f in FAMILIES if f not in REFUSED)


def sizes_of(known: Any, family: str) -> dict[str, Any]:
    """What a config of the family is made of; known: one with its defaults."""
    sizes = {k: v for k, v in SIZES.items() if settable(known, k)}
    if "kv_lora_rank" in sizes:
        sizes.pop("head_dim", None)
        sizes |= MLA_HEADS
    return {**sizes, **OVERRIDES.get(family, {})}


@functools.cache
def config(family: str) -> Any:
    own = CONFIG_MAPPING[family](**sizes_of(CONFIG_MAPPING[family](), family))
    supports = MODEL_FOR_CAUSAL_LM_MAPPING[type(own)]._supports_sdpa
    # Older transformers let sdpa run softcapped models, and leave the softcap out.
    supports = supports and not getattr(own, "attn_logit_softcapping", None)
    own._attn_implementation = "sdpa" if supports else "eager"
    return own


def settable(known: Any, name: str) -> bool:
    """Whether the class has this attribute and lets it be chosen."""
    try:
        setattr(copy.copy(known), name, getattr(known, name))
    except (AttributeError, NotImplementedError):
        return False
    except RuntimeError:  # layers differ in it
        pass
    return True


@functools.cache
def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model in eval mode, with weights wide enough that the next token depends on all of the context."""
    torch.manual_seed(FAMILIES.index(family))
    model = AutoModelForCausalLM.from_config(config(family)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2 and ("proj" in name or "lm_head" in name):
                p.normal_(0, 0.25)
            elif name.endswith("bias") or "sinks" in name:
                p.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(dtype)


def prompt(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[Tensor, Tensor]:
    ids, mask = prompt(BATCH, LENGTH), torch.ones(BATCH, LENGTH + STEPS, dtype=torch.long)
    ids[1, :63], mask[1, :63] = 0, 0
    return ids, mask


@torch.no_grad()
def logits_of(model: Any, cache: Any) -> Tensor:
    """Of a left-padded batch, prefilled in two calls and continued by single tokens: [real tokens, vocabulary]."""
    ids, mask = padded()
    ids = torch.cat([ids, prompt(BATCH, STEPS, seed=1)], 1)
    parts, start = [], 0
    for stop in (*CHUNKS, *range(LENGTH + 1, LENGTH + STEPS + 1)):
        part = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        parts.append(part.logits)
        start = stop
    return torch.cat(parts, 1)[mask.bool()]
