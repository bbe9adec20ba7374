"""How a Hugging Face hub says no: status, `X-Error-Code` and `X-Error-Message`, of which clients make their errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from modelgrove_hub.errors import DataError, ModelgroveError, NotFoundError, UsageError
from modelgrove_hub.registry.names import check_name

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class RepoNotFoundError(NotFoundError):
    """There is no such repository, or the caller may not see it."""

    code = "RepoNotFound"


class RevisionNotFoundError(NotFoundError):
    """The repository has no such branch, tag or commit."""

    code = "RevisionNotFound"


class EntryNotFoundError(NotFoundError):
    """The revision, of the commit `commit`, has no such file."""

    code = "EntryNotFound"

    def __init__(self, message: str, commit: str = "") -> None:
        super().__init__(message)
        self.commit = commit


class HubRoute(APIRoute):
    """A route whose errors are said as a Hugging Face hub says them."""

    def get_route_handler(self) -> Handler:
        """The route's handler, behind the translation."""
        handler = super().get_route_handler()

        async def translated(request: Request) -> Response:
            try:
                return await handler(request)
            except ModelgroveError as error:
                # With the commit a client remembers that the file is not there.
                commit = getattr(error, "commit", "")
                headers = {"X-Repo-Commit": commit} if commit else {}
                return refusal(_status(error), str(error), getattr(error, "code", ""), **headers)
            except RequestValidationError as error:
                places = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
                return refusal(400, "; ".join(places))
            except HTTPException as error:
                return refusal(error.status_code, str(error.detail), **dict(error.headers or {}))

        return translated


def refusal(status: int, message: str, code: str = "", **headers: str) -> JSONResponse:
    """An answer that a client turns into its own error."""
    plain = re.sub(r"[^\x20-\x7e]+", " ", message)[:1000]
    found = {**headers, "X-Error-Message": plain, **({"X-Error-Code": code} if code else {})}
    return JSONResponse({"error": message}, status, found)


def checked_repo(owner: str, name: str) -> str:
    """The repository's name, if it can be one of a model.

    Raises:
        RepoNotFoundError: it cannot, so there is none.
    """
    try:
        return check_name(f"{owner}/{name}")
    except UsageError as error:
        raise RepoNotFoundError(str(error)) from error


def _status(error: ModelgroveError) -> int:
    # Clients take 422 for a programming error of theirs; 400 shows the message.
    return 400 if isinstance(error, UsageError | DataError) and error.status == 422 else error.status
