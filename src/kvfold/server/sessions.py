"""/sessions: conversations by name; and llama-server's /slots over them.

Names are checked against a pattern here and again where folders are made of them: no path in a request means anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Path, Query, Request

from kvfold.server.errors import ApiError
from kvfold.server.schema import Body, SessionName
from kvfold.server.service import Service, service_of, slot_name
from kvfold.serving.shelf import Shelf

T = TypeVar("T")
router = APIRouter(tags=["sessions"])
Name = Annotated[SessionName, Path(description="A session's name.")]
Slot = Annotated[int, Path(ge=0, le=1 << 16)]


class ForkBody(Body):
    """POST /sessions/{name}/fork."""

    name: SessionName


class SlotBody(Body):
    """POST /slots/{id}. filename: a session's name; it is not one of a file."""

    filename: SessionName | None = None


async def _do(service: Service, work: Callable[[Shelf], T]) -> T:
    """Work on sessions between two steps of the model."""
    return await asyncio.wrap_future(service.model.scheduler.call(lambda: work(service.model.shelf)))


@router.get("/sessions")
async def sessions(request: Request) -> dict[str, Any]:
    """Sessions with a name, and the memory that all take."""
    model = service_of(request).model
    report = model.shelf.store.report()
    rows = model.shelf.rows()
    return {
        "object": "list",
        "data": rows,
        "unnamed": report["sessions"] - len(rows),
        "profile": model.runner.profile,
        "disk": model.shelf.store.disk is not None,
        "memory": {
            "bytes": report["memory_bytes"],
            "limit_bytes": report["memory_limit_bytes"],
            "reference_bytes": report["memory_reference_bytes"],
            "by_kind": report["memory_bytes_by_kind"],
        },
    }


@router.get("/sessions/{name}")
async def session(request: Request, name: Name) -> dict[str, Any]:
    """One session and the messages in it."""
    return await _do(service_of(request), lambda shelf: {**shelf.row(name), "messages": shelf.messages(name)})


@router.delete("/sessions/{name}")
async def remove(request: Request, name: Name) -> dict[str, Any]:
    """Forget a session, in memory and on the disk."""
    await _do(service_of(request), lambda shelf: shelf.remove(name))
    return {"name": name, "deleted": True}


@router.post("/sessions/{name}/save")
async def save(request: Request, name: Name) -> dict[str, Any]:
    """When this answers, the session is on the disk."""
    return await _do(service_of(request), lambda shelf: shelf.save(name))


@router.post("/sessions/{name}/restore")
async def restore(request: Request, name: Name) -> dict[str, Any]:
    """Go back to what was saved."""
    return await _do(service_of(request), lambda shelf: shelf.restore(name))


@router.post("/sessions/{name}/fork", status_code=201)
async def fork(request: Request, name: Name, body: ForkBody) -> dict[str, Any]:
    """A second session that goes on from the same point; pages are shared."""
    return await _do(service_of(request), lambda shelf: shelf.fork(name, body.name))


@router.get("/slots")
async def slots(request: Request) -> list[dict[str, Any]]:
    """llama-server's shape: slot n is the session slot-n; requests choose one with id_slot."""
    service = service_of(request)
    rows = {r["name"]: r for r in service.model.shelf.rows()}
    busy = {j.place.name for j in service.model.scheduler.jobs if j.place is not None}
    return [
        {
            "id": n,
            "n_ctx": service.model.max_context,
            "is_processing": slot_name(n) in busy,
            "n_tokens": rows.get(slot_name(n), {}).get("tokens", 0),
        }
        for n in range(service.slots)
    ]


@router.post("/slots/{slot}")
async def slot(
    request: Request,
    slot: Slot,
    action: Annotated[Literal["save", "restore", "erase"], Query()],
    body: SlotBody | None = None,
) -> dict[str, Any]:
    """Copy a slot to a saved session, copy one back, or empty it."""
    service = service_of(request)
    if slot >= service.slots:
        raise ApiError(404, "not_found", f"there are {service.slots} slots")
    own, began = slot_name(slot), time.monotonic()
    if action == "erase":
        return {"id_slot": slot, "n_erased": (await _do(service, lambda shelf: shelf.remove(own)))["tokens"]}
    if body is None or body.filename is None:
        raise ApiError(400, "missing_required_parameter", "filename is missing", "filename")
    name = body.filename
    if action == "save":
        row = await _do(service, lambda shelf: (shelf.copy(own, name), shelf.save(name))[1])
        counts, verb = ("n_saved", "n_written"), "save_ms"
    else:
        row = await _do(service, lambda shelf: shelf.copy(name, own))
        counts, verb = ("n_restored", "n_read"), "restore_ms"
    done = {"id_slot": slot, "filename": name, counts[0]: row["tokens"], counts[1]: row["bytes"]}
    return {**done, "timings": {verb: round(1000 * (time.monotonic() - began), 3)}}
