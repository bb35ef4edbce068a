"""Operations that vLLM asks of its compiled library whatever is configured, in torch. Stands where that library is imported."""

import torch

_OPERATIONS = torch.library.Library("_C", "FRAGMENT")


def _operation(signature: str):
    _OPERATIONS.define(signature)

    def put(function):
        _OPERATIONS.impl(signature.split("(")[0], function, "CompositeExplicitAutograd")
        return function

    return put


@_operation("silu_and_mul(Tensor! out, Tensor x) -> ()")
def _silu_and_mul(out: torch.Tensor, x: torch.Tensor) -> None:
    half = x.shape[-1] // 2
    out.copy_(torch.nn.functional.silu(x[..., :half]) * x[..., half:])


@_operation(
    "vocab_parallel_embedding(Tensor! out, Tensor ids, Tensor weight, int first, int stop, int padding,"
    " int added_first, int added_stop) -> ()"
)
def _vocab_parallel_embedding(
    out: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, first: int, stop: int, padding: int, *added: int
) -> None:
    """Rows of a worker's part of a vocabulary; zeros for other workers' tokens."""
    own = (ids >= first) & (ids < stop)
    extra = (ids >= added[0]) & (ids < added[1])
    row = torch.where(own, ids - first, torch.where(extra, ids - added[0] + stop - first + padding, 0))
    out.copy_(weight[row] * (own | extra)[:, None])


@_operation("weak_ref_tensor(Tensor x) -> Tensor")
def _weak_ref_tensor(x: torch.Tensor) -> torch.Tensor:
    """What a CUDA graph reads or writes. vLLM's own lets go of the memory, so that graphs share it; here they do not."""
    return x.view(x.shape)


def _no(*_: int) -> bool:
    return False


for _name in ("cutlass_scaled_mm_supports_fp8", "cutlass_scaled_mm_supports_block_fp8",
              "cutlass_scaled_mm_supports_fp4", "cutlass_group_gemm_supported"):  # fmt: skip
    _operation(f"{_name}(int capability) -> bool")(_no)

# Compiling, vLLM names these in rewritings of the model's graph that stay off.
for _name in ("rotary_embedding", "fused_qk_norm_rope", "fused_add_rms_norm", "static_scaled_fp8_quant",
              "dynamic_scaled_fp8_quant", "dynamic_per_token_scaled_fp8_quant", "silu_and_mul_quant",
              "rms_norm_static_fp8_quant", "fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant",
              "silu_and_mul_per_block_quant"):  # fmt: skip
    _OPERATIONS.define(f"{_name}(Tensor x) -> ()")
