"""The attention backend that vLLM asks for: what memory a layer needs, what a step is, who computes it.

Folded are full-attention decoder layers. Sliding-window layers, which are bounded anyway, stay vLLM's own on CPUs. What would
change results and is not implemented is refused when the model is built.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from kvfold.adapters.vllm import chosen_spec
from kvfold.adapters.vllm.step import Geometry, Step, plan
from kvfold.cache.layer import AttendingEngine
from kvfold.config import PAGE_TOKENS
from kvfold.engine.cuda import pooled, steps
from kvfold.engine.cuda.engine import CudaEngine
from kvfold.engine.request import LayerShape
from kvfold.engine.select import make_engine
from kvfold.errors import Unsupported

GRADED_KINDS = 4  # as many layers as have all kinds of a graded cache among them: the first two, others, the last


@functools.lru_cache
def engines(kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[AttendingEngine]:
    """One for each kind of layer: more than one where layers have bits of their own."""
    device, spec = torch.device(current_platform.device_type), chosen_spec()
    shape = LayerShape(0, kv_heads, head_dim, dtype.itemsize)
    layers = len(spec.bits_by_layer) or GRADED_KINDS
    kinds = dict.fromkeys(spec.for_layer(place, layers) for place in range(layers))
    return [make_engine("auto", kind, shape, dtype, device) for kind in kinds]


def page_bytes(kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one page, as the engine that will run it lays them out. vLLM gives the pages of all layers one size, the
    largest."""
    return max(engine.page_bytes for engine in engines(kv_heads, head_dim, dtype))


def steps_on_device(spec: AttentionSpec) -> bool:
    """Whether decode steps of layers with such heads need nothing of the host."""
    return all(
        isinstance(engine, CudaEngine) and engine.folder is not None
        for engine in engines(spec.num_kv_heads, spec.head_size, spec.dtype)
    )


@functools.lru_cache
def watch(device: torch.device) -> steps.Watch:
    """Of all layers of a device."""
    return steps.Watch(device)


class FoldedBackend(AttentionBackend):
    """Chosen by `--attention-backend CUSTOM`."""

    supported_dtypes = [torch.float16, torch.bfloat16, torch.float32]  # noqa: RUF012
    supported_kv_cache_dtypes = ["auto"]  # noqa: RUF012
    forward_includes_kv_cache_update = True
    cells = False  # how pages are told to vLLM in the model that this process runs: see customize_spec

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls() -> type[Any]:
        from kvfold.adapters.vllm.attention import FoldedImpl

        return FoldedImpl

    @staticmethod
    def get_builder_cls() -> type[FoldedMetadataBuilder]:
        return FoldedMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Full-attention layers hold pages. In hybrid models a page is told to vLLM as cells of its tokens, with a few bytes to
        spare: it sizes their blocks by what a single token takes, and finds prefixes that end within a page."""
        if not isinstance(spec, FullAttentionSpec):
            return spec
        size = page_bytes(spec.num_kv_heads, spec.head_size, spec.dtype)
        if cls.cells or spec.block_size % PAGE_TOKENS:
            return replace(spec, num_head_slots=1, state_content_bytes=-(-size // (2 * PAGE_TOKENS)) * 2)
        return replace(spec, num_head_slots=1, state_content_bytes=size, tokens_per_state=PAGE_TOKENS)


class FoldedCpuBackend(FoldedBackend, CPUAttentionBackend):
    """In the place of vLLM's CPU_ATTN."""

    # vLLM's own layers, which this backend makes too, update their cache in a call of its own; folded ones ignore it.
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[Any]:
        from kvfold.adapters.vllm.attention import FoldedCpuImpl

        return FoldedCpuImpl

    @staticmethod
    def get_builder_cls() -> type[FoldedMetadataBuilder]:
        return FoldedCpuMetadataBuilder


class ExactBackend(FoldedBackend):
    """Of the layers that only hold exact tokens."""

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        return spec


