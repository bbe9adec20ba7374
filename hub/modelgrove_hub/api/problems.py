"""Errors over HTTP: one `application/problem+json` document (RFC 9457) for each, whoever raised it."""

from __future__ import annotations

import logging
import re
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
_PASSWORD = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s/@]+@")


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
    """Have the app answer every error as a problem; what nobody foresaw is not told (`api.watching` logs it)."""

    @app.exception_handler(ModelgroveError)
    async def ours(_request: Request, error: ModelgroveError) -> JSONResponse:
        said = without_passwords(str(error))
        if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            LOG.warning("%s: %s", type(error).__name__, said)
        return problem(error.status, said)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        faults = [{"place": list(map(str, one["loc"])), "reason": one["msg"]} for one in error.errors()]
        said = "; ".join(f"{'.'.join(one['place'])}: {one['reason']}" for one in faults)
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, said, faults)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> JSONResponse:
        return problem(error.status_code, str(error.detail), **dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def unforeseen(_request: Request, _error: Exception) -> JSONResponse:
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "an internal error; the server's log tells more")


def without_passwords(text: str) -> str:
    """A message whose URLs name no password: those of stores and brokers may hold one."""
    return _PASSWORD.sub(r"\1***@", text)
