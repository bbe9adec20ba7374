"""The REST API: a route for every verb, and what is no verb because it streams."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, FastAPI, HTTPException, Query, Response
from pydantic import BaseModel

from modelgrove_hub.api import artefacts, events
from modelgrove_hub.api.access import bearer, hub_for
from modelgrove_hub.api.once import Once, once
from modelgrove_hub.api.problems import MEDIA_TYPE, Problem
from modelgrove_hub.hub import Hub
from modelgrove_hub.verbs.verb import Verb, all_verbs

PREFIX = "/api/v1"
_PROBLEMS: dict[int, str] = {
    400: "The body is no JSON.", 401: "No token, or not a good one.", 403: "The token does not allow it.",
    404: "There is no such thing.", 408: "The body came too slowly.",
    409: "It conflicts with what is there.", 413: "The body is too large.", 415: "The body is packed.",
    421: "The hub is not called so.", 422: "The request or the model's file does not fit.",
    429: "Too many requests, or too many tokens that are not good.", 500: "A mistake of the hub; its log tells more.",
    502: "A plugin failed.", 503: "Database, store or broker do not answer.",
}  # fmt: skip
_OF_BODIES = (400, 408, 409, 413, 415)
_SCHEMA = {"schema": {"$ref": "#/components/schemas/Problem"}}
_ACCEPTED = 202
_WORK: dict[int | str, dict[str, Any]] = {
    _ACCEPTED: {"headers": {"Location": {"description": "The job, to watch.", "schema": {"type": "string"}}}}
}
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"}


def make_router() -> APIRouter:
    """All routes below /api/v1."""
    router = APIRouter(prefix=PREFIX, dependencies=[Depends(bearer)])
    for part in (events, artefacts):
        router.include_router(part.router, responses=problems(with_body=False))
    # "/events/head" must be tried before "/models/{model:path}" would be, were it below it.
    for found in sorted(all_verbs(), key=lambda one: ("{" in one.path, one.path)):
        _mount(router, found)
    _refuse_others(router)
    return router


def describe(app: FastAPI) -> None:
    """Have the app's document say what a problem is: as a model, FastAPI would say that it comes as plain JSON."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        return document

    app.openapi = described  # type: ignore[method-assign]


def _refuse_others(router: APIRouter) -> None:
    """Answer 405 to methods that a path does not have; what is asked after us would say that there is no such path."""
    allowed: dict[str, set[str]] = {}
    for verb in all_verbs():
        allowed.setdefault(verb.path, set()).add(verb.method)
    for path, methods in sorted(allowed.items(), key=lambda one: ("{" in one[0], one[0])):
        others = sorted(_METHODS - methods)
        router.add_api_route(path, _refusal(", ".join(sorted(methods))), methods=others, include_in_schema=False)


def _refusal(allowed: str) -> Any:
    async def refuse() -> None:
        raise HTTPException(405, f"only {allowed} is answered here", {"Allow": allowed})

    return refuse


def _mount(router: APIRouter, found: Verb) -> None:
    router.add_api_route(
        found.path, _endpoint(found), methods=[found.method], status_code=found.status,
        responses={**problems(with_body=found.method != "GET"), **(_WORK if found.status == _ACCEPTED else {})},
        name=found.function.__name__, operation_id=found.function.__name__, summary=_title(found),
        tags=[found.function.__module__.rpartition(".")[2]],
    )  # fmt: skip


def problems(*, with_body: bool) -> dict[int | str, dict[str, Any]]:
    """The errors that every route may answer, for the document."""
    return {
        code: {"description": said, "content": {MEDIA_TYPE: _SCHEMA}}
        for code, said in _PROBLEMS.items() if with_body or code not in _OF_BODIES
    }  # fmt: skip


def _endpoint(found: Verb) -> Any:
    """The verb as FastAPI reads it: the hub is the caller's, arguments come from path, query and body."""
    signature = inspect.signature(found.function, eval_str=True)
    hub, *arguments = signature.parameters.values()
    accepts = found.status == _ACCEPTED

    def endpoint(**values: Any) -> Any:
        response, asked = values.pop("response", None), values.pop("once", None)
        given = found.function if asked is None else asked.guard(found.function)
        answer = given(values.pop("hub"), **values)
        job = answer.get("id") if isinstance(answer, dict) else getattr(answer, "id", None)
        if response is not None and job is not None:
            response.headers["Location"] = f"{PREFIX}/jobs/{job}"
        return answer

    seen = hub.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[Hub, Depends(hub_for(found.scope))])
    parameters = [seen, *(_told_apart(parameter, found.path) for parameter in arguments)]
    if accepts:
        parameters.append(seen.replace(name="response", annotation=Response))
        parameters.append(seen.replace(name="once", annotation=Annotated[Once | None, Depends(once)]))
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