@dataclass
class FoldedMetadata:
    """A step, as the layers of one group of blocks see it. new: tokens that each of its requests brings, if all bring as many and
    decode steps need nothing of the host, else 0; then the tensors are those on the device."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    longest: int
    new: int = 0
    fills: bool = True
    step: Step | None = None
    asked: steps.Requests | None = None

    def requests(self, exact_table: Tensor) -> steps.Requests:
        """Of a step that needs nothing of the host. Made by the first layer, used by all."""
        if self.asked is None:
            self.asked = steps.Requests(self.seq_lens, self.block_table, exact_table, self.new, self.fills)
        return self.asked

    def plan(self, geometry: Geometry, exact_table: Tensor) -> Step:
        """Made by the first layer, used by all. Waits for the step before if the tables lie on a GPU."""
        if self.step is None:
            starts, lengths = (x.cpu().numpy().astype("int64") for x in (self.query_start_loc, self.seq_lens))
            tables = (
                table[:, : -(-self.longest // tokens)].cpu().numpy()
                for table, tokens in (
                    (self.block_table, geometry.block_pages * PAGE_TOKENS),
                    (exact_table, geometry.exact_tokens),
                )
            )
            self.step = plan(geometry, starts, lengths, *tables)
        return self.step


class FoldedMetadataBuilder(AttentionMetadataBuilder[FoldedMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._runner: Any = None
        self._on_device = steps_on_device(kv_cache_spec)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps in which every request brings as many tokens are captured whole, where they need nothing of the host."""
        return AttentionCGSupport.UNIFORM_BATCH if steps_on_device(kv_cache_spec) else AttentionCGSupport.NEVER

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FoldedMetadata:
        made = self.build(0, common_attn_metadata)
        made.fills = True  # in some of the steps that the graph is replayed for
        return made

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FoldedMetadata:
        m = common_attn_metadata
        if m.causal is not True:
            raise Unsupported(
                "folded attention is causal", "Unset KVFOLD_PROFILE to run this model in vLLM's own cache"
            )
        if m.seq_lens.device.type == "cuda":
            pooled.join()
            watch(m.seq_lens.device).look()
        if (
            self._on_device
            and m.max_query_len <= steps.MOST_NEW
            and m.max_query_len * m.num_reqs == m.num_actual_tokens
        ):
            new, fills = m.max_query_len, self._fills(m)
            return FoldedMetadata(m.query_start_loc, m.seq_lens, m.block_table_tensor, m.max_seq_len, new, fills)
        table = self._host_table(m)
        if table is None:
            return FoldedMetadata(m.query_start_loc, m.seq_lens, m.block_table_tensor, m.max_seq_len)
        return FoldedMetadata(m.query_start_loc_cpu, m.seq_lens_cpu_upper_bound, table, m.max_seq_len)

    def _fills(self, m: CommonAttentionMetadata) -> bool:
        """Whether a request fills a page in this step, as far as the host knows."""
        if self.vllm_config.speculative_config is not None:
            return True
        lengths = m.seq_lens_cpu_upper_bound.numpy()
        return bool((lengths // PAGE_TOKENS != (lengths - m.max_query_len) // PAGE_TOKENS).any())

    def _host_table(self, m: CommonAttentionMetadata) -> Tensor | None:
        """What the scheduler wrote before it was copied to the GPU: reading it back would wait for the step before. vLLM hands
        builders the copy only, so its runner is looked for among the callers. None where it keeps no such table, and with
        drafts, when only the GPU knows how many tokens were accepted."""
        if m.block_table_tensor.device.type == "cpu" or self.vllm_config.speculative_config is not None:
            return None
        if self._runner is None:
            self._runner = _caller_with("input_batch", "kv_cache_config")
        groups = self._runner.kv_cache_config.kv_cache_groups if self._runner else []
        for i, group in enumerate(groups):
            if self.layer_names[0] in group.layer_names:
                tables = self._runner.input_batch.block_table[i]
                if tables.get_device_tensor(m.num_reqs).data_ptr() == m.block_table_tensor.data_ptr():
                    return cast(Tensor, tables.get_cpu_tensor()[: m.num_reqs])
        return None


def _caller_with(*names: str) -> Any:
    """The nearest object with all these attributes whose method is running; None if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if all(hasattr(owner, name) for name in names):
            return owner
        frame = frame.f_back
    return None


class FoldedCpuMetadataBuilder(FoldedMetadataBuilder):
    """For groups of folded layers; groups of vLLM's own get vLLM's own builder."""

    def __new__(cls, kv_cache_spec: AttentionSpec, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(kv_cache_spec, FullAttentionSpec):
            return CPUAttentionMetadataBuilder(kv_cache_spec, *args, **kwargs)
        return super().__new__(cls)
