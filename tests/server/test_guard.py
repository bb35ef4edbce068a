"""Who may call, how much may be sent, how long it may take; and how requests end."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from tests.server.running import Running, running, wait_for

from kvfold.loading import DEMO, Loaded
from kvfold.server.guard import Rules
from kvfold.serving.scheduler import Limits

ENDLESS: dict[str, Any] = {"model": DEMO, "prompt": "The", "max_tokens": 100_000, "ignore_eos": True}


def refusal(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


def test_other_names_and_other_sites_are_refused(served: Running) -> None:
    """What a page of another site could make a browser send to a server on loopback."""
    url = served.url + "/v1/models"
    assert httpx.get(url, headers={"Host": "localhost:1234"}).status_code == 200
    assert refusal(httpx.get(url, headers={"Host": "evil.example"})) == (403, "unknown_host")
    assert refusal(httpx.get(url, headers={"Host": "[::1"})) == (403, "unknown_host")
    assert refusal(httpx.get(url, headers={"Origin": "http://evil.example"})) == (403, "unknown_origin")
    assert refusal(httpx.get(url, headers={"Origin": "null"})) == (403, "unknown_origin")
    assert refusal(httpx.get(url, headers={"Origin": f"http://127.0.0.1:{1}"})) == (403, "unknown_origin")
    assert httpx.get(url, headers={"Origin": served.url}).status_code == 200


def test_origins_can_be_allowed(loaded: Loaded) -> None:
    site = "https://notes.example"
    with running(loaded, Rules(origins=(site,))) as r:
        preflight = httpx.options(
            r.url + "/v1/completions",
            headers={
                "Origin": site,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "content-type",
            },
        )
        assert preflight.headers["access-control-allow-origin"] == site
        assert httpx.get(r.url + "/v1/models", headers={"Origin": site}).headers["access-control-allow-origin"] == site
        assert httpx.get(r.url + "/v1/models", headers={"Origin": "https://evil.example"}).status_code == 403


def test_a_key_is_asked_for(loaded: Loaded) -> None:
    with running(loaded, Rules(key="s3cret é")) as r:
        with pytest.raises(openai.AuthenticationError) as refused, OpenAI(base_url=r.url + "/v1", api_key="wrong") as c:
            c.models.list()
        assert refused.value.code == "invalid_api_key"
        assert refusal(httpx.get(r.url + "/metrics")) == (401, "invalid_api_key")
        key = {"Authorization": "Bearer s3cret é".encode()}
        assert httpx.get(r.url + "/v1/models", headers=key).status_code == 200
        for path in ("/health", "/ready"):
            assert httpx.get(r.url + path).status_code == 200


def test_bodies_are_limited_in_size_and_time(loaded: Loaded) -> None:
    with running(loaded, Rules(max_body_bytes=1000, body_seconds=0.5)) as r:
        url = r.url + "/v1/completions"
        assert refusal(httpx.post(url, content=b"x" * 1001)) == (413, "body_too_large")
        assert refusal(httpx.post(url, content=(b"x" * 100 for _ in range(11)))) == (413, "body_too_large")
        ok = {"model": DEMO, "prompt": "a", "max_tokens": 1}
        assert httpx.post(url, json=ok).status_code == 200
        host, port = r.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as s:
            s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
            assert b"408" in s.recv(100)


def test_odd_requests_are_errors_in_the_same_shape(served: Running) -> None:
    def post(content: bytes, kind: str = "application/json") -> tuple[int, str]:
        return refusal(httpx.post(served.url + "/v1/completions", content=content, headers={"Content-Type": kind}))

    assert post(b"") == (400, "missing_required_parameter")
    assert post(b"{") == (400, "invalid_json")
    assert post(b"[]") == (400, "invalid_value")
    assert post(b"[" * 100_000)[0] == 400
    assert post(b"\xff\xfe")[0] == 400
    assert post(json.dumps({"model": DEMO, "prompt": "a"}).encode(), "text/plain") == (400, "invalid_value")
    assert post(b'{"model": "' + DEMO.encode() + b'", "prompt": "a", "temperature": NaN}') == (400, "invalid_value")
    assert post(b'{"model": "' + DEMO.encode() + b'", "prompt": "\\ud800"}')[0] == 400
    assert post(b'{"model": "' + DEMO.encode() + b'", "prompt": ""}') == (400, "invalid_prompt")
    assert post(b'{"model": "other", "prompt": "a"}') == (404, "model_not_found")
    assert refusal(httpx.get(served.url + "/nothing")) == (404, "not_found")
    wrong = httpx.delete(served.url + "/v1/models")
    assert refusal(wrong) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "GET, HEAD"
    assert httpx.get(served.url + "/v1/completions").headers["allow"] == "POST"
    for path in ("/", "/health", "/v1/models"):
        head = httpx.head(served.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert int(head.headers["content-length"]) > 0


@pytest.mark.parametrize(
    "asked", [{"n": True}, {"best_of": True}, {"echo": 0}, {"n": 0}, {"best_of": 2}, {"echo": True}]
)
def test_a_number_is_no_boolean(served: Running, asked: dict[str, Any]) -> None:
    response = httpx.post(served.url + "/v1/completions", json={"model": DEMO, "prompt": "a", **asked})
    assert refusal(response) == (400, "invalid_value")
    assert response.json()["error"]["param"] == next(iter(asked))


def test_what_has_several_shapes_is_told_by_its_own_name(served: Running) -> None:
    def told(path: str, **asked: Any) -> tuple[str, str]:
        response = httpx.post(served.url + path, json={"model": DEMO, **asked})
        assert refusal(response) == (400, "invalid_value")
        return response.json()["error"]["param"], response.json()["error"]["message"]

    param, message = told("/v1/completions", prompt=["a", "b"])
    assert (param, "several prompts in one request are not supported" in message) == ("prompt", True)
    image = [{"type": "image_url", "image_url": {"url": "http://example.com"}}]
    param, message = told("/v1/chat/completions", messages=[{"role": "user", "content": image}])
    assert (param, "parts of type text" in message) == ("messages.0.content", True)
    assert told("/v1/completions", prompt="a", stop=[1])[0] == "stop"
    plain = httpx.post(
        served.url + "/v1/completions", content=b'{"model": "x"}', headers={"Content-Type": "text/plain"}
    )
    assert "Content-Type: application/json" in plain.json()["error"]["message"]


def test_a_client_that_leaves_ends_the_decoding(served: Running) -> None:
    url = served.url + "/v1/completions"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=ENDLESS, timeout=httpx.Timeout(10, read=0.4))
    with httpx.stream("POST", url, json={**ENDLESS, "stream": True}, timeout=30) as response:
        assert next(response.iter_raw())
        assert len(served.model.scheduler.jobs) >= 1
    wait_for(lambda: served.model.scheduler.jobs == [])


def test_a_client_that_leaves_while_its_prompt_is_read(served: Running) -> None:
    with httpx.stream(
        "POST", served.url + "/v1/completions", json={**ENDLESS, "prompt": [5] * 60_000, "stream": True}, timeout=30
    ) as response:
        for line in response.iter_lines():
            if line.startswith(": read"):
                break
    wait_for(lambda: served.model.scheduler.jobs == [])


def test_too_many_requests_get_429_and_when_to_come_back(loaded: Loaded) -> None:
    with running(loaded, limits=Limits(max_rows=1, max_waiting=1)) as r:
        url = r.url + "/v1/completions"

        def leave_soon() -> None:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=ENDLESS, timeout=httpx.Timeout(10, read=3))

        threads = [threading.Thread(target=leave_soon) for _ in range(2)]
        for n, t in enumerate(threads, 1):
            t.start()
            wait_for(lambda n=n: len(r.model.scheduler.jobs) == n)
        wait_for(lambda: r.model.scheduler.waiting == 1)
        response = httpx.post(url, json=ENDLESS)
        assert refusal(response) == (429, "rate_limit_exceeded")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        for t in threads:
            t.join()
        with OpenAI(base_url=r.url + "/v1", api_key="none", max_retries=8) as client:  # obeys Retry-After
            assert client.completions.create(model=DEMO, prompt="a", max_tokens=2).usage.completion_tokens == 2  # type: ignore[union-attr]


def test_shutdown_is_announced_and_ends_streams_with_an_error(loaded: Loaded) -> None:
    lines: list[str] = []
    with (
        running(loaded) as r,
        httpx.stream("POST", r.url + "/v1/completions", json={**ENDLESS, "stream": True}, timeout=30) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data") and not lines:
                r.server.should_exit = True
                wait_for(lambda: r.model.scheduler.draining)
                ready = httpx.get(r.url + "/ready")
                assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
                assert refusal(httpx.post(r.url + "/v1/completions", json=ENDLESS)) == (503, "shutting_down")
            if line:
                lines.append(line)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "cancelled"


def test_metrics_count(loaded: Loaded) -> None:
    with running(loaded) as r:
        before = time.monotonic()
        for _ in range(2):
            httpx.post(
                r.url + "/v1/completions",
                json={"model": DEMO, "prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True},
            )
        text = httpx.get(r.url + "/metrics").text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["kvfold_prompt_tokens_total"]) == 6
        assert float(values["kvfold_answer_tokens_total"]) == 8
        assert float(values['kvfold_requests_total{finish="length"}']) == 2
        assert float(values["kvfold_inter_token_seconds_count"]) == 6
        assert float(values["kvfold_first_token_seconds_count"]) == 2
        assert 0 < float(values["kvfold_request_seconds_sum"]) < time.monotonic() - before
