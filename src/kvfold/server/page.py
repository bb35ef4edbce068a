"""The web page, from memory, and the text its needle demo asks about."""

from __future__ import annotations

import asyncio
from importlib import resources
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from kvfold.errors import ContextTooLong
from kvfold.evaluation.needle import Document, documents
from kvfold.evaluation.text import templates
from kvfold.server.errors import ApiError
from kvfold.server.schema import Body
from kvfold.server.service import Service, service_of

router = APIRouter(tags=["page"])
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Everything from here, nothing inline, nothing from elsewhere, no frame around it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# Read once: no request reaches the file system.
FILES = {x.name: x.read_bytes() for x in resources.files("kvfold.server").joinpath("web").iterdir() if x.is_file()}


class NeedleBody(Body):
    """POST /needle."""

    context: Annotated[int, Field(ge=2048, le=1 << 17)] = 8192
    seed: Annotated[int, Field(ge=0, le=1 << 31)] = 0


def _file(name: str) -> Response:
    if name not in FILES:
        raise ApiError(404, "not_found", "the page has no such file")
    kind = TYPES[name.rsplit(".", 1)[-1]]
    return Response(FILES[name], media_type=kind, headers={"Content-Security-Policy": POLICY})


@router.get("/", include_in_schema=False)
async def index() -> Response:
    """The page."""
    return _file("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def file(name: str) -> Response:
    """What the page is made of."""
    return _file(name)


@router.post("/needle")
async def needle(request: Request, body: NeedleBody) -> dict[str, Any]:
    """A text of so many tokens with five facts in it, and how to ask for them."""
    service = service_of(request)
    if body.context > service.model.max_context:
        raise ContextTooLong(f"this model's context ends at {service.model.max_context} tokens", "Use a shorter one")
    return await asyncio.to_thread(_hidden, service, body)


def _hidden(service: Service, body: NeedleBody) -> dict[str, Any]:
    decode, kinds = service.model.tokenizer.decode, list(templates())
    kind = kinds[body.seed % len(kinds)]
    document: Document = next(documents(body.context, [kind], 1, body.seed, service.model.tokenizer))
    return {
        "document": document.ids,
        "needles": [
            {
                "depth": n.depth,
                "statement": decode(n.statement),
                "question": decode(n.question),
                "question_ids": n.question,
                "answer": decode(n.answer),
                "answer_tokens": len(n.answer),
            }
            for n in document.needles
        ],
    }
