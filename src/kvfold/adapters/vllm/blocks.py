"""How vLLM's scheduler hands out memory for folded layers: what a block holds, and which exact tokens are kept.

Every folded layer asks for two kinds of blocks, and vLLM allocates both from one pool and counts both:

- blocks of pages, one page per 128 tokens, held like those of any full-attention layer;
- blocks of exact tokens, held for the page being filled, the window before it, and the first tokens (sinks). Blocks that fall
  behind are freed as those of a sliding window are; blocks that a long prefill would free again at once are never taken. What
  a step reads and no later one is handed over to the tokens that the step writes, where the request would hold more than a
  stretch otherwise: the block is in its table twice.

Exact blocks are cached by prefix too, so a request that continues another as a rule finds its window exact. Where only pages
are left, the prefix is used all the same. Only the block of the sinks must be there.

A request may find what another stores in the same step: its layers store before they read. Not so in decode steps on a GPU, where
each request reads before it stores; so blocks that a few tokens complete are found from the next step on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from kvfold.config import PAGE_TOKENS
from kvfold.engine.cuda.steps import MOST_NEW

Groups = tuple[list[KVCacheBlock], ...]
# Numbers of blocks that the step being scheduled completes by a few tokens.
_FRESH: weakref.WeakKeyDictionary[BlockPool, set[int]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class ExactSpec(SlidingWindowSpec):
    """Blocks of exact tokens of one layer.

    margin: tokens before the newest page that stay exact: the window, and drafts that may be taken back. sinks: first tokens
    that stay exact, all in the first block. batches: steps that vLLM schedules before the first of them is done.
    """

    margin: int
    sinks: int
    batches: int

    def first_exact(self, tokens: int) -> int:
        """The first token, sinks aside, with an exact copy when a request has `tokens`. Exact blocks divide pages."""
        return max(0, tokens - self.margin) // PAGE_TOKENS * PAGE_TOKENS

    def keeps(self, block: int, tokens: int) -> bool:
        """Whether a request that has `tokens` keeps its exact block number `block`."""
        return (block == 0 and self.sinks > 0) or (block + 1) * self.block_size > self.first_exact(tokens)

    @property
    def stretch(self) -> int:
        """Blocks of the most exact tokens that one step leaves behind, the sinks' aside."""
        return cdiv(self.margin + PAGE_TOKENS - 1, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most blocks a request holds: one stretch per step under way, and the sinks. More are held only while others
        hold the same ones."""
        return min(self.batches * self.stretch + (self.sinks > 0), cdiv(max_model_len, self.block_size))


class ExactManager(SlidingWindowManager):
    """The blocks of exact tokens of all requests."""

    kv_cache_spec: ExactSpec

    def __init__(self, kv_cache_spec: ExactSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._freed: dict[str, int] = {}  # blocks before this number were given back, the sinks' aside
        self._handed: dict[str, set[int]] = {}  # numbers of blocks that later tokens have now
        self._hits: dict[str, int] = {}  # blocks before this number were found by prefix: others may find them again

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.kv_cache_spec.first_exact(num_computed_tokens)

    def _taken(self, have: int, tokens: int, main_tokens: int) -> list[bool]:
        """For block numbers from `have` up to what `tokens` need: whether they are taken or left null."""
        return [self.kv_cache_spec.keeps(i, main_tokens) for i in range(have, cdiv(tokens, self.block_size))]

    def _to_hand_over(self, request_id: str, tokens: int, new: int) -> list[int]:
        """Numbers of blocks that a request with `tokens` after the step, and `new` blocks more, gives to those."""
        blocks, handed = self.req_to_blocks.get(request_id, []), self._handed.get(request_id, set())
        first, hits = (
            max(self._freed.get(request_id, 0), int(self.kv_cache_spec.sinks > 0)),
            self._hits.get(request_id, 0),
        )
        held = [i for i in range(first, len(blocks)) if not blocks[i].is_null and i not in handed]
        behind = [i for i in held if i >= hits and not self.kv_cache_spec.keeps(i, tokens) and blocks[i].ref_cnt == 1]
        return behind[: max(0, len(held) + new - self.kv_cache_spec.stretch)][:new]

    def _extend(self, request_id: str, taken: list[bool], tokens: int = 0) -> list[KVCacheBlock]:
        """tokens: of the request after the step that these blocks are for; 0: nothing is read in it."""
        numbers = self._to_hand_over(request_id, tokens, sum(taken)) if tokens else []
        own = [self.req_to_blocks[request_id][i] for i in numbers]
        self._handed.setdefault(request_id, set()).update(numbers)
        for block in own:
            self.block_pool._maybe_evict_cached_block(block)  # later requests would find other tokens there
        fresh = [*own, *self.block_pool.get_new_blocks(sum(taken) - len(own))]
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh[len(own) :])
        it = iter(fresh)
        blocks = [next(it) if take else self._null_block for take in taken]
        self.req_to_blocks[request_id].extend(blocks)
        return blocks

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        have = len(self.req_to_blocks.get(request_id, ())) or len(new_computed_blocks)
        if num_tokens <= have * self.block_size and not new_computed_blocks:  # so in most steps, for every request
            return 0
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            need = min(cdiv(num_tokens, self.block_size) - have, self.max_admission_blocks_per_request)
        else:
            external = max(have, total_computed_tokens // self.block_size)
            need = sum(self._taken(have, external * self.block_size, total_computed_tokens))
            new = sum(self._taken(external, num_tokens, num_tokens_main_model))
            need += new - len(self._to_hand_over(request_id, num_tokens_main_model, new))
        hit = (b for i, b in enumerate(new_computed_blocks) if self.kv_cache_spec.keeps(i, total_computed_tokens))
        return max(need, 0) + self._get_num_evictable_blocks(list(hit))

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        computed = num_local_computed_tokens + num_external_computed_tokens
        kept = [
            b if self.kv_cache_spec.keeps(i, computed) else self._null_block for i, b in enumerate(new_computed_blocks)
        ]
        self.block_pool.touch([block for block in kept if not block.is_null])
        self.req_to_blocks[request_id].extend(kept)
        self.num_cached_block[request_id] = self._hits[request_id] = len(kept)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        computed = num_local_computed_tokens + num_external_computed_tokens
        self._extend(request_id, self._taken(len(self.req_to_blocks[request_id]), computed, computed))

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        have = len(self.req_to_blocks[request_id])
        if num_tokens <= have * self.block_size:
            return []
        return self._extend(request_id, self._taken(have, num_tokens, num_tokens_main_model), num_tokens_main_model)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        first = max(self._freed.get(request_id, 0), int(self.kv_cache_spec.sinks > 0))
        stop = min(self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size, len(blocks))
        if stop <= first:
            return
        behind = [i for i in range(stop - 1, first - 1, -1) if not blocks[i].is_null]
        handed = self._handed.get(request_id, set())
        self.block_pool.free_blocks([blocks[i] for i in behind if i not in handed])
        handed.difference_update(behind)
        for i in behind:
            blocks[i] = self._null_block
        self._freed[request_id] = stop

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._freed.pop(request_id, None)
        self._hits.pop(request_id, None)
        for i in self._handed.pop(request_id, ()):
            self.req_to_blocks[request_id][i] = self._null_block
        return super().pop_blocks_for_free(request_id)

    def new_step_starts(self) -> None:
        _FRESH.pop(self.block_pool, None)

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        before = self.num_cached_block.get(request.request_id, 0)
        if num_tokens // self.block_size <= before:
            return
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        after = self.num_cached_block.get(request.request_id, 0)
        computed = max(request.num_computed_tokens, self._hits.get(request.request_id, 0) * self.block_size)
        if num_tokens - computed <= MOST_NEW:  # blocks are cached by whole pages, whenever their tokens came
            blocks = self.req_to_blocks[request.request_id][before:after]
            _FRESH.setdefault(self.block_pool, set()).update(b.block_id for b in blocks if not b.is_null)

    @classmethod
    def reachable_block_mask(cls, *args: Any, **kwargs: Any) -> None:
        """Every exact block may serve a later request."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: ExactSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[Groups, int]:
        """All of `max_length`, which the pages have, if the sinks are there: with the exact blocks before its end that are
        still cached. Of a page that is not full all must be; else the prefix ends before it."""
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size, alignment_tokens=alignment_tokens)
        blocks: Groups = tuple([block_pool.null_block] * (max_length // size) for _ in kv_cache_group_ids)

        def found(numbers: Iterable[int]) -> bool:
            for i in numbers:
                cached = block_pool.get_cached_block(hashes[i], kv_cache_group_ids)
                if cached is None:
                    return False
                for group, block in zip(blocks, cached, strict=True):
                    group[i] = block
            return True

        full = max_length // PAGE_TOKENS * (PAGE_TOKENS // size)
        if len(blocks[0]) and kv_cache_spec.sinks and not found((0,)):
            return tuple([] for _ in kv_cache_group_ids), 0
        if not found(range(full, len(blocks[0]))):
            for group in blocks:
                del group[full:]
        count = len(blocks[0])
        found(range(min(full, count) - 1, kv_cache_spec.first_exact(count * size) // size - 1, -1))
        fresh = _FRESH.get(block_pool, set())
        known = next((i for i, block in enumerate(blocks[0]) if block.block_id in fresh), count)
        if known < count:
            return cls.find_longest_cache_hit(
                block_hashes,
                known * size,
                kv_cache_group_ids,
                block_pool,
                kv_cache_spec,
                drop_eagle_block,
                alignment_tokens,
            )
        return blocks, count * size


def register_specs() -> None:
    """Tell vLLM which manager goes with the blocks of exact tokens."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, uniform_type_base_spec=ExactSpec)
