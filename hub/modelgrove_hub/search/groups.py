"""Groups: the models that one expert is for, and their latest revisions.

A tree is what shares one base network (`registry.trees`), a group its adapters or its whole networks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import case
from sqlmodel import Session, col, func, select

from modelgrove_hub.registry.commits import latest_revisions
from modelgrove_hub.registry.trees import find_root
from modelgrove_hub.tables import NETWORKS, Model, ModelKind, Revision, Trust


class Group(NamedTuple):
    """Models that one expert is for: the adapters, or the networks but for the root, of one tree."""

    tree: str
    kind: str

    @property
    def title(self) -> str:
        """ "zoo", "zoo checkpoints"."""
        return self.tree if self.kind == ModelKind.ADAPTER else f"{self.tree} {self.kind}s"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of its models."""
        return (ModelKind.ADAPTER,) if self.kind == ModelKind.ADAPTER else NETWORKS


def groups(session: Session) -> dict[Group, int]:
    """Every group with models that may be read, and how many."""
    kind = case((col(Model.kind) == ModelKind.ADAPTER, str(ModelKind.ADAPTER)), else_=str(ModelKind.CHECKPOINT))
    query = select(Model.tree, kind, func.count()).where(*_in_trees()).group_by(col(Model.tree), kind)
    found = {Group(str(tree), kind): count for tree, kind, count in session.exec(query)}
    for group in found:
        found[group] -= _root_id(session, group) is not None
    return {group: found[group] for group in sorted(found) if found[group]}


def fits_none(session: Session) -> dict[str, int]:
    """By family, how many adapters fit none of its trees, so that nothing can place them."""
    query = (
        select(Model.family, func.count())
        .where(Model.kind == ModelKind.ADAPTER, Model.trust == Trust.OK, Model.family != "unknown")
        .where(col(Model.tree).is_(None))
        .group_by(Model.family)
    )
    return dict(session.exec(query).all())


def _in_trees() -> tuple[Any, ...]:
    kinds = (ModelKind.ADAPTER, *NETWORKS)
    return col(Model.kind).in_(kinds), col(Model.tree).is_not(None), Model.trust == Trust.OK


def members(session: Session, group: Group) -> tuple[Any, ...]:
    """Conditions on the models of a group."""
    return (
        col(Model.kind).in_(group.kinds), Model.tree == group.tree, Model.trust == Trust.OK,
        Model.id != _root_id(session, group),
    )  # fmt: skip


def _root_id(session: Session, group: Group) -> int | None:
    """Of the network that all others of the group are compared with: it is no member. Adapters have none."""
    root = find_root(session, group.tree) if group.kind != ModelKind.ADAPTER else None
    return root.id if root is not None else None


def latest(session: Session, group: Group, *conditions: Any) -> Iterator[tuple[Model, Revision]]:
    """The models of a group and their latest revisions, by id."""
    return with_latest(session, *members(session, group), *conditions)


def with_latest(session: Session, *conditions: Any) -> Iterator[tuple[Model, Revision]]:
    """Models and their latest revisions, by id."""
    query = select(Model, Revision).join(Revision, col(Revision.model_id) == col(Model.id))
    query = query.where(col(Revision.id).in_(latest_revisions()), *conditions).order_by(col(Revision.id))
    yield from session.exec(query)
