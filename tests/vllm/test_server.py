"""vLLM's own server over folded pages, asked by OpenAI's client."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engines import MODEL, environment, prompt, run, step, tokenizer
from openai import OpenAI

COMMAND = ["-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--dtype", "float32", "--enforce-eager"]
PROMPTS = [prompt(i, 700 + 100 * i) for i in range(4)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait(url: str, server: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while True:
        assert server.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < end, log.read_text()[-6000:]
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the shipped model, profile lossless."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    env = environment("lossless", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    options = ["--max-model-len", "4096", "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, *COMMAND, *options], stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        wait(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def test_complete_and_stream(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    assert [m.id for m in client.models.list()] == ["demo"]

    def complete(ids: list[int]) -> str:
        return client.completions.create(model="demo", prompt=ids, max_tokens=24, temperature=0).choices[0].text

    def stream(ids: list[int]) -> str:
        parts = client.completions.create(model="demo", prompt=ids, max_tokens=24, temperature=0, stream=True)
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(8) as pool:
        whole, streamed = pool.map(complete, PROMPTS), pool.map(stream, PROMPTS)
    stock = [tokenizer().decode(ids) for ids in run(None, [step(*PROMPTS)]).ids(0)]
    assert list(whole) == list(streamed) == stock


def test_metrics_know_the_prefix_cache(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    for _ in range(2):
        client.completions.create(model="demo", prompt=PROMPTS[0], max_tokens=1)
    text = urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
    hits = [float(x.rsplit(" ", 1)[1]) for x in text.splitlines() if x.startswith("vllm:prefix_cache_hits_total")]
    assert sum(hits) >= 640
