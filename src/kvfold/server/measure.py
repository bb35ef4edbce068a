"""What a server bears, seen from its clients: many streams at once, batched against one, a document read once against anew.

The server runs in a process of its own, as `kvfold serve` starts it; clients are threads with plain sockets.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvfold.errors import EvaluationError
from kvfold.evaluation.text import haystack, stream
from kvfold.loading import load

CLIENT_SECONDS = 120.0  # without a byte: counted as an error
PROMPT_TOKENS, ANSWER_TOKENS = (32, 1024), (16, 128)
SPEED_TOKENS = 256
BATCH = 8
QUESTIONS, QUESTION_TOKENS, REPLY_TOKENS = 10, 32, 8


@dataclass
class Seen:
    """What clients saw. gaps: seconds between two pieces of an answer. firsts: from request to first piece."""

    requests: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """A server: its port, its process, the model's id."""

    port: int
    pid: int
    model: str

    def ask(self, prompt: list[int], tokens: int, seen: Seen, **more: Any) -> list[Any]:
        """One streamed completion; its tokens' log-probabilities, if `more` asks for them. more: other parameters. Raises
        OSError, HTTPException, EvaluationError."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        logprobs: list[Any] = []
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=CLIENT_SECONDS)
        latest = began = time.perf_counter()
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            for data in _events(connection.getresponse()):
                now = time.perf_counter()
                if data["choices"] and data["choices"][0].get("text"):
                    (seen.firsts if latest == began else seen.gaps).append(now - latest)
                    latest = now
                if data["choices"] and data["choices"][0].get("logprobs"):
                    told = data["choices"][0]["logprobs"]
                    logprobs += zip(told["tokens"], told["token_logprobs"], strict=True)
                if data.get("usage"):
                    seen.tokens += data["usage"]["completion_tokens"]
        finally:
            connection.close()
        seen.requests += 1
        return logprobs

    @property
    def cache_bytes(self) -> dict[str, int]:
        """What its caches take, what running requests were promised beyond that, and the limit, by /health."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=CLIENT_SECONDS)
        try:
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())["memory"]
        finally:
            connection.close()

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) * 1024


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    if response.status != 200:
        raise EvaluationError(f"the server answered {response.status}: {response.read(300)!r}", "See its log")
    for line in response:
        if line.startswith(b"data: {"):
            data = json.loads(line[len(b"data: ") :])
            if "error" in data:
                raise EvaluationError(f"the server broke an answer off: {data['error']['message']}", "See its log")
            yield data
        elif line == b"data: [DONE]\n":
            return
    raise EvaluationError("an answer ended without its last event", "See the server's log")


