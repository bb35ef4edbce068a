"""Reading a job's answer, in a thread or in an event loop, whole or as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from kvfold.errors import KvfoldError, RequestCancelled
from kvfold.serving.job import Finish, Job, Piece, Usage
from kvfold.serving.logits import TokenLogprob
from kvfold.serving.scheduler import Scheduler


class ThreadChannel:
    """For readers in threads: a job's `ready` is a threading.Event."""

    def deliver(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.ready.set()


@dataclass(frozen=True)
class LoopChannel:
    """For readers in an event loop: `ready` is an asyncio.Event. The loop is woken once per step, whatever comes."""

    loop: asyncio.AbstractEventLoop

    def deliver(self, jobs: Sequence[Job]) -> None:
        try:
            self.loop.call_soon_threadsafe(_wake, jobs)
        except RuntimeError:  # the loop is closed, and its readers are gone
            for job in jobs:
                job.cancelled = True


def _wake(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.ready.set()


@dataclass(frozen=True)
class Answer:
    """A whole answer. finish: `stop` (an end token or a stop string), or `length`."""

    text: str
    finish: Finish
    usage: Usage
    logprobs: list[TokenLogprob]

    def __str__(self) -> str:
        return self.text


def _check(piece: Piece) -> Piece:
    """The piece; raises what ended it other than its own text."""
    if piece.error is not None:
        raise piece.error
    if piece.finish == "cancelled":
        raise RequestCancelled("this request was cancelled", "Send it again")
    return piece


class Reader:
    """What sync and async reading share: the pieces so far."""

    def __init__(self, scheduler: Scheduler, job: Job) -> None:
        self.job, self._scheduler = job, scheduler
        self._whole = Piece()

    def _next(self) -> Piece | None:
        self.job.ready.clear()
        piece = self.job.read()
        if piece is None:
            return None
        self._whole.add(_check(piece))
        return piece

    @property
    def complete(self) -> bool:
        """Whether the last piece was read."""
        return self._whole.finish is not None

    @property
    def answer(self) -> Answer:
        """All of it. Raises KvfoldError while there is more to come."""
        if self._whole.finish is None:
            raise KvfoldError("this answer is not complete", "Read the stream to its end")
        return Answer(self._whole.text, self._whole.finish, self.job.usage, self._whole.logprobs)

    def cancel(self) -> None:
        """Stop decoding."""
        self._scheduler.cancel(self.job)


class Stream(Reader):
    """Iterate for pieces of text; `answer` is there afterwards. Leaving early stops the decoding."""

    def pieces(self) -> Iterator[Piece]:
        try:
            while not self.complete:
                self.job.ready.wait()
                if (piece := self._next()) is not None:
                    yield piece
        finally:
            if not self.complete:
                self.cancel()

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in self.pieces() if piece.text)

    def read(self) -> Answer:
        """The whole answer."""
        for _ in self.pieces():
            pass
        return self.answer


class AsyncStream(Reader):
    """The same for `async for`."""

    async def wait(self, seconds: float) -> Piece | None:
        """The next piece, or None if there is none for so long."""
        try:
            async with asyncio.timeout(seconds):
                await self.job.ready.wait()
        except TimeoutError:
            return None
        return self._next()

    async def pieces(self) -> AsyncIterator[Piece]:
        try:
            while not self.complete:
                await self.job.ready.wait()
                if (piece := self._next()) is not None:
                    yield piece
        finally:
            if not self.complete:
                self.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for piece in self.pieces():
            if piece.text:
                yield piece.text

    async def read(self) -> Answer:
        async for _ in self.pieces():
            pass
        return self.answer
