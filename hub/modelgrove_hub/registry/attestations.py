"""Documents about a revision: how a job made it, and signatures over its files. Their bytes are blobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from sqlmodel import Session, col, select

from modelgrove_hub.registry.events import record
from modelgrove_hub.tables import Attestation, AttestationKind, Event, Model, Revision, RevisionFile

SIGNATURE_FILE = "model.sig"
"""What a signature is called beside the files that it is of, here and by `model_signing` itself."""
MAX_SIGNATURE_BYTES = 16 << 20
"""More than a signature over the most files that a model may have."""

_ACTION = "attested"


class Statement(NamedTuple):
    """An attestation of provenance, and the files that its revision has: path in the model → sha256."""

    model: str
    sha256: str
    files: dict[str, str]


def attest(session: Session, model: Model, revision: Revision, kind: AttestationKind, sha256: str) -> None:
    """Keep a document, whose Blob row is there, with a revision, once; the event log tells of it."""
    number = cast(int, revision.id)
    if session.get(Attestation, (number, kind, sha256)) is None:
        session.add(Attestation(revision_id=number, kind=kind, sha256=sha256))
        record(session, _ACTION, model.name, revision=revision.digest, kind=kind, sha256=sha256)


def attestations_of(session: Session, revision_id: int, kind: AttestationKind) -> list[str]:
    """The sha256 of a revision's documents of that kind, newest first."""
    query = select(Attestation.sha256).where(Attestation.revision_id == revision_id, Attestation.kind == kind)
    return list(session.exec(query.order_by(col(Attestation.created_at).desc(), col(Attestation.sha256))))


def statements(session: Session) -> Iterator[Statement]:
    """Every attestation of provenance, with the files of its revision."""
    query = (
        select(Attestation, Model.name)
        .join(Revision, col(Revision.id) == col(Attestation.revision_id))
        .join(Model, col(Model.id) == col(Revision.model_id))
        .where(Attestation.kind == AttestationKind.PROVENANCE)
    )
    for attestation, name in session.exec(query.order_by(col(Attestation.revision_id))):
        files = select(RevisionFile.path, RevisionFile.sha256)
        held = session.exec(files.where(RevisionFile.revision_id == attestation.revision_id))
        yield Statement(name, attestation.sha256, dict(held.all()))


def unlogged(session: Session) -> Iterator[tuple[str, Attestation]]:
    """Documents that no event tells of, with the name of their model: nobody kept them by `attest`."""
    events = session.exec(select(Event.detail).where(Event.action == _ACTION))
    told = {(detail.get("revision"), detail.get("kind"), detail.get("sha256")) for detail in events}
    query = select(Attestation, Revision.digest, Model.name).join(Revision, col(Revision.id) == Attestation.revision_id)
    for attestation, digest, name in session.exec(query.join(Model, col(Model.id) == col(Revision.model_id))):
        if (digest, attestation.kind, attestation.sha256) not in told:
            yield name, attestation


def subjects_of(document: bytes) -> dict[str, str]:
    """What an in-toto statement speaks of: path → sha256.

    Raises:
        ValueError: it is no such statement.
    """
    try:
        statement: dict[str, Any] = json.loads(document)
        return {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no in-toto statement: {error!r}") from None
