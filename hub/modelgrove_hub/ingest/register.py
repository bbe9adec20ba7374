"""Make a prepared model part of the registry: blobs first, then all rows in one transaction.

A crash in between leaves blobs that no row names; `modelgrove gc` removes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from sqlmodel import Session, col, delete, select

from modelgrove_hub.errors import DataError
from modelgrove_hub.formats.outputs import Outputs
from modelgrove_hub.hub import Hub
from modelgrove_hub.ingest.discover import WEIGHT_SUFFIXES
from modelgrove_hub.ingest.prepare import Prepared
from modelgrove_hub.registry.attestations import attest
from modelgrove_hub.registry.blobs import name_blobs
from modelgrove_hub.registry.commits import MAIN, Said
from modelgrove_hub.registry.events import record
from modelgrove_hub.registry.lineage import add_edge
from modelgrove_hub.registry.models import add_revision, latest_revision
from modelgrove_hub.registry.names import clean_name, free_name
from modelgrove_hub.registry.trees import place
from modelgrove_hub.store.blobs import BlobStore
from modelgrove_hub.store.manifest import FileScan, inventory_hash, values_hash, weights_hash
from modelgrove_hub.tables import AttestationKind, Blob, Model, ModelKind, Relation, Revision, RevisionFile, Sketch

Mode = Literal["reference", "hardlink", "copy"]
"""What happens to the user's files: left in place, or also kept in the blob store."""


@dataclass(frozen=True)
class Stored:
    """A prepared model whose bytes are safe: the rows that will name them."""

    prepared: Prepared
    blobs: tuple[Blob, ...]
    files: Mapping[str, str]
    manifests: Mapping[str, str]
    shelf: BlobStore
    """Where they are."""
    signature: str | None = None
    """sha256 of the signature that lay beside the files."""


def store(hub: Hub, prepared: Prepared, mode: Mode) -> Stored:
    """Put the files (unless referenced) and their manifests into the blob store.

    Raises:
        DataError, ConflictError, NotFoundError: a file changed or went since it was prepared.
        StorageError: the store fails.
    """
    blobs: list[Blob] = []
    manifests: dict[str, str] = {}
    for path, scan in prepared.scans.items():
        source = prepared.found.files[path]
        if mode == "reference":
            blobs.append(_referenced(prepared, path, scan))
        else:
            stored = hub.store.put(source, mode=mode)
            if stored.sha256 != scan.sha256:
                raise DataError(f"{source} changed while it was read: ingest it again when it is complete")
            # Whoever has the original can write into a hard link: its time tells `fsck`.
            mtime_ns = stored.mtime_ns if mode == "hardlink" else None
            blobs.append(Blob(sha256=stored.sha256, size=stored.size, mtime_ns=mtime_ns))
        if scan.tensors:
            manifest = hub.store.put_bytes(scan.to_json().encode())
            manifests[path] = manifest.sha256
            blobs.append(Blob(sha256=manifest.sha256, size=manifest.size))
    files = {path: scan.sha256 for path, scan in prepared.scans.items()}
    signature = None
    if prepared.found.signature is not None:
        kept = hub.store.put(prepared.found.signature)
        blobs.append(Blob(sha256=kept.sha256, size=kept.size))
        signature = kept.sha256
    return Stored(prepared, tuple(blobs), files, manifests, hub.store, signature)


