"""Errors over HTTP: one `application/problem+json` document (RFC 9457) for each, whoever raised it."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from modelgrove_hub.errors import ModelgroveError

LOG = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"


class Problem(BaseModel):
    """What went wrong with a request, and the way out."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[dict[str, Any]] | None = None
    """Which parts of the request do not fit."""


def problem(status: int, detail: str, errors: list[dict[str, Any]] | None = None, **headers: str) -> JSONResponse:
    """The answer to a request that went wrong."""
    body = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, errors=errors)
    return JSONResponse(body.model_dump(exclude_none=True), status, headers, media_type=MEDIA_TYPE)


def answer_problems(app: FastAPI) -> None:
    """Have the app answer every error as a problem; what nobody foresaw is logged and not told."""

    @app.exception_handler(ModelgroveError)
    async def ours(_request: Request, error: ModelgroveError) -> JSONResponse:
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            LOG.warning("%s: %s", type(error).__name__, error)
        return problem(error.status, str(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{"place": list(map(str, one["loc"])), "reason": one["msg"]} for one in error.errors()]
        said = "; ".join(f"{'.'.join(one['place'])}: {one['reason']}" for one in faults)
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, said, faults)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), **dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        LOG.exception("%s %s", request.method, request.url.path, exc_info=error)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an internal error; the server's log tells more")
