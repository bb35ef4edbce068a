"""/v1/models, /v1/chat/completions, /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvfold.server.replies import ChatReply, TextReply
from kvfold.server.schema import ChatBody, CompletionBody
from kvfold.server.service import Service, send, service_of

router = APIRouter(tags=["OpenAI"])

# One server-sent event; its data is a chunk of OpenAI's, or [DONE].
EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string"}, "event": {"const": "message"}},
}
# An answer comes whole or as events, by the body's `stream`.
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer",
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["id", "object", "created", "model", "choices", "usage"],
                    "properties": {"choices": {"type": "array", "minItems": 1, "maxItems": 1}},
                }
            },
            "text/event-stream": {"schema": EVENT},
        },
    }
}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model served here."""
    return {"object": "list", "data": [_card(service_of(request))]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """The model, if that is its name."""
    service = service_of(request)
    service.check_model(name)
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "kvfold",
        "max_model_len": service.model.max_context,
    }


@router.post("/v1/chat/completions", responses=ANSWER, response_class=Response)
async def chat(request: Request, body: ChatBody) -> Response:
    """Answer a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    messages = [m.plain() for m in body.messages]
    place = service.place(body, messages)
    prompt = await service.tokens(messages)
    stream = service.model.astream(prompt, body.as_generation(service.answer_tokens(len(prompt))), place)
    reply = ChatReply(service.name, service.text_of, body.include_usage)
    return await send(request, stream, reply, bool(body.stream))


@router.post("/v1/completions", responses=ANSWER, response_class=Response)
async def complete(request: Request, body: CompletionBody) -> Response:
    """Continue a text."""
    service = service_of(request)
    service.check_model(body.model)
    given = body.text_or_ids
    prompt = await service.tokens(given) if isinstance(given, str) else given
    stream = service.model.astream(prompt, body.as_generation(), service.place(body))
    reply = TextReply(service.name, service.text_of, body.include_usage)
    return await send(request, stream, reply, bool(body.stream))
