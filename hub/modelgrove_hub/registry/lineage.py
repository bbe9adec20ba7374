"""Lineage: which revision came from which, how we know it, and how sure we are."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlmodel import Session, col, select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.registry.database import insert_into
from modelgrove_hub.tables import Edge, Model, Relation, Revision

_KEY = ("child_id", "parent_id", "relation", "inferred")
_BATCH = 500
"""Ids in one query: databases limit the parameters of a statement."""


@dataclass(frozen=True)
class Link:
    """A step in the lineage: the edge, and the revision and model at its other end."""

    edge: Edge
    revision: Revision
    model: Model

    def describe(self) -> str:
        """As a person reads it: "zoo/base (adapter, declared)", "zoo/base (finetune, inferred, 0.93)"."""
        known = f"inferred, {self.edge.score:.2f}" if self.edge.inferred else "declared"
        return f"{self.model.name} ({self.edge.relation}, {known})"


@dataclass
class Node:
    """A revision in a family tree, and the edge it was reached by (none for the first)."""

    name: str
    revision_id: int
    digest: str
    relation: str | None = None
    inferred: bool = False
    score: float = 1.0
    evidence: Mapping[str, Any] = field(default_factory=dict)
    parents: list[Node] = field(default_factory=list)
    children: list[Node] = field(default_factory=list)
    again: bool = False
    """Already shown elsewhere in the tree: its own family is not repeated here."""


def add_edge(
    session: Session, child: Revision, parent: Revision, relation: Relation, *,
    inferred: bool = False, score: float = 1.0, evidence: Mapping[str, Any] | None = None,
) -> Edge:  # fmt: skip
    """Record that `child` came from `parent`; said again, only score and evidence are renewed.

    Raises:
        UsageError: both are the same revision.
    """
    if child.id == parent.id:
        raise UsageError(f"revision {child.digest[:12]} cannot be its own parent")
    session.flush()
    edge = Edge(
        child_id=child.id, parent_id=parent.id, relation=Relation(relation), inferred=inferred, score=score,
        evidence=dict(evidence or {}),
    )  # fmt: skip
    # One statement: two jobs may say the same at the same time.
    statement = insert_into(session, Edge).values(edge.model_dump(exclude={"id"}))
    renewed = {"score": statement.excluded.score, "evidence": statement.excluded.evidence}
    session.exec(statement.on_conflict_do_update(index_elements=list(_KEY), set_=renewed))
    query = select(Edge).filter_by(**{name: getattr(edge, name) for name in _KEY})
    return session.exec(query, execution_options={"populate_existing": True}).one()


def drop_inferred(session: Session, child: Revision, relations: Iterable[Relation]) -> None:
    """Forget what was inferred of a revision's parents; what cards and jobs declared stays."""
    query = select(Edge).where(Edge.child_id == child.id, col(Edge.inferred), col(Edge.relation).in_(list(relations)))
    for edge in session.exec(query).all():
        session.delete(edge)
    session.flush()


def record_found(session: Session, report: Mapping[str, Any], among: Collection[int]) -> None:
    """Keep what an analyzer found of the lineage of the revisions that it was given, `among`.

    `edges` in its report are the steps (child, parent, relation, score, evidence); relations that it calls `replaced`
    are first forgotten, where they were inferred of these revisions.
    """
    known = {number: session.get(Revision, number) for number in among}
    for revision in known.values() if report.get("replaced") else ():
        if revision is not None:
            drop_inferred(session, revision, [Relation(one) for one in report["replaced"]])
    for edge in report.get("edges", ()):
        child, parent = known.get(edge["child"]), known.get(edge["parent"])
        if child is not None and parent is not None:
            add_edge(
                session, child, parent, Relation(edge["relation"]), inferred=True, score=edge["score"],
                evidence=edge["evidence"],
            )  # fmt: skip


def parents(session: Session, revision: Revision) -> list[Link]:
    """What the revision came from: declared before inferred, surest first."""
    return _links(session, revision, "parents")


