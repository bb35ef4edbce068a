"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}} and a status."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from kvfold import errors

log = logging.getLogger(__name__)

# Error class -> (status, code). The first match in order of the classes' own bases wins.
STATUS: dict[type[errors.KvfoldError], tuple[int, str]] = {
    errors.ContextTooLong: (400, "context_length_exceeded"),
    errors.ChatTemplateMissing: (400, "chat_template_missing"),
    errors.BadPrompt: (400, "invalid_prompt"),
    errors.InvalidConfig: (400, "invalid_value"),
    errors.Overloaded: (429, "rate_limit_exceeded"),
    errors.Draining: (503, "shutting_down"),
    errors.RequestCancelled: (503, "cancelled"),
    errors.EvaluationError: (400, "invalid_value"),
    errors.OutOfMemory: (503, "out_of_memory"),
    errors.OverBudget: (503, "out_of_memory"),
    errors.SessionNotFound: (404, "session_not_found"),
    errors.SessionExists: (409, "session_exists"),
    errors.WrongModel: (409, "wrong_model"),
    errors.WrongVersion: (409, "wrong_version"),
    errors.DamagedSession: (409, "damaged_session"),
    errors.StorageFailed: (507, "storage_failed"),
    errors.ModelFailure: (500, "internal_error"),
}
# Parameters of several shapes, and how pydantic calls the first of them.
CHOICES = {
    "prompt": "one text or one list of token ids; several prompts in one request are not supported",
    "content": "a text, or a list of parts of type text",
    "stop": "a text, or a list of texts",
}
# Parameters of which one value is implemented, and what to do instead of another.
ONE_VALUE = {
    "n": "one answer per request; send several requests, which share what was read",
    "best_of": "one answer per request; send several requests, which share what was read",
    "tools": "tool calls are not supported; leave it out and describe them in the messages",
    "tool_choice": "tool calls are not supported; leave it out",
    "response_format": "answers are plain text; ask for a format in the messages",
    "modalities": "answers are plain text",
    "echo": "answers are without the prompt",
    "suffix": "texts are continued, not filled in",
}
BRANCHES = ("str", "constrained-str")
MAX_NAME = 100  # characters of an unknown parameter that are sent back
CODE_OF_STATUS = {401: "invalid_api_key", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}
# Parameters of OpenAI's API that are known and not implemented; anything else unknown is a typo.
KNOWN = frozenset(
    (
        *("audio", "functions", "function_call", "prediction", "reasoning_effort", "verbosity", "moderation"),
        *("web_search_options", "prompt_cache_retention", "prompt_cache_options", "grammar", "json_schema"),
        *("guided_json", "typical_p", "top_a", "mirostat", "mirostat_eta", "mirostat_tau"),
    )
)


class ApiError(Exception):
    """An error made here, with its status."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_seconds = (
            status,
            code,
            message,
            param,
            retry_seconds,
        )


def body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON object of an error."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def as_api_error(error: errors.KvfoldError) -> ApiError:
    """What an error of kvfold's is over HTTP; 500 for those a request cannot cause."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            status, code = STATUS[kind]
            break
    else:
        status, code = 500, "internal_error"
    retry = error.retry_seconds if isinstance(error, errors.Overloaded) else 1 if status == 503 else None
    return ApiError(status, code, str(error), None, retry)


def response(error: ApiError) -> JSONResponse:
    headers = {} if error.retry_seconds is None else {"Retry-After": str(error.retry_seconds)}
    return JSONResponse(body(error.status, error.code, error.message, error.param), error.status, headers)


def _invalid(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body, by the name of its parameter."""
    first = error.errors()[0]
    # Without the marks of pydantic's unions.
    where = [str(x) for x in first["loc"][1:] if str(x).isidentifier() or str(x).isdigit()]
    for at, field in enumerate(where[:-1]):
        if where[at + 1] in BRANCHES and field in CHOICES:  # none of the shapes it can have
            whole = ".".join(where[: at + 1])
            return ApiError(400, "invalid_value", f"{whole}: use {CHOICES[field]}", whole)
    name = ".".join(where) or None
    if where and (instead := ONE_VALUE.get(where[0])):
        return ApiError(400, "invalid_value", f"{name}: {instead}", name)
    if first["type"] == "model_attributes_type" and name is None:
        return ApiError(400, "invalid_value", "the body is not a JSON object sent with Content-Type: application/json")
    if first["type"] == "json_invalid":
        return ApiError(400, "invalid_json", f"the body is not JSON ({first['ctx']['error']})")
    if first["type"] == "extra_forbidden":
        extra = str(first["loc"][-1])[:MAX_NAME].encode("ascii", "backslashreplace").decode()
        if extra in KNOWN:
            return ApiError(400, "unsupported_parameter", f"{extra} is not supported", extra)
        return ApiError(400, "unknown_parameter", f"there is no parameter {extra}", extra)
    if first["type"] == "missing":
        return ApiError(400, "missing_required_parameter", f"{name or 'the body'} is missing", name)
    return ApiError(400, "invalid_value", f"{name or 'body'}: {first['msg'].removeprefix('Value error, ')}", name)


def _methods(request: Request) -> list[str]:
    """Methods that some route has for this path; Starlette tells those of the first such route."""
    routes: list[Route] = request.app.state.routes
    found = {m for r in routes if r.matches(request.scope)[0] is not Match.NONE for m in r.methods or ()}
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


def install(app: FastAPI) -> None:
    """Every error leaves in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> JSONResponse:
        return response(error)

    @app.exception_handler(errors.KvfoldError)
    async def kvfold(request: Request, error: errors.KvfoldError) -> JSONResponse:
        made: ApiError = request.app.state.service.as_api_error(error)
        if made.status in (500, 507):
            log.error("%s %s: %s", request.method, request.url.path, error)
        return response(made)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return response(_invalid(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = CODE_OF_STATUS.get(error.status_code, "invalid_request")
        out = response(ApiError(error.status_code, code, str(error.detail)))
        out.headers.update(error.headers or {})
        if error.status_code == 405:
            out.headers["Allow"] = ", ".join(_methods(request))
        return out

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        # Starlette logs it; its text may name what is none of a client's business.
        return response(ApiError(500, "internal_error", "the server failed; its log says why"))
