"""What every route of the Hugging Face API begins with: the repository and the revision that the URL names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import unquote

from fastapi import Depends, Request
from sqlmodel import Session, col, select

from modelgrove_hub.api.access import hub_for
from modelgrove_hub.api.hf.answers import RepoNotFoundError, RevisionNotFoundError, checked_repo
from modelgrove_hub.errors import NotFoundError, UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.commits import MAIN, find_commit
from modelgrove_hub.tables import Commit, Model, Ref, RefKind, Revision

Reading = Annotated[Hub, Depends(hub_for("read"))]
Writing = Annotated[Hub, Depends(hub_for("write"))]


@dataclass(frozen=True)
class Repo:
    """A model, and the commit and content that a URL means."""

    model: Model
    commit: Commit
    revision: Revision


def find_model(session: Session, owner: str, name: str) -> Model:
    """The model that is called so.

    Raises:
        RepoNotFoundError: there is none that the caller may see.
    """
    full = checked_repo(owner, name)
    model = session.exec(select(Model).where(Model.name == full)).first()
    if model is None:
        raise RepoNotFoundError(f"no model {full} here")
    return model


def find_repo(session: Session, owner: str, name: str, revision: str = "main") -> Repo:
    """The model and what a branch, tag or commit of it holds.

    Raises:
        RepoNotFoundError, RevisionNotFoundError: there is none.
    """
    model = find_model(session, owner, name)
    try:
        commit = find_commit(session, model, revision)
    except (NotFoundError, UsageError) as error:
        raise RevisionNotFoundError(str(error)) from error
    return Repo(model, commit, session.get_one(Revision, commit.revision_id))


def heads_of(session: Session, models: Sequence[Model]) -> dict[int, tuple[Commit, Revision]]:
    """The commit at the head of `main`, and its content, by model id."""
    numbers = [model.id for model in models]
    query = (
        select(Commit, Revision)
        .join(Ref, col(Ref.commit_id) == col(Commit.id))
        .join(Revision, col(Revision.id) == col(Commit.revision_id))
        .where(col(Ref.model_id).in_(numbers), Ref.kind == RefKind.BRANCH, Ref.name == MAIN)
    )
    return {commit.model_id: (commit, revision) for commit, revision in session.exec(query)}


def parts_after(request: Request, marker: str) -> list[str]:
    """The parts of the URL's path after `marker`, each decoded by itself: "refs%2Fpr%2F1" is one part."""
    raw: bytes = request.scope["raw_path"]
    parts = raw.partition(b"?")[0].decode("latin-1").split("/")
    return [unquote(part) for part in parts[parts.index(marker) + 1 :] if part]
