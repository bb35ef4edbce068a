"""What every endpoint shares: the model under its served name, and how an answer is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kvfold.errors import KvfoldError, RequestCancelled
from kvfold.server.errors import ApiError, as_api_error, body
from kvfold.server.metrics import Metrics
from kvfold.server.replies import DONE, Reply, event
from kvfold.server.schema import SamplingBody
from kvfold.serving.model import History, Model
from kvfold.serving.prompts import Message
from kvfold.serving.shelf import Place
from kvfold.serving.streams import AsyncStream

# Between a stream's signs of life while a prompt is read: proxies and clients give up on silent connections.
PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class Service:
    """name: the model's id for clients. default_tokens: of a chat answer whose request sets no limit."""

    model: Model
    name: str
    metrics: Metrics
    default_tokens: int = 2048
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics.model = self.model

    @property
    def slots(self) -> int:
        """As many as requests that are answered together."""
        return self.model.scheduler.limits.max_rows

    def place(self, body: SamplingBody, messages: Sequence[Message] = ()) -> Place | None:
        """The session that a request is to be kept in, if it names one."""
        if body.id_slot >= self.slots:
            raise ApiError(400, "invalid_value", f"there are {self.slots} slots", "id_slot")
        if body.session is not None and body.id_slot >= 0:
            raise ApiError(400, "invalid_value", "session and id_slot name two sessions", "session")
        name = slot_name(body.id_slot) if body.id_slot >= 0 else body.session
        return None if name is None else Place(name, messages)

    def check_model(self, wanted: str) -> None:
        if wanted != self.name:
            raise ApiError(404, "model_not_found", f"this server serves {self.name!r}, not {wanted!r}", "model")

    def text_of(self, token: int) -> str:
        return self.model.tokenizer.decode([token])

    def as_api_error(self, error: KvfoldError) -> ApiError:
        """What it is over HTTP, without where the server keeps its files."""
        made, disk = as_api_error(error), self.model.shelf.store.disk
        if disk is not None:
            made.message = made.message.replace(f"{disk.root}/", "")
        return made

    async def tokens(self, history: History) -> list[int]:
        """Token ids, made in a thread: a long text takes a while. Raises Overloaded and Draining before that."""
        self.model.scheduler.check()
        return await asyncio.to_thread(self.model.tokens, history)

    def answer_tokens(self, prompt_tokens: int) -> int:
        """How long an answer may be when its request does not say."""
        return max(1, min(self.default_tokens, self.model.room(prompt_tokens)))


def slot_name(slot: int) -> str:
    """The session that stands for a slot of llama-server's."""
    return f"slot-{slot}"


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def send(request: Request, stream: AsyncStream, reply: Reply, as_events: bool) -> Response:
    """The answer as events, or whole. A client that leaves ends the decoding."""
    if as_events:
        headers = {"X-Accel-Buffering": "no"}
        events = _events(service_of(request), stream, reply)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    reading = asyncio.ensure_future(stream.read())
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise RequestCancelled("the client left", "Send it again")
        return JSONResponse(reply.whole(reading.result()))
    finally:
        reading.cancel()  # which ends the decoding, if it has not ended
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(service: Service, stream: AsyncStream, reply: Reply) -> AsyncIterator[bytes]:
    """Server-sent events; comments while the prompt is read. Starlette cancels it when the client leaves."""
    job = stream.job
    try:
        for x in reply.opening():
            yield x
        while not stream.complete:
            piece = await stream.wait(PROGRESS_SECONDS)
            if piece is not None:
                yield b"".join(reply.piece(piece))
            elif not job.answer:
                read = len(job.session.tokens) if job.session is not None else 0
                yield f": read {read} of {len(job.prompt)}\n\n".encode()
        yield b"".join(reply.closing(job.usage))
    except KvfoldError as error:
        made = service.as_api_error(error)
        yield event(body(made.status, made.code, made.message)) + DONE
    finally:
        if not stream.complete:
            stream.cancel()