def register(
    session: Session, stored: Stored, name: str | None = None, parent: Model | None = None, said: Said | None = None
) -> tuple[Model, Revision, bool]:
    """Add the rows of a stored model. Returns the model, its revision and whether it is new.

    What recognition cannot tell (a packed file, say) is taken from `parent`, the model that a
    job made this one from.
    """
    prepared, recognition, tensors = stored.prepared, stored.prepared.recognition, stored.prepared.tensors
    name = name or _name_at(session, stored) or free_name(session, clean_name(prepared.found.name), stored.files)
    name_blobs(session, stored.blobs)
    verdict = parent if parent and recognition.kind == ModelKind.UNKNOWN else recognition
    model, revision, created = add_revision(
        session,
        name=name,
        files=stored.files,
        manifests=stored.manifests,
        kind=verdict.kind,
        family=verdict.family,
        adapter_type=verdict.adapter_type,
        declared_base=prepared.card.base or recognition.declared_base,
        licence=prepared.card.licence or recognition.licence,
        tags=list(prepared.card.tags),
        card=prepared.card.text,
        trust=recognition.trust,
        summary=_summary(prepared),
        weights_hash=weights_hash(tensors),
        values_hash=values_hash(tensors),
        inventory_hash=inventory_hash(tensors),
        parameters=recognition.parameters,
        size=sum(scan.size for scan in prepared.scans.values()),
        said=said or Said(),
    )
    if created:
        record(session, "registered", model.name, revision=revision.digest, files=len(stored.files))
        _link_copy(session, revision)
        _link_declared(session, model, revision)
        if said is None or said.branch == MAIN:
            _keep_outputs(session, model, revision, prepared.outputs)
            place(session, stored.shelf, model, parent)
    if stored.signature is not None:
        attest(session, model, revision, AttestationKind.SIGNATURE, stored.signature)
    return model, revision, created


def _summary(prepared: Prepared) -> dict[str, Any]:
    summary = prepared.recognition.summary()
    if prepared.origin:
        summary = {**summary, "sidecars": dict(prepared.origin)}
    names = prepared.not_finite
    return {**summary, "not_finite": {"tensors": len(names), "first": names[0]}} if names else summary


def _keep_outputs(session: Session, model: Model, revision: Revision, outputs: Outputs | None) -> None:
    """The sketch of the newest revision is the model's."""
    older = select(Revision.id).where(Revision.model_id == model.id)
    session.exec(delete(Sketch).where(col(Sketch.revision_id).in_(older)))
    if outputs is not None:
        session.add(Sketch(revision_id=cast(int, revision.id), outputs=outputs.to_bytes()))
        session.flush()


def _name_at(session: Session, stored: Stored) -> str | None:
    """The model that was registered from this place before: other content there is its next revision."""
    places = [blob.path for blob in stored.blobs if blob.path and Path(blob.path).suffix in WEIGHT_SUFFIXES]
    query = (
        select(Model.name)
        .join(Revision, col(Revision.model_id) == col(Model.id))
        .join(RevisionFile, col(RevisionFile.revision_id) == col(Revision.id))
        .join(Blob, col(Blob.sha256) == col(RevisionFile.sha256))
        .where(col(Blob.path).in_(places))
    )
    return session.exec(query.order_by(col(Model.id)).limit(1)).first()


def _referenced(prepared: Prepared, path: str, scan: FileScan) -> Blob:
    source = prepared.found.files[path].resolve()
    return Blob(sha256=scan.sha256, size=scan.size, path=str(source), mtime_ns=prepared.mtimes[path])


def _link_copy(session: Session, revision: Revision) -> None:
    """The earliest revision with the same tensor values is the original."""
    if revision.values_hash is None:
        return
    same = select(Revision).where(
        Revision.values_hash == revision.values_hash, col(Revision.model_id) != revision.model_id
    )
    original = session.exec(same.order_by(col(Revision.id)).limit(1)).first()
    if original is not None:
        add_edge(session, revision, original, Relation.COPY, inferred=True, evidence={"values_hash": "equal"})


def _link_declared(session: Session, model: Model, revision: Revision) -> None:
    """Connect to the declared base, and the models that were waiting for this one as theirs."""
    if model.declared_base:
        base = session.exec(select(Model).where(Model.name == model.declared_base)).first()
        if base is not None and base.id != model.id:
            _declare(session, model, revision, base)
    for child in session.exec(select(Model).where(Model.declared_base == model.name)):
        if child.id != model.id:
            _declare(session, child, latest_revision(session, child), model)


def _declare(session: Session, child: Model, revision: Revision, base: Model) -> None:
    relation = Relation.ADAPTER if child.kind == ModelKind.ADAPTER else Relation.FINETUNE
    evidence = {"declared_base": base.name}
    add_edge(session, revision, latest_revision(session, base), relation, inferred=False, evidence=evidence)
