"""The folded attention layer of a worker, and the layer beside it that asks vLLM for exact tokens' blocks."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from kvfold.adapters.vllm import PROFILE_VARIABLE, RUNNER_VARIABLE, chosen_spec, forced
from kvfold.adapters.vllm.backend import ExactBackend, FoldedBackend, FoldedMetadata, page_bytes, watch
from kvfold.adapters.vllm.blocks import ExactSpec
from kvfold.adapters.vllm.layer import PooledLayer
from kvfold.adapters.vllm.step import Geometry
from kvfold.config import PAGE_TOKENS
from kvfold.engine.cuda.engine import CudaEngine
from kvfold.engine.pools import Pools
from kvfold.engine.request import LayerShape
from kvfold.engine.select import make_engine
from kvfold.errors import Unsupported

CONNECTOR = "kvfold.connectors.vllm"
logger = init_logger("vllm.kvfold")  # vLLM shows the loggers below its own name
SIGNATURE = inspect.signature(AttentionImpl.__init__)


class ExactLayer(torch.nn.Module, AttentionLayerBase):
    """Asks vLLM for the blocks of exact tokens that belong to one folded layer."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.kv_cache = torch.tensor([])
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype

    def get_attn_backend(self) -> type[AttentionBackend]:
        return ExactBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ExactSpec:
        """A block holds as many tokens, a power of two up to a page, as take no more bytes than a block of pages."""
        spec = chosen_spec()
        pages = vllm_config.cache_config.block_size // PAGE_TOKENS
        token_bytes = 2 * self.kv_heads * self.head_dim * self.dtype.itemsize
        fit = pages * page_bytes(self.kv_heads, self.head_dim, self.dtype) // token_bytes
        block = min(1 << fit.bit_length() - 1, PAGE_TOKENS)
        if spec.sinks > block:
            raise Unsupported(f"{spec.sinks} sinks do not fit a block of {block} exact tokens", "Use fewer sinks")
        margin = spec.window + vllm_config.num_speculative_tokens
        if vllm_config.kv_transfer_config is not None:
            margin += PAGE_TOKENS  # of the prompt's last full page a connector also keeps the exact tokens
        return ExactSpec(
            block_size=block,
            num_kv_heads=self.kv_heads,
            head_size=self.head_dim,
            dtype=self.dtype,
            sliding_window=margin + PAGE_TOKENS,
            margin=margin,
            sinks=spec.sinks,
            batches=vllm_config.max_concurrent_batches,
        )


class FoldedImpl(AttentionImpl[FoldedMetadata]):
    """A folded layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """The arguments that vLLM gives to every attention layer."""
        given = SIGNATURE.bind(self, *args, **kwargs).arguments
        self.num_heads, self.num_kv_heads = given["num_heads"], given["num_kv_heads"]
        self.head_size, self.scale = given["head_size"], float(given["scale"])
        self.kv_cache_dtype = given["kv_cache_dtype"]
        self.config = get_current_vllm_config()
        refuse_layer(given)
        refuse_config(self.config)
        FoldedBackend.cells = self.config.model_config.is_hybrid
        self.exact = ExactLayer(self.num_kv_heads, self.head_size, self.config.model_config.dtype)
        self.layer: PooledLayer | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """The model is complete and this layer has a name: put the layer of exact tokens beside it."""
        layers = self.config.compilation_config.static_forward_context
        self.name = next(name for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        self.exact_name = f"{self.name}.exact"
        layers[self.exact_name] = self.exact

    def pooled(self, kv_cache: Tensor) -> PooledLayer:
        """This layer over the memory that vLLM gave it. kv_cache: its pages, as `forward` gets them. vLLM tries its graphs with
        memory that it then gives up."""
        if self.layer is None or self.layer.memory.pages.data_ptr() != kv_cache.data_ptr():
            self.layer = self._build(kv_cache)
        return self.layer

    def _build(self, kv_cache: Tensor) -> PooledLayer:
        layer, dtype = extract_layer_index(self.name), self.exact.dtype
        layers = self.config.compilation_config.static_forward_context
        folded = sorted(
            extract_layer_index(name) for name, x in layers.items() if isinstance(getattr(x, "impl", None), FoldedImpl)
        )
        spec = chosen_spec().for_layer(folded.index(layer), len(folded))
        shape = LayerShape(layer, self.num_kv_heads, self.head_size, dtype.itemsize, self._first_head())
        engine = make_engine("auto", spec, shape, dtype, kv_cache.device)
        if isinstance(engine, CudaEngine):
            engine.report_to(watch(engine.device).flag(layer))
        memory = Pools(as_pages(kv_cache, engine.page_bytes), self.exact.kv_cache)
        self.geometry = Geometry(spec.window, spec.sinks, memory.pages.shape[1], memory.exact.shape[2])
        logger.info_once("kvfold: profile %s, engine %s", os.environ[PROFILE_VARIABLE], engine.name)
        return PooledLayer(engine, memory, self.config.scheduler_config.max_num_seqs)

    def _first_head(self) -> int:
        """The model's number of this worker's first KV head. With more workers than KV heads, neighbours hold the same one."""
        rank, workers = get_tensor_model_parallel_rank(), self.config.parallel_config.tensor_parallel_size
        total = self.config.model_config.get_total_num_kv_heads()
        return rank * self.num_kv_heads if total >= workers else rank * total // workers

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Nothing: `forward` stores the step's tokens."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FoldedMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query, output [tokens, H * G, D], key, value [tokens, H, D]; writes output."""
        if attn_metadata is None:  # vLLM measures its memory
            return output
        pooled = self.pooled(kv_cache)
        exact_table = get_forward_context().attn_metadata[self.exact_name].block_table
        if pooled.steps is not None and attn_metadata.new:
            pooled.steps.run(attn_metadata.requests(exact_table), query, key, value, self.scale, output)
        else:
            pooled.run(attn_metadata.plan(self.geometry, exact_table), query, key, value, self.scale, output)
        return output


