"""transformers: recurrent states of linear-attention layers in 8-bit codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

STATE_LEVELS = 127  # of a recurrent state's codes, either side of zero


class CodedStateLayer(LinearAttentionLayer):
    """A linear-attention layer whose recurrent state lies in int8 codes between calls, with one scale for each vector along its
    last axis. The convolution's state stays as it is: transformers changes it in place."""

    def __init__(self, number_of_states: int = 1, **kwargs: Any) -> None:
        super().__init__(number_of_states, **kwargs)
        self.codes: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))
        self.scales: dict[int, Tensor | None] = dict.fromkeys(range(number_of_states))

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Keep a state; returns what the next call will be given."""
        scale = recurrent_states.abs().amax(-1, keepdim=True) / STATE_LEVELS
        codes = torch.where(scale > 0, recurrent_states / scale, 0).round().clamp(-STATE_LEVELS, STATE_LEVELS)
        self.codes[state_idx], self.scales[state_idx] = codes.to(torch.int8), scale
        self.is_recurrent_states_initialized[state_idx] = True
        return self.recurrent_state(state_idx)

    def recurrent_state(self, state_idx: int) -> Tensor:
        """A state in the dtype it came in. Raises KeyError for one that never came."""
        codes, scale = self.codes[state_idx], self.scales[state_idx]
        if codes is None or scale is None:
            raise KeyError(state_idx)
        return codes * scale

    def reorder_cache(self, beam_idx: Tensor) -> None:
        select_states(self, beam_idx)


def select_states(layer: LinearAttentionLayer, rows: Tensor) -> None:
    """Keep, repeat or permute the rows of every state."""
    for states in vars(layer).values():
        for i, x in states.items() if isinstance(states, dict) else ():
            if isinstance(x, Tensor):
                states[i] = x[rows.to(x.device)]
