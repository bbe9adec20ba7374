"""Verbs of the hub as a whole: what happened, and whether all is in order."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import BaseModel, Field

from modelgrove_hub.doctor import examine
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry import events as log
from modelgrove_hub.registry.privacy import public_events
from modelgrove_hub.verbs.facts import Facts
from modelgrove_hub.verbs.verb import Page, verb


class EventFacts(Facts):
    """Something that happened; `hash` chains it to the one before."""

    id: int
    at: datetime
    action: str
    subject: str
    detail: dict[str, Any]
    previous: str
    hash: str


class Head(BaseModel):
    """The end of the event log: how many events, and the hash of the newest."""

    events: int
    head: str


class CheckFacts(Facts):
    """One thing that `doctor` looked at."""

    name: str
    ok: bool
    seen: str
    fix: str


@verb("GET", "/events")
def list_events(
    hub: Hub, *, limit: Annotated[int, Field(ge=1, le=10_000)] = 30,
    after: Annotated[str | None, Field(description="`next` of the page before.", pattern=r"^\d{1,18}$")] = None,
) -> Page[EventFacts]:  # fmt: skip
    """What happened, newest first."""
    with hub.reading() as session:
        found = log.list_events(session, limit + 1, before=int(after) if after else None)
        shown = found[:limit]
        items = public_events(session, shown) if hub.public_only else shown
    last = str(shown[-1].id) if len(found) > limit else None
    return Page[EventFacts](items=[EventFacts.model_validate(event) for event in items], next=last)


@verb("GET", "/events/head")
def event_head(hub: Hub) -> Head:
    """The end of the event log: noted elsewhere, it shows later that nobody changed the past."""
    with hub.reading() as session:
        number, newest = log.head(session)
    return Head(events=number, head=newest)


@verb("GET", "/doctor", "admin")
def doctor(hub: Hub) -> list[CheckFacts]:
    """Whether everything that a hub needs is in order, and what to do where not."""
    return [CheckFacts.model_validate(check) for check in examine(hub.settings)]
