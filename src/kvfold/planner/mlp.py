"""Numbers per token that an MLP holds at once, as transformers computes it: dense, or experts gathered by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MLP_WIDTHS = ("intermediate_size", "block_ff_dim", "ffn_hidden_size", "ffn_dim", "n_inner", "decoder_ffn_dim")
EXPERT_WIDTHS = ("moe_intermediate_size", "expert_ffn_hidden_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
GATED, UNGATED = 3, 2  # gate, up, product; up, its activation
ALL_SEE_ALL = (
    "llama4_text",
)  # every expert computes every token, and the router weights those it was not chosen for by zero
# Activations that are several operations hold more while they run.
ACTIVATIONS = {"gelu_new": 4, "gelu_fast": 5, "gelu_accurate": 4, "quick_gelu": 3, "xielu": 5}


def mlp_values(text: Mapping[str, Any], hidden: int) -> int:
    """Of the widest layer. text: the decoder's part of a config.json."""
    widths = [_widest(text, (name,)) for name in MLP_WIDTHS if text.get(name)]
    dense = widths[0] if widths else 4 * hidden
    activation = str(text.get("hidden_act") or text.get("activation_function") or "")
    usual = UNGATED if "activation_function" in text else GATED
    values = dense * max(usual, ACTIVATIONS.get(activation, 0))
    if _has_experts(text):
        each = _widest(text, EXPERT_WIDTHS) or dense
        # A token's copies for its experts, beside their gates and ups, activations and products; or beside their outputs, the
        # weighted ones, and these in the tokens' order.
        seeing = _widest(text, EXPERTS) if text.get("model_type") in ALL_SEE_ALL else _widest(text, CHOSEN)
        values = max(values, seeing * max(hidden + 4 * each, 4 * hidden))
    return values


def _has_experts(text: Mapping[str, Any]) -> bool:
    """Whether any layer has them: configs may name experts that none has."""
    types = text.get("layer_types") or text.get("layers_block_type") or ()
    dense_first, layers = text.get("first_k_dense_replace"), text.get("num_hidden_layers")
    only_dense = ("mlp" in types and "moe" not in types) or (dense_first and layers and dense_first >= layers)
    return _widest(text, EXPERTS) > 1 and not only_dense


def _widest(text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """The first of them that is set; some configs name a number per layer."""
    x = next((text[n] for n in names if text.get(n)), 0)
    return int(max(x) if isinstance(x, list | tuple) else x)
