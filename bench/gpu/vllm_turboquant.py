"""vLLM's TurboQuant kernels for NVIDIA, run from the files of an unpacked wheel; vLLM itself is neither installed nor imported.

Needs four files below the folder: vllm/v1/attention/ops/{triton_decode_attention,triton_turboquant_decode,
triton_turboquant_store}.py and vllm/model_executor/layers/quantization/turboquant/centroids.py. What they import from the
rest of vLLM is the name of the platform and of Triton; both are given here.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

OPS = "vllm.v1.attention.ops."
CENTROIDS = "vllm.model_executor.layers.quantization.turboquant.centroids"
BITS = 3  # preset turboquant_3bit_nc: Lloyd-Max keys of 3 bits with norm correction, uniform values of 3 bits
BLOCK = 16  # tokens of a page, vLLM's default
SPLITS = 32  # vLLM's default


def load(folder: Path, name: str) -> types.ModuleType:
    """A module of vLLM from its file, under its own name."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    path = folder.joinpath(*parts).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"{path} is missing: unpack a vllm wheel of 0.26 to 0.33 there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class TurboQuant:
    """Store and decode attention of one layer of `kv_heads` x `dim`. device: cuda, or cpu under Triton's interpreter."""

    def __init__(self, folder: Path, kv_heads: int, dim: int, device: str = "cuda") -> None:
        import triton

        stubs = {
            "vllm.platforms": {
                "current_platform": types.SimpleNamespace(is_cuda_alike=lambda: device == "cuda", is_rocm=lambda: False)
            },
            "vllm.triton_utils": {"triton": triton, "tl": triton.language},
        }
        for name, members in stubs.items():
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(members)
        load(folder, OPS + "triton_decode_attention")
        self._decode = load(folder, OPS + "triton_turboquant_decode").triton_turboquant_decode_attention
        self._store = load(folder, OPS + "triton_turboquant_store").triton_turboquant_store
        levels, borders = load(folder, CENTROIDS).solve_lloyd_max(dim, BITS)
        self.levels, self.borders = levels.to(device), borders.to(device)
        turn = torch.ones(1, 1)
        while len(turn) < dim:
            turn = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), turn)
        self.turn = (turn / dim**0.5).to(device)
        self.kv_heads, self.dim, self.device = kv_heads, dim, device
        self.key_bytes = dim * BITS // 8 + 2
        self.slot_bytes = self.key_bytes + dim * BITS // 8 + 4

    def cache(self, tokens: int) -> Tensor:
        """Empty pages [tokens / BLOCK, BLOCK, H, bytes]. One slot more lies behind: unpacking reads a byte too far."""
        shape = (-(-tokens // BLOCK), BLOCK, self.kv_heads, self.slot_bytes)
        flat = torch.zeros(torch.Size(shape).numel() + self.slot_bytes, dtype=torch.uint8, device=self.device)
        return flat[: -self.slot_bytes].view(shape)

    def store(self, k: Tensor, v: Tensor, cache: Tensor, slots: Tensor) -> None:
        """k, v [N, H, D] into int32 slots [N]."""
        self._store(k, v, cache, slots, self.turn, self.borders, BITS, self.key_bytes, BITS)

    def decode(self, q: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> Callable[[], Tensor]:
        """One step for q [B, H * G, D], with all buffers allocated ahead, as vLLM does."""
        b, heads, dim = q.shape
        middle = torch.empty(b, heads, SPLITS, dim + 1, device=self.device)
        out, lse = torch.empty_like(q), torch.empty(b, heads, device=self.device)

        def call() -> Tensor:
            return self._decode(  # type: ignore[no-any-return]
                q, cache, table, lengths, self.turn, self.levels, dim**-0.5, BITS, self.key_bytes, BITS,
                norm_correction=True, PiT=self.turn, mid_o_buf=middle, output_buf=out, lse_buf=lse, max_num_kv_splits=SPLITS,
            )  # fmt: skip

        return call

    def filled(self, lengths: tuple[int, ...], groups: int) -> tuple[Callable[[], Tensor], int]:
        """A step over random keys and values in blocks in random places; and the bytes that it must read."""
        b, longest = len(lengths), max(lengths)
        blocks = -(-longest // BLOCK)
        cache = self.cache(b * blocks * BLOCK)
        for at in range(0, b * blocks * BLOCK, 32768):
            slots = torch.arange(at, min(at + 32768, b * blocks * BLOCK), dtype=torch.int32, device=self.device)
            k, v = torch.randn(2, len(slots), self.kv_heads, self.dim, dtype=torch.bfloat16, device=self.device)
            self.store(k, v, cache, slots)
        table = torch.randperm(b * blocks, device=self.device).int().view(b, blocks)
        q = torch.randn(b, self.kv_heads * groups, self.dim, dtype=torch.bfloat16, device=self.device)
        step = self.decode(q, cache, table, torch.tensor(lengths, dtype=torch.int32, device=self.device))
        return step, sum(lengths) * self.kv_heads * self.slot_bytes + 4 * table.numel()

    def error(self, tokens: int, groups: int) -> float:
        """Distance of a step's output from attention over the keys and values themselves, relative: what 3 bits cost."""
        k, v = torch.randn(2, tokens, self.kv_heads, self.dim, device=self.device)
        blocks = -(-tokens // BLOCK)
        table = torch.randperm(blocks, device=self.device).int()[None]
        cache, at = self.cache(blocks * BLOCK), torch.arange(tokens, device=self.device)
        self.store(k, v, cache, (table[0, at // BLOCK] * BLOCK + at % BLOCK).int())
        q = 2 * torch.randn(1, self.kv_heads * groups, self.dim, device=self.device)
        got = self.decode(q, cache, table, torch.tensor([tokens], dtype=torch.int32, device=self.device))()
        q3, k3, v3 = q.view(self.kv_heads, groups, self.dim), k.permute(1, 2, 0), v.transpose(0, 1)
        want = (torch.softmax(q3 @ k3 * self.dim**-0.5, -1) @ v3).view_as(got)
        return float((got - want).norm() / want.norm())
