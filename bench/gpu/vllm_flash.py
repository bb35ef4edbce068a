"""vLLM's flash attention over sequences one after another, by torch's build of it. Stands where vLLM's own is imported."""

import torch
from torch import Tensor

compile_flash_attn_varlen_func_from_specs = get_scheduler_metadata = None  # of versions that torch does not have


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """q [tokens, H * G, D], k, v [tokens, H, D] -> [tokens, H * G, D]; a sequence's queries are its last tokens."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False, scale=softmax_scale
    )[0]
