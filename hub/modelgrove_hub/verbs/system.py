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


class FindingFacts(BaseModel):
    """Something that is not as the rows say."""

    level: str
    subject: str
    problem: str
    way_out: str
    fixed: bool


class Verdict(BaseModel):
    """Whether rows and files agree."""

    findings: list[FindingFacts]
    remaining: int
    """Findings that were not fixed."""
    half_written_files_removed: int
    events: int
    head: str


class Swept(BaseModel):
    """What a collection removed, or would remove."""

    class GarbageFacts(Facts):
        """A blob that nothing names."""

        sha256: str
        size: int
        stored: bool

    blobs: list[GarbageFacts]
    bytes: int
    folders: list[str]
    half_written_files: int
    removed: bool


@verb("POST", "/fsck", "admin")
def fsck(
    hub: Hub, *, full: bool = False, fix: bool = False,
    head: Annotated[str, Field(description="A head of the event log, noted earlier.", pattern="^[0-9a-f]{64}$")]
    = log.START,
) -> Verdict:  # fmt: skip
    """Whether database, event log, blob store and referenced files agree."""
    from modelgrove_hub.store.fsck import check

    with hub.reading() as session:
        events, newest = log.head(session)
    found = []
    for finding in check(hub, full=full, head=head):
        mended = fix and finding.fix is not None
        if mended and finding.fix is not None:
            finding.fix(hub)
        facts = {name: getattr(finding, name) for name in ("level", "subject", "problem", "way_out")}
        found.append(FindingFacts(**facts, fixed=mended))
    swept = hub.store.sweep(hub.settings.gc_grace_seconds) if fix else 0
    remaining = sum(not one.fixed for one in found)
    return Verdict(
        findings=found, remaining=remaining, half_written_files_removed=swept, events=events, head=newest
    )  # fmt: skip


@verb("POST", "/gc", "admin")
def gc(hub: Hub, *, dry_run: bool = False) -> Swept:
    """Remove stored files that no model, expert or job names, and what dead processes left half-written."""
    from modelgrove_hub.store.gc import collect

    found = collect(hub, dry_run=dry_run)
    return Swept(
        blobs=[Swept.GarbageFacts.model_validate(one) for one in found.garbage],
        bytes=sum(one.size for one in found.garbage if one.stored), folders=[str(one) for one in found.folders],
        half_written_files=found.drafts, removed=not dry_run,
    )  # fmt: skip


@verb("GET", "/doctor", "admin")
def doctor(hub: Hub) -> list[CheckFacts]:
    """Whether everything that a hub needs is in order, and what to do where not."""
    return [CheckFacts.model_validate(check) for check in examine(hub.settings)]
