"""The Triton engine: canonical pages on GPUs of any maker."""

# How every kernel is compiled. With 8 warps, and not with 4, none of them spills more than a few registers.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
