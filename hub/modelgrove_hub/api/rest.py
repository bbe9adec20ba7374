"""The REST API: a route for every verb, and what is no verb because it streams."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query
from pydantic import BaseModel

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.api.problems import MEDIA_TYPE, Problem
from modelgrove_hub.hub import Hub
from modelgrove_hub.verbs.verb import Verb, all_verbs

PREFIX = "/api/v1"
_PROBLEM = {"model": Problem, "content": {MEDIA_TYPE: {}}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {**_PROBLEM, "description": said}
    for code, said in {
        401: "No token, or not a good one.", 403: "The token does not allow it.", 404: "There is no such thing.",
        409: "It conflicts with what is there.", 422: "The request or the model's file does not fit.",
        429: "Too many requests.", 502: "A plugin failed.", 503: "Database, store or broker do not answer.",
    }.items()
}  # fmt: skip


def make_router() -> APIRouter:
    """All routes below /api/v1."""
    router = APIRouter(prefix=PREFIX)
    # "/events/head" must be tried before "/models/{model:path}" would be, were it below it.
    for found in sorted(all_verbs(), key=lambda one: ("{" in one.path, one.path)):
        _mount(router, found)
    return router


def _mount(router: APIRouter, found: Verb) -> None:
    router.add_api_route(
        found.path, _endpoint(found), methods=[found.method], status_code=found.status, responses=_PROBLEMS,
        name=found.function.__name__, operation_id=found.function.__name__, summary=_title(found),
        tags=[found.function.__module__.rpartition(".")[2]],
    )  # fmt: skip


def _endpoint(found: Verb) -> Any:
    """The verb as FastAPI reads it: the hub is the caller's, arguments come from path, query and body."""
    signature = inspect.signature(found.function, eval_str=True)
    hub, *arguments = signature.parameters.values()

    def endpoint(**values: Any) -> Any:
        return found.function(values.pop("hub"), **values)

    seen = hub.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[Hub, Depends(hub_for(found.scope))])
    parameters = [seen, *(_told_apart(parameter, found.path) for parameter in arguments)]
    endpoint.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    endpoint.__doc__ = inspect.getdoc(found.function)
    return endpoint


def _told_apart(parameter: inspect.Parameter, path: str) -> inspect.Parameter:
    if f"{{{parameter.name}}}" in path or f"{{{parameter.name}:" in path:
        return parameter
    is_body = inspect.isclass(parameter.annotation) and issubclass(parameter.annotation, BaseModel)
    return parameter.replace(annotation=Annotated[parameter.annotation, Body() if is_body else Query()])


def _title(found: Verb) -> str:
    return found.function.__name__.replace("_", " ").capitalize()
