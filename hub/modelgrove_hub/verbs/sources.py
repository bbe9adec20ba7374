"""Verbs of sources: where models are taken in from, when, and what the last run found."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import uuid4

from pydantic import BaseModel, Field
from sqlmodel import Session, col, func, select

from modelgrove_hub.contracts import Kind
from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.runs import following, last_job, run_params, running, start_run
from modelgrove_hub.jobs.dispatch import publish
from modelgrove_hub.plugins import check_params, get_plugin
from modelgrove_hub.registry.events import record
from modelgrove_hub.tables import Job, Source, SourceItem, now
from modelgrove_hub.verbs.facts import Facts, JobFacts
from modelgrove_hub.verbs.verb import verb


class NewSource(BaseModel):
    """A source to add."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", description="What it is called here.")
    url: str = Field(max_length=4096, description="Its address, as the plugin reads it.")
    plugin: str = Field("", description='As plugins are listed: "source.folder"; found by the address if empty.')
    schedule: str = Field("", description='"15m", "6h", "1d", or cron with a time zone; only by hand if empty.')
    params: dict[str, Any] = Field(default_factory=dict, description="The plugin's options.")


class Run(BaseModel):
    """A run to start."""

    dry_run: bool = Field(False, description="Say what would happen; register nothing.")
    key: str | None = Field(None, max_length=100, description="Idempotency key: the same gives the same run.")


class SourceFacts(Facts):
    """A source, in a line of a list."""

    name: str
    plugin: str
    url: str
    params: dict[str, Any]
    schedule: str
    paused: bool
    next_run: datetime | None
    last: dict[str, Any]
    """When it last ran to its end, and how many models were new, changed, moved, gone, refused."""
    created_at: datetime


class Refusal(Facts):
    """What a source has and the hub does not want."""

    key: str
    reason: str


class Missing(Facts):
    """A model that the source does not have any more; the hub keeps it."""

    key: str
    gone_at: datetime


class SourceDetail(SourceFacts):
    """A source with what it brought."""

    models: int
    refused: list[Refusal]
    """The first hundred."""
    gone: list[Missing]
    """The last hundred."""
    job: JobFacts | None
    """Its newest run."""


_SHOWN = 100
_OWN = {"url", "source", "dry_run", "local"}
"""Parameters of a run that are not options."""


@verb("POST", "/sources", "admin", 201)
def add_source(hub: Hub, *, source: NewSource) -> SourceFacts:
    """Add a source; with a schedule, its first run is due at once.

    It may not look at private addresses; one that was added by `create_source` may.

    Raises:
        NotFoundError: no such plugin.
        UsageError: the options, the address or the schedule are not what the plugin or the clock can read.
        ConflictError: there is a source of this name.
    """
    return create_source(hub, source)


def create_source(hub: Hub, source: NewSource, *, local: bool = False) -> SourceFacts:
    """The same; `local` says that whoever adds it sits at the hub's own machine.

    Raises:
        NotFoundError, UsageError, ConflictError: as `add_source`.
    """
    plugin = get_plugin(source.plugin or _plugin_of(source.url), hub.settings)
    if plugin.kind != Kind.SOURCE:
        raise UsageError(f"{plugin.kind}.{plugin.name} is no source: `modelgrove plugin ls` lists them")
    if own := _OWN & source.params.keys():
        raise UsageError(f"{sorted(own)[0]} is not an option that a source keeps")
    due = now() if following(source.schedule) else None
    row = Source(
        name=source.name, plugin=f"{plugin.kind}.{plugin.name}", url=source.url, params=source.params,
        schedule=source.schedule, next_run=due,
    )  # fmt: skip
    kept = check_params(plugin, run_params(row)).model_dump(mode="json", exclude_unset=True)
    row.params = {name: value for name, value in kept.items() if name not in _OWN} | ({"local": True} if local else {})
    with hub.transaction() as session:
        if session.exec(select(Source.id).where(Source.name == source.name)).first() is not None:
            raise ConflictError(f"there is a source {source.name!r}: remove it first, or choose another name")
        session.add(row)
        record(session, "source added", source.name, url=source.url, plugin=row.plugin)
        session.flush()
        return _facts(row)


