"""`kvfold.load(...).session(name)`: conversations that are kept, from threads and from event loops."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import kvfold
from kvfold.errors import Draining, InvalidConfig, SessionExists, SessionNotFound

FIRST, THEN = "The function returns an error when the", " and the value of the"


def test_a_conversation_reads_only_what_is_new_and_lasts(tmp_path: Path) -> None:
    with kvfold.load("demo", memory="300MB", disk=tmp_path) as model:
        talk = model.session("talk", system="Rules. ")
        assert not talk.exists
        assert talk.messages == []
        with pytest.raises(SessionNotFound):
            talk.info()
        a = talk.complete(FIRST, max_tokens=10)
        stream = talk.complete(THEN, max_tokens=10, stream=True)
        b = "".join(stream)
        assert stream.answer.usage.cached_tokens >= a.usage.prompt_tokens
        said = [("system", "Rules. "), ("user", FIRST), ("assistant", a.text), ("user", THEN), ("assistant", b)]
        assert [(m["role"], m["content"]) for m in talk.messages] == said
        # The same as asking without a session.
        assert model.complete(talk.messages[:-1], max_tokens=10).text == b
        talk.save()
        fork = talk.fork("fork")
        with pytest.raises(SessionExists):
            talk.fork("fork")
        fork.complete(FIRST, max_tokens=4)
        assert len(talk.messages) == 5
        talk.complete("x", max_tokens=2)
        assert talk.restore()["tokens"] < fork.info()["tokens"]
        assert len(talk.messages) == 5
        with pytest.raises(InvalidConfig, match="not a session's name"):
            model.session("../x")
    with pytest.raises(Draining):
        talk.save()
    with kvfold.load("demo", memory="300MB", disk=tmp_path) as model:
        talk = model.session("talk")
        assert [(m["role"], m["content"]) for m in talk.messages] == said
        again = talk.complete(FIRST, max_tokens=4)
        assert again.usage.cached_tokens >= stream.answer.usage.prompt_tokens
        model.session("fork").remove()
        assert [r["name"] for r in model.shelf.rows()] == ["talk"]


def test_event_loops_can_talk_too_and_what_is_stopped_is_kept(tmp_path: Path) -> None:
    async def both(model: kvfold.serving.model.Model) -> list[str]:
        talk = model.session("talk")
        first = await talk.acomplete(FIRST, max_tokens=6)
        stream = await talk.acomplete(THEN, max_tokens=100_000, ignore_end=True, stream=True)
        text = ""
        async for piece in stream:
            text += piece
            if len(text) > 20:
                break
        stream.cancel()
        return [first.text, text]

    with kvfold.load("demo", memory="300MB", disk=tmp_path) as model:
        first, second = asyncio.run(both(model))
        said = model.session("talk").messages
        assert said[1]["content"] == first
        assert said[3]["content"].startswith(second)
