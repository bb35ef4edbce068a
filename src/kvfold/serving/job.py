"""One request on its way: waiting, reading its prompt, answering, done."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from kvfold.errors import KvfoldError
from kvfold.serving.generation import Generation
from kvfold.serving.logits import TokenLogprob, logprob, process, processors
from kvfold.serving.shelf import Place
from kvfold.serving.text import AnswerText
from kvfold.sessions.session import Session

Finish = Literal["stop", "length", "cancelled", "error"]


@dataclass
class Piece:
    """A part of an answer: text, the tokens in it if log-probabilities were asked for, and in the last one why it ended."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    error: KvfoldError | None = None

    def add(self, other: Piece) -> None:
        self.text += other.text
        self.logprobs += other.logprobs
        self.finish, self.error = other.finish or self.finish, other.error or self.error


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: of its prompt, of those already in a cache, of its answer."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Channel(Protocol):
    """Tells readers that their jobs have new pieces; called from the model's thread, once per step."""

    def deliver(self, jobs: Sequence[Job]) -> None: ...


class Job:
    """prompt: token ids. place: the session that is to hold prompt and answer. The scheduler writes, one reader reads."""

    def __init__(
        self,
        prompt: list[int],
        generation: Generation,
        tokenizer: Any,
        channel: Channel,
        ready: Any,
        place: Place | None = None,
    ) -> None:
        self.prompt, self.generation, self.place = prompt, generation, place
        self.need = 0  # bytes that it takes at most, alone
        self.channel, self.ready = channel, ready
        self.session: Session | None = None
        self.sampler = generation.sampler()
        self.cached_tokens = 0
        self.answer: list[int] = []
        self.text = ""  # of the answer
        self.finish: Finish | None = None
        self.cancelled = False
        self.submitted = time.monotonic()
        self.latest = self.submitted  # when its latest token was picked
        self._text = AnswerText(tokenizer, prompt, generation.stop)
        self._chain = processors(generation, len(prompt))
        self._pieces: deque[Piece] = deque()

    @property
    def open_session(self) -> Session:
        """The session of a job that holds a row."""
        if self.session is None:
            raise KvfoldError("this job holds no session", "Wait until it is admitted")
        return self.session

    @property
    def most(self) -> int:
        """Tokens of prompt and answer at most."""
        return len(self.prompt) + (self.generation.max_tokens or 1)

    @property
    def usage(self) -> Usage:
        return Usage(len(self.prompt), self.cached_tokens, len(self.answer))

    def pick(self, logits: Tensor, ends: frozenset[int]) -> None:
        """Choose the next token from the model's logits [V] and write it down."""
        token = self.sampler.pick(process(self._chain, self.prompt + self.answer, logits) if self._chain else logits)
        self.answer.append(token)
        piece = Piece()
        if self.generation.logprobs is not None:
            piece.logprobs.append(logprob(logits, token, self.generation.logprobs))
        if token in ends and not self.generation.ignore_end:
            piece.finish = "stop"
        else:
            piece.text = self._text.push(token)
            if self._text.stopped:
                piece.finish = "stop"
            elif len(self.answer) == self.generation.max_tokens:
                piece.finish = "length"
        self.write(piece)

    def write(self, piece: Piece) -> None:
        """Hand a piece to the reader; the last one brings what was held back."""
        if piece.finish is not None:
            self.finish = piece.finish
            piece.text += self._text.finish()
        self.text += piece.text
        self._pieces.append(piece)

    def read(self) -> Piece | None:
        """Everything written since the last call as one piece; None if nothing was."""
        whole: Piece | None = None
        while self._pieces:
            piece = self._pieces.popleft()
            if whole is None:
                whole = piece
            else:
                whole.add(piece)
        return whole
