"""Ingest folders: every model is registered or refused with a reason, and a re-run continues."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sqlmodel import Session, col, select

from modelgrove_hub.errors import DataError, NotFoundError, UsageError
from modelgrove_hub.formats.texts import one_line
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES, Found, data_of, discover
from modelgrove_hub.ingest.prepare import Prepared, attempt
from modelgrove_hub.ingest.register import Mode, register, store
from modelgrove_hub.registry.trees import settle
from modelgrove_hub.tables import Blob, Model, Revision, RevisionFile, Trust

_AHEAD = 32
"""Models prepared ahead of registration: bounds memory, keeps the workers busy."""


@dataclass(frozen=True)
class Ingested:
    """What became of one model on disk: "new", "known" or "refused" (then `reason` says why).

    "converted" is a second model, made of its pickles; "unconverted" says why there is none.
    """

    path: str
    outcome: str
    name: str = ""
    kind: str = ""
    family: str = ""
    adapter_type: str | None = None
    trust: str = ""
    not_finite: int = 0
    """Tensors with NaN or infinite values."""
    reason: str = ""


def ingest(
    hub: Hub, paths: Iterable[Path], mode: Mode, workers: int = 1, *, convert_pickles: bool = False
) -> Iterator[Ingested]:
    """Register every model under `paths`, one result for each, in order.

    Files that are registered and unchanged (path, size, time) are not read again. With
    `workers` > 1 hashing and recognition run in that many processes. With `convert_pickles` each
    quarantined model of pickles has a second result, for what was made of it (`ingest.conversion`).
    """
    fresh: list[Found] = []
    for path in paths:
        for found in discover(path):
            known = _known(hub, found)
            if known is None:
                fresh.append(found)
            else:
                yield _result(found, "known", known)
                yield from _conversion(hub, found, known, convert_pickles)
    families: set[str] = set()
    for found, outcome in _prepared(fresh, workers):
        if isinstance(outcome, str):
            yield _refused(found, outcome)
            continue
        try:
            stored = store(hub, outcome, mode)
        except (DataError, UsageError) as error:  # the file is gone or another one by now
            yield _refused(found, str(error))
            continue
        with hub.transaction() as session:
            model, _, created = register(session, stored)
        families.add(model.family)
        yield _result(found, "new" if created else "known", model, len(outcome.not_finite))
        yield from _conversion(hub, found, model, convert_pickles)
    for family in families:  # the first of a tree have less to be compared with than the last
        with hub.transaction() as session:
            settle(session, hub.store, family)


def _conversion(hub: Hub, found: Found, model: Model, wanted: bool) -> Iterator[Ingested]:
    if not wanted or model.trust != Trust.QUARANTINED:
        return
    from modelgrove_hub.ingest.conversion import convert, keep_reason

    try:
        made = convert(hub, found, model)
    except (DataError, NotFoundError) as error:
        reason = one_line(str(error))
        keep_reason(hub, model, reason)
        yield Ingested(one_line(str(found.root)), "unconverted", model.name, reason=reason)
    else:
        if made is not None:
            yield _result(found, "converted", made)


def _prepared(fresh: list[Found], workers: int) -> Iterator[tuple[Found, Prepared | str]]:
    if workers <= 1 or len(fresh) < 2 * workers:
        for found in fresh:
            yield found, attempt(found)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        waiting = iter(fresh)
        pending = [(found, pool.submit(attempt, found)) for found in islice(waiting, _AHEAD)]
        while pending:
            found, future = pending.pop(0)
            yield found, future.result()
            pending.extend((later, pool.submit(attempt, later)) for later in islice(waiting, 1))


def _known(hub: Hub, found: Found) -> Model | None:
    """The model whose revision holds exactly this file, referenced and unchanged."""
    weights = {path for path in found.files.values() if path.suffix in WEIGHT_SUFFIXES}
    weights |= {path for weight in weights for path in data_of(weight).values()}
    if found.refused or not weights:
        return None
    try:
        with hub.reading() as session:
            models = [_owner(session, path.resolve()) for path in weights]
    except OSError:  # gone since it was found: reading it will say so
        return None
    return models[0] if all(model is not None and model == models[0] for model in models) else None


def _owner(session: Session, path: Path) -> Model | None:
    stat = path.stat()
    query = (
        select(Model)
        .join(Revision, col(Revision.model_id) == col(Model.id))
        .join(RevisionFile, col(RevisionFile.revision_id) == col(Revision.id))
        .join(Blob, col(Blob.sha256) == col(RevisionFile.sha256))
        .where(Blob.path == str(path), Blob.size == stat.st_size, Blob.mtime_ns == stat.st_mtime_ns)
    )
    return session.exec(query.order_by(col(Model.id)).limit(1)).first()


def _refused(found: Found, reason: str) -> Ingested:
    return Ingested(one_line(str(found.root)), "refused", reason=one_line(reason))


def _result(found: Found, outcome: str, model: Model, not_finite: int = 0) -> Ingested:
    facts = (model.name, model.kind, model.family, model.adapter_type, model.trust, not_finite)
    return Ingested(str(found.root), outcome, *facts)
