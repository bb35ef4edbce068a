"""A running server: uvicorn around the application, with an end that finishes and saves."""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import dataclass
from types import FrameType

import uvicorn

from kvfold.server.app import create_app
from kvfold.server.guard import Rules
from kvfold.server.service import Service

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Address:
    """port 0: any free one."""

    host: str = "127.0.0.1"
    port: int = 8000


class Server(uvicorn.Server):
    """Before connections are closed, answers under way get `grace_seconds` to end, and the model is closed."""

    def __init__(self, service: Service, rules: Rules, address: Address, grace_seconds: float = 10.0) -> None:
        config = uvicorn.Config(
            create_app(service, rules),
            host=address.host,
            port=address.port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        super().__init__(config)
        self._service, self._grace_seconds = service, grace_seconds

    @property
    def port(self) -> int:
        """Where it listens, once it does."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        sys.stderr.write(f"kvfold serves {self._service.name} at http://{host}:{self.port}\n")
        sys.stderr.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal ends it in order and with exit code 0, a second one at once."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        closing = asyncio.ensure_future(asyncio.to_thread(self._service.model.close, self._grace_seconds))
        while not closing.done():
            await asyncio.wait((closing,), timeout=POLL_SECONDS)
            if self.force_exit:
                for job in self._service.model.scheduler.jobs:
                    self._service.model.scheduler.cancel(job)
        await super().shutdown(sockets)
        closing.result()  # raises StorageFailed if the disk did not take every session
