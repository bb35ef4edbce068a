"""One thread runs the model: reads prompts in calls, decodes all answers together, one token each per step.

A step is at most one call over a prompt, in turn for every prompt that is being read, and one decode step over all
rows. So an answer never waits for more than one call, and a short prompt does not wait for a long one.

A job starts when a row is free and memory for all that it may come to hold can be promised; until then it waits, and those
behind it wait with it, so that none is overtaken for ever. What has started is never short of memory.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvfold.errors import Draining, KvfoldError, ModelFailure, OutOfMemory, OverBudget, Overloaded, StorageFailed
from kvfold.serving.job import Channel, Job, Piece
from kvfold.serving.shelf import Shelf
from kvfold.sessions.batch import SessionBatch
from kvfold.sessions.runner import Runner

T = TypeVar("T")
log = logging.getLogger(__name__)
MAX_RETRY_SECONDS = 60


@dataclass(frozen=True)
class Limits:
    """max_rows: requests read and answered together. max_waiting: requests that may wait for a row or for
    memory."""

    max_rows: int = 16
    max_waiting: int = 64


class Meter:
    """What a scheduler tells about itself, from its own thread. This one does not listen."""

    def read(self, tokens: int, seconds: float) -> None:
        """A call over part of a prompt."""

    def decoded(self, rows: int, seconds: float) -> None:
        """A decode step."""

    def picked(self, job: Job, seconds: float) -> None:
        """A token; seconds since the job's last one, or since it was submitted."""

    def finished(self, job: Job) -> None:
        """A job left, for whatever reason."""


