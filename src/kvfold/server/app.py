"""The application: endpoints behind the guard, errors in one shape, and an OpenAPI document that says so."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware

import kvfold
from kvfold.server import completions, errors, health, page, sessions
from kvfold.server.guard import Guard, Rules
from kvfold.server.service import Service

STATUSES = (400, 401, 403, 404, 405, 408, 409, 413, 429, 500, 503, 507)
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def create_app(service: Service, rules: Rules) -> FastAPI:
    """The ASGI application of one model."""
    app = FastAPI(title="kvfold", version=kvfold.__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    routers = [module.router for module in (completions, sessions, health, page)]
    app.state.routes = [route for router in routers for route in router.routes]
    for router in routers:
        app.include_router(router)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    if rules.origins:
        app.add_middleware(CORSMiddleware, allow_origins=rules.origins, allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(Guard, rules=rules)
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the errors that are really sent: OpenAI's shape, never 422."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = ERROR_SCHEMA
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        for path in made["paths"].values():
            for operation in path.values():
                responses = operation["responses"]
                responses.pop("422", None)
                for status in STATUSES:
                    responses.setdefault(str(status), {"description": "an error", "content": content})
        app.openapi_schema = made
    return app.openapi_schema
