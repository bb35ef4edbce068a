"""/health, /ready, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from kvfold.server import readings
from kvfold.server.errors import ApiError
from kvfold.server.service import service_of

router = APIRouter(tags=["health"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """The process is alive; what runs, what waits, and the memory they have and need."""
    return {"status": "ok", **readings.health(service_of(request).model)}


@router.get("/ready")
async def ready(request: Request) -> dict[str, str]:
    """New requests are taken."""
    if service_of(request).model.scheduler.draining:
        raise ApiError(503, "shutting_down", "the server is being shut down", retry_seconds=1)
    return {"status": "ready"}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
