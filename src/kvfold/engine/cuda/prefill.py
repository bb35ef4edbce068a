"""Attention of many new queries: pages are unfolded a bounded tile at a time and read by torch's flash attention.

Reading codes costs one pass per 16 query columns in the decode kernel; from some 128 columns on it is cheaper to unfold
once. The whole history is never held in 16 bits: TILE_TOKENS of it are, in one workspace. Parts are merged by their
log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor

# 32k tokens of 8 heads and 128 dims are 128 MB; the merge of a tile then costs 1 % of its attention.
TILE_TOKENS = 32768
MIN_COLUMNS = 128  # query columns of one KV head from which this path is the faster one


def attention_part(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q, k, v [heads, tokens, D] -> (out in float32, log-sum-exp [heads, Q])."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        q[None], k[None], v[None], 0.0, causal, False, scale=scale
    )
    return out[0].float(), lse[0]


class Merge:
    """Softmax parts of the same queries, merged as they come."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse = torch.empty(0)

    def add(self, out: Tensor, lse: Tensor) -> None:
        if self.out is None:
            self.out, self.lse = out, lse
            return
        total = torch.logaddexp(self.lse, lse)
        self.out.mul_(torch.exp(self.lse - total)[..., None]).addcmul_(out, torch.exp(lse - total)[..., None])
        self.lse = total
