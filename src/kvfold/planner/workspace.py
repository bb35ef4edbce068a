"""Peak memory of a prefill call beyond weights and cache: the activations that are alive at one time.

Three moments compete: the MLP, which holds its gate, its input and their product; attention, which holds queries,
rotated queries, keys, values and outputs, and the engine's float32 copies of the call; linear attention, which
transformers computes by chunks in float32. `kvfold memory` compares the sum with a process's measured peak. What Python,
torch and their libraries take before there is a model differs by machine and is not in it.
"""

from __future__ import annotations

from kvfold.planner.model import FLOAT32_BYTES, Attention, Model

RESIDUALS = 3  # hidden states alive beside either: residual, normed, output
MLP_TENSORS = 3  # gate, up, product
QUERY_TENSORS = 4  # projected, rotated, attended, transposed
ENGINE_QUERIES = 2  # float32 queries and outputs of an engine
LINEAR_TENSORS = 17  # of the chunked delta rule in torch: inputs, their copies by chunk and by decay (measured)
ENGINE_BYTES = {"torch": 16 << 20, "cpu": 4 << 20}  # blocks of decoded pages and scores


def workspace_bytes(model: Model, tokens: int, rows: int, dtype_bytes: int, engines: set[str]) -> int:
    """Of a call of `tokens` tokens of each of `rows` sequences, in bytes; logits of one position included. engines: those that
    run."""
    mlp = MLP_TENSORS * model.mlp_width * dtype_bytes
    attention = max(_attention(model, a, dtype_bytes) for x in model.layers if (a := x.attention) is not None)
    linear = LINEAR_TENSORS * model.linear_width * FLOAT32_BYTES
    per_token = RESIDUALS * model.hidden * dtype_bytes + max(mlp, attention, linear)
    engine = max((ENGINE_BYTES.get(name, 0) for name in engines), default=0)
    return rows * (tokens * per_token + model.vocabulary * (dtype_bytes + FLOAT32_BYTES)) + engine


def _attention(model: Model, a: Attention, dtype_bytes: int) -> int:
    """Bytes per token of a call. Latent attention queries in the width of the latent."""
    query = model.query_heads * (a.key_dim + a.value_dim if a.latent else a.key_dim)
    own = QUERY_TENSORS * query + 2 * a.values
    if dtype_bytes == FLOAT32_BYTES:  # taken as they are
        return own * FLOAT32_BYTES
    return own * dtype_bytes + (ENGINE_QUERIES * query + a.values) * FLOAT32_BYTES
