"""A run of a source: what it offers is compared with what it offered before, and what is new is taken in.

Every model is a transaction of its own, in which its `SourceItem` is written too, so a run that was killed goes on
where it was, and a run that finds nothing changed reads no file and writes no row.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from sqlmodel import Session, col, select, update

from modelgrove_hub.contracts import Context, Result
from modelgrove_hub.contracts import Source as SourcePlugin
from modelgrove_hub.errors import DataError, NotFoundError, StorageError, UsageError
from modelgrove_hub.formats.texts import one_line
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.discover import Found, discover
from modelgrove_hub.ingest.offers import Offer, SourceParams, unwanted
from modelgrove_hub.ingest.prepare import Prepared, attempt
from modelgrove_hub.ingest.register import Mode, register, store
from modelgrove_hub.registry.database import insert_into
from modelgrove_hub.registry.models import latest_revision
from modelgrove_hub.registry.trees import settle
from modelgrove_hub.tables import Blob, Model, RevisionFile, Source, SourceItem, now

_SHOWN = 100
"""Models of each outcome that a report names; the counts are of all."""
_PATIENCE = 5
"""Models in a row that cannot be fetched before the run gives up."""


@dataclass(frozen=True)
class _Known:
    stamp: str
    model_id: int | None
    reason: str
    gone: bool


@dataclass
class _Run:
    hub: Hub
    plugin: SourcePlugin
    context: Context
    params: SourceParams
    source: int
    known: dict[str, _Known]
    lost: dict[str, list[str]] = field(default_factory=dict)
    """Keys that are not offered any more, by their stamp."""
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    families: set[str] = field(default_factory=set)

    def tell(self, outcome: str, key: str, model: str = "", reason: str = "") -> None:
        self.counts[outcome] += 1
        if len(shown := self.named.setdefault(outcome, [])) < _SHOWN:
            shown.append({"key": one_line(key), "model": model, "reason": one_line(reason)})


def run_source(hub: Hub, plugin: SourcePlugin, context: Context, params: SourceParams) -> Result:
    """Take in what the source has. The result's report counts new, changed, moved, gone, back, refused and unchanged.

    Raises:
        NotFoundError: there is no such source.
        UsageError: the parameters are not those of the source.
        StorageError: the source does not answer; nothing is then taken to be gone.
    """
    with hub.reading() as session:
        source = session.exec(select(Source).where(Source.name == params.source)).first()
        if source is None or source.id is None:
            raise NotFoundError(f"no source {params.source!r}: `modelgrove source add` makes one")
        if source.url != params.url:
            raise UsageError(f"source {source.name} is at {source.url}, not at {params.url}")
        if params.local and not source.params.get("local"):
            raise UsageError(f"source {source.name} was added over the network: it may not look at private addresses")
        known = _known(session, source.id)
    run = _Run(hub, plugin, context, params, source.id, known)
    offered: dict[str, Offer] = {}
    for offer in plugin.offers(context, params):
        offered[offer.key] = offer
        if not len(offered) % 1000:
            context.progress(0, f"{len(offered)} found")
    for key, item in known.items():
        if key not in offered and not item.gone and item.model_id is not None:
            run.lost.setdefault(item.stamp, []).append(key)
    _take_all(run, offered)
    _bury(run, offered)
    report = {**{what: run.counts[what] for what in sorted(run.counts)}, "models": run.named, "dry_run": params.dry_run}
    if not params.dry_run:
        for family in run.families:  # the first of a tree have less to be compared with than the last
            with hub.transaction() as session:
                settle(session, hub.store, family)
        cursor = {"last_run": f"{now():%Y-%m-%d %H:%M:%S}", **run.counts}
        with hub.transaction() as session:
            session.exec(update(Source).where(col(Source.id) == source.id).values(cursor=cursor))
    return Result(report=report)


def _known(session: Session, source: int) -> dict[str, _Known]:
    columns: Any = (SourceItem.key, SourceItem.stamp, SourceItem.model_id, SourceItem.reason, SourceItem.gone_at)
    rows = session.exec(select(*columns).where(SourceItem.source_id == source))
    return {key: _Known(stamp, model, reason, gone is not None) for key, stamp, model, reason, gone in rows}


def _take_all(run: _Run, offered: Mapping[str, Offer]) -> None:
    fresh = []
    for offer in offered.values():
        known = run.known.get(offer.key)
        if known is not None and known.stamp == offer.stamp and not known.gone:
            run.counts["refused before" if known.reason else "unchanged"] += 1
        elif why := unwanted(offer, run.params):
            run.counts[f"left out by {why}"] += 1
        else:
            fresh.append(offer)
    limit, failures = run.params.max_models or len(fresh), 0
    if fresh[limit:]:
        run.counts["left for the next run"] = len(fresh) - limit
    for number, offer in enumerate(fresh[:limit]):
        run.context.progress(number / max(limit, 1), f"{number} of {limit}: {offer.name}")
        try:
            _take(run, offer)
            failures = 0
        except (DataError, UsageError, NotFoundError) as error:
            _refuse(run, offer, str(error))
        except (StorageError, OSError) as error:
            # Tried again by the next run; when nothing works any more, the job waits and is tried again.
            failures += 1
            run.tell("failed", offer.key, reason=str(error))
            run.context.log(one_line(f"failed {offer.key}: {error}"))
            if failures == _PATIENCE:
                raise


def _take(run: _Run, offer: Offer) -> None:
    known = run.known.get(offer.key)
    if offer.refused:
        _refuse(run, offer, offer.refused)
    elif known is not None and known.gone and known.stamp == offer.stamp:
        _note(run, offer, known.model_id, "back")
    elif known is None and run.lost.get(offer.stamp) and _moved(run, offer, run.lost[offer.stamp][0]):
        run.lost[offer.stamp].pop(0)
    elif run.params.dry_run:
        run.tell("new" if known is None else "changed", offer.key)
    else:
        _fetch(run, offer, "new" if known is None or known.model_id is None else "changed")


def _fetch(run: _Run, offer: Offer, outcome: str) -> None:
    mode: Mode = "reference"
    found, folder = offer.found, None
    if found is None:
        mark = sha256(f"{run.source}\0{offer.key}\0{offer.stamp}".encode()).hexdigest()[:32]
        folder = run.hub.settings.incoming / f"source-{mark}"
        folder.mkdir(parents=True, exist_ok=True)
        place = run.plugin.fetch(run.context, offer, run.params, folder)
        found, mode = _one(place, folder, offer), "hardlink"
    prepared = attempt(found)
    if isinstance(prepared, str):
        raise DataError(prepared)
    if run.params.families and prepared.recognition.family not in run.params.families:
        raise DataError(f"of the family {prepared.recognition.family}, which is left out by families")
    licence = prepared.card.licence or prepared.recognition.licence
    if run.params.licences and licence not in run.params.licences:
        raise DataError(f"licence {licence or 'unknown'}, which is left out by licences")
    stored = store(run.hub, prepared, mode)
    with run.hub.transaction() as session:
        name, before = _name(session, run, offer, prepared)
        model, _, _ = register(session, stored, name)
        _write(session, run, offer, model.id)
        if before is not None:
            _forget(session, run, before)
    run.families.add(model.family)
    run.tell("moved" if before is not None else outcome, offer.key, model.name)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def _one(place: Path, folder: Path, offer: Offer) -> Found:
    """The one model in what was fetched."""
    if not place.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{offer.key} was fetched to {place}, outside {folder}")
    models = list(discover(place))
    if len(models) != 1:
        raise DataError(f"{offer.key}: {len(models)} models, where one was expected")
    return Found(models[0].root, models[0].files, offer.name, models[0].top, models[0].refused, models[0].signature)


def _name(session: Session, run: _Run, offer: Offer, prepared: Prepared) -> tuple[str | None, str | None]:
    """The name of the model that this is another revision of, or a moved copy of; with the key it had, if it moved."""
    known = run.known.get(offer.key)
    if known is not None and known.model_id is not None:
        model = session.get(Model, known.model_id)
        return (model.name if model else None), None
    lost = {run.known[key].model_id: (key, stamp) for stamp, keys in run.lost.items() for key in keys}
    content = sorted(scan.sha256 for scan in prepared.scans.values())
    same = select(Model).join(SourceItem, col(SourceItem.model_id) == col(Model.id))
    for model in session.exec(same.where(SourceItem.source_id == run.source, col(Model.id).in_(lost))) if lost else ():
        rows = select(RevisionFile.sha256).where(RevisionFile.revision_id == latest_revision(session, model).id)
        if sorted(session.exec(rows)) == content:
            key, stamp = lost[model.id]
            run.lost[stamp].remove(key)
            return model.name, key
    return None, None


def _moved(run: _Run, offer: Offer, before: str) -> bool:
    """Whether the same files (inode, size, time) only lie elsewhere: then rows are changed and nothing is read."""
    model_id = run.known[before].model_id
    if offer.found is None:
        return False
    places = {(stat.st_size, stat.st_mtime_ns): path for path, stat in _stats(offer.found.files.values())}
    if len(places) != len(offer.found.files):
        return False  # two of them cannot be told apart: reading tells
    with run.hub.transaction() as session:
        model = session.get(Model, model_id)
        if model is None:
            return False
        rows = select(Blob).join(RevisionFile, col(RevisionFile.sha256) == col(Blob.sha256))
        blobs = list(session.exec(rows.where(RevisionFile.revision_id == latest_revision(session, model).id)))
        if any(blob.path and (blob.size, blob.mtime_ns) not in places for blob in blobs):
            return False
        run.tell("moved", offer.key, model.name)
        if not run.params.dry_run:
            for blob in blobs:
                if blob.path is not None and not Path(blob.path).exists():
                    blob.path = str(places[blob.size, blob.mtime_ns or 0].resolve())
            _forget(session, run, before)
            _write(session, run, offer, model_id)
    return True


def _stats(files: Iterable[Path]) -> Iterator[tuple[Path, Any]]:
    yield from ((path, path.stat()) for path in files)


def _bury(run: _Run, offered: Mapping[str, Offer]) -> None:
    """Note since when a model is not there; it stays, and comes back with its file."""
    gone = [key for keys in run.lost.values() for key in keys]
    moment = now()
    for key in gone:
        run.tell("gone", key)
    if run.params.dry_run:
        return
    with run.hub.transaction() as session:
        for key in gone:
            mine = (col(SourceItem.source_id) == run.source, col(SourceItem.key) == key)
            session.exec(update(SourceItem).where(*mine).values(gone_at=moment))
        for key, item in run.known.items():
            if item.model_id is None and key not in offered:
                _forget(session, run, key)


def _refuse(run: _Run, offer: Offer, reason: str) -> None:
    run.tell("refused", offer.key, reason=reason)
    run.context.log(one_line(f"refused {offer.key}: {reason}"))
    if not run.params.dry_run:
        known = run.known.get(offer.key)
        with run.hub.transaction() as session:
            _write(session, run, offer, known.model_id if known else None, reason)


def _note(run: _Run, offer: Offer, model_id: int | None, outcome: str) -> None:
    with run.hub.transaction() as session:
        model = session.get(Model, model_id) if model_id is not None else None
        run.tell(outcome, offer.key, model.name if model else "")
        if not run.params.dry_run:
            _write(session, run, offer, model_id)


def _write(session: Session, run: _Run, offer: Offer, model_id: int | None, reason: str = "") -> None:
    facts = {"stamp": offer.stamp, "model_id": model_id, "reason": reason, "gone_at": None}
    row = insert_into(session, SourceItem).values(source_id=run.source, key=offer.key, **facts)
    session.exec(row.on_conflict_do_update(index_elements=["source_id", "key"], set_=facts))


def _forget(session: Session, run: _Run, key: str) -> None:
    item = session.get(SourceItem, (run.source, key))
    if item is not None:
        session.delete(item)
        session.flush()
