"""Clients people use, against the shipped model: OpenAI's, LangChain's, curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from langchain_openai import OpenAI as TextOpenAI
from openai import AsyncOpenAI, OpenAI
from tests.server.running import Running

from kvfold.loading import DEMO

HELLO: list[Any] = [{"role": "user", "content": "The function returns an error when the"}]
GREEDY: dict[str, Any] = {"model": DEMO, "temperature": 0}


def test_models(client: OpenAI, served: Running) -> None:
    assert [m.id for m in client.models.list()] == [DEMO]
    assert client.models.retrieve(DEMO).owned_by == "kvfold"
    with pytest.raises(openai.NotFoundError, match="not 'other'"):
        client.models.retrieve("other")


def test_chat(client: OpenAI, served: Running) -> None:
    out = client.chat.completions.create(messages=HELLO, max_tokens=12, **GREEDY)
    expected = served.model.complete(HELLO, max_tokens=12)
    choice = out.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert out.usage is not None
    assert out.usage.prompt_tokens == expected.usage.prompt_tokens
    assert out.usage.completion_tokens == 12
    assert out.usage.total_tokens == out.usage.prompt_tokens + 12
    assert out.usage.prompt_tokens_details is not None
    assert out.object == "chat.completion"
    # An answer can be sent back as it came.
    again = client.chat.completions.create(messages=[*HELLO, choice.message, *HELLO], max_tokens=2, **GREEDY)
    assert again.usage is not None
    assert again.usage.prompt_tokens > out.usage.total_tokens


def test_chat_stream(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=HELLO, max_tokens=12, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=HELLO, max_tokens=12, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 6
    assert len({c.id for c in chunks}) == 1
    plain = list(client.chat.completions.create(messages=HELLO, max_tokens=2, stream=True, **GREEDY))
    assert all(c.usage is None for c in plain)


def test_chat_logprobs(client: OpenAI) -> None:
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 4, "logprobs": True, "top_logprobs": 3, **GREEDY}
    out = client.chat.completions.create(**asked)
    assert out.choices[0].logprobs is not None
    content = out.choices[0].logprobs.content
    assert content is not None
    assert "".join(t.token for t in content) == out.choices[0].message.content
    for t in content:
        assert bytes(t.bytes or []).decode() == t.token
        assert (t.top_logprobs[0].token, t.top_logprobs[0].logprob) == (t.token, t.logprob)
        assert len(t.top_logprobs) == 3
    streamed = client.chat.completions.create(stream=True, **asked)
    rows = [x for c in streamed if c.choices and c.choices[0].logprobs for x in c.choices[0].logprobs.content or []]
    assert rows == content


def test_seeds_stops_and_content_parts(client: OpenAI) -> None:
    def text(**asked: Any) -> str:
        return (
            client.chat.completions.create(model=DEMO, messages=HELLO, max_tokens=14, **asked)
            .choices[0]
            .message.content
            or ""
        )

    assert text(seed=3) == text(seed=3)
    assert len({text(seed=s) for s in range(3)}) > 1
    greedy = text(temperature=0)
    stop = greedy[6:9]
    assert text(temperature=0, stop=[stop, "never there"]) == greedy[: greedy.index(stop)]
    parts: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "The function returns"},
                {"type": "text", "text": " an error when the"},
            ],
        }
    ]
    out = client.chat.completions.create(messages=parts, max_tokens=14, **GREEDY)
    assert out.choices[0].message.content == greedy


def test_text_completion(client: OpenAI, served: Running) -> None:
    prompt = "The function returns"
    out = client.completions.create(prompt=prompt, max_tokens=8, logprobs=2, **GREEDY)
    expected = served.model.complete(prompt, max_tokens=8)
    assert out.choices[0].text == expected.text
    logprobs = out.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or []) == expected.text
    assert logprobs.text_offset == [sum(map(len, (logprobs.tokens or [])[:i])) for i in range(8)]
    assert all(len(t) == 2 for t in logprobs.top_logprobs or [])
    ids = served.model.tokens(prompt)
    for same in (ids, [ids], [prompt]):
        assert client.completions.create(prompt=same, max_tokens=8, **GREEDY).choices[0].text == expected.text
    streamed = list(client.completions.create(prompt=prompt, max_tokens=8, stream=True, **GREEDY))
    assert "".join(c.choices[0].text for c in streamed) == expected.text
    assert len(client.completions.create(model=DEMO, prompt=prompt).choices[0].text) > 0
    assert (
        client.completions.create(model=DEMO, prompt=prompt, extra_body={"ignore_eos": True}).usage.completion_tokens
        == 16
    )  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"extra_body": {"tempature": 1}}, "tempature", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"top_logprobs": 2}, None, "invalid_value"),
        ({"max_tokens": 200_000}, None, "context_length_exceeded"),
        ({"logit_bias": {"5000": 1}}, None, "invalid_value"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    client: OpenAI, asked: dict[str, Any], param: str | None, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"messages": HELLO, "model": DEMO, **asked})
    assert (refused.value.param, refused.value.code, refused.value.type) == (param, code, "invalid_request_error")
    if param:
        assert param in refused.value.message


def test_too_long_is_context_length_exceeded(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="ends at 131072 tokens") as refused:
        client.completions.create(model=DEMO, prompt="a b " * 100_000)
    assert refused.value.code == "context_length_exceeded"


def test_biases_are_honoured(client: OpenAI, served: Running) -> None:
    token = served.model.tokenizer(" value", add_special_tokens=False).input_ids[0]
    out = client.chat.completions.create(messages=HELLO, max_tokens=3, logit_bias={str(token): 100}, **GREEDY)
    assert out.choices[0].message.content == " value value value"


def test_async_client_and_many_at_once(served: Running) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as c:

            async def one(i: int) -> str:
                out = ""
                async for chunk in await c.chat.completions.create(
                    messages=[{"role": "user", "content": f"Value {i} is"}], max_tokens=8, stream=True, **GREEDY
                ):
                    out += chunk.choices[0].delta.content or ""
                return out

            return await asyncio.gather(*(one(i) for i in range(12)))

    expected = [served.model.complete(f"Value {i} is", max_tokens=8).text for i in range(12)]
    assert asyncio.run(ask()) == expected


def test_langchain(served: Running) -> None:
    how: Any = {"base_url": served.url + "/v1", "api_key": "none", "model": DEMO, "temperature": 0, "max_retries": 0}
    chat = ChatOpenAI(**how, max_tokens=8)
    expected = served.model.complete(HELLO, max_tokens=8).text
    answer = chat.invoke(HELLO[0]["content"])
    assert answer.content == expected
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 8
    assert "".join(str(c.content) for c in chat.stream(HELLO[0]["content"])) == expected
    text = TextOpenAI(**how, max_tokens=8)
    assert text.invoke(HELLO[0]["content"]) == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(served: Running) -> None:
    def curl(*arguments: str) -> str:
        return subprocess.run(
            ["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, text=True, check=True
        ).stdout

    body = json.dumps({"messages": HELLO, "max_tokens": 4, **GREEDY})
    json_type = ("-H", "Content-Type: application/json")
    whole = json.loads(curl(f"{served.url}/v1/chat/completions", *json_type, "-d", body))
    body = json.dumps({"messages": HELLO, "max_tokens": 4, "stream": True, **GREEDY})
    lines = curl("-N", f"{served.url}/v1/chat/completions", *json_type, "-d", body).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(x.removeprefix("data: ")) for x in lines[:-2] if not x.startswith(":")]
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == whole["choices"][0]["message"]["content"]
    refused = json.loads(curl(f"{served.url}/v1/chat/completions", *json_type, "-d", "{not json"))
    assert refused["error"]["code"] == "invalid_json"
