"""Pages of the hub as a whole: sources, plugins, its state, and who one is."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from sqlmodel import col, func, select

from modelgrove_hub.api.access import COOKIE, hub_for, identify, keep_token
from modelgrove_hub.hub import Hub
from modelgrove_hub.tables import Expert, Job, JobState, Source
from modelgrove_hub.verbs.facets import facets
from modelgrove_hub.verbs.plugins import list_plugins, show_plugin
from modelgrove_hub.verbs.system import doctor, event_head, list_events
from modelgrove_hub.web.actions import KINDS, Posted
from modelgrove_hub.web.forms import fields_of
from modelgrove_hub.web.render import THEME, THEMES, page

router = APIRouter(include_in_schema=False)
Reading = Annotated[Hub, Depends(hub_for("read"))]
Ruling = Annotated[Hub, Depends(hub_for("admin"))]
_YEAR = 365 * 86_400
_EVENTS = 30


@router.get("/sources")
def sources(request: Request, hub: Reading) -> HTMLResponse:
    """Where models are taken in from."""
    with hub.reading() as session:
        rows = list(session.exec(select(Source).order_by(col(Source.name))))
    return page(request, "sources.html", nav="sources", sources=rows, home=hub.settings.home)


@router.get("/plugins")
def plugins(request: Request, hub: Reading) -> HTMLResponse:
    """What is installed, and whether it works."""
    return page(request, "plugins.html", nav="plugins", plugins=list_plugins(hub))


@router.get("/plugins/{plugin}")
def plugin(request: Request, hub: Reading, plugin: str) -> HTMLResponse:
    """What one plugin does, and its parameters."""
    found = show_plugin(hub, plugin=plugin)
    fields = fields_of(found.params)
    return page(request, "plugin.html", nav="plugins", plugin=found, fields=fields, usable=found.kind in KINDS)


@router.get("/system")
def system(request: Request, hub: Ruling, after: str = "") -> HTMLResponse:
    """Whether all is in order, what waits, and what happened."""
    number = func.count(col(Job.id))
    with hub.reading() as session:
        depths = dict(
            session.exec(select(Job.queue, number).where(Job.state == JobState.QUEUED).group_by(Job.queue)).all()
        )
        states = dict(session.exec(select(Job.state, number).group_by(Job.state)).all())
        experts = session.exec(select(func.count(col(Expert.id)))).one()
    start = after if after.isdigit() and len(after) < 19 else None
    return page(
        request, "system.html", nav="system", checks=doctor(hub), models=facets(hub).models, depths=depths,
        states=states, experts=experts, events=list_events(hub, limit=_EVENTS, after=start), head=event_head(hub),
        database=hub.settings.database.partition(":")[0],
    )  # fmt: skip


@router.get("/signin")
def sign_in_form(request: Request, next: str = "/") -> HTMLResponse:  # noqa: A002  (the name in the address)
    """Where a token is given."""
    return page(request, "signin.html", nav="signin", next=_local(next), problem="")


@router.post("/signin")
def sign_in(request: Request, posted: Posted) -> Response:
    """Keep a good token in a cookie that scripts cannot read and other sites cannot use."""
    token, following = posted.one("token"), _local(posted.one("next"))
    try:
        identify(request, token)
    except HTTPException as error:
        shown = {"nav": "signin", "next": following, "problem": str(error.detail)}
        return page(request, "signin.html", error.status_code, **shown)
    answer = RedirectResponse(following, 303)
    keep_token(answer, request, token)
    return answer


@router.post("/signout")
def sign_out() -> Response:
    """Forget the token."""
    answer = RedirectResponse("/", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


@router.post("/theme")
def theme(posted: Posted) -> Response:
    """Dark, light, or as the system has it."""
    answer = RedirectResponse(_local(posted.one("next")), 303)
    chosen = posted.one("theme")
    if chosen in THEMES:
        answer.set_cookie(THEME, chosen, max_age=_YEAR, samesite="lax")
    return answer


def _local(address: str) -> str:
    """A path of this hub; the home page for any other address."""
    parts = urlsplit(address)
    odd = parts.scheme or parts.netloc or not address.startswith("/") or address.startswith("//") or "\\" in address
    return "/" if odd or any(ord(letter) < 32 for letter in address) else address
