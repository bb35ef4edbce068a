"""Attention over pages and exact tokens that lie in pools of blocks which another program owns and hands out.

The host keeps two pools per layer: pages, and blocks of a few exact tokens. What a call reads is the same for every layer
of a step, so it is described once, in numbers (`PooledCall`), and each layer brings its own memory (`Pools`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvfold.config import CacheSpec
from kvfold.engine.request import AttendRequest, SequenceView


@dataclass(frozen=True)
class Pools:
    """One layer's memory. pages: uint8 [blocks, pages of a block, page_bytes], the last dimension contiguous. exact:
    [blocks, H, tokens of a block, 2 D], keys before values, the last dimension contiguous."""

    pages: Tensor
    exact: Tensor

    def row(self, number: int) -> Tensor:
        """The bytes of a page, a view [page_bytes]."""
        return self.pages[number // self.pages.shape[1], number % self.pages.shape[1]]

    def tokens(self, blocks: NDArray[np.int32], count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [H, count, D] of the first `count` tokens in these blocks, copied together."""
        rows = self.exact[torch.from_numpy(blocks).to(self.exact.device).long()]
        keys, values = rows.transpose(0, 1).flatten(1, 2)[:, :count].chunk(2, dim=-1)
        return keys, values


@dataclass(frozen=True)
class PooledCall:
    """The sequences of a call, one after the other.

    token_start: [n + 1] first new token of each sequence in the call's flat tensors. page_numbers: the pages of all
    sequences, page_start [n + 1] tells them apart; page number p is page p mod m of block ⌊p / m⌋, m pages to a block.
    folded: [n] tokens read through pages. recent_table: blocks of the exact tokens folded ... folded + recent - 1,
    recent_start [n + 1] tells sequences apart. sink_block: [n] block whose first tokens are the sequence's first ones, read
    exactly if folded > 0. runs: (first sequence, sequences, new tokens of each), stretches of equally long calls; sequences in
    none of them are not attended to.
    made: what the first layer made of all this on a device, for those after it.
    """

    token_start: NDArray[np.int64]
    page_numbers: NDArray[np.int64]
    page_start: NDArray[np.int64]
    folded: NDArray[np.int64]
    recent_table: NDArray[np.int32]
    recent_start: NDArray[np.int64]
    recent: NDArray[np.int64]
    sink_block: NDArray[np.int64]
    runs: list[tuple[int, int, int]]
    made: dict[Any, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class PooledFold:
    """Pages to fold. keys, values [P, H, 128, D]. first: page 0 is among them, at 0. numbers: [P] where they go."""

    keys: Tensor
    values: Tensor
    first: bool
    numbers: NDArray[np.int64]


class Attends(Protocol):
    """What this module needs of an engine."""

    spec: CacheSpec

    def attend(self, request: AttendRequest) -> Tensor: ...


def attend(
    engine: Attends, pools: Pools, call: PooledCall, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor
) -> None:
    """Any engine, one sequence after the other: q, out [tokens, H * G, D], k, v [tokens, H, D]; writes out.

    The packed pages and exact tokens of a sequence are copied together; nothing is unfolded beyond what the engine does.
    """
    for first, count, _new in call.runs:
        for i in range(first, first + count):
            attend_one(engine, call, i, view(engine, pools, call, i), q, k, v, scale, out)


def view(engine: Attends, pools: Pools, call: PooledCall, i: int) -> SequenceView:
    """Sequence i as it is now, its packed pages and recent tokens copied."""
    numbers = torch.from_numpy(call.page_numbers[call.page_start[i] : call.page_start[i + 1]]).to(pools.pages.device)
    per_block = pools.pages.shape[1]
    rows = pools.pages[numbers // per_block, numbers % per_block]
    recent_k, recent_v = pools.tokens(
        call.recent_table[call.recent_start[i] : call.recent_start[i + 1]], int(call.recent[i])
    )
    sinks_k, sinks_v = pools.exact[int(call.sink_block[i]), :, : engine.spec.sinks].chunk(2, dim=-1)
    runs = [rows] if len(rows) else []
    return SequenceView(runs, int(call.folded[i]), sinks_k, sinks_v, recent_k, recent_v, 0, None, None)


def attend_one(
    engine: Attends, call: PooledCall, i: int, view: SequenceView, q: Tensor, k: Tensor, v: Tensor, scale: float,
    out: Tensor,
) -> None:  # fmt: skip
    """Sequence i alone, over `view`."""
    new = slice(int(call.token_start[i]), int(call.token_start[i + 1]))
    new_q, new_k, new_v = (x[new].transpose(0, 1)[None] for x in (q, k, v))
    out[new] = engine.attend(AttendRequest(new_q, new_k, new_v, scale, [view]))[0].transpose(0, 1)
