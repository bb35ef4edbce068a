"""`Model.session(name)`: a conversation that is kept under its name, with its messages, and goes on after a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from kvfold.errors import SessionNotFound
from kvfold.serving.generation import Generation
from kvfold.serving.prompts import Message
from kvfold.serving.shelf import Place, Shelf
from kvfold.serving.streams import Answer, AsyncStream, Stream

if TYPE_CHECKING:
    from kvfold.serving.model import Model

T = TypeVar("T")


class Conversation:
    """system: begins a conversation that has no messages yet. Methods may be called from any thread; they wait for the model
    to end its step. Raises InvalidConfig for names that sessions cannot have."""

    def __init__(self, model: Model, name: str, system: str | None = None) -> None:
        self.model, self.name, self.system = model, Place(name).name, system

    @property
    def messages(self) -> list[Message]:
        """All so far, the latest answer included, cut short if it was stopped."""
        return self._do(lambda shelf: shelf.messages(self.name)) if self.exists else []

    @property
    def exists(self) -> bool:
        """Whether anything is kept under the name."""
        return self._do(lambda shelf: any(r["name"] == self.name for r in shelf.rows()))

    @overload
    def complete(self, text: str, *, stream: Literal[False] = False, **generation: Any) -> Answer: ...

    @overload
    def complete(self, text: str, *, stream: Literal[True], **generation: Any) -> Stream: ...

    def complete(self, text: str, *, stream: bool = False, **generation: Any) -> Answer | Stream:
        """Say something; what is read and answered is kept. generation: fields of Generation. Raises as Model.complete."""
        history = self._with(text)
        out = self.model.stream(self.model.tokens(history), Generation(**generation), Place(self.name, history))
        return out if stream else out.read()

    @overload
    async def acomplete(self, text: str, *, stream: Literal[False] = False, **generation: Any) -> Answer: ...

    @overload
    async def acomplete(self, text: str, *, stream: Literal[True], **generation: Any) -> AsyncStream: ...

    async def acomplete(self, text: str, *, stream: bool = False, **generation: Any) -> Answer | AsyncStream:
        """`complete` for event loops: `await` it; a stream is then read with `async for`."""
        history = await asyncio.to_thread(self._with, text)
        tokens = await asyncio.to_thread(self.model.tokens, history)
        out = self.model.astream(tokens, Generation(**generation), Place(self.name, history))
        return out if stream else await out.read()

    def info(self) -> dict[str, Any]:
        """Its row of SessionStore.sessions, and `ratio`. Raises SessionNotFound while nothing was said."""
        return self._do(lambda shelf: shelf.row(self.name))

    def save(self) -> dict[str, Any]:
        """When this returns, it is on the disk. Raises SessionNotFound, StorageFailed, InvalidConfig without a disk."""
        return self._do(lambda shelf: shelf.save(self.name))

    def restore(self) -> dict[str, Any]:
        """Go back to what was saved. Raises SessionNotFound."""
        return self._do(lambda shelf: shelf.restore(self.name))

    def fork(self, name: str) -> Conversation:
        """A second one that goes on from here. Raises SessionExists, SessionNotFound."""
        self._do(lambda shelf: shelf.fork(self.name, name))
        return Conversation(self.model, name, self.system)

    def remove(self) -> None:
        """Forget it, in memory and on the disk. Raises SessionNotFound."""
        self._do(lambda shelf: shelf.remove(self.name))

    def _with(self, text: str) -> list[Message]:
        try:
            said = self.messages
        except SessionNotFound:  # it was removed meanwhile
            said = []
        if not said and self.system is not None:
            said = [{"role": "system", "content": self.system}]
        return [*said, {"role": "user", "content": text}]

    def _do(self, work: Callable[[Shelf], T]) -> T:
        return self.model.scheduler.call(lambda: work(self.model.shelf)).result()
