"""One folded attention layer over the memory that vLLM allocated for it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvfold.adapters.vllm.step import Fold, Step
from kvfold.cache.layer import AttendingEngine
from kvfold.config import PAGE_TOKENS
from kvfold.engine import pools
from kvfold.engine.cpu import pooled as on_cpu
from kvfold.engine.cpu.engine import CpuEngine
from kvfold.engine.cuda import pooled as on_cuda
from kvfold.engine.cuda.engine import CudaEngine
from kvfold.engine.cuda.steps import Steps, Workspace
from kvfold.engine.pools import PooledFold, Pools


class PooledLayer:
    """Stores, folds and attends to the tokens of a step, in this order: requests may read what others store in the same step.
    Only what the step overwrites is read before. steps: for calls that need nothing of the host, in which no request reads what
    another stores or folds (see `blocks`); None where there are none."""

    def __init__(self, engine: AttendingEngine, memory: Pools, requests: int) -> None:
        """requests: the most of a step."""
        self.engine, self.memory = engine, memory
        self.folding: on_cuda.Folding | None = None
        self.steps: Steps | None = None
        if isinstance(engine, CudaEngine):
            self.folding = on_cuda.Folding(engine)
            self.steps = Steps(engine, memory, _workspace(engine, requests))

    def run(self, step: Step, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
        """q, out [tokens, H * G, D], k, v [tokens, H, D]; writes out. Raises NonFiniteInput for tokens that cannot be folded;
        on a GPU a later step does."""
        views = [(i, pools.view(self.engine, self.memory, step.reads, i)) for i in step.apart]
        folds = self._pages([f for f in step.folds if f.overwritten], k, v)
        self._store(step, k, v)
        self._fold(step, folds + self._pages([f for f in step.folds if not f.overwritten], k, v))
        if isinstance(self.engine, CpuEngine):
            on_cpu.attend(self.engine, self.memory, step.reads, q, k, v, scale, out)
        elif isinstance(self.engine, CudaEngine):
            on_cuda.attend(self.engine, self.memory, step.reads, q, k, v, scale, out)
        else:
            pools.attend(self.engine, self.memory, step.reads, q, k, v, scale, out)
        for i, view in views:
            pools.attend_one(self.engine, step.reads, i, view, q, k, v, scale, out)

    def _store(self, step: Step, k: Tensor, v: Tensor) -> None:
        made = step.reads.made
        if "store" not in made:
            made["store"] = [on_cuda.upload(x, k.device) for x in (step.token, step.block, step.slot)]
        token, block, slot = made["store"]
        if len(token) == len(k):  # all of them, in order
            self.memory.exact[block, :, slot] = torch.cat([k, v], dim=-1)
        else:
            self.memory.exact[block, :, slot] = torch.cat([k[token], v[token]], dim=-1)

    def _fold(self, step: Step, folds: list[PooledFold]) -> None:
        if self.folding is not None and folds:
            self.folding.fold(folds, self.memory)
            if step.reads_own_folds:
                on_cuda.join()
            return
        for f in folds:
            self.engine.fold(f.keys, f.values, f.first, [self.memory.row(n) for n in f.numbers.tolist()], (None, None))

    def _pages(self, folds: list[Fold], k: Tensor, v: Tensor) -> list[PooledFold]:
        """Copies of what the step folds, as few calls as can be: single pages that began in earlier steps go together."""
        out, keys, values, numbers = [], [], [], []
        for fold in folds:
            count, first, token = len(fold.numbers), fold.starts_sequence, fold.token
            if fold.head_tokens:
                token += PAGE_TOKENS - fold.head_tokens
                head = self.memory.tokens(fold.head, fold.head_tokens)
                page = [
                    torch.cat([h, x[fold.token : token].transpose(0, 1)], dim=1)
                    for h, x in zip(head, (k, v), strict=True)
                ]
                if first:
                    out.append(PooledFold(page[0][None], page[1][None], True, fold.numbers[:1]))
                else:
                    keys.append(page[0])
                    values.append(page[1])
                    numbers.append(fold.numbers[0])
                count, first = count - 1, False
            if count:
                whole_k, whole_v = (
                    x[token : token + count * PAGE_TOKENS].unflatten(0, (count, PAGE_TOKENS)).transpose(1, 2).clone()
                    for x in (k, v)
                )
                out.append(PooledFold(whole_k, whole_v, first, fold.numbers[-count:]))
        if keys:
            out.append(PooledFold(torch.stack(keys), torch.stack(values), False, np.array(numbers)))
        return out


_WORKSPACES: dict[object, Workspace] = {}


def _workspace(engine: CudaEngine, requests: int) -> Workspace:
    """One for all layers of a shape."""
    key = (
        engine.device,
        engine.shape.kv_heads,
        engine.shape.head_dim,
        engine.dtype,
        engine.spec.window,
        engine.spec.sinks,
    )
    if key not in _WORKSPACES:
        _WORKSPACES[key] = Workspace(engine, requests)
    return _WORKSPACES[key]
