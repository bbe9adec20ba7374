"""Verbs of lineage: who came from whom. Finding out is a job of an analyzer; what it finds is recorded with its end."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, Field
from sqlmodel import Session

from modelgrove_hub.errors import UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry import lineage
from modelgrove_hub.registry.models import find, find_revision, latest_revision, list_models
from modelgrove_hub.registry.trees import checkpoints_of, find_root
from modelgrove_hub.tables import NETWORKS, Model, Revision, Trust
from modelgrove_hub.verbs.jobs import Work
from modelgrove_hub.verbs.verb import verb

_MOST_COMPARED = 100_000


class TreeQuestion(BaseModel):
    """Which tree is to be drawn, and by what."""

    model: str
    times: bool = Field(True, description="Use when models were registered.")
    confirm: bool = Field(True, description="Read what sketches leave open.")
    limit: int = Field(500, ge=1, le=100_000, description="Checkpoints at most, the oldest first, and the model.")


class TreeWork(BaseModel):
    """The job that finds out, and what is declared."""

    work: Work
    declared: dict[int, list[str]]
    """What cards and jobs say of each revision."""


class FamilyNode(BaseModel):
    """A revision in a family tree, and how it was reached."""

    name: str
    revision: str
    relation: str | None
    inferred: bool
    score: float
    again: bool
    """Shown elsewhere in the tree: its own family is not repeated here."""
    parents: list[FamilyNode]
    children: list[FamilyNode]


@verb("GET", "/tree/{model:path}")
def family_of(hub: Hub, *, model: str, depth: Annotated[int, Field(ge=1, le=100)] = 32) -> FamilyNode:
    """A model with its ancestors and descendants, as they are known: declared, or inferred from weights.

    Raises:
        NotFoundError: there is no such model.
        UsageError: several are called so.
    """
    with hub.reading() as session:
        return _node(lineage.tree(session, find_revision(session, model), depth))


@verb("POST", "/tree/plan")
def plan_tree(hub: Hub, *, question: TreeQuestion) -> TreeWork:
    """The work that finds out which checkpoints of a model's tree came from which: give it to `submit_job`.

    Raises:
        NotFoundError, UsageError: as `family_of`, or the model stands in no tree of checkpoints.
    """
    with hub.reading() as session:
        members, root = _members(session, question.model, question.limit)
        declared = {member.id or 0: _declared(session, member) for member in members}
    params: dict[str, Any] = {"confirm": question.confirm, "root": root}
    if question.times:
        params["times"] = [member.created_at.timestamp() for member in members]
    models = [f"@#{member.id}" for member in members]
    return TreeWork(work=Work(plugin="analyzer.tree", params=params, models=models), declared=declared)


@verb("GET", "/copies/plan")
def plan_copies(hub: Hub, *, model: str | None = None, confirm: bool = True) -> Work:
    """The work that finds copies of a model, or among all models: give it to `submit_job`.

    Raises:
        NotFoundError, UsageError: as `family_of`.
    """
    with hub.reading() as session:
        wanted = find(session, model) if model else None
        others = [
            one
            for one in list_models(session, trust=Trust.OK, limit=_MOST_COMPARED)
            if wanted is None or (one.id != wanted.id and _comparable(one, wanted))
        ]
        revisions = [latest_revision(session, one) for one in ([wanted] if wanted else []) + others]
    params = {"first_only": model is not None, "confirm": confirm}
    return Work(plugin="analyzer.copies", params=params, models=[f"@#{one.id}" for one in revisions])


def _node(node: lineage.Node) -> FamilyNode:
    return FamilyNode(
        name=node.name, revision=node.digest, relation=node.relation, inferred=node.inferred, score=node.score,
        again=node.again, parents=[_node(one) for one in node.parents],
        children=[_node(one) for one in node.children],
    )  # fmt: skip


def _comparable(model: Model, wanted: Model) -> bool:
    """A copy is of the same family as far as both are known: names may have been changed to hide it."""
    return "unknown" in (model.family, wanted.family) or model.family == wanted.family


def _members(session: Session, name: str, limit: int) -> tuple[list[Revision], int | None]:
    """The latest revisions of the checkpoints of the model's tree, and which of them is the root."""
    wanted = find(session, name)
    if wanted.kind not in NETWORKS or wanted.tree is None:
        said = (wanted.tree_reason or {}).get("said", "it is no checkpoint")
        raise UsageError(f"{wanted.name} stands in no tree of checkpoints: {said}. See `modelgrove show {wanted.name}`")
    root = find_root(session, wanted.tree)
    members = {model.id: model for model in (wanted, *checkpoints_of(session, wanted.tree, limit))}
    first = root.id if root is not None else None
    ordered = sorted(members.values(), key=lambda member: (member.id != first, member.id))
    return [latest_revision(session, member) for member in ordered], 0 if first in members else None


def _declared(session: Session, revision: Revision) -> list[str]:
    """What cards and jobs say that the revision came from."""
    links = lineage.parents(session, revision)
    return [f"{link.edge.relation} of {link.model.name}" for link in links if not link.edge.inferred]