@verb("GET", "/sources")
def list_sources(hub: Hub) -> list[SourceFacts]:
    """All sources, by name."""
    with hub.reading() as session:
        return [_facts(row) for row in session.exec(select(Source).order_by(col(Source.name)))]


@verb("GET", "/sources/{name}")
def show_source(hub: Hub, *, name: str) -> SourceDetail:
    """One source: what it brought, refused and lost.

    Raises:
        NotFoundError: there is none of this name.
    """
    with hub.reading() as session:
        row = _get(session, name)
        mine = col(SourceItem.source_id) == row.id
        models = select(func.count()).where(mine, col(SourceItem.model_id).is_not(None))
        items = select(SourceItem).where(mine).limit(_SHOWN)
        refused = session.exec(items.where(SourceItem.reason != "").order_by(col(SourceItem.key)))
        gone = session.exec(items.where(col(SourceItem.gone_at).is_not(None)).order_by(col(SourceItem.gone_at).desc()))
        job = last_job(session, row)
        return SourceDetail(
            **_facts(row).model_dump(), models=session.exec(models).one(),
            refused=[Refusal.model_validate(item) for item in refused],
            gone=[Missing.model_validate(item) for item in gone], job=JobFacts.of(job) if job else None,
        )  # fmt: skip


@verb("POST", "/sources/{name}/run", "write", 202)
def run_source(hub: Hub, *, name: str, run: Run) -> JobFacts:
    """Run a source now; one that runs already is not started again.

    Raises:
        NotFoundError: there is none of this name, or its plugin is gone.
        UsageError: its options do not fit its plugin.
        ConflictError: the key belongs to a run of another kind.
    """
    job = create_run(hub, name, run)
    publish(hub, job)
    return JobFacts.of(job)


def create_run(hub: Hub, name: str, run: Run) -> Job:
    """The job of a run; no worker is told.

    Raises:
        NotFoundError, UsageError, ConflictError: as `run_source`.
    """
    with hub.reading() as session:
        row = _get(session, name)
        busy = running(session, row)
    if run.key is None and busy is not None and busy.params.get("dry_run") == run.dry_run:
        return busy
    return start_run(hub, row, run.key or uuid4().hex, dry_run=run.dry_run)


@verb("POST", "/sources/{name}/pause", "admin")
def pause_source(hub: Hub, *, name: str) -> SourceFacts:
    """Start it no more by its schedule.

    Raises:
        NotFoundError: there is none of this name.
    """
    return _set(hub, name, paused=True)


@verb("POST", "/sources/{name}/resume", "admin")
def resume_source(hub: Hub, *, name: str) -> SourceFacts:
    """Start it by its schedule again; what was missed is one run.

    Raises:
        NotFoundError: there is none of this name.
    """
    return _set(hub, name, paused=False)


@verb("DELETE", "/sources/{name}", "admin")
def remove_source(hub: Hub, *, name: str) -> SourceFacts:
    """Forget a source; the models that it brought stay.

    Raises:
        NotFoundError: there is none of this name.
        ConflictError: it runs.
    """
    with hub.transaction() as session:
        row = _get(session, name)
        if (busy := running(session, row)) is not None:
            raise ConflictError(f"source {name} runs: wait for job {busy.id}, or `modelgrove jobs cancel {busy.id}`")
        facts = _facts(row)
        session.delete(row)
        record(session, "source removed", name, url=row.url)
        return facts


def _set(hub: Hub, name: str, *, paused: bool) -> SourceFacts:
    with hub.transaction() as session:
        row = _get(session, name)
        if row.paused != paused:
            row.paused = paused
            record(session, "source paused" if paused else "source resumed", name)
        return _facts(row)


def _get(session: Session, name: str) -> Source:
    row = session.exec(select(Source).where(Source.name == name)).first()
    if row is None:
        raise NotFoundError(f"no source {name!r}: `modelgrove source ls` lists them")
    return row


def _facts(row: Source) -> SourceFacts:
    return SourceFacts.model_validate({**row.model_dump(), "last": row.cursor})


def _plugin_of(url: str) -> str:
    scheme, colon, _ = url.partition("://")
    if not colon or scheme == "file":
        return "source.folder"
    return "source.huggingface" if scheme in ("hf", "hf+http", "hf+https") else "source.fsspec"
