"""Hand out columns of a tree's shared basis (`formats.shared_basis`): each concept its own, and never the same twice.

A basis is a tree and a seed, drawn when its first columns are asked for, so that adapters of hubs which know nothing
of each other meet by chance and not in the same columns. A concept has the same columns in every layer, so the
narrowest layer decides how many there are. Columns stay a concept's until they are released: removing a model frees
none, for its file may lie elsewhere and come back. A basis keeps its seed even when no concept has columns of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import NamedTuple

from sqlmodel import Session, col, select

from modelgrove_hub.errors import ConflictError, NotFoundError, UsageError
from modelgrove_hub.formats.shared_basis import MAX_COLUMNS, BasisColumns
from modelgrove_hub.registry.commits import latest_revisions
from modelgrove_hub.registry.database import take_turn
from modelgrove_hub.registry.events import record
from modelgrove_hub.tables import Basis, BasisRange, Model, ModelKind, Revision

_LONGEST = 200


class Assigned(NamedTuple):
    """A concept's columns, and whether they were handed out just now."""

    columns: BasisColumns
    made: bool


def assign(session: Session, tree: str, concept: str, rank: int, width: int | None = None) -> Assigned:
    """Columns for `concept`: those that it has, or the lowest that are free; nobody else gets them.

    `width` is the input width of the narrowest layer, which the first call for a tree must know.

    Raises:
        ConflictError: the concept has columns of another rank, there is no room, or the basis has another width.
        UsageError: a name or number cannot be, or the width is not known yet.
    """
    _check(concept, rank, width)
    take_turn(session)
    basis = session.get(Basis, tree)
    if basis is None:
        if width is None:
            raise UsageError(f"tree {tree} has no basis yet: say the input width of its narrowest layer")
        basis = Basis(tree=tree, seed=secrets.randbits(32), columns=width)
        session.add(basis)
        session.flush()
    elif width is not None and width != basis.columns:
        raise ConflictError(f"the basis of {tree} was made for layers of {basis.columns} inputs and more, not {width}")
    ranges = ranges_of(session, tree)
    known = next((one for one in ranges if one.concept == concept), None)
    if known is not None:
        if known.rank != rank:
            raise ConflictError(
                f"{concept} has columns {known.start} to {known.start + known.rank - 1} of the basis of {tree}, rank "
                f"{known.rank} and not {rank}: release them first, or train with that rank"
            )
        return Assigned(columns_of(basis, known), made=False)
    found = BasisRange(tree=tree, concept=concept, start=_place(basis, ranges, rank), rank=rank)
    session.add(found)
    record(session, "basis assigned", tree, concept=concept, start=found.start, rank=rank)
    session.flush()
    return Assigned(columns_of(basis, found), made=True)


def release(session: Session, tree: str, concept: str) -> BasisColumns:
    """Take a concept's columns back; the next concept may get them. Returns them.

    Raises:
        NotFoundError: it has none.
    """
    take_turn(session)
    basis, found = session.get(Basis, tree), session.get(BasisRange, (tree, concept))
    if basis is None or found is None:
        known = ", ".join(one.concept for one in ranges_of(session, tree)[:8]) or "no concept"
        raise NotFoundError(f"{concept} has no columns of the basis of {tree}; {known} has")
    session.delete(found)
    session.flush()  # before another row may take its columns
    record(session, "basis released", tree, concept=concept, start=found.start, rank=found.rank)
    return columns_of(basis, found)


def bases(session: Session) -> list[Basis]:
    """All bases, by tree."""
    return list(session.exec(select(Basis).order_by(col(Basis.tree))))


def ranges_of(session: Session, tree: str) -> list[BasisRange]:
    """All ranges of a tree's basis, the lowest first."""
    return list(session.exec(select(BasisRange).where(BasisRange.tree == tree).order_by(col(BasisRange.start))))


def is_tree(session: Session, name: str) -> bool:
    """Whether a basis or a model belongs to a tree of this name."""
    known = session.get(Basis, name) or session.exec(select(Model.id).where(Model.tree == name).limit(1)).first()
    return known is not None


def declared_in(session: Session, tree: str) -> list[tuple[str, BasisColumns]]:
    """The adapters of a tree whose newest files declare columns, by name."""
    query = (
        select(Model.name, Revision.summary)
        .join(Revision, col(Revision.model_id) == col(Model.id))
        .where(Model.tree == tree, Model.kind == ModelKind.ADAPTER, col(Revision.id).in_(latest_revisions()))
        .order_by(Model.name)
    )
    rows = [(name, summary.get("metadata", {}).get("basis")) for name, summary in session.exec(query)]
    return [(name, BasisColumns(**columns)) for name, columns in rows if columns]


def columns_of(basis: Basis, found: BasisRange) -> BasisColumns:
    """A concept's range as files declare it."""
    return BasisColumns(base=basis.tree, seed=basis.seed, start=found.start, rank=found.rank)


def gaps(basis: Basis, ranges: Sequence[BasisRange]) -> list[tuple[int, int]]:
    """Free columns as (start, count), the lowest first."""
    found, free = [], 0
    for one in ranges:
        if one.start > free:
            found.append((free, one.start - free))
        free = one.start + one.rank
    return [*found, (free, basis.columns - free)] if free < basis.columns else found


def _place(basis: Basis, ranges: Sequence[BasisRange], rank: int) -> int:
    free = gaps(basis, ranges)
    start = next((start for start, count in free if count >= rank), None)
    if start is None:
        total, most = sum(count for _, count in free), max((count for _, count in free), default=0)
        raise ConflictError(
            f"the basis of {basis.tree} has no room for rank {rank}: of {basis.columns} columns {total} are free, "
            f"{most} of them side by side; {len(ranges)} concepts have the others. Release one, or take a lower rank"
        )
    return start


def _check(concept: str, rank: int, width: int | None) -> None:
    if not concept.strip() or len(concept) > _LONGEST or not concept.isprintable():
        raise UsageError(f"{concept[:40]!a} cannot be a concept's name: 1 to {_LONGEST} printable characters")
    if rank < 1:
        raise UsageError(f"rank {rank}: an adapter has one column or more")
    if width is not None and not 1 <= width <= MAX_COLUMNS:
        raise UsageError(f"width {width}: a basis has 1 to {MAX_COLUMNS} columns")
