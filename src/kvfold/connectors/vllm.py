"""vLLM's KV connector over a folder of page files: prompts that any process read before come back from disk as cached tokens.

vLLM makes two of these per engine. The scheduler's looks prompts up and says which requests to load and to keep; the workers'
moves pages between their memory and files of their own, unchanged but for the byte order, which is canonical on disk. Pages
are kept in the step that completes them. With the last page that a repeated prompt finds go the exact tokens of the window, so
that the prompt continues as it did; elsewhere the window is read through its pages.

Option: kv_connector_extra_config {"folder": where}. All workers of an engine must see the same folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from kvfold.adapters.vllm import chosen_spec
from kvfold.config import PAGE_TOKENS
from kvfold.connectors.prefixes import PrefixFolder
from kvfold.connectors.vllm_layers import Held, StoredLayer, model_key, stored_layers
from kvfold.engine.cuda import pooled
from kvfold.errors import DamagedSession, InvalidConfig, Unsupported
from kvfold.sessions.segments import Tensors


@dataclass(frozen=True)
class Load:
    """tokens: the beginning of a request that is known. local: how many of them are in memory already."""

    tokens: list[int]
    local: int
    held: Held


@dataclass(frozen=True)
class Save:
    """tokens: of whole pages. exact: the window before their end is kept, too."""

    tokens: list[int]
    exact: bool
    held: Held


@dataclass
class Transfers(KVConnectorMetadata):
    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


class FoldedConnector(KVConnectorBase_V1, SupportsHMA):
    """Both roles, as vLLM wants it."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        folder = self._kv_transfer_config.get_from_extra_config("folder", None)
        if not folder:
            raise InvalidConfig("the connector has no folder", 'Set kv_connector_extra_config to {"folder": "PATH"}')
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            raise Unsupported("the connector does not know pipeline parallelism", "Use tensor parallelism")
        self.layers: list[StoredLayer] = stored_layers(kv_cache_config, vllm_config)
        root, workers = Path(folder, model_key(vllm_config)), parallel.tensor_parallel_size
        ranks = range(workers) if role == KVConnectorRole.SCHEDULER else [get_tensor_model_parallel_rank()]
        kept = [layer.kept for layer in self.layers]
        self.folders = [PrefixFolder(root / f"{rank}-of-{workers}", kept) for rank in ranks]
        self.block = vllm_config.cache_config.block_size
        self.requests: dict[str, Request] = {}
        self.local: dict[str, int] = {}
        self.loads: dict[str, int] = {}  # requests that wait to be loaded: tokens
        self.loaded: dict[str, int] = {}

    # --- the scheduler's

    def on_new_request(self, request: Request) -> None:
        """Requests whose tokens do not say everything about their keys and values are left alone."""
        salted = request.cache_salt is not None or request.lora_request is not None
        if not (salted or request.mm_features or request.prompt_token_ids is None):
            self.requests[request.request_id] = request

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id not in self.requests:
            return 0, False
        tokens = request.all_token_ids[: request.num_tokens - 1]  # one must be left to compute
        found = min(_end(folder, tokens) for folder in self.folders) // self.block * self.block
        self.local[request.request_id] = num_computed_tokens
        return max(0, found - num_computed_tokens), False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens:
            self.loads[request.request_id] = self.local[request.request_id] + num_external_tokens

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Transfers:
        transfers = Transfers()
        for request_id, computed in _computed(scheduler_output):
            request = self.requests.get(request_id)
            if request is None:
                continue
            held = Held(scheduler_output.kv_connector_block_state.get_block_ids(request_id))
            if (known := self.loads.pop(request_id, None)) is not None:
                self.loaded[request_id] = known
                transfers.loads.append(Load(request.all_token_ids[:known], self.local[request_id], held))
            end = computed + scheduler_output.num_scheduled_tokens[request_id]
            transfers.saves += self._saves(request, computed, end, held)
        return transfers

    def _saves(self, request: Request, computed: int, end: int, held: Held) -> Iterator[Save]:
        """Pages that this step completes, drafts aside: up to where a repetition of the prompt may find it, then the others."""
        known = min(end, len(request.all_token_ids)) // PAGE_TOKENS * PAGE_TOKENS
        repeated = (request.num_prompt_tokens - 1) // PAGE_TOKENS * PAGE_TOKENS
        if computed < request.num_prompt_tokens <= end and repeated:
            window = chosen_spec().window
            exact = self.loaded.get(request.request_id, 0) <= (repeated - window) // PAGE_TOKENS * PAGE_TOKENS
            yield Save(request.all_token_ids[:repeated], exact, held)
        if known > computed // PAGE_TOKENS * PAGE_TOKENS:
            yield Save(request.all_token_ids[:known], False, held)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        for memory in (self.requests, self.local, self.loads, self.loaded):
            memory.pop(request.request_id, None)
        return False, None

    # --- the workers'

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pooled.join()
        for load in self._get_connector_metadata().loads:
            pieces = self.folders[0].find(load.tokens, len(load.tokens) // PAGE_TOKENS)
            if not pieces or pieces[-1].tokens < len(load.tokens):
                raise DamagedSession.at("page files of a prompt vanished while they were read", 0)
            for layer in self.layers:
                layer.load(pieces, load.local, load.held)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: `start_load_kv` loads all."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing: `wait_for_save` saves all."""

    def wait_for_save(self) -> None:
        pooled.join()
        folder = self.folders[0]
        for save in self._get_connector_metadata().saves:
            first = _end(folder, save.tokens) // PAGE_TOKENS
            stop = len(save.tokens) // PAGE_TOKENS
            if first == stop:
                continue
            pages: dict[int, Tensor] = {}
            rest: Tensors = {}
            for i, layer in enumerate(self.layers):
                pages[i] = layer.pages(first, stop, save.held)
                own = layer.sinks(save.held) if first == 0 else {}
                if save.exact:
                    own |= layer.window(stop * PAGE_TOKENS, save.held)
                rest |= {f"layers.{i}.{name}": x for name, x in own.items()}
            folder.add(save.tokens, first, pages, rest)


def _end(folder: PrefixFolder, tokens: list[int]) -> int:
    """How many of these tokens, in whole pages, the folder knows."""
    pieces = folder.find(tokens, len(tokens) // PAGE_TOKENS)
    return pieces[-1].tokens if pieces else 0


def _computed(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """The requests of a step and how many tokens each had computed before it."""
    yield from ((new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs)
    cached = output.scheduled_cached_reqs
    yield from zip(cached.req_ids, cached.num_computed_tokens, strict=True)
