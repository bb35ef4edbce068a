"""One decode step for several sessions."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from kvfold.adapters.hf_batch import Batch
from kvfold.errors import CacheMisuse
from kvfold.sessions.runner import Runner
from kvfold.sessions.session import Session


class SessionBatch:
    """Sessions of one runner, decoded together until `close`; meanwhile they refuse every other use."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        if len({id(s.runner) for s in sessions}) > 1:
            raise CacheMisuse("sessions of different runners cannot be one batch", "Make them with one Runner or store")
        self.sessions = list(sessions)
        self._batch = Batch([s.cache for s in sessions])
        self._lost = False
        self._model = self.sessions[0].runner.model

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to each session; logits [B, V]. If the call fails, no session has taken its token.

        Raises CannotTrim if layers with running states or full sliding windows took it and cannot go back: the sessions
        then stay refused for good.
        """
        ids = torch.tensor([[t] for t in tokens], device=self._model.device)
        length = self._batch.cache.get_seq_length()
        inputs = {k: x.to(self._model.device) for k, x in self._batch.inputs().items()}
        try:
            with torch.no_grad():
                out = self._model(ids, past_key_values=self._batch.cache, use_cache=True, logits_to_keep=1, **inputs)
        except BaseException:
            self._lost = True
            Runner.undo(self._batch.cache, length)
            self._lost = False
            raise
        for s, t in zip(self.sessions, tokens, strict=True):
            s.tokens.append(t)
        return out.logits[:, -1]

    def close(self) -> None:
        """Hand the rows back to the sessions."""
        self._batch.scatter()

    def __enter__(self) -> SessionBatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._lost:
            self.close()