@contextmanager
def serving(source: str, profile: str, memory: str) -> Iterator[Target]:
    """A server of its own. Raises EvaluationError if it does not start, or does not end in order."""
    arguments = ["--profile", profile, "--memory", memory, "--no-disk", "--port", "0", "--model-name", "model"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kvfold", "serve", source, *arguments], stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr or ():
            if found := re.search(r" at http://[^:]+:(\d+)", line):
                break
        else:
            raise EvaluationError("the server did not start", f"Try kvfold serve {source}")
        yield Target(int(found[1]), process.pid, "model")
        process.terminate()
        if code := process.wait(60):
            raise EvaluationError(f"the server ended with exit code {code}", "See its log")
    finally:
        process.kill()
        process.wait()


def together(works: list[Callable[[], object]]) -> float:
    """Seconds until all are done, each in a thread of its own."""
    threads = [threading.Thread(target=w) for w in works]
    began = time.perf_counter()
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return time.perf_counter() - began


def speed(target: Target, clients: int, text: list[int]) -> float:
    """Tokens per second over all clients, short prompts included."""
    seen = [Seen() for _ in range(clients)]

    def work(i: int) -> Callable[[], object]:
        return lambda: target.ask(text[100 * i : 100 * i + 64], SPEED_TOKENS, seen[i])

    seconds = together([work(i) for i in range(clients)])
    return sum(s.tokens for s in seen) / seconds


def reuse(target: Target, document: list[int], text: list[int], fresh: int) -> dict[str, float]:
    """Seconds for questions over one document, and for the first `fresh` of them with all of it read again for each; as a ratio,
    per question. equal_answers: how many of those have the same tokens and log-probabilities to the last digit."""
    seconds, answers = [], []
    for cached, questions in ((True, QUESTIONS), (False, fresh)):
        began = time.perf_counter()
        for i in range(questions):
            # The first token sets it apart from texts that were read before.
            prompt = [3, *document[1:], *text[50 * i : 50 * i + QUESTION_TOKENS]]
            answers.append(target.ask(prompt, REPLY_TOKENS, Seen(), cache_prompt=cached, logprobs=1))
        seconds.append(time.perf_counter() - began)
    equal = sum(len(a) == REPLY_TOKENS and a == b for a, b in zip(answers, answers[QUESTIONS:], strict=False))
    return {
        "reuse_seconds": seconds[0],
        "fresh_questions": fresh,
        "fresh_seconds": seconds[1],
        "fresh_over_reuse": seconds[1] / fresh * QUESTIONS / seconds[0],
        "equal_answers": equal,
    }


def crowd(target: Target, clients: int, seconds: float, text: list[int]) -> dict[str, Any]:
    """So many clients, each with one request after the other: new prompts and such that go on from an earlier one."""
    seen, end = [Seen() for _ in range(clients)], time.monotonic() + seconds
    memory: list[int] = []
    caches: list[dict[str, int]] = []

    def client(i: int) -> Callable[[], None]:
        def work() -> None:
            draw, prompt = random.Random(i), [3]
            while time.monotonic() < end:
                at, n = draw.randrange(len(text) - PROMPT_TOKENS[1]), draw.randint(*PROMPT_TOKENS)
                goes_on = draw.random() < 0.5 and len(prompt) < 4 * PROMPT_TOKENS[1]
                prompt = (prompt if goes_on else []) + text[at : at + n]
                try:
                    target.ask(prompt, draw.randint(*ANSWER_TOKENS), seen[i])
                except (OSError, http.client.HTTPException, EvaluationError) as error:
                    seen[i].errors.append(str(error))

        return work

    def watch() -> None:
        while time.monotonic() < end:
            memory.append(target.resident_bytes)
            caches.append(target.cache_bytes)
            time.sleep(0.5)

    wall = together([watch, *map(client, range(clients))])
    gaps, firsts = sorted(x for s in seen for x in s.gaps), sorted(x for s in seen for x in s.firsts)
    third = len(memory) // 3
    settled, late = max(memory[: 2 * third]), max(memory[2 * third :])
    return {
        "clients": clients,
        "seconds": wall,
        "requests": sum(s.requests for s in seen),
        "errors": sum(len(s.errors) for s in seen),
        "first_error": next((e for s in seen for e in s.errors), ""),
        "tokens_per_s": sum(s.tokens for s in seen) / wall,
        "inter_token_p50_ms": 1000 * gaps[len(gaps) // 2],
        "inter_token_p99_ms": 1000 * gaps[len(gaps) * 99 // 100],
        "p99_over_p50": gaps[len(gaps) * 99 // 100] / gaps[len(gaps) // 2],
        "first_token_p50_ms": 1000 * firsts[len(firsts) // 2],
        "first_token_p99_ms": 1000 * firsts[len(firsts) * 99 // 100],
        "resident_bytes_first_two_thirds": settled,
        "resident_bytes_last_third": late,
        "resident_growth": late / settled - 1,
        "cache_limit_bytes": caches[0]["limit_bytes"],
        "most_cache_bytes": max(x["used_bytes"] for x in caches),
        "most_promised_bytes": max(x["used_bytes"] + x["promised_bytes"] for x in caches),
    }


def run(
    source: str, profile: str, minutes: float, clients: int, document: int, memory: str, fresh: int = QUESTIONS
) -> dict[str, Any]:
    """The `load-test` command's figures. memory: of the server's caches; flat memory needs one that fills early."""
    text = stream(haystack(), load(source).tokenizer)
    with serving(source, profile, memory) as target:
        target.ask(text[:300], 8, Seen())  # the first calls of a model are slow
        one, batched = speed(target, 1, text), speed(target, BATCH, text)
        reused = reuse(target, text[:document], text[-2000:], fresh)
        seen = crowd(target, clients, 60 * minutes, text)
    return {
        "profile": profile,
        "memory": memory,
        "one_tokens_per_s": one,
        "batched": BATCH,
        "batched_tokens_per_s": batched,
        "batched_over_one": batched / one,
        "document_tokens": document,
        "questions": QUESTIONS,
        **reused,
        **seen,
    }
