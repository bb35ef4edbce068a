"""One conversation: its tokens, a cache of one row that holds them, and the state of its sampler."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kvfold.adapters.hf_transformers import FoldedCache
from kvfold.config import CacheSpec
from kvfold.errors import CacheMisuse, CannotTrim, InvalidInput
from kvfold.sessions.runner import Runner
from kvfold.sessions.sampler import Sampler


class Session:
    """`tokens` are those the cache holds, in order. A token that was picked but not fed yet is not among them."""

    def __init__(
        self,
        runner: Runner,
        cache: FoldedCache | None = None,
        tokens: Sequence[int] = (),
        sampler: Sampler | None = None,
    ) -> None:
        self.runner = runner
        self.cache = cache if cache is not None else runner.new_cache()
        self.tokens = list(tokens)
        self.sampler = sampler if sampler is not None else Sampler()

    @classmethod
    def new(
        cls,
        model: Any,
        tokenizer: Any = None,
        profile: str = "balanced",
        *,
        spec: CacheSpec | None = None,
        backend: str = "auto",
        sampler: Sampler | None = None,
    ) -> Session:
        """An empty session of a transformers model, which gets attached. Sessions of one Runner share page pools."""
        return cls(Runner(model, tokenizer, profile, spec=spec, backend=backend), sampler=sampler)

    def extend(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens in calls on the runner's grid; logits [V] after the last. A call that fails leaves those before it."""
        tokens = list(tokens)
        self.check()
        if not tokens:
            raise InvalidInput("there are no tokens to feed", "Pass at least one token")
        for part in self.runner.calls(len(self.tokens), tokens):
            try:
                logits = self.runner.forward(self.cache, part)
            except BaseException:
                self.runner.undo(self.cache, len(self.tokens))
                raise
            self.tokens += part
        return logits

    def check(self) -> None:
        """Raise CacheMisuse if the cache is in use, or holds a call that failed and could not be taken back."""
        self.cache.guard.check()
        if (held := self.cache.get_seq_length()) != len(self.tokens):
            raise CacheMisuse(
                f"a call failed and could not be taken back: the cache holds {held} tokens, the session {len(self.tokens)}",
                "Continue from a fork or a saved copy made before it",
            )

    def fork(self) -> Session:
        """An independent continuation that shares folded pages."""
        self.check()
        return Session(self.runner, self.cache.fork(), self.tokens, copy.copy(self.sampler))

    def trim(self, tokens: int) -> None:
        """Forget the newest tokens. Raises CannotTrim if a layer does not keep what it would need to go back."""
        if not 0 <= tokens <= len(self.tokens):
            raise CannotTrim(f"cannot trim {tokens} of {len(self.tokens)} tokens", "Trim at most what there is")
        self.cache.crop(-tokens)
        del self.tokens[len(self.tokens) - tokens :]

    @property
    def nbytes(self) -> int:
        """Bytes this session needs: its own pages, shared or not, its exact tokens, tables and running states."""
        return self.cache.used_bytes

    def report(self) -> dict[str, Any]:
        return self.cache.report()
