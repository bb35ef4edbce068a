"""A config.json to a Model. Keys of the published configs are read as they are, those that transformers derives as well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvfold.engine.variant import Reach, Variant
from kvfold.errors import ModelError, UnsupportedModel
from kvfold.planner.mlp import EXPERT_WIDTHS, MLP_WIDTHS, mlp_values
from kvfold.planner.model import Attention, Layer, Model, Scores
from kvfold.planner.states import conv_state, linear_values, running_state

Config = Mapping[str, Any]

TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config", "decoder")
CONTEXTS = (
    *("max_position_embeddings", "model_max_length", "n_positions", "max_sequence_length", "seq_length"),
    "max_target_positions",  # of Whisper
)
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "attention_heads")
WINDOWS = ("sliding_window", "attention_chunk_size", "sliding_window_size")
HEAD_DIMS = ("head_dim", "attention_head_dim", "kv_channels", "dim_head", "d_kv")
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
POSITION_BYTES = 3 * 8  # of a token with three axes
# The least and the most of what a config may say: beyond it lies no model, but a slip that would take all memory or all day.
SIZES = {
    **dict.fromkeys(LAYERS, (1, 10_000)),
    **dict.fromkeys((*HEADS, "num_key_value_heads", "num_kv_heads", "head_dim", "v_head_dim"), (1, 1 << 14)),
    **dict.fromkeys((*WIDTHS, "linear_num_key_heads", "linear_num_value_heads"), (1, 1 << 20)),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"), (1, 1 << 20)),
    **dict.fromkeys((*MLP_WIDTHS, *EXPERT_WIDTHS, "kv_lora_rank", "qk_rope_head_dim"), (0, 1 << 24)),
    "vocab_size": (0, 1 << 28),
}
DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "float64": 8}
# Names of layer types in configs to the planner's kinds.
KINDS = {
    "full_attention": "full",
    "attention": "full",
    "global_attention": "full",
    "indexed_attention": "indexed",
    "sliding_attention": "sliding",
    "local_attention": "sliding",
    "reference_sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "linear",
    "mamba": "linear",
    "mamba2": "linear",
    "conv": "conv",
    "short_conv": "conv",
    "hybrid": "hybrid",
    "hybrid_sliding": "hybrid_sliding",
    "mlp": "none",
    "moe": "none",
    "dummy": "none",
}
PATTERN = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}  # of Nemotron-H
# Families whose older configs name a window but not which layers slide: every n-th layer attends to everything.
FULL_EVERY = {
    "gemma2": 2,
    "gemma3": 6,
    "gemma3_text": 6,
    "gemma4": 6,
    "gemma4_text": 6,
    "cohere2": 4,
    "gpt_oss": 2,
    "exaone4": 4,
    "olmo3": 4,
    "llama4_text": 4,
    "qwen3_next": 4,
    "qwen3_5_text": 4,
    "qwen3_5_moe_text": 4,
}


# Attentions in each of a config's `num_layers`, where there are several.
ATTENTIONS = {"longcat_flash": 2}

# Families whose layers have a learned logit in their softmax: no config says so.
SINK_LOGITS = {
    **dict.fromkeys(("flint", "gpt_oss", "granite_swa", "granitemoe_swa"), ("full", "sliding")),
    "mimo_v2_flash": ("sliding",),
}
# Families that compute attention in ways of their own, or change keys after caching them: folded caches hand them decoded keys
# and values.
EXPANDED = (
    *("big_bird", "bigbird_pegasus", "bloom", "codegen", "cpmant", "diffllama", "doge", "falcon", "fsmt", "git"),
    *("gpt_neo", "gpt_neox_japanese", "gptj", "jetmoe", "led", "megatron-bert", "mpt", "mvp", "nllb-moe", "pegasus_x"),
    *("prophetnet", "rembert", "roformer", "trocr", "xglm"),
    # A bias by position.
    *("inkling_text", "inkling2_text", "longt5", "mt5", "pop2piano", "switch_transformers", "t5", "udop", "umt5"),
    # Sparse attention: an indexer chooses what is read.
    *("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4", "qwen4_exp_text"),
)
# How many copies of their scores these hold: a matter of their code.
SCORES = {"gpt_oss": Scores(3), "mimo_v2_flash": Scores(2), "flint": Scores(3, wide=True)}


def read(config: Config) -> Model:
    """The Model of a config.json's content.

    Raises UnsupportedModel where it describes no decoder that is known, and ModelError for sizes that cannot be.
    """
    check_sizes(config)
    text = text_of(config)
    name = str(text.get("model_type") or config.get("model_type") or "unknown")
    heads, hidden = number(text, *HEADS), number(text, *WIDTHS)
    kinds = _kinds(text, name)
    shared = int(text.get("num_kv_shared_layers") or 0)
    layers = [_layer(text, kind, i, heads, hidden) for i, kind in enumerate(kinds)]
    if shared:
        layers[-shared:] = [Layer("shared")] * shared
    if not any(x.attention for x in layers):
        raise UnsupportedModel(f"no layer of this {name} keeps keys and values", "There is nothing to fold")
    dtype = str(
        text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    )
    return Model(
        name=name,
        layers=tuple(layers),
        dtype_bytes=DTYPE_BYTES.get(dtype.removeprefix("torch."), 2),
        hidden=hidden,
        query_heads=heads,
        mlp_values=mlp_values(text, hidden),
        linear_values=linear_values(text, hidden) if "linear" in kinds or "hybrid" in kinds else 0,
        vocabulary=int(text.get("vocab_size") or config.get("vocab_size") or 0),
        max_context=next((n for k in CONTEXTS if (n := int(text.get(k) or 0)) > 0), None),
        scores=SCORES.get(name, Scores()),
        streams=int(text.get("altup_num_inputs") or 1),
    )


def text_of(config: Config) -> Config:
    """The part of a config that describes the text decoder."""
    for name in TEXT_CONFIGS:
        if isinstance(inner := config.get(name), Mapping):
            return text_of(inner)
    return config


def check_sizes(config: Config) -> None:
    """Raise ModelError for sizes that no decoder has, such as a negative number of layers."""
    text = text_of(config)
    for name, (least, most) in SIZES.items():
        x = text.get(name)
        if name == "head_dim" and text.get("kv_lora_rank"):
            continue  # of nothing that there is
        if isinstance(x, int | float) and not isinstance(x, bool) and not least <= x <= most:
            raise _broken(f"{name} is {x:,}, where {least} to {most:,} can be")
    heads, kv = (text.get(k) for k in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(kv, int) and heads % kv:
        raise _broken(f"{heads} heads share {kv} of keys and values, which is no whole number each")
    if isinstance(text.get("torch_dtype", text.get("dtype")), int | float | list | Mapping):
        raise _broken("its dtype is no name")


def _broken(what: str) -> ModelError:
    return ModelError(f"this config says {what}", "Compare it with the config.json that was published with the model")


def number(config: Config, *names: str) -> int:
    """The first of `names` that is set. Raises UnsupportedModel if none is."""
    for name in names:
        if isinstance(x := config.get(name), int) and x:
            return x
    raise UnsupportedModel(
        f"this config has no {names[0]!r}, so it describes no decoder", "Give the config.json of a language model"
    )


def _kinds(text: Config, name: str) -> list[str]:
    """The kind of each layer."""
    types = text.get("layer_types") or text.get("layers_block_type")
    if types is None and (pattern := text.get("hybrid_override_pattern")):
        types = [PATTERN[c] for c in pattern]
    count = len(types) if types else number(text, *LAYERS)
    if types is None:
        each = 1 if text.get("num_hidden_layers") else ATTENTIONS.get(name, 1)
        types = [_type_of(text, name, i) for i in range(count * each)]
    unknown = sorted({t for t in types if t not in KINDS})
    if unknown:
        raise UnsupportedModel(f"layers of type {unknown[0]!r} ({name}) are not known", "Use the stock cache for it")
    kinds = [KINDS[t] for t in types]
    return ["latent" if k == "full" and text.get("kv_lora_rank") else k for k in kinds]


def _type_of(text: Config, name: str, i: int) -> str:
    """The type of layer i in a config without `layer_types`."""
    linear = text.get("linear_attn_config")
    if isinstance(linear, Mapping) and "full_attn_layers" in linear:  # Kimi-Linear counts from 1
        return "full_attention" if i + 1 in linear["full_attn_layers"] else "linear_attention"
    if "attn_layer_indices" in text:  # Bamba
        return "full_attention" if i in (text["attn_layer_indices"] or ()) else "linear_attention"
    if "attn_layer_period" in text:  # Jamba
        return "full_attention" if i % text["attn_layer_period"] == text["attn_layer_offset"] else "linear_attention"
    if "full_attn_idxs" in text:  # LFM2
        return "full_attention" if i in text["full_attn_idxs"] else "conv"
    every = text.get("full_attention_interval") or text.get("sliding_window_pattern") or FULL_EVERY.get(name)
    if "linear_num_value_heads" in text:
        return "linear_attention" if (i + 1) % (every or 4) else "full_attention"
    if "attention_chunk_size" in text:
        rope = text.get("no_rope_layers") or [(j + 1) % (every or 4) for j in range(i + 1)]
        return "chunked_attention" if rope[i] else "full_attention"
    if not text.get("sliding_window") or text.get("use_sliding_window") is False:
        return "full_attention"
    if every:
        return "sliding_attention" if (i + 1) % every else "full_attention"
    return "sliding_attention" if i >= (text.get("max_window_layers") or 0) else "full_attention"


def _layer(text: Config, kind: str, i: int, heads: int, hidden: int) -> Layer:
    if kind == "none":
        return Layer(kind)
    if kind == "linear":
        return Layer(kind, states=running_state(text, hidden))
    if kind == "conv":
        return Layer(kind, states=conv_state(text, hidden))
    indexer = 0
    if kind == "indexed" and list(text.get("indexer_types") or ())[i : i + 1] != ["shared"]:
        indexer = number(text, "index_head_dim", "indexer_head_dim") * int(text.get("indexer_kv_heads") or 1)
    if kind in ("latent", "indexed", "sliding") and (rank := _own(text, i, "kv_lora_rank")):
        reach = Reach(_own(text, i, "sliding_window")) if kind == "sliding" else None
        variant = replace(variant_of(text, slides=kind == "sliding"), reach=reach)
        attention = Attention(1, rank, _own(text, i, "qk_rope_head_dim"), variant, indexer)
        return Layer(kind, attention)
    slides = kind in ("sliding", "chunked", "hybrid_sliding")
    attention = _attention(text, i, heads, hidden, slides, chunked=kind == "chunked")
    if indexer:
        # Where positions have three axes, the first such layer keeps those of its keys.
        first = text.get("model_type") == "qwen4_exp_text" and "indexed_attention" not in text["layer_types"][:i]
        attention = replace(attention, indexer=indexer, position_bytes=POSITION_BYTES if first else 0)
    if kind in ("hybrid", "hybrid_sliding"):
        return Layer(kind, attention, running_state(text, hidden, attention.values))
    return Layer(kind, attention)


def _attention(text: Config, i: int, heads: int, hidden: int, slides: bool, chunked: bool) -> Attention:
    own = _overrides(text, i, slides)
    kv = own.get("num_key_value_heads") or text.get("num_key_value_heads") or text.get("num_kv_heads")
    if text.get("multi_query") and not text.get("new_decoder_architecture"):
        kv = 1
    if text.get("model_type") == "falcon" and text.get("new_decoder_architecture"):
        kv = heads  # which are repeated before they are cached
    dim = own.get("head_dim") or next((text[n] for n in HEAD_DIMS if text.get(n)), hidden // heads)
    value = own.get("v_head_dim") or text.get("v_head_dim") or dim
    window = own.get("sliding_window") or next((text[n] for n in WINDOWS if text.get(n)), None)
    if slides and (int(window) < 1 if window is not None else "sliding_window" in text):
        raise _broken(f"layer {i} slides, and its window is {window}")
    reach = Reach(int(window or 0), chunked) if slides else None
    return Attention(int(kv or heads), int(dim), int(value), replace(variant_of(text, slides), reach=reach))


def variant_of(text: Config, slides: bool) -> Variant:
    """The softmax of a text config's full, or sliding, layers."""
    latent = bool(text.get("kv_lora_rank")) and not slides
    if text.get("model_type") in EXPANDED:
        return Variant(latent=latent, expanded=True)
    with_sinks = SINK_LOGITS.get(str(text.get("model_type")), ())
    softcap = text.get("attn_logit_softcapping")
    return Variant(float(softcap) if softcap else None, ("sliding" if slides else "full") in with_sinks, latent)


def _per_layer(text: Config, i: int) -> dict[str, Any]:
    """transformers' `per_layer_config` of layer i."""
    return {int(k): v for k, v in (text.get("per_layer_config") or {}).items()}.get(i, {})


def _own(text: Config, i: int, name: str) -> int:
    """A size of layer i, 0 if it has none."""
    return int(_per_layer(text, i).get(name, text.get(name)) or 0)


def _overrides(text: Config, i: int, slides: bool) -> dict[str, Any]:
    """What layer i has of its own: by transformers' way to say it, or by the published names of Gemma 4 and MiMo V2."""
    own = _per_layer(text, i)
    prefix = "swa_" if slides else "global_"
    names = {"num_key_value_heads": f"{prefix}num_key_value_heads", "head_dim": f"{prefix}head_dim"}
    names["v_head_dim"] = f"{prefix}v_head_dim"
    if not slides:
        names["num_key_value_heads"] = "num_global_key_value_heads"
    if slides and text.get("model_type") == "mimo_v2_flash":
        own = {"num_key_value_heads": 2 * text["num_key_value_heads"], **own}
    return {**own, **{k: text[v] for k, v in names.items() if text.get(v)}}
