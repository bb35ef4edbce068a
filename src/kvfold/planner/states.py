"""Running states of hybrid layers, in numbers: Gated DeltaNet, Kimi Delta Attention, Mamba 1 and 2, short convolutions.

Convolution states hold the last `kernel` inputs in the model's dtype, recurrent ones float32, as transformers keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kvfold.errors import UnsupportedModel
from kvfold.planner.model import FLOAT32_BYTES, State

Config = Mapping[str, Any]

CHUNK = 64  # tokens, of the delta rule
# Gated DeltaNet, by value head: what is as wide as its keys, as its values, as a chunk (measured).
DELTA_KEYS, DELTA_VALUES, DELTA_SCORES = 8, 8.5, 3
# Kimi Delta Attention has a decay for each number of a key: scores of a chunk for each of them, and what is as wide as keys.
KIMI_SCORES, KIMI_KEYS = 3, 10
# Of Mamba 2: scores of a chunk, their decays and the product; inputs and copies of them, and outputs.
SCAN_SCORES, SCAN_TENSORS = 3, 12
# Of Mamba 1, which has a state for every token: its decay, its input's weight, its input; and inputs, copies of them, outputs.
SCAN_STATES, SCAN_INPUTS = 3, 9


def _first(config: Config, *names: str, default: int = 0) -> int:
    return next((int(config[n]) for n in names if isinstance(config.get(n), int | float)), default)


def running_state(text: Config, hidden: int, values: int = 0) -> tuple[State, ...]:
    """Of one linear-attention or state-space layer; values: numbers per token of the attention beside it.

    Raises UnsupportedModel for kinds that are not known.
    """
    if "linear_num_value_heads" in text:
        return _delta_net(text)
    if isinstance(text.get("linear_attn_config"), Mapping) or "linear_num_heads" in text:
        return _kimi(text)
    if "d_rel" in text:  # Inkling: short convolutions over keys and values, and over the outputs of attention and MLP
        return (
            State("conv", (values + 2 * hidden) * _first(text, "conv_kernel_size", "sconv_kernel_size", default=4)),
        )
    if "cca_time0" in text:
        return _zaya(text)
    if _first(text, "mamba_n_groups", "mamba_ngroups", "n_groups"):
        return _mamba_2(text, hidden)
    if "mamba_d_state" in text:
        inner = int(text.get("mamba_expand", 2) * hidden)
        return _states(inner * _first(text, "mamba_d_conv", default=4), inner * int(text["mamba_d_state"]))
    raise UnsupportedModel(
        f"the running state of {text.get('model_type', 'this model')} is not known", "Plan its attention layers alone"
    )


def linear_values(text: Config, hidden: int) -> int:
    """Float32 numbers per token of a call that a linear-attention or state-space layer holds at once, as torch computes it."""
    if "linear_num_value_heads" in text:
        dims = DELTA_KEYS * text["linear_key_head_dim"] + DELTA_VALUES * text["linear_value_head_dim"]
        return int(text["linear_num_value_heads"] * (dims + DELTA_SCORES * CHUNK))
    own = text.get("linear_attn_config") or {}
    if heads := _first(own, "num_heads") or _first(text, "linear_num_heads"):
        return heads * (_first(own, "head_dim") or _first(text, "linear_head_dim")) * (KIMI_SCORES * CHUNK + KIMI_KEYS)
    inner = int(text.get("mamba_expand", 2) * hidden)
    if _first(text, "mamba_n_groups", "mamba_ngroups", "n_groups"):
        heads = _first(text, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
        inner = heads * _first(text, "mamba_d_head", "mamba_head_dim", "mamba_headdim") or inner
        usual = 128 if "ssm_state_size" in text else 256  # Nemotron-H's, and that of others
        chunk = _first(text, "mamba_chunk_size", "chunk_size", default=usual)
        return SCAN_SCORES * heads * chunk + SCAN_TENSORS * inner
    return inner * (SCAN_STATES * _first(text, "mamba_d_state") + SCAN_INPUTS)


def conv_state(text: Config, hidden: int) -> tuple[State, ...]:
    """Of one short-convolution layer (LFM2)."""
    return (State("conv", hidden * _first(text, "conv_L_cache", default=3)),)


def _states(conv: int, recurrent: int, vector: int = 0) -> tuple[State, ...]:
    return State("conv", conv), State("recurrent", recurrent, FLOAT32_BYTES, vector)


def _delta_net(text: Config) -> tuple[State, ...]:
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    return _states(
        (2 * keys + values) * text["linear_conv_kernel_dim"],
        values * text["linear_key_head_dim"],
        text["linear_value_head_dim"],
    )


def _kimi(text: Config) -> tuple[State, ...]:
    own = text.get("linear_attn_config") or {}
    heads = _first(own, "num_heads") or _first(text, "linear_num_heads")
    dim = _first(own, "head_dim") or _first(text, "linear_head_dim")
    kernel = _first(own, "short_conv_kernel_size") or _first(text, "linear_conv_kernel_dim", default=4)
    return _states(3 * heads * dim * kernel, heads * dim * dim, dim)


def _zaya(text: Config) -> tuple[State, ...]:
    """Compressed convolutional attention: the last inputs of two short convolutions over queries and keys, and half of the
    last token's value, all in the model's dtype."""
    keys, dim = int(text["num_key_value_heads"]), int(text["head_dim"])
    inputs = int(text["cca_time0"]) + int(text["cca_time1"]) - 2
    return State("conv", (int(text["num_attention_heads"]) + keys) * dim * inputs), State("value", keys * dim // 2)


def _mamba_2(text: Config, hidden: int) -> tuple[State, ...]:
    heads = _first(text, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    state = _first(text, "mamba_d_state", "ssm_state_size")
    groups = _first(text, "mamba_n_groups", "mamba_ngroups", "n_groups")
    dim = _first(text, "mamba_d_head", "mamba_head_dim", "mamba_headdim")
    inner = heads * dim if dim else int(math.prod((text.get("mamba_expand", 2), hidden)))
    kernel = _first(text, "mamba_d_conv", "conv_kernel", default=4)
    return _states((inner + 2 * groups * state) * kernel, inner * state)
