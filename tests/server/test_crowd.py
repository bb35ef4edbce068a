"""More clients than memory holds: each gets what it would get alone, or is told to come back; nothing is over budget or lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.running import Running, running

from kvfold.loading import DEMO, Loaded
from kvfold.serving.scheduler import Limits
from kvfold.serving.shelf import Keep

Answer = dict[str, Any]  # OpenAI's logprobs of a completion
CLIENTS, TURNS, TOKENS = 16, 3, 12
TIE = 0.25  # nats; a step of a bfloat16 logit is .0625
MEMORY = 24 << 20  # of three or four of these requests at once


def prompt(client: int, turn: int) -> list[int]:
    """A turn begins with the one before it. No two clients begin alike."""
    return [
        3 + client,
        *(3 + (client * 7919 + 31 * i * (i + client)) % 4000 for i in range(200 * (turn + 1) + 9 * client)),
    ]


def ask(url: str, client: int, turn: int, refused: list[int]) -> Answer:
    """An answer's tokens, and the two likeliest at each place, after as many refusals as it takes."""
    body = {"model": DEMO, "prompt": prompt(client, turn), "max_tokens": TOKENS, "ignore_eos": True}
    body |= {"temperature": 0, "session": f"client-{client}", "logprobs": 2}
    while (got := httpx.post(url + "/v1/completions", json=body, timeout=300)).status_code != 200:
        error = got.json()["error"]
        assert (got.status_code, error["code"]) in ((429, "rate_limit_exceeded"), (503, "out_of_memory")), error
        assert int(got.headers["retry-after"]) >= 1
        refused.append(got.status_code)
        time.sleep(0.5)
    answer = got.json()
    assert answer["usage"]["completion_tokens"] == TOKENS
    assert answer["choices"][0]["finish_reason"] == "length"
    return answer["choices"][0]["logprobs"]


def gap(a: Answer, b: Answer) -> float | None:
    """By how much the likelier of two tokens led where two answers part; None where they do not. A batch of other size, or a
    prompt that is cut elsewhere, rounds otherwise."""
    for x, y, likely in zip(a["tokens"], b["tokens"], a["top_logprobs"], strict=True):
        if x != y:
            first, second = likely.values()
            return abs(first - second)
    return None


def lengths(r: Running) -> dict[str, int]:
    return {row["name"]: row["tokens"] for row in httpx.get(r.url + "/sessions", timeout=60).json()["data"]}


def together(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=w) for w in works]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


@pytest.mark.slow
def test_sixteen_clients_in_memory_for_four(loaded: Loaded, tmp_path: Path) -> None:
    turns = [(c, t) for c in range(CLIENTS) for t in range(TURNS)]
    with running(loaded, keep=Keep("1GiB")) as r:
        alone = {x: ask(r.url, *x, refused=[]) for x in turns}
    got: dict[tuple[int, int], Answer] = {}
    refused: list[int] = []
    seen: list[dict[str, int]] = []
    with running(loaded, keep=Keep(MEMORY, tmp_path), limits=Limits(max_waiting=6)) as r:

        def talk(client: int) -> Callable[[], None]:
            return lambda: got.update({(client, t): ask(r.url, client, t, refused) for t in range(TURNS)})

        def look() -> None:
            while len(got) < len(turns) and time.monotonic() < end:
                seen.append(httpx.get(r.url + "/health", timeout=60).json()["memory"])
                time.sleep(0.05)

        end = time.monotonic() + 400
        together([look, *map(talk, range(CLIENTS))])
        held = lengths(r)
    gaps = {x: g for x in turns if (g := gap(alone[x], got[x])) is not None}
    assert len(gaps) <= 4, gaps
    assert max(gaps.values(), default=0) < TIE, gaps
    assert 429 in refused
    # Promises are used up after the call that takes them: until then its pages count in both.
    assert all(m["used_bytes"] <= m["limit_bytes"] == MEMORY for m in seen)
    assert max(m["promised_bytes"] for m in seen) > 0
    assert max(m["waiting_bytes"] for m in seen) > MEMORY
    assert held == {f"client-{c}": len(prompt(c, TURNS - 1)) + TOKENS - 1 for c in range(CLIENTS)}
    with running(loaded, keep=Keep(MEMORY, tmp_path)) as r:
        assert lengths(r) == held
