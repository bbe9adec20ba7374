"""What is kept of every request: a line in the log, a count and a time for the metrics, and no secret."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelgrove_hub.api.limits import address_of

LOG = logging.getLogger("modelgrove.requests")
_ERRORS = logging.getLogger(__name__)
_SECRET = ("token",)
"""Path parameters that are as good as a password."""
_UNSEEN = ("/healthz", "/readyz", "/metrics")

Count = Callable[[str, str, int, float], None]


class Watching:
    """Middleware: the outermost, so that it sees every answer and what nobody foresaw.

    Args:
        app: what is behind.
        count: is told method, route, status and seconds of every request.
    """

    def __init__(self, app: ASGIApp, count: Count) -> None:
        self.app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 0

        async def seen(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, seen)
        except Exception as error:  # the last line of defence
            _ERRORS.exception("%s %s", scope["method"], _path(scope))
            if status:
                raise  # it broke off in the middle, and the client must see that
            answer = await scope["app"].exception_handlers[Exception](Request(scope), error)
            await answer(scope, receive, seen)
        finally:
            seconds = time.perf_counter() - begun
            self._count(scope["method"], route_of(scope), status, seconds)
            if LOG.isEnabledFor(logging.INFO) and scope["path"] not in _UNSEEN:
                LOG.info("", extra={"request": _facts(scope, status, seconds)})


class TextLines(logging.Formatter):
    """A line for people."""

    def format(self, record: logging.LogRecord) -> str:
        """When, who from where, what, and what came of it."""
        facts = record.__dict__["request"]
        text = "{address} {caller} {method} {path} {status} {ms:.0f} ms".format(**facts)
        return f"{self.formatTime(record)} {text}"


class JsonLines(logging.Formatter):
    """A JSON object a line, for programs."""

    def format(self, record: logging.LogRecord) -> str:
        """The same facts."""
        facts: dict[str, Any] = record.__dict__["request"]
        return json.dumps({"at": round(record.created, 3), **facts})


def route_of(scope: Scope) -> str:
    """The route's pattern: metrics by path would be as many as there are models."""
    if scope["path"].startswith("/static/"):
        return "/static"
    return str(getattr(scope.get("route"), "path", "")) or "none"


def _facts(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    caller = scope.get("state", {}).get("caller")
    return {
        "address": address_of(scope), "caller": caller.name if caller else "-", "method": scope["method"],
        "path": _path(scope), "status": status, "ms": round(seconds * 1000, 1),
    }  # fmt: skip


def _path(scope: Scope) -> str:
    # No query: clients put searches there, and some their tokens. Printable, so that no line can be forged.
    path = str(scope["path"])
    for name in _SECRET:
        if value := scope.get("path_params", {}).get(name):
            path = path.replace(str(value), "…")
    return path.encode("unicode_escape").decode() if not path.isprintable() else path