def children(session: Session, revision: Revision) -> list[Link]:
    """What came from the revision: declared before inferred, surest first."""
    return _links(session, revision, "children")


def tree(session: Session, revision: Revision, depth: int = 32) -> Node:
    """The revision with its ancestors (`parents` of parents) and descendants (`children` of children).

    Each way goes `depth` steps at most. A revision that can be reached twice is expanded once,
    so loops, which wrong inference may make, end.
    """
    revision_id = _id(revision)
    up = _reach(session, revision_id, "parents", depth)
    down = _reach(session, revision_id, "children", depth)
    names = _names(session, {revision_id, *_ends(up, "parents"), *_ends(down, "children")})
    root = Node(*names[revision_id])
    _grow(root, up, names, "parents")
    _grow(root, down, names, "children")
    return root


Direction = Literal["parents", "children"]


def _links(session: Session, revision: Revision, direction: Direction) -> list[Link]:
    here, there = _columns(direction)
    query = (
        select(Edge, Revision, Model)
        .join(Revision, col(Revision.id) == there)
        .join(Model, col(Model.id) == col(Revision.model_id))
        .where(here == revision.id)
        .order_by(col(Edge.inferred), col(Edge.score).desc(), col(Edge.id))
    )
    return [Link(*row) for row in session.exec(query)]


def _reach(session: Session, start: int, direction: Direction, depth: int) -> dict[int, list[Edge]]:
    """Edges by the revision they lead away from, level by level: a query a level, not one a revision."""
    here, _ = _columns(direction)
    edges: dict[int, list[Edge]] = {start: []}
    level = [start]
    for _ in range(depth):
        for ids in _batches(level):
            query = select(Edge).where(here.in_(ids)).order_by(col(Edge.inferred), col(Edge.score).desc(), col(Edge.id))
            for edge in session.exec(query):
                edges[edge.child_id if direction == "parents" else edge.parent_id].append(edge)
        level = sorted({_far(edge, direction) for reached in level for edge in edges[reached]} - edges.keys())
        if not level:
            break
        edges.update({reached: [] for reached in level})
    return edges


def _grow(
    root: Node, edges: Mapping[int, list[Edge]], names: Mapping[int, tuple[str, int, str]], way: Direction
) -> None:
    # Breadth first: a revision is expanded where it is nearest to the root.
    seen, waiting = {root.revision_id}, [root]
    while waiting:
        following = []
        for node in waiting:
            for edge in edges.get(node.revision_id, ()):
                far = _far(edge, way)
                if far not in names:
                    continue
                grown = Node(*names[far], edge.relation, edge.inferred, edge.score, edge.evidence, again=far in seen)
                (node.parents if way == "parents" else node.children).append(grown)
                if far not in seen:
                    seen.add(far)
                    following.append(grown)
        waiting = following


def _names(session: Session, ids: set[int]) -> dict[int, tuple[str, int, str]]:
    names: dict[int, tuple[str, int, str]] = {}
    for some in _batches(sorted(ids)):
        query = select(Revision, Model.name).join(Model, col(Model.id) == col(Revision.model_id))
        for revision, name in session.exec(query.where(col(Revision.id).in_(some))):
            names[_id(revision)] = (name, _id(revision), revision.digest)
    return names


def _columns(direction: Direction) -> tuple[Any, Any]:
    near, far = col(Edge.child_id), col(Edge.parent_id)
    return (near, far) if direction == "parents" else (far, near)


def _far(edge: Edge, direction: Direction) -> int:
    return edge.parent_id if direction == "parents" else edge.child_id


def _ends(edges: Mapping[int, list[Edge]], direction: Direction) -> set[int]:
    return {_far(edge, direction) for found in edges.values() for edge in found}


def _batches(ids: list[int]) -> Iterable[list[int]]:
    return (ids[start : start + _BATCH] for start in range(0, len(ids), _BATCH))


def _id(revision: Revision) -> int:
    if revision.id is None:
        raise UsageError("the revision is not in the database yet")
    return revision.id
