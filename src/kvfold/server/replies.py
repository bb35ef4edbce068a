"""Answers in the shapes of OpenAI's two completion endpoints, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

from kvfold.serving.job import Piece, Usage
from kvfold.serving.logits import TokenLogprob
from kvfold.serving.streams import Answer

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(u: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": u.prompt_tokens,
        "completion_tokens": u.completion_tokens,
        "total_tokens": u.prompt_tokens + u.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": u.cached_tokens},
    }


class Reply:
    """One answer's shapes. text_of: the text of a single token id, for log-probabilities."""

    kind = chunk_kind = prefix = ""

    def __init__(self, model: str, text_of: Callable[[int], str], include_usage: bool) -> None:
        self._text_of, self._include_usage = text_of, include_usage
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, answer: Answer) -> dict[str, Any]:
        choice = {
            "index": 0,
            **self._content(answer),
            "finish_reason": answer.finish,
            "logprobs": self._logprobs(answer.logprobs),
        }
        return {**self._head, "object": self.kind, "choices": [choice], "usage": usage(answer.usage)}

    def opening(self) -> list[bytes]:
        """Events before the first token."""
        return []

    def piece(self, piece: Piece) -> list[bytes]:
        """Events of a piece."""
        out = []
        if piece.text or piece.logprobs:
            out.append(self._chunk(self._delta(piece.text), None, self._logprobs(piece.logprobs)))
        if piece.finish is not None:
            out.append(self._chunk(self._delta(None), piece.finish, None))
        return out

    def closing(self, u: Usage) -> list[bytes]:
        """Events after the last token."""
        if not self._include_usage:
            return [DONE]
        return [event({**self._head, "object": self.chunk_kind, "choices": [], "usage": usage(u)}), DONE]

    def _chunk(self, content: dict[str, Any], finish: str | None, logprobs: dict[str, Any] | None) -> bytes:
        choice = {"index": 0, **content, "finish_reason": finish, "logprobs": logprobs}
        data = {**self._head, "object": self.chunk_kind, "choices": [choice]}
        return event({**data, "usage": None} if self._include_usage else data)

    def _content(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str | None) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        raise NotImplementedError


class ChatReply(Reply):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[bytes]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None, None)]

    def _content(self, answer: Answer) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": answer.text, "refusal": None}}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if not tokens:
            return None
        rows = [{**self._token(t.token, t.logprob), "top_logprobs": [self._token(*x) for x in t.top]} for t in tokens]
        return {"content": rows, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


class TextReply(Reply):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, text_of: Callable[[int], str], include_usage: bool) -> None:
        super().__init__(model, text_of, include_usage)
        self._offset = 0

    def _content(self, answer: Answer) -> dict[str, Any]:
        return {"text": answer.text}

    def _delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any] | None:
        if not tokens:
            return None
        texts = [self._text_of(t.token) for t in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self._text_of(i): p for i, p in t.top} for t in tokens],
            "text_offset": offsets,
        }
