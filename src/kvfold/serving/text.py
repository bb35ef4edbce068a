"""Tokens to text as they arrive: whole characters only, and nothing that might become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from kvfold.errors import Unsupported

# Tokens of the prompt that a decoder sees before the answer, so that a word's leading space is not taken for the text's.
CONTEXT_TOKENS = 8


def backend(tokenizer: Any) -> Any:
    """The Rust tokenizer behind a transformers one. Raises Unsupported if there is none."""
    found = getattr(tokenizer, "backend_tokenizer", None)
    if found is None:
        raise Unsupported(
            f"{type(tokenizer).__name__} cannot decode token by token", "Use a tokenizer with a tokenizer.json"
        )
    return found


class AnswerText:
    """The text of one answer. `stopped`: a stop string was met; neither it nor what follows is part of the text."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._backend = backend(tokenizer)
        self._decode = DecodeStream(ids=list(prompt[-CONTEXT_TOKENS:]), skip_special_tokens=True)
        self._stops = [s for s in stops if s]
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is certain after this token; empty while a character or a stop string may be incomplete."""
        self._held += self._decode.step(self._backend, token) or ""
        if not self._stops:
            return self._release(len(self._held))
        found = [at for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        return self._release(len(self._held) - max(_overlap(self._held, s) for s in self._stops))

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        return self._release(len(self._held))

    def _release(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of text that begin the stop string."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
