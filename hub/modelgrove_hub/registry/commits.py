"""Commits, branches and tags of a model, as a Hugging Face hub has them.

A commit names a revision, which is content; the same content may be committed again. What the hub calls a model's
latest revision is the one at the head of its branch `main`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlmodel import Session, col, select

from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.tables import Commit, Model, Ref, RefKind, Revision, now

MAIN = "main"
_NAME = re.compile(r"(?!.*(?:\.\.|//|@\{|\.lock$|/$|\.$))[A-Za-z0-9_][A-Za-z0-9._/-]{0,249}")
_ID = re.compile(r"[0-9a-f]{40}")
_SHORTEST = 4


class Said(NamedTuple):
    """What a commit says of itself, and its branch. An empty title is replaced by what happened."""

    title: str = ""
    message: str = ""
    author: str = ""
    branch: str = MAIN


def commit(session: Session, model: Model, revision: Revision, said: Said) -> Commit:
    """Make a revision the head of a branch, which is made if it is not there; the head stays if it is that revision.

    Raises:
        UsageError: the branch's name cannot be one.
    """
    ref = session.get(Ref, (model.id, RefKind.BRANCH, check_ref_name(said.branch)))
    parent = session.get(Commit, ref.commit_id) if ref else None
    if parent is not None and parent.revision_id == revision.id:
        return parent
    moment, title = now(), said.title or ("Next version" if parent else "First version")
    facts = (str(model.id), parent.id if parent else "", revision.digest, title, said.message, said.author)
    number = hashlib.sha1("\0".join((*facts, moment.isoformat())).encode(), usedforsecurity=False).hexdigest()
    made = Commit(
        id=number, model_id=model.id, revision_id=revision.id, parent_id=parent.id if parent else None, title=title,
        message=said.message, author=said.author, created_at=moment,
    )  # fmt: skip
    session.add(made)
    session.flush()
    point(session, model, RefKind.BRANCH, said.branch, made)
    return made


def point(session: Session, model: Model, kind: RefKind, name: str, target: Commit) -> None:
    """Have a branch or tag name a commit.

    Raises:
        UsageError: its name cannot be one.
    """
    ref = session.get(Ref, (model.id, kind, check_ref_name(name)))
    if ref is None:
        session.add(Ref(model_id=model.id, kind=kind, name=name, commit_id=target.id))
    else:
        ref.commit_id = target.id
    session.flush()


def squash(session: Session, model: Model, branch: str, title: str, author: str) -> Commit:
    """Have a branch begin with what it holds now: its history is no longer reached from it.

    Raises:
        NotFoundError: there is no such branch.
    """
    ref = session.get(Ref, (model.id, RefKind.BRANCH, branch))
    if ref is None:
        raise NotFoundError(f"{model.name} has no branch {branch!r}")
    revision = session.get_one(Revision, session.get_one(Commit, ref.commit_id).revision_id)
    session.delete(ref)
    session.flush()
    return commit(session, model, revision, Said(title, author=author, branch=branch))


def drop_ref(session: Session, model: Model, kind: RefKind, name: str) -> None:
    """Forget a branch or tag; its commits stay.

    Raises:
        NotFoundError: there is none.
        ConflictError: it is the branch `main`.
    """
    ref = session.get(Ref, (model.id, kind, name))
    if ref is None:
        raise NotFoundError(f"{model.name} has no {kind} {name!r}")
    if (kind, name) == (RefKind.BRANCH, MAIN):
        raise ConflictError(f"branch {MAIN} of {model.name} is what the hub shows: it cannot be deleted")
    session.delete(ref)
    session.flush()


def refs_of(session: Session, model: Model) -> list[Ref]:
    """Branches and tags, `main` first, then by name."""
    found = session.exec(select(Ref).where(Ref.model_id == model.id))
    return sorted(found, key=lambda ref: (ref.kind, ref.name != MAIN, ref.name))


def head(session: Session, model: Model, branch: str = MAIN) -> Commit | None:
    """The commit at the head of a branch."""
    ref = session.get(Ref, (model.id, RefKind.BRANCH, branch))
    return session.get(Commit, ref.commit_id) if ref else None


def history(session: Session, start: Commit) -> Iterator[Commit]:
    """A commit and those before it, newest first."""
    every = {one.id: one for one in session.exec(select(Commit).where(Commit.model_id == start.model_id))}
    current: Commit | None = start
    while current is not None:
        yield current
        current = every.get(current.parent_id or "")


def find_commit(session: Session, model: Model, name: str) -> Commit:
    """The commit that a branch, a tag, an id or its beginning names, or the newest of the content with that digest.

    Raises:
        NotFoundError: nothing is called so.
        UsageError: the beginning fits several.
    """
    for kind in (RefKind.BRANCH, RefKind.TAG):
        if ref := session.get(Ref, (model.id, kind, name.removeprefix("refs/heads/").removeprefix("refs/tags/"))):
            return session.get_one(Commit, ref.commit_id)
    digits = name.lower()
    if re.fullmatch(rf"[0-9a-f]{{{_SHORTEST},64}}", digits):
        query = select(Commit).join(Revision, col(Revision.id) == col(Commit.revision_id))
        begins = col(Commit.id).startswith(digits) | col(Revision.digest).startswith(digits)
        found = list(session.exec(query.where(Commit.model_id == model.id, begins).order_by(col(Commit.created_at))))
        if len({one.revision_id for one in found}) == 1:
            return found[-1]
        if found:
            known = ", ".join(sorted({one.id[:12] for one in found})[:8])
            raise UsageError(f"{len(found)} commits of {model.name} start with {name!r}: {known}")
    raise NotFoundError(f"{model.name} has no revision {name!r}: it has {_known(session, model)}")


def forget_revision(session: Session, model: Model, revision: Revision) -> None:
    """Take a revision's commits out of the chains: what named one of them names the one before it, if there is one.

    `main` always names something: the newest commit of another revision where none came before.
    """
    query = select(Commit).where(Commit.model_id == model.id).order_by(col(Commit.created_at))
    every = {one.id: one for one in session.exec(query)}
    going = {one.id for one in every.values() if one.revision_id == revision.id}

    def before(number: str | None) -> str | None:
        while number in going:
            number = every[number].parent_id
        return number

    newest = next((number for number in reversed(every) if number not in going), None)
    for one in every.values():
        one.parent_id = before(one.parent_id)
    for ref in refs_of(session, model):
        target = before(ref.commit_id) or (newest if (ref.kind, ref.name) == (RefKind.BRANCH, MAIN) else None)
        if target is None:
            session.delete(ref)
        else:
            ref.commit_id = target
    session.flush()


def latest_revisions() -> Any:
    """A subquery of the ids of the revisions at the heads of all models' `main`."""
    query = select(Commit.revision_id).join(Ref, col(Ref.commit_id) == col(Commit.id))
    return query.where(Ref.kind == RefKind.BRANCH, Ref.name == MAIN)


def check_ref_name(name: str) -> str:
    """The name itself, if a branch or tag may be called so.

    Raises:
        UsageError: it may not.
    """
    if not _NAME.fullmatch(name) or _ID.fullmatch(name):
        raise UsageError(f"{name[:80]!a} cannot be a branch or tag: 250 letters, digits, '.', '_', '-' and '/' at most")
    return name


def _known(session: Session, model: Model) -> str:
    refs = [ref.name for ref in refs_of(session, model)]
    digests = select(Revision.digest).where(Revision.model_id == model.id).order_by(col(Revision.id).desc()).limit(8)
    return ", ".join([*refs[:8], *(digest[:12] for digest in session.exec(digests))])
