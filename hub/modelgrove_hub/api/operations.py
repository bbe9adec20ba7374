"""What machines ask of a server: whether it lives, whether it can work, and its metrics."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.hub import Hub
from modelgrove_hub.jobs.dispatch import dispatcher
from modelgrove_hub.registry.schema import require_current

router = APIRouter(include_in_schema=False)
_FRESH = 2.0
_NO_BLOB = hashlib.sha256(b"modelgrove readiness").hexdigest()


@router.get("/healthz")
async def healthz() -> PlainTextResponse:
    """Whether the process lives."""
    return PlainTextResponse("ok")


@router.get("/readyz")
def readyz(request: Request) -> JSONResponse:
    """Whether database, store and broker answer; what is wrong with those that do not is in the log."""
    readiness: Readiness = request.app.state.readiness
    parts = readiness.parts()
    said = {name: "ok" if good else "failed" for name, good in parts.items()}
    return JSONResponse(said, 200 if all(parts.values()) else 503)


@router.get("/metrics")
def metrics(request: Request, _hub: Annotated[Hub, Depends(hub_for("read"))]) -> Response:
    """The metrics in Prometheus' text format."""
    return Response(request.app.state.metrics.document(), media_type=CONTENT_TYPE_PLAIN_0_0_4)


class Readiness:
    """Looks at what a hub stands on, at most every two seconds: anybody may ask."""

    def __init__(self, hub: Hub, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._checks: dict[str, Callable[[], object]] = {
            "database": lambda: require_current(hub.engine),
            "store": lambda: hub.store.find(_NO_BLOB),
            "broker": lambda: dispatcher(hub.settings).waiting("cpu"),
        }
        self._lock = threading.Lock()
        self._looked_at = -_FRESH
        self._seen: dict[str, bool] = {}

    def parts(self) -> dict[str, bool]:
        """Whether each of them answers."""
        with self._lock:
            if time.monotonic() - self._looked_at >= _FRESH:
                self._seen = {name: self._works(name, check) for name, check in self._checks.items()}
                self._looked_at = time.monotonic()
            return self._seen

    def _works(self, name: str, check: Callable[[], object]) -> bool:
        try:
            check()
        except ModelgroveError as error:
            self._warn(f"not ready, {name}: {error}")
            return False
        return True
