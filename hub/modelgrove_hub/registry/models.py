"""The registry's verbs: add, find, list and remove models and their revisions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypedDict

from sqlalchemy import func
from sqlmodel import Session, col, select, update

from modelgrove_hub.errors import ConflictError, DataError, NotFoundError, UsageError
from modelgrove_hub.registry.commits import MAIN, Said, commit, find_commit, forget_revision, head, latest_revisions
from modelgrove_hub.registry.database import EVERYTHING, take_turn
from modelgrove_hub.registry.digest import digest_of
from modelgrove_hub.registry.events import record
from modelgrove_hub.registry.names import check_name
from modelgrove_hub.tables import Blob, Job, JobState, Model, Revision, RevisionFile, now

MAX_PATH = 1024
"""Bytes in a file's path inside a model: what both databases can index."""
_NOTHING_SAID = Said()
_DIGITS = 10
_NEAR = 10_000
"""Names looked at for "did you mean": more would take longer than the answer is worth."""


class FileFacts(TypedDict):
    """A file of a revision; `place` is where it is referenced, None when it is in the blob store."""

    path: str
    size: int
    sha256: str
    place: str | None


def add_revision(
    session: Session, *, name: str, files: Mapping[str, str], manifests: Mapping[str, str], kind: str, family: str,
    adapter_type: str | None, declared_base: str | None, licence: str | None, tags: Sequence[str], card: str,
    trust: str, summary: Mapping[str, Any], weights_hash: str | None, values_hash: str | None,
    inventory_hash: str | None, parameters: int, size: int, said: Said = _NOTHING_SAID,
) -> tuple[Model, Revision, bool]:  # fmt: skip
    """Register files under a name, as the head of its branch `main` or of the one that `said` names.

    Returns the model, the revision, and whether the revision is new.

    `files` and `manifests` map paths in the model to sha256; their Blob rows must be in the
    session. The same content gives the same revision. Of a model that exists, fields are renewed that
    are empty or as the content before declared them: what a person corrected stays. Another
    branch than `main` changes no field.

    Raises:
        UsageError: the name is not valid.
        DataError: a path cannot be kept.
    """
    check_paths(files)
    session.flush()
    take_turn(session)
    facts = {
        "kind": kind, "family": family, "adapter_type": adapter_type, "declared_base": _storable(declared_base),
        "licence": _storable(licence), "tags": [str(_storable(tag)) for tag in tags], "card": _storable(card),
    }  # fmt: skip
    model = _model(session, check_name(name), facts, renew=said.branch == MAIN)
    digest = digest_of(files)
    known = session.exec(select(Revision).where(Revision.model_id == model.id, Revision.digest == digest)).first()
    if known is not None:
        commit(session, model, known, said)
        return model, known, False
    if said.branch == MAIN:
        model.trust, model.updated_at = trust, now()
    revision = Revision(
        model_id=model.id, digest=digest, weights_hash=weights_hash, values_hash=values_hash,
        inventory_hash=inventory_hash, parameters=parameters, size=size,
        summary={**summary, "trust": trust, "declared": _declared(facts)},
    )  # fmt: skip
    session.add(revision)
    session.flush()
    for path, sha256 in files.items():
        session.add(RevisionFile(revision_id=revision.id, path=path, sha256=sha256, manifest=manifests.get(path)))
    session.flush()
    commit(session, model, revision, said)
    return model, revision, True


def find(session: Session, ref: str | int) -> Model:
    """The model that `ref` names: "owner/name", "name" if only one is called so, "#id" or a number.

    A revision may follow "@": a branch, tag or commit, or the beginning of its digest; it must exist. "@" and a whole
    digest alone name the first model that has that content; "@#12" is the revision with that id.

    Raises:
        NotFoundError: there is none; the message offers near names.
        UsageError: several fit; the message lists them.
    """
    return _resolve(session, ref)[0]


def find_revision(session: Session, ref: str | int) -> Revision:
    """The revision that `ref` names: the one after "@", or the model's latest.

    Raises:
        NotFoundError, UsageError: as `find`.
    """
    model, revision = _resolve(session, ref)
    return revision or latest_revision(session, model)


