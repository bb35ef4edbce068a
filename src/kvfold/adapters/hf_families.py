"""transformers: what is known of model types that a config does not say."""

from __future__ import annotations

# Families of multi-head latent attention that the tests hold to the stock cache.
LATENT = (
    *("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "longcat_flash"),
    *("minicpm3", "mistral4", "youtu"),
)
# Families that a folded cache cannot serve, and why: each would be silently wrong, or fail half-way through a call.
NOT_FOLDED = {
    "minimax": "takes no cache but one of its own kind",
    "mllama_text_model": "keeps what its cross-attention reads in the same cache",
    "recurrent_gemma": "keeps running states in its modules, outside of caches",
    **dict.fromkeys(("openai-gpt", "rwkv"), "has no cache in transformers"),
    "xlstm": "keeps running states outside of caches of this kind",
}
# Families whose layers hand every new running state to the cache, which may then keep it in codes. State-space layers change
# theirs in place.
CODED_STATES = ("bailing_hybrid", "kimi_linear", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