def as_pages(kv_cache: Tensor, page_bytes: int) -> Tensor:
    """uint8 [blocks, pages of a block, page_bytes] of what vLLM allocated, [blocks, 1, pages or tokens of a block, cell]."""
    cells = kv_cache.view(torch.uint8).squeeze(1)
    if cells.shape[2] < page_bytes:  # of tokens
        cells = cells.unflatten(1, (-1, PAGE_TOKENS)).flatten(2)
    return cells[..., :page_bytes]


class FoldedCpuImpl(FoldedImpl):
    """Folded layers; sliding-window and encoder layers become vLLM's own."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        given = SIGNATURE.bind(None, *args, **kwargs).arguments
        if given["sliding_window"] is not None or given["attn_type"] != AttentionType.DECODER:
            return CPUAttentionBackendImpl(*args, **kwargs)
        return super().__new__(cls, *args, **kwargs)


def refuse_layer(given: dict[str, Any]) -> None:
    """Raise Unsupported for what makes a layer's attention another one."""
    names = {
        "alibi_slopes": "ALiBi",
        "sliding_window": "a sliding window (on GPUs, give these layers another backend by --attention-config)",
        "logits_soft_cap": "soft-capped scores",
        "kv_sharing_target_layer_name": "layers that share a KV cache",
        "sinks": "attention sinks",
    }
    for name, what in names.items():
        if given.get(name) is not None:
            raise _unsupported(what)
    if given["attn_type"] != AttentionType.DECODER:
        raise _unsupported(f"{given['attn_type']} attention")


def refuse_config(config: VllmConfig) -> None:
    """Raise Unsupported for options of vLLM that folded layers do not go with."""
    draft, parallel = config.speculative_config, config.parallel_config
    if config.cache_config.cache_dtype != "auto":
        raise _unsupported(f"--kv-cache-dtype {config.cache_config.cache_dtype}")
    if config.use_v2_model_runner and not forced():
        raise _unsupported(f"second model runner ({RUNNER_VARIABLE}=1)")
    if draft is not None and (draft.use_eagle() or draft.uses_draft_model()):
        raise _unsupported(f"speculative decoding with a draft model ({draft.method}); ngram works")
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise _unsupported("context parallelism")
    if parallel.use_ubatching:
        raise _unsupported("steps in micro-batches (--enable-dbo)")
    if parallel.pipeline_parallel_size > 1 and chosen_spec().by_place:
        raise _unsupported("layers with bits of their own and pipeline parallelism")
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise _unsupported("a disabled hybrid KV cache manager, which exact tokens need,")
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_connector_module_path != CONNECTOR:
        raise _unsupported(f"KV connector {transfer.kv_connector}; its own is in {CONNECTOR}")
    if any(side.codec == "split" for side in (chosen_spec().key, chosen_spec().value)):
        raise _unsupported("codec 'split', which keeps a state per sequence,")


def _unsupported(what: str) -> Unsupported:
    return Unsupported(f"kvfold has no {what} in vLLM", "Unset KVFOLD_PROFILE to run this model in vLLM's own cache")