def latest_revision(session: Session, model: Model) -> Revision:
    """The model's revision at the head of its branch `main`.

    Raises:
        DataError: it has none, which nothing here can bring about.
    """
    query = select(Revision).where(Revision.model_id == model.id, col(Revision.id).in_(latest_revisions()))
    revision = session.exec(query.limit(1)).first()
    if revision is None:
        raise DataError(f"model {model.name} has no revision: run `modelgrove fsck`")
    return revision


def revisions_shown(session: Session, models: Sequence[Model]) -> dict[int, Revision]:
    """The latest revision of each of these models, by the model's id: one query, however many there are."""
    numbers = [model.id for model in models]
    query = select(Revision).where(col(Revision.model_id).in_(numbers), col(Revision.id).in_(latest_revisions()))
    return {revision.model_id: revision for revision in session.exec(query)}


def list_models(
    session: Session, *, kind: str | None = None, family: str | None = None, adapter_type: str | None = None,
    base: str | None = None, licence: str | None = None, trust: str | None = None, tag: str | None = None,
    text: str | None = None, limit: int = 50, after: int | None = None,
) -> list[Model]:  # fmt: skip
    """Models that fit every filter, newest first; `text` looks in the name.

    For the next page give the last model's id as `after`.
    """
    query = select(Model).order_by(col(Model.id).desc()).limit(limit)
    exact = {"kind": kind, "family": family, "adapter_type": adapter_type, "licence": licence, "trust": trust}
    for field, value in {**exact, "declared_base": base}.items():
        if value is not None:
            query = query.where(getattr(Model, field) == value)
    if tag is not None:
        postgresql = session.get_bind().dialect.name == "postgresql"
        each = func.json_array_elements_text if postgresql else func.json_each
        tags = each(col(Model.tags)).table_valued("value")
        query = query.where(select(tags.c.value).where(tags.c.value == tag).exists())
    if text:
        query = query.where(func.lower(Model.name).contains(text.lower(), autoescape=True))
    if after is not None:
        query = query.where(col(Model.id) < after)
    return list(session.exec(query))


def files_of(session: Session, revision: Revision) -> list[FileFacts]:
    """The files of a revision, by path."""
    query = select(RevisionFile, Blob).join(Blob, col(Blob.sha256) == col(RevisionFile.sha256))
    rows = session.exec(query.where(RevisionFile.revision_id == revision.id).order_by(col(RevisionFile.path)))
    return [FileFacts(path=file.path, size=blob.size, sha256=blob.sha256, place=blob.path) for file, blob in rows]


def remove(session: Session, ref: str | int) -> str:
    """Forget a model, or with "@" one revision of it; returns the model's name. Files are left to `gc`.

    Lineage, embeddings and reports of what is forgotten go with it.

    Raises:
        NotFoundError, UsageError: as `find`.
        ConflictError: a job that has not ended needs it.
    """
    model, revision = _resolve(session, ref)
    ids = list(session.exec(select(Revision.id).where(Revision.model_id == model.id)))
    leaving = ids if revision is None else [revision.id]
    _refuse_if_used(session, model, {number for number in leaving if number is not None})
    record(session, "removed", model.name, revisions=len(leaving))
    if revision is not None and len(ids) > 1:
        forget_revision(session, model, revision)
        session.delete(revision)
    else:
        children = update(Model).where(col(Model.inferred_parent_id) == model.id).values(inferred_parent_id=None)
        session.exec(children)
        session.delete(model)
    session.flush()
    session.expire_all()  # the database removed rows that the session may still know
    return model.name


def rename(session: Session, model: Model, name: str, **detail: Any) -> None:
    """Give a model another name.

    Raises:
        UsageError: no model can be called so.
        ConflictError: another model is.
    """
    take_turn(session)
    taken = select(Model.id).where(Model.name == check_name(name)).execution_options(**{EVERYTHING: True})
    if session.exec(taken).first() is not None:
        raise ConflictError(f"a model is called {name} already")
    record(session, "renamed", name, was=model.name, **detail)
    model.name, model.updated_at = name, now()
    session.flush()


