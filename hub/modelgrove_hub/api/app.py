"""The web application: every way to talk to a hub over HTTP, on one port."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI

from modelgrove_hub.api import rest
from modelgrove_hub.api.hf import lfs, reading, writing, xet
from modelgrove_hub.api.problems import answer_problems
from modelgrove_hub.hub import Hub
from modelgrove_hub.web.mount import mount_web


def create_app(hub: Hub, *, open_to_all: bool) -> FastAPI:
    """The application for a hub; with `open_to_all` it demands no token."""
    app = FastAPI(
        title="modelgrove", version=version("modelgrove"), summary="A model hub that understands weights.",
        openapi_url=f"{rest.PREFIX}/openapi.json", docs_url=None, redoc_url=None,
    )  # fmt: skip
    app.state.hub, app.state.open = hub, open_to_all
    answer_problems(app)
    app.include_router(rest.make_router())
    for part in (reading, lfs, xet, writing):
        app.include_router(part.router)
    mount_web(app)
    return app
