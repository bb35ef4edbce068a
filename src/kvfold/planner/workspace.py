"""Peak memory of a prefill call beyond weights and cache: the activations that are alive at one time.

Moments compete: the MLP, which holds its gate, its input and their product; attention of a folded layer, which holds queries,
rotated queries, keys, values and outputs, and what its engine makes of them; attention of a layer that keeps an exact window,
with its mask, and all scores where torch has no fused form of its softmax; linear attention and state spaces, which
transformers computes by chunks in float32. `kvfold memory` compares the sum with a process's measured peak. What Python,
torch and their libraries take before there is a model differs by machine and is not in it.
"""

from __future__ import annotations

from kvfold.planner.model import FLOAT32_BYTES, Attention, Model

RESIDUALS = 3  # hidden states alive beside either: residual, normed, output
MLP_TENSORS = 3  # gate, up, product
QUERY_TENSORS = 4  # projected, rotated, attended, transposed
ENGINE_BYTES = {"torch": 8 << 20, "cpu": 4 << 20}  # blocks of decoded pages and scores
# Float32 tensors as wide as the queries that an engine holds at once. torch: scaled queries, projected ones, weighted values,
# and three while those are lifted; of latents, which need no lifting, half of it. Others copy what is not float32.
TORCH_QUERIES, TORCH_LATENT_QUERIES, COPIED_QUERIES = 6, 3, 2
EAGER_SCORES = 3  # scores, with their sink logits, and their softmax


def workspace_bytes(model: Model, tokens: int, rows: int, dtype_bytes: int, runs: dict[int, str]) -> int:
    """Of a call of `tokens` tokens of each of `rows` sequences, in bytes; logits of one position included. runs: the engine of
    each layer that folds."""
    moments = [MLP_TENSORS * model.mlp_width * dtype_bytes * tokens, model.linear_values * FLOAT32_BYTES * tokens]
    blocks = 0
    for i, layer in enumerate(model.layers):
        if (a := layer.attention) is None:
            continue
        if (engine := runs.get(i)) is not None:
            moments.append(_folded(model, a, engine, dtype_bytes) * tokens)
            blocks = max(blocks, ENGINE_BYTES.get(engine, 0))
        else:
            moments.append(_own(model, a) * dtype_bytes * tokens + _exact(model, a, tokens, dtype_bytes))
    logits = model.vocabulary * (dtype_bytes + FLOAT32_BYTES)
    return rows * (RESIDUALS * model.hidden * dtype_bytes * tokens + max(moments) + logits) + blocks


def _query(model: Model, a: Attention) -> int:
    """Numbers of a token's queries. Latent attention queries in the width of the latent."""
    return model.query_heads * (a.key_dim + a.value_dim if a.latent else a.key_dim)


def _own(model: Model, a: Attention) -> int:
    """Numbers per token that the model holds itself."""
    return QUERY_TENSORS * _query(model, a) + 2 * a.values


def _folded(model: Model, a: Attention, engine: str, dtype_bytes: int) -> int:
    """Bytes per token of a call."""
    if engine == "torch":
        engines = TORCH_LATENT_QUERIES if a.latent else TORCH_QUERIES
    else:
        engines = 0 if dtype_bytes == FLOAT32_BYTES else COPIED_QUERIES
    copied = 0 if dtype_bytes == FLOAT32_BYTES else a.values
    return _own(model, a) * dtype_bytes + (engines * _query(model, a) + copied) * FLOAT32_BYTES


def _exact(model: Model, a: Attention, tokens: int, dtype_bytes: int) -> int:
    """Bytes of masks and scores over a window and the call: sdpa makes numbers of its mask, eager attention has all scores."""
    pairs = tokens * (tokens + (a.window or 0))
    if a.variant.softcap is not None or a.variant.sink_logits:
        return pairs * dtype_bytes * (1 + EAGER_SCORES * model.query_heads)
    return pairs * (1 + dtype_bytes)
