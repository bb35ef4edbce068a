"""Peak memory of a prefill call beyond weights and cache: the activations that are alive at one time.

Moments compete: the MLP, which holds its gate, its input and their product; attention of a folded layer, which holds queries,
rotated queries, keys, values and outputs, and what its engine makes of them; attention of a layer that keeps an exact window,
with its mask, and all scores where torch has no fused form of its softmax; linear attention and state spaces, which
transformers computes by chunks in float32. `kvfold memory` compares the sum with a process's measured peak. What Python,
torch and their libraries take before there is a model differs by machine and is not in it.
"""

from __future__ import annotations

from kvfold.planner.model import FLOAT32_BYTES, Attention, Model

RESIDUALS = 3  # hidden states alive beside attention: the embeddings, the residual, the normed; beside the MLP one more
STREAM_TENSORS = 7.5  # of all streams, alive at once where they are mixed (measured)
QUERY_TENSORS = 4  # projected, and while they are rotated: two products and their sum
BIASED = 2  # more tensors of scores where a model adds its own biases and masks, one by one
ENGINE_BYTES = {"torch": 8 << 20, "cpu": 4 << 20}  # blocks of decoded pages and scores
# Float32 tensors as wide as the queries that an engine holds at once. torch: scaled queries, projected ones, weighted values,
# and three while those are lifted; of latents, which need no lifting, half of it.
TORCH_QUERIES, TORCH_LATENT_QUERIES = 6, 3


def workspace_bytes(
    model: Model, tokens: int, rows: int, dtype_bytes: int, runs: dict[int, str], context: int = 0
) -> int:
    """Of the call that reaches `context` tokens by `tokens` new ones of each of `rows` sequences, in bytes; logits of one
    position included. runs: the engine of each layer that folds.
    Windows as they were before the call stay until it ends, for a way back."""
    hidden = model.hidden * dtype_bytes * tokens
    # Layers read the streams and their predictions, which are mixed and corrected between them.
    residuals = RESIDUALS + (2 * model.streams if model.streams > 1 else 0)
    mixing = int(STREAM_TENSORS * model.streams * hidden) if model.streams > 1 else 0
    mlp = (residuals + 1) * hidden + model.mlp_values * dtype_bytes * tokens
    linear = residuals * hidden + model.linear_values * FLOAT32_BYTES * tokens
    most, ways_back = rows * max(mlp, linear, mixing), 0
    for i, layer in enumerate(model.layers):
        if (a := layer.attention) is None:
            continue
        if (engine := runs.get(i)) is not None:
            own = _own(model, a) * dtype_bytes * tokens
            if a.variant.expanded:
                most = max(most, rows * (residuals * hidden + own + _expanded(model, a, tokens, context, dtype_bytes)))
                continue
            blocks = _engine(model, a, engine, dtype_bytes) * tokens + ENGINE_BYTES.get(engine, 0)  # row after row
        else:
            own, blocks = _exact(model, a, tokens, dtype_bytes), 0
            ways_back += (a.window or 0) * a.values * dtype_bytes
        most = max(most, rows * (residuals * hidden + own) + blocks)
    return most + rows * (ways_back + model.vocabulary * (dtype_bytes + FLOAT32_BYTES))


def _query(model: Model, a: Attention) -> int:
    """Numbers of a token's queries. Latent attention queries in the width of the latent."""
    return model.query_heads * (a.key_dim + a.value_dim if a.latent else a.key_dim)


def _own(model: Model, a: Attention) -> int:
    """Numbers per token that the model holds itself."""
    return QUERY_TENSORS * _query(model, a) + 2 * a.values


def _engine(model: Model, a: Attention, engine: str, dtype_bytes: int) -> int:
    """Bytes per token of a row that an engine holds. The native ones read tensors as they are."""
    if engine != "torch":
        return 0
    queries = TORCH_LATENT_QUERIES if a.latent else TORCH_QUERIES
    copied = 0 if dtype_bytes == FLOAT32_BYTES else a.values
    return (queries * _query(model, a) + copied) * FLOAT32_BYTES


def _expanded(model: Model, a: Attention, tokens: int, context: int, dtype_bytes: int) -> int:
    """Bytes of a call of a model that attends by itself: keys and values of all tokens, decoded, once more for every query head,
    and its scores with biases, mask and softmax."""
    every = max(tokens, context)
    repeated = model.query_heads * (a.key_dim + a.value_dim) if model.query_heads != a.kv_heads else 0
    scores = model.query_heads * tokens * (model.scores.bytes_each(dtype_bytes) + BIASED * dtype_bytes)
    return every * ((a.values + repeated) * dtype_bytes + scores)


def _exact(model: Model, a: Attention, tokens: int, dtype_bytes: int) -> int:
    """Bytes of a call over a window. sdpa makes numbers of its mask; eager attention repeats keys and values for every query
    head and has all scores."""
    past = tokens + (a.window or 0)
    pairs = tokens * past
    if a.variant.softcap is None and not a.variant.sink_logits:
        return _own(model, a) * dtype_bytes * tokens + pairs * (1 + dtype_bytes)
    repeated = model.query_heads * (a.key_dim + a.value_dim) if model.query_heads != a.kv_heads else 0
    numbers = _query(model, a) * tokens + a.values * (tokens + past) + repeated * past + pairs
    return numbers * dtype_bytes + model.query_heads * pairs * model.scores.bytes_each(dtype_bytes)
