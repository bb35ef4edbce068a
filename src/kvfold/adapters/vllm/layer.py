"""One folded attention layer over the memory that vLLM allocated for it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvfold.adapters.vllm.step import Fold, Step
from kvfold.cache.layer import AttendingEngine
from kvfold.config import PAGE_TOKENS
from kvfold.engine import pools
from kvfold.engine.cpu import pooled
from kvfold.engine.cpu.engine import CpuEngine
from kvfold.engine.pools import Pools


class PooledLayer:
    """Stores, folds and attends to the tokens of a step, in this order: requests may read what others store in the same step."""

    def __init__(self, engine: AttendingEngine, memory: Pools) -> None:
        self.engine, self.memory = engine, memory

    def run(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
        """q, out [tokens, H * G, D], k, v [tokens, H, D]; writes out. Raises NonFiniteInput for tokens that cannot be folded."""
        self._store(step, k, v)
        for fold in step.folds:
            self._fold(fold, k, v)
        if isinstance(self.engine, CpuEngine):
            pooled.attend(self.engine, self.memory, step.reads, q, k, v, scale, out)
        else:
            pools.attend(self.engine, self.memory, step.reads, q, k, v, scale, out)

    def _store(self, step: Step, k: Tensor, v: Tensor) -> None:
        token, block, slot = (torch.from_numpy(x).to(k.device) for x in (step.token, step.block, step.slot))
        dim = k.shape[-1]
        exact = self.memory.exact
        exact[block, :, slot, :dim] = k[token]
        exact[block, :, slot, dim:] = v[token]

    def _fold(self, fold: Fold, k: Tensor, v: Tensor) -> None:
        count, first = len(fold.numbers), fold.starts_sequence
        rows = [self.memory.row(n) for n in fold.numbers.tolist()]
        token = fold.token
        if fold.head_tokens:
            # The page began in earlier steps: together with their exact tokens it is folded by itself.
            token += PAGE_TOKENS - fold.head_tokens
            head = self.memory.tokens(fold.head, fold.head_tokens)
            keys, values = (
                torch.cat([h, x[fold.token : token].transpose(0, 1)], dim=1)[None]
                for h, x in zip(head, (k, v), strict=True)
            )
            self.engine.fold(keys, values, first, rows[:1], (None, None))
            count, first, rows = count - 1, False, rows[1:]
        if count:
            keys, values = (
                x[token : token + count * PAGE_TOKENS].unflatten(0, (count, PAGE_TOKENS)).transpose(1, 2)
                for x in (k, v)
            )
            self.engine.fold(keys, values, first, rows, (None, None))
