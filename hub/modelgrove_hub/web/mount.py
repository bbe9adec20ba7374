"""Puts the pages into the application: routes, static files, and errors that people can read."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles

from modelgrove_hub.web import actions, browse, hubwide, jobs, models
from modelgrove_hub.web.render import here, page

Handler = Callable[[Request, Exception], Awaitable[Response]]
_TRY = {
    401: "Sign in with a token: whoever runs this hub makes one with `modelgrove token create NAME --scope read`.",
    403: "Sign in with a token that allows it.",
    404: "Search finds models by what they do.",
    409: "Look at the job or model that is named, then try again.",
    422: "Go back and change what is named here.",
    429: "Wait a moment, then try again.",
    500: "The server's log tells more: `modelgrove serve` prints it.",
    502: "The plugin's own distribution is at fault: see the plugins page.",
    503: "See `modelgrove doctor`.",
}


def mount_web(app: FastAPI) -> None:
    """Add the web page to an application whose handlers of problems are there."""
    app.mount("/static", _Static(directory=Path(str(files("modelgrove_hub.web") / "static"))), name="static")
    for part in (browse, actions, models, jobs, hubwide):
        app.include_router(part.router)
    for error, handler in list(app.exception_handlers.items()):
        app.exception_handlers[error] = _for_people(handler)


class _Static(StaticFiles):
    """Static files by addresses that change with their content, so they are kept for ever."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """A file, told to be kept."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "public, max-age=31536000, immutable"
        return response


def _for_people(handler: Any) -> Handler:
    """The handler's problem as a page, where a browser asks for one."""

    async def answer(request: Request, error: Exception) -> Response:
        response: Response = await handler(request, error)
        wants_page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")
        if not wants_page:
            return response
        problem = json.loads(bytes(response.body))
        status = response.status_code
        shown = page(
            request, "error.html", status, nav="", title=HTTPStatus(status).phrase, code=status,
            detail=problem["detail"], advice=_TRY.get(status, ""),
            back=here(request) if request.method == "GET" else "/",
        )  # fmt: skip
        for name in ("WWW-Authenticate", "Retry-After", "Allow"):
            if name in response.headers:
                shown.headers[name] = response.headers[name]
        return shown

    return answer
