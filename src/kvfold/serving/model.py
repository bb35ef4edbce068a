"""`kvfold.load`: a model to talk to, from threads, from an event loop, and behind the server."""

from __future__ import annotations

import asyncio
import bisect
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

from kvfold.errors import BadPrompt, ContextTooLong, InvalidConfig
from kvfold.loading import Loaded, Options
from kvfold.loading import load as load_model
from kvfold.serving.generation import Generation
from kvfold.serving.job import Channel, Job
from kvfold.serving.prompts import Message, chat_tokens, text_tokens
from kvfold.serving.scheduler import Limits, Meter, Scheduler
from kvfold.serving.shelf import Keep, Place, Shelf
from kvfold.serving.streams import Answer, AsyncStream, LoopChannel, Stream, ThreadChannel
from kvfold.serving.talk import Conversation

History = str | Sequence[Message]

# Calls over a prompt. On CPUs longer ones are no faster and keep answers waiting; GPUs need more rows to be busy.
CPU_CALL_TOKENS, GPU_CALL_TOKENS = 128, 512
_THREADS = ThreadChannel()


class Model:
    """A loaded model with its scheduler and its sessions. `close` it, or use it as `with`.

    max_context: tokens of prompt and answer; the model's own limit if that is smaller. call_tokens: tokens of a prompt
    read in one call. keep: where and how much of what was read is kept.
    """

    def __init__(
        self,
        loaded: Loaded,
        profile: str = "balanced",
        *,
        limits: Limits | None = None,
        meter: Meter | None = None,
        max_context: int | None = None,
        call_tokens: int | None = None,
        keep: Keep | None = None,
    ) -> None:
        self.model, self.tokenizer, self.source = loaded.model, loaded.tokenizer, loaded.source
        if call_tokens is None:
            call_tokens = CPU_CALL_TOKENS if loaded.model.device.type == "cpu" else GPU_CALL_TOKENS
        text = loaded.model.config.get_text_config()
        self.vocabulary: int = text.vocab_size
        own = getattr(text, "max_position_embeddings", None)
        self.max_context: int = min(x for x in (own, max_context, 1 << 30) if x)
        store = (keep or Keep()).store(loaded.model, loaded.tokenizer, profile, call_tokens)
        self.runner, self.shelf = store.runner, Shelf(store)
        self.scheduler = Scheduler(self.runner, self.shelf, _ends(loaded), limits or Limits(), meter or Meter())

    def tokens(self, history: History) -> list[int]:
        """Token ids of plain text, or of messages through the chat template.

        Raises ChatTemplateMissing, and BadPrompt for messages that the template refuses.
        """
        if isinstance(history, str):
            return text_tokens(self.tokenizer, history)
        return chat_tokens(self.tokenizer, history)

    def _submit(
        self, prompt: list[int], generation: Generation, channel: Channel, ready: Any, place: Place | None
    ) -> Job:
        """Raises BadPrompt, ContextTooLong, InvalidConfig, Overloaded, Draining."""
        if not prompt:
            raise BadPrompt("the prompt has no tokens", "Send some text")
        if max(max(prompt), max(generation.logit_bias, default=0)) >= self.vocabulary:
            raise InvalidConfig(f"a token id is beyond the vocabulary of {self.vocabulary}", "Use this model's ids")
        wanted = generation.max_tokens or 1
        if len(prompt) + wanted > self.max_context:
            raise ContextTooLong(
                f"the context ends at {self.max_context} tokens; the prompt has {len(prompt)}, {wanted} are to follow",
                "Send a shorter prompt, or ask for fewer tokens",
            )
        if (need := self.shelf.need(len(prompt) + wanted, len(prompt))) > self.shelf.limit:
            raise ContextTooLong(
                f"a prompt of {len(prompt)} tokens and {wanted} to follow need {need:,} bytes of memory, and all requests "
                f"together may take {self.shelf.limit:,}",
                "Send a shorter prompt, ask for fewer tokens, or give the model more memory",
            )
        generation = replace(generation, max_tokens=generation.max_tokens or self.room(len(prompt)))
        job = Job(prompt, generation, self.tokenizer, channel, ready, place)
        job.need = self.shelf.need(job.most, len(prompt))
        self.scheduler.submit(job)
        return job

    def room(self, prompt: int) -> int:
        """Tokens that can follow a prompt of so many: what the context leaves, or the memory if it leaves less; 0 or more."""
        lengths = range(prompt + 1, self.max_context + 1)
        return bisect.bisect_right(lengths, self.shelf.limit, key=lambda n: self.shelf.need(n, prompt))

    def stream(self, prompt: list[int], generation: Generation, place: Place | None = None) -> Stream:
        """An answer to token ids, for a reader in this or another thread. place: the session to keep both in."""
        return Stream(self.scheduler, self._submit(prompt, generation, _THREADS, threading.Event(), place))

    def astream(self, prompt: list[int], generation: Generation, place: Place | None = None) -> AsyncStream:
        """An answer to token ids, for a reader in the running event loop."""
        channel = LoopChannel(asyncio.get_running_loop())
        return AsyncStream(self.scheduler, self._submit(prompt, generation, channel, asyncio.Event(), place))

    @overload
    def complete(self, history: History, *, stream: Literal[False] = False, **generation: Any) -> Answer: ...

    @overload
    def complete(self, history: History, *, stream: Literal[True], **generation: Any) -> Stream: ...

    def complete(self, history: History, *, stream: bool = False, **generation: Any) -> Answer | Stream:
        """Continue plain text, or answer messages [{"role", "content"}]. generation: fields of Generation.

        Raises RequestError subclasses, and InvalidConfig that names a field.
        """
        out = self.stream(self.tokens(history), Generation(**generation))
        return out if stream else out.read()

    @overload
    async def acomplete(self, history: History, *, stream: Literal[False] = False, **generation: Any) -> Answer: ...

    @overload
    async def acomplete(self, history: History, *, stream: Literal[True], **generation: Any) -> AsyncStream: ...

    async def acomplete(self, history: History, *, stream: bool = False, **generation: Any) -> Answer | AsyncStream:
        """`complete` for event loops: `await` it; a stream is then read with `async for`."""
        tokens = await asyncio.to_thread(self.tokens, history)
        out = self.astream(tokens, Generation(**generation))
        return out if stream else await out.read()

    def session(self, name: str, system: str | None = None) -> Conversation:
        """A conversation that is kept under this name: the one there is, or a new one, which `system` begins."""
        return Conversation(self, name, system)

    def close(self, grace_seconds: float = 0.0) -> None:
        """Take no more requests, give those there are so much time, stop, and write sessions to the disk, if there is one."""
        self.scheduler.close(grace_seconds)
        self.shelf.store.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _ends(loaded: Loaded) -> frozenset[int]:
    """Token ids that end an answer, by the generation config and by the tokenizer."""
    ids = loaded.model.generation_config.eos_token_id
    found = {*(ids if isinstance(ids, list) else [ids]), loaded.tokenizer.eos_token_id}
    return frozenset(i for i in found if i is not None)


def load(
    source: str,
    profile: str = "balanced",
    *,
    memory: int | str = "4GiB",
    disk: Path | str | None = None,
    options: Options | None = None,
    **how: Any,
) -> Model:
    """Load a model to talk to: a folder, a hub id, a GGUF file, or `demo`.

    memory: what the caches of all its sessions may take. disk: folder that they are saved to. options: how it is loaded.
    how: arguments of Model. Raises ModelError subclasses.
    """
    return Model(load_model(source, options), profile, keep=Keep(memory, disk), **how)
