"""Prove that rows and files agree, and say the way out where they do not.

Rows are read first, in one short transaction, and the disk is looked at afterwards: a hub that
is working is not held up, and what is stored meanwhile is not reported as missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ForeignKey, func
from sqlmodel import Session, SQLModel, col, delete, select, update

from modelgrove_hub.errors import NotFoundError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.attestations import Statement, statements, subjects_of, unlogged
from modelgrove_hub.registry.commits import MAIN
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.registry.events import START, check_chain
from modelgrove_hub.store.gc import find_leftovers, named, remove_leftovers
from modelgrove_hub.store.shelves import StoredBlob
from modelgrove_hub.tables import (
    Attestation,
    Blob,
    Edge,
    Embedding,
    Model,
    Ref,
    RefKind,
    Report,
    Revision,
    RevisionFile,
    Sketch,
    Source,
    SourceItem,
)  # fmt: skip

_DERIVED = (Edge, Embedding, Report, Sketch)
"""Rows that can be made again: where they point to nothing they may go."""

Fix = Callable[[Hub], None]


class Fault(NamedTuple):
    """What is wrong with a file, what a person can do, and what `fix` can do for them."""

    problem: str
    way_out: str
    fix: Fix | None = None


@dataclass(frozen=True)
class Finding:
    """Something that is not as the rows say.

    `level` is "error" where data is missing or changed, else "warning". `fix`, where there is
    one, loses nothing that could still be used.
    """

    level: str
    subject: str
    problem: str
    way_out: str
    fix: Fix | None = field(default=None, compare=False, repr=False)


def check(hub: Hub, *, full: bool = False, head: str = START) -> Iterator[Finding]:
    """Compare rows, blob store and referenced files; with `full`, read and hash every byte.

    `head` is a hash that the event log ended with earlier: it must still be in it.

    Raises:
        StorageError: the database or the store does not answer.
    """
    with hub.reading() as session:
        findings = [*_dangling(session), *_broken_revisions(session), *_broken_log(session, head)]
        blobs = {blob.sha256: blob for blob in session.exec(select(Blob))}
        users = _users(session)
        gone = _gone(session)
        claims = list(statements(session))
    yield from findings
    stored = {blob.sha256: blob for blob in hub.store}
    for sha256, user in users.items():
        fault = _fault(hub, sha256, blobs.get(sha256), stored, full)
        place = blobs[sha256].path if sha256 in blobs else None
        if fault and fault.fix is None and sha256 in gone and place and not Path(place).exists():
            yield Finding("warning", f"{user}, blob {sha256[:12]}", gone[sha256], "put it back, or `modelgrove rm` it")
            continue
        if fault and _unchanged(hub, sha256, blobs.get(sha256)):
            yield Finding("warning" if fault.fix else "error", f"{user}, blob {sha256[:12]}", *fault)
    for claim in claims:
        yield from _broken_statement(hub, claim)
    for folder in find_leftovers(hub):
        yield Finding(
            "warning", str(folder), "was left by a job that died", "`modelgrove gc` removes it", _removal(folder)
        )


# ---- rows -----------------------------------------------------------------------------------


def _dangling(session: Session) -> Iterator[Finding]:
    """Rows that point to no row. Foreign keys forbid them, unless someone wrote with other tools."""
    for table in SQLModel.metadata.sorted_tables:
        for key in table.foreign_keys:
            lost = (
                key.parent.is_not(None) & ~select(key.column).where(key.column == key.parent).correlate(table).exists()
            )
            count = session.exec(select(func.count()).select_from(table).where(lost)).one()
            if count:
                yield _dangling_finding(key, count, lost)


def _dangling_finding(key: ForeignKey, count: int, lost: Any) -> Finding:
    table = key.parent.table
    subject, problem = f"{table.name}.{key.parent.name}", f"{count} rows point to no {key.column.table.name}"
    if table.name not in {derived.__tablename__ for derived in _DERIVED}:
        return Finding("error", subject, problem, "restore the database from a backup, or ingest those models again")

    def fix(hub: Hub) -> None:
        with hub.transaction() as session:
            session.exec(delete(table).where(lost))

    return Finding("warning", subject, problem, "`modelgrove fsck --fix` removes them", fix)


def _broken_revisions(session: Session) -> Iterator[Finding]:
    empty = select(Model.name).where(~select(Revision.id).where(Revision.model_id == col(Model.id)).exists())
    for name in session.exec(empty):
        yield Finding("error", name, "has no revision", f"`modelgrove rm {name}`, then ingest it again")
    main = select(Ref).where(Ref.model_id == Model.id, Ref.kind == RefKind.BRANCH, Ref.name == MAIN)
    for name in session.exec(select(Model.name).where(~main.exists(), col(Model.name).not_in(empty))):
        yield Finding("error", name, f"has no branch {MAIN}", f"`modelgrove rm {name}`, then ingest it again")
    revisions = select(Revision, Model.name).join(Model, col(Model.id) == col(Revision.model_id))
    digests = {revision.id: (name, revision.digest) for revision, name in session.exec(revisions)}
    rows = session.exec(select(RevisionFile).order_by(col(RevisionFile.revision_id))).all()
    held = {
        number: {row.path: row.sha256 for row in group} for number, group in groupby(rows, lambda row: row.revision_id)
    }
    for number, (name, digest) in digests.items():
        if digest_of(held.get(number, {})) != digest:
            ref = f"{name}@{digest[:12]}"
            yield Finding(
                "error", ref, "its files are not those it was made of", f"`modelgrove rm {ref}`, then ingest it again"
            )


def _broken_log(session: Session, head: str) -> Iterator[Finding]:
    chain = check_chain(session, head)
    if chain.problem:
        way_out = f"restore the database from a backup; the {chain.sound} events before it are sound"
        yield Finding("error", chain.broken, chain.problem, way_out)
        return
    for name, attestation in unlogged(session):
        subject = f"{name}: {attestation.kind} {attestation.sha256[:12]}"
        yield Finding("error", subject, "is told by no event", "restore the database from a backup")


def _users(session: Session) -> dict[str, str]:
    """Who names each blob, for people: one name a blob is enough."""
    users = dict.fromkeys(sorted(named(session)), "an expert or a job")
    attested = select(Attestation, Model.name).join(Revision, col(Revision.id) == col(Attestation.revision_id))
    for attestation, name in session.exec(attested.join(Model, col(Model.id) == col(Revision.model_id))):
        users[attestation.sha256] = f"{name}: {attestation.kind}"
    query = select(RevisionFile, Model.name).join(Revision, col(Revision.id) == col(RevisionFile.revision_id))
    for file, name in session.exec(query.join(Model, col(Model.id) == col(Revision.model_id))):
        users[file.sha256] = f"{name}: {file.path}"
        if file.manifest:
            users[file.manifest] = f"{name}: manifest of {file.path}"
    return users


def _gone(session: Session) -> dict[str, str]:
    """Files of models that a source does not have any more, and since when."""
    query = select(RevisionFile.sha256, SourceItem.key, SourceItem.gone_at, Source.name)
    query = query.join(Revision, col(Revision.id) == col(RevisionFile.revision_id))
    query = query.join(SourceItem, col(SourceItem.model_id) == col(Revision.model_id))
    query = query.join(Source, col(Source.id) == col(SourceItem.source_id))
    rows = session.exec(query.where(col(SourceItem.gone_at).is_not(None)))
    return {sha256: f"{key} of source {name} is gone since {at:%Y-%m-%d %H:%M}" for sha256, key, at, name in rows}


def _broken_statement(hub: Hub, claim: Statement) -> Iterator[Finding]:
    """Whether a statement of provenance speaks of the files that its revision has."""
    try:
        with hub.store.open(claim.sha256) as file:
            problem = "" if subjects_of(file.read()) == claim.files else "speaks of other files than its revision has"
    except NotFoundError:
        return  # told as a missing blob
    except ValueError as error:
        problem = f"cannot be read: {error}"
    if problem:
        way_out = "restore the database and the blob store from a backup, or run the job again"
        yield Finding("error", f"{claim.model}: provenance {claim.sha256[:12]}", problem, way_out)


# ---- files ----------------------------------------------------------------------------------


def _fault(hub: Hub, sha256: str, blob: Blob | None, stored: Mapping[str, StoredBlob], full: bool) -> Fault | None:
    if blob is None:
        return Fault("no row tells its size", "ingest the model again, or retry the job")
    copy = stored.get(sha256)
    if blob.path is not None:
        return _reference_fault(blob, Path(blob.path), has_copy=bool(copy and copy.size == blob.size), full=full)
    again = "ingest the file again with `--mode copy`, or `modelgrove rm` the model"
    if copy is None:
        return Fault("is not in the blob store", again)
    if copy.size != blob.size:
        return Fault(f"has {copy.size} bytes in the blob store, not {blob.size}", again)
    touched = None not in (copy.mtime_ns, blob.mtime_ns) and copy.mtime_ns != blob.mtime_ns
    if (touched or full) and not hub.store.verify(sha256):
        return Fault("has other bytes in the blob store than its hash says", again)
    return _touched("its hard link", sha256, copy.mtime_ns) if touched else None


def _reference_fault(blob: Blob, place: Path, *, has_copy: bool, full: bool) -> Fault | None:
    try:
        found = place.stat()
        touched = found.st_mtime_ns != blob.mtime_ns
        same = found.st_size == blob.size
        if same and (touched or full):
            with place.open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == blob.sha256
    except OSError as error:
        problem = f"was referenced at {place}: {error.strerror}"
        return _or_use_copy(Fault(problem, "put it back, or `modelgrove rm` the model"), blob, has_copy)
    if not same:
        way_out = "ingest it again for a new revision, or `modelgrove rm` the model"
        return _or_use_copy(Fault(f"{place} has other content now", way_out), blob, has_copy)
    if touched:
        return _touched(str(place), blob.sha256, found.st_mtime_ns)
    return None


def _touched(what: str, sha256: str, mtime_ns: int | None) -> Fault:
    way_out = "`modelgrove fsck --fix` notes the new time"
    return Fault(f"{what} was touched, its content is the same", way_out, _change(sha256, mtime_ns=mtime_ns))


def _or_use_copy(fault: Fault, blob: Blob, has_copy: bool) -> Fault:
    if not has_copy:
        return fault
    return Fault(
        fault.problem, "`modelgrove fsck --fix` takes the store's copy", _change(blob.sha256, path=None, mtime_ns=None)
    )


def _change(sha256: str, **values: Any) -> Fix:
    def fix(hub: Hub) -> None:
        with hub.transaction() as session:
            session.exec(update(Blob).where(col(Blob.sha256) == sha256).values(**values))

    return fix


def _unchanged(hub: Hub, sha256: str, blob: Blob | None) -> bool:
    """Whether the rows are still as they were read: else someone removed or replaced the file meanwhile."""
    with hub.reading() as session:
        current = session.get(Blob, sha256)
        same = current == blob if current is None or blob is None else current.model_dump() == blob.model_dump()
        return same and sha256 in named(session, [sha256])


def _removal(folder: Path) -> Fix:
    return lambda _hub: remove_leftovers([folder])
