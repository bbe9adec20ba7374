"""The web application: every way to talk to a hub over HTTP, on one port."""

from __future__ import annotations

import logging
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from anyio import to_thread
from fastapi import FastAPI
from sqlmodel import select

from modelgrove_hub.api import operations, rest
from modelgrove_hub.api.events import Board
from modelgrove_hub.api.headers import Headers
from modelgrove_hub.api.hf import lfs, reading, writing, xet
from modelgrove_hub.api.limits import Failures, Limits, Places, Requests
from modelgrove_hub.api.metrics import Metrics
from modelgrove_hub.api.origins import Origins
from modelgrove_hub.api.problems import answer_problems
from modelgrove_hub.api.watching import Watching
from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Model
from modelgrove_hub.web.mount import mount_web

LOG = logging.getLogger(__name__)
_UPLOADS_EACH = 16
_THREADS = 10
"""Fewer than the database has connections to give: a request waits for a thread, and never in vain for a connection."""
_SUMMARY = "A model hub that understands weights."
_BESIDE = 8 << 20
"""Bytes that a request may have beside the file that it carries."""


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    to_thread.current_default_thread_limiter().total_tokens = _THREADS
    threading.Thread(target=_warm_up, args=(app.state.hub,), name="warm-up", daemon=True).start()
    yield


def _warm_up(hub: Hub) -> None:
    """Load what searches need where there is something to find, so that the first one waits for nothing."""
    try:
        with hub.reading() as session:
            if session.exec(select(Model.id).limit(1)).first() is None:
                return
        from modelgrove_hub.search.query import search

        search(hub, "warm up", limit=1)
    except ModelgroveError as error:
        LOG.warning("search is not ready: %s", error)


def create_app(hub: Hub, *, open_to_all: bool) -> FastAPI:
    """The application for a hub; with `open_to_all` it demands no token."""
    app = FastAPI(
        title="modelgrove", version=version("modelgrove"), summary=_SUMMARY,
        openapi_url=f"{rest.PREFIX}/openapi.json", docs_url=None, redoc_url=None,
        lifespan=_lifespan,
    )  # fmt: skip
    config = hub.settings
    app.state.hub, app.state.open = hub, open_to_all
    app.state.failures, app.state.board, app.state.metrics = Failures(), Board(hub), Metrics(hub)
    app.state.readiness = operations.Readiness(hub, LOG.warning)
    answer_problems(app)
    app.include_router(operations.router)
    app.include_router(rest.make_router())
    rest.describe(app)
    for part in (reading, lfs, xet, writing):
        app.include_router(part.router)
    mount_web(app)
    # The last that is added is the outermost. On its own machine an open hub counts nobody's requests.
    rate = 0 if open_to_all else config.max_requests_per_second
    app.add_middleware(
        Limits, requests=Requests(rate), uploads=Places(_UPLOADS_EACH), largest=config.max_upload_bytes + _BESIDE
    )
    hosts = config.host_names if open_to_all or config.host_names else None
    app.add_middleware(Origins, hosts=hosts, is_open=open_to_all)
    app.add_middleware(Headers)
    app.add_middleware(Watching, count=app.state.metrics.count)
    return app
