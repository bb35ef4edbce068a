"""A server of the shipped model in a thread of the test process, reached over real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kvfold.loading import DEMO, Loaded
from kvfold.server.guard import Rules
from kvfold.server.launch import Address, Server
from kvfold.server.metrics import Metrics
from kvfold.server.service import Service
from kvfold.serving.model import Model


@dataclass(frozen=True)
class Running:
    url: str
    server: Server
    model: Model
    loaded: Loaded


@contextmanager
def running(loaded: Loaded, rules: Rules | None = None, **how: Any) -> Iterator[Running]:
    """how: arguments of Model."""
    metrics = Metrics()
    model = Model(loaded, meter=metrics, **how)
    server = Server(Service(model, DEMO, metrics), rules or Rules(), Address(port=0), grace_seconds=1)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not (server.started and server.servers):
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(f"http://127.0.0.1:{server.port}", server, model, loaded)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(condition: Any, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
