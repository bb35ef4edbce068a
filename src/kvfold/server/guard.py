"""What a request must pass before anything looks at it: host, origin, key, size, time."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvfold.server.errors import ApiError, response

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Open without a key: a supervisor has none, and the page asks for it.
OPEN_PATHS = ("/", "/health", "/ready")
OPEN_FOLDER = "/page/"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Rules:
    """hosts: names the server answers to, None for all. origins: other sites whose pages may call. key: of the API."""

    hosts: tuple[str, ...] | None = LOOPBACK
    origins: tuple[str, ...] = ()
    key: str | None = None
    max_body_bytes: int = 16 << 20
    body_seconds: float = 30.0


def host_of(value: str) -> str:
    """The name in a Host header or origin, without port and brackets."""
    try:
        return urlsplit(value if "//" in value else f"//{value}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """ASGI middleware. A page of another site can reach a server on loopback through its visitor's browser, under a name it
    chose: so names and origins are checked even where no key is asked for."""

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self.app, self.rules = app, rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if scope["method"] == "HEAD":  # as GET; the server leaves the body out
            scope = {**scope, "method": "GET"}
        try:
            self._admit(scope["method"], scope["path"], Headers(scope=scope))
            body = await self._body(scope, receive)
        except ApiError as error:
            await response(error)(scope, receive, send_with_headers)
            return
        await self.app(scope, _replay(body, receive), send_with_headers)

    def _admit(self, method: str, path: str, headers: Headers) -> None:
        rules = self.rules
        if rules.hosts is not None and host_of(headers.get("host", "")) not in rules.hosts:
            raise ApiError(
                403,
                "unknown_host",
                "this server does not answer to that host name; start it with --host or --allow-host",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in rules.origins and urlsplit(origin).netloc != headers.get("host"):
            raise ApiError(
                403, "unknown_origin", "pages of other sites may not call this server; allow them with --allow-origin"
            )
        if path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or method == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if rules.key is not None and not (
            scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), rules.key.encode())
        ):
            raise ApiError(401, "invalid_api_key", "the API key is missing or wrong; send Authorization: Bearer KEY")

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, read here so that nothing behind can be made to wait or to hold more than is allowed."""
        limit = self.rules.max_body_bytes
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.rules.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "disconnected", "the client left while it was sending")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise ApiError(413, "body_too_large", f"the body is larger than {limit} bytes")
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(408, "body_timeout", f"the body took longer than {self.rules.body_seconds:g} s") from error


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that brings the body once and then what the client does, which is to leave."""
    messages: Iterable[Message] = iter(({"type": "http.request", "body": body, "more_body": False},))

    async def replay() -> Message:
        for message in messages:
            return message
        return await receive()

    return replay