class Scheduler:
    """Runs jobs until `close`. All methods may be called from any thread.

    ends: token ids that end an answer.
    """

    def __init__(self, runner: Runner, shelf: Shelf, ends: frozenset[int], limits: Limits, meter: Meter) -> None:
        self.runner, self.shelf, self.ends, self.limits, self.meter = runner, shelf, ends, limits, meter
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._live: dict[Job, None] = {}  # in order of submission
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._draining = self._stopped = False
        self._seconds = 1.0  # of a job, running mean
        # Of the model's thread alone:
        self._reading: deque[Job] = deque()
        self._answering: list[Job] = []
        self._blocked: Job | None = None  # waits for memory until something leaves
        self._batch: SessionBatch | None = None
        self._written: dict[Channel, list[Job]] = {}
        self._thread = threading.Thread(target=self._run, name="kvfold-model", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what `submit` would raise now."""
        if self._draining:
            raise Draining("the model is being shut down", "Try again when it is back")
        if (n := len(self._waiting)) >= self.limits.max_waiting:
            raise Overloaded(f"{n} requests are waiting already", "Try again later", self._retry_seconds())

    def submit(self, job: Job) -> None:
        """Queue a job. Raises Draining after `drain` and Overloaded when too many wait."""
        with self._changed:
            self.check()
            self._waiting.append(job)
            self._live[job] = None
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job at the next step; nothing if it has ended."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Run something between two steps, when no session is in use by the model. Raises Draining after `close`."""
        future: Future[T] = Future()
        with self._changed:
            if self._stopped:
                raise Draining("the model is shut down", "Load it again")
            self._calls.append((work, future))
            self._changed.notify()
        return future

    def drain(self) -> None:
        """Take no more jobs; those there are go on."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def close(self, grace_seconds: float = 0.0) -> None:
        """Take no more jobs, give those there are so much time, cancel the rest, and stop the thread."""
        self.drain()
        self._thread.join(grace_seconds)
        with self._changed:
            for job in self._live:
                job.cancelled = True
            self._changed.notify()
        self._thread.join()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def waiting(self) -> int:
        """Jobs that have not started."""
        return len(self._waiting)

    @property
    def waiting_bytes(self) -> int:
        """What they need at most, each by itself."""
        with self._changed:
            return sum(job.need for job in self._waiting)

    @property
    def jobs(self) -> list[Job]:
        """Jobs that have not ended, in order of submission."""
        with self._changed:
            return list(self._live)

    def _retry_seconds(self) -> int:
        # Short of memory, no more run at a time than do now.
        rows = self.limits.max_rows if self._blocked is None else self._running
        turns = len(self._waiting) / max(1, rows)
        return min(MAX_RETRY_SECONDS, max(1, math.ceil(turns * self._seconds)))

    def _run(self) -> None:
        while self._wait():
            try:
                self._step()
            except Exception as error:  # the thread's edge: what is under way ends with an error
                log.exception("a step of the model failed")
                self._fail_all(error)
            self._deliver()

    def _wait(self) -> bool:
        """Wait for something to do; False if nothing will come."""
        with self._changed:
            while not (self._live or self._calls or self._draining):
                self._changed.wait()
            self._stopped = not (self._live or self._calls)
            return not self._stopped

    def _step(self) -> None:
        with self._changed:
            calls, self._calls = self._calls, []
            gone = [j for j in self._live if j.cancelled]
            self._waiting = deque(j for j in self._waiting if not j.cancelled)
        for job in gone:
            self._finish(job, Piece(finish="cancelled"))
        if calls:
            self._part()
        for work, future in calls:
            _work(work, future)
            self._blocked = None
        while self._admit():
            pass
        if self._reading:
            self._reading.rotate(-1)
            self._guarded(self._read, self._reading[-1])
        if self._answering:
            self._decode()

    def _guarded(self, work: Callable[[Job], None], job: Job) -> None:
        """Work for one job; an error of kvfold's, or memory running out, ends that job alone."""
        try:
            work(job)
        except (KvfoldError, MemoryError, torch.OutOfMemoryError) as error:
            self._finish(job, Piece(finish="error", error=_named(error)))

    @property
    def _running(self) -> int:
        return len(self._reading) + len(self._answering)

    def _admit(self) -> bool:
        """Start the job that waited longest, if there is a row and memory for it; whether the next may be tried."""
        with self._changed:
            job = self._waiting[0] if self._waiting else None
        if job is None or job is self._blocked or self._running >= self.limits.max_rows:
            return False
        self._guarded(self._open, job)
        if job.session is None and job.finish is None:
            self._blocked = job
            return False
        with self._changed:
            self._waiting.popleft()
        return True

    def _open(self, job: Job) -> None:
        try:
            job.session = self.shelf.open(job.prompt, job.most, job.generation.reuse)
        except (OverBudget, StorageFailed):
            if not self._running:
                raise  # nobody will make room
            return
        job.cached_tokens = len(job.session.tokens)
        self._reading.append(job)

    def _read(self, job: Job) -> None:
        """One call over a job's prompt; after the last of them, its first token."""
        at = len(job.open_session.tokens)
        part = next(self.runner.calls(at, job.prompt[at:]))
        began = time.monotonic()
        logits = job.open_session.extend(part)
        self.meter.read(len(part), time.monotonic() - began)
        if at + len(part) == len(job.prompt):
            self._reading.remove(job)
            self._part()
            self._answering.append(job)
            self._pick(job, logits)

    def _part(self) -> None:
        """Hand the rows of the batch back to their sessions."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.close()

    def _decode(self) -> None:
        jobs = list(self._answering)
        began = time.monotonic()
        try:
            if self._batch is None:
                self._batch = SessionBatch([j.open_session for j in jobs])
            logits = self._batch.step([j.answer[-1] for j in jobs])
        except (KvfoldError, MemoryError, torch.OutOfMemoryError):
            # The step took nothing. One row may be at fault: alone, the others go on.
            self._part()
            for job in jobs:
                self._guarded(self._decode_alone, job)
            return
        self.meter.decoded(len(jobs), time.monotonic() - began)
        for job, row in zip(jobs, logits, strict=True):
            self._pick(job, row)

    def _decode_alone(self, job: Job) -> None:
        self._pick(job, job.open_session.extend([job.answer[-1]]))

    def _pick(self, job: Job, logits: Tensor) -> None:
        job.pick(logits, self.ends)
        now = time.monotonic()
        self.meter.picked(job, now - job.latest)
        job.latest = now
        self._written.setdefault(job.channel, []).append(job)
        if job.finish is not None:
            self._leave(job)

    def _finish(self, job: Job, piece: Piece) -> None:
        """End a job for another reason than its own text."""
        job.write(piece)
        self._written.setdefault(job.channel, []).append(job)
        self._leave(job)

    def _leave(self, job: Job) -> None:
        if job in self._answering:
            self._part()
            self._answering.remove(job)
        elif job in self._reading:
            self._reading.remove(job)
        with self._changed:
            del self._live[job]
        session, job.session = job.session, None
        if session is not None:
            self._blocked = None
            self.shelf.close(session, job.place if job.answer else None, job.text)
        self._seconds += (time.monotonic() - job.submitted - self._seconds) / 8
        self.meter.finished(job)

    def _deliver(self) -> None:
        written, self._written = self._written, {}
        for channel, jobs in written.items():
            channel.deliver(jobs)

    def _fail_all(self, error: Exception) -> None:
        """End every job that holds a row. What state their sessions are in is not known, so none is taken back."""
        self._batch = None
        for job in self.jobs:
            if job.session is not None:
                self.shelf.discard(job.session)
                job.session = self._blocked = None
                self._finish(job, Piece(finish="error", error=_named(error)))


def _named(error: BaseException) -> KvfoldError:
    if isinstance(error, KvfoldError):
        return error
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OutOfMemory("there is not enough memory for this request", "Send a shorter one, or fewer at once")
    return ModelFailure(f"the model failed ({type(error).__name__})", "See the log")


def _work(work: Callable[[], Any], future: Future[Any]) -> None:
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - it belongs to whoever waits for the future
        future.set_exception(error)