def _declared(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as a revision remembers them; of the card only a hash."""
    return {**facts, "card": hashlib.sha256((facts["card"] or "").encode()).hexdigest()}


def _model(session: Session, name: str, facts: Mapping[str, Any], *, renew: bool) -> Model:
    model = session.exec(select(Model).where(Model.name == name)).first()
    if model is None:
        model = Model(name=name, **facts)
        session.add(model)
        session.flush()
        return model
    newest = head(session, model) if renew else None
    if newest is None:
        return model
    before = session.get_one(Revision, newest.revision_id).summary.get("declared", {})
    current = _declared({field: getattr(model, field) for field in facts})
    for field, value in facts.items():
        untouched = getattr(model, field) in (None, "", [], "unknown") or current[field] == before.get(field)
        if untouched and value != getattr(model, field):
            setattr(model, field, value)
            model.updated_at = now()
    return model


def _resolve(session: Session, ref: str | int) -> tuple[Model, Revision | None]:
    text, _, digest = str(ref).strip().partition("@")
    if digest and not text:
        return _by_content(session, digest.lower())
    model = _named(session, text)
    return model, _revision(session, model, digest) if digest else None


def _by_content(session: Session, digest: str) -> tuple[Model, Revision]:
    query = select(Model, Revision).join(Revision, col(Revision.model_id) == col(Model.id))
    number = digest.removeprefix("#")
    if digest.startswith("#") and number.isdecimal() and len(number) < _DIGITS:
        query = query.where(Revision.id == int(number))
    else:
        query = query.where(Revision.digest == digest).order_by(col(Revision.id)).limit(1)
    found = session.exec(query).first()
    if found is None:
        raise NotFoundError(f"revision {digest[:12]} is not in this hub: ingest it first")
    return found[0], found[1]


def _named(session: Session, text: str) -> Model:
    number = text.removeprefix("#")
    if number.isascii() and number.isdigit() and len(number) < _DIGITS:
        model = session.get(Model, int(number))
        if model is not None:
            return model
    model = session.exec(select(Model).where(Model.name == text)).first()
    if model is not None:
        return model
    if text and "/" not in text:
        # SQLite's LIKE does not tell "a" from "A".
        similar = session.exec(select(Model).where(col(Model.name).endswith(f"/{text}", autoescape=True)))
        found = [model for model in similar if model.name.endswith(f"/{text}")]
        if len(found) > 1:
            raise UsageError(f"{len(found)} models are called {text!r}: {', '.join(sorted(m.name for m in found)[:8])}")
        if found:
            return found[0]
    raise NotFoundError(f"no model {text!r}{_suggest(session, text)}")


def _suggest(session: Session, text: str) -> str:
    names = list(session.exec(select(Model.name).order_by(col(Model.id).desc()).limit(_NEAR)))
    if not names:
        return ": the hub is empty, fill it with `modelgrove ingest PATH`"
    spellings = {name.lower() if "/" in text else name.partition("/")[2].lower(): name for name in reversed(names)}
    near = [spellings[match] for match in get_close_matches(text.lower(), spellings, n=3)]
    return f": did you mean {' or '.join(near)}?" if near else ": `modelgrove ls` lists what there is"


def _revision(session: Session, model: Model, name: str) -> Revision:
    return session.get_one(Revision, find_commit(session, model, name).revision_id)


def _refuse_if_used(session: Session, model: Model, revisions: set[int]) -> None:
    active = select(Job).where(col(Job.state).in_([JobState.QUEUED, JobState.RUNNING]))
    for job in session.exec(active):
        if revisions & set(job.inputs):
            raise ConflictError(
                f"model {model.name} is needed by the {job.state} job {job.id} ({job.plugin}): "
                f"wait for it, or `modelgrove jobs cancel {job.id}`"
            )


def check_paths(files: Mapping[str, str]) -> None:
    """Refuse what cannot be a revision's files: path → sha256.

    Raises:
        DataError: there are none, or a path is not relative, not UTF-8, too long or has "..".
    """
    if not files:
        raise DataError("a revision needs at least one file")
    for path in files:
        try:
            length = len(path.encode())
        except UnicodeEncodeError as error:
            raise DataError(f"file {path!a}: its name is not UTF-8: rename it") from error
        parts = path.split("/")
        if length > MAX_PATH or "\0" in path or not set(parts).isdisjoint(("", ".", "..")):
            raise DataError(
                f"file {path[:80]!a}: no path inside a model (relative, without '..', {MAX_PATH} bytes at most)"
            )


def _storable(text: str | None) -> str | None:
    """Without what a database refuses: half characters and NUL."""
    return None if text is None else text.encode("utf-8", "replace").decode().replace("\0", "")
