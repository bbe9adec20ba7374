"""Model trees: what grew from one base network, decided by weights (decision 0008).

Experts and updates compare within a tree only. A tree is a name: that of the family for its first tree,
"family:founder" for further ones. Checkpoints are compared with the root of each tree of their family (`kinship`),
adapters by the outputs that they move (`formats.outputs`) with the root and some of the adapters of each tree. A base
that a card declares is believed only if the weights agree. What fits no tree has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy.orm import aliased
from sqlmodel import Session, col, func, select

from modelgrove_hub.errors import CorruptFileError, NotFoundError
from modelgrove_hub.formats.outputs import Likeness, Outputs, compare_outputs
from modelgrove_hub.registry.database import take_turn
from modelgrove_hub.registry.kinship import RELATED, UNRELATED, Weights, read_weights
from modelgrove_hub.registry.models import latest_revision
from modelgrove_hub.store.blobs import BlobStore
from modelgrove_hub.tables import NETWORKS, Edge, Model, ModelKind, Revision, Sketch, Trust

ALIKE = 0.02
"""Likeness of outputs that an adapter must have with its tree, whatever the noise (decision 0008)."""
SIGMAS = 4.0
"""Standard deviations of what hashing adds that the likeness must be."""
_MEMBERS = 32
"""Adapters of a tree that a new one is compared with: more would not make it surer."""
_ASKED = 8
"""Checkpoints of a tree that are asked when the root cannot tell."""
_STRANGERS = 500
"""Networks of unknown family and the same size that a new one is compared with, the oldest first."""
_UNKNOWN = "unknown"


class Verdict(NamedTuple):
    """A model's tree, and why."""

    tree: str | None
    by: str
    """weights; founder: of its tree; family: nothing to compare; parent: a job made it from one; none."""
    said: str
    score: float | None = None


@dataclass(frozen=True)
class _Tree:
    """One tree of a family as others are compared with it."""

    name: str
    root: Model | None
    outputs: tuple[Outputs, ...]
    """Of the root and of some adapters."""


def place(session: Session, store: BlobStore, model: Model, parent: Model | None = None) -> None:
    """Decide the tree of a model from its latest revision, and those that wait for the base or the tree that it is.

    `parent` is what a job made it from, which counts where weights cannot be compared.

    Raises:
        NotFoundError, CorruptFileError, StorageError: a manifest cannot be read.
    """
    take_turn(session)
    decide(session, store, model, parent)
    if model.kind in NETWORKS or (model.tree_reason or {})["by"] == "founder":
        settle(session, store, model.family)
    for child in session.exec(select(Model).where(_means(model), Model.id != model.id)):
        check_declared(session, child)


def forget(session: Session, model: Model) -> None:
    """The model belongs to no tree until it is placed."""
    model.tree, model.tree_reason = None, None
    session.flush()


def settle(session: Session, store: BlobStore, family: str) -> None:
    """Decide again about the adapters of a family whose trees their weights have not decided yet."""
    query = select(Model).where(
        Model.family == family, Model.kind == ModelKind.ADAPTER, Model.trust == Trust.OK, Model.family != _UNKNOWN
    )
    unseen = col(Model.tree).is_(None) | (col(Model.tree_reason)["by"].as_string() == "family")
    for adapter in session.exec(query.where(unseen).order_by(col(Model.id))).all():
        decide(session, store, adapter)


def check_declared(session: Session, model: Model) -> None:
    """Note whether the model's weights agree with its declared base; None if that is not here or nothing compares."""
    if not model.declared_base or model.tree_reason is None:
        return
    base = session.exec(select(Model).where(_called(model.declared_base), Model.id != model.id)).first()
    compared = base is not None and base.tree and model.tree_reason["by"] in ("weights", "founder", "unlike")
    agrees = base.tree == model.tree if base is not None and compared else None
    model.tree_reason = {**model.tree_reason, "declared_agrees": agrees}
    session.flush()


def find_root(session: Session, tree: str) -> Model | None:
    """The network that the tree grew from: the one that most networks of the tree name as their base.

    Where none does, the oldest one that no edge says came from another one of the tree.
    """
    own = Model.tree == tree, col(Model.kind).in_(NETWORKS), Model.trust == Trust.OK
    networks = select(Model).where(*own).order_by(col(Model.id))
    found = session.exec(networks.limit(2)).all()
    if len(found) < 2:
        return found[0] if found else None
    query = networks.limit(1)
    names = select(Model.declared_base).where(*own, col(Model.declared_base).is_not(None))
    names = names.group_by(col(Model.declared_base)).order_by(func.count().desc(), func.min(Model.id)).limit(_ASKED)
    for name in session.exec(names).all():
        root = session.exec(query.where(_called(str(name)))).first()
        if root is not None:
            return root
    mine, other = aliased(Revision), aliased(Revision)
    parent = aliased(Model)
    grown = (
        select(Edge.id)
        .join(mine, col(mine.id) == col(Edge.child_id))
        .join(other, col(other.id) == col(Edge.parent_id))
        .join(parent, col(parent.id) == col(other.model_id))
        .where(mine.model_id == Model.id, parent.tree == tree, col(parent.kind).in_(NETWORKS), parent.id != Model.id)
    )
    return session.exec(query.where(~grown.exists())).first() or session.exec(query).first()


def tree_names(session: Session, family: str) -> list[str]:
    """The trees of a family, the oldest first."""
    query = select(Model.tree).where(Model.family == family, col(Model.tree).is_not(None))
    return [str(name) for name in session.exec(query.group_by(col(Model.tree)).order_by(func.min(Model.id)))]


# ---- one model ------------------------------------------------------------------------------


def decide(session: Session, store: BlobStore, model: Model, parent: Model | None = None) -> None:
    """Decide the tree of one model. Raises what `place` does."""
    # Its own vote must not count.
    model.tree = None
    session.flush()
    if model.trust != Trust.OK:
        verdict = Verdict(None, "none", "it is quarantined, so its weights are not looked at")
    elif model.kind in NETWORKS:
        verdict = _network(session, store, model, parent)
    elif model.kind == ModelKind.ADAPTER and model.family != _UNKNOWN:
        verdict = _adapter(session, model, parent)
    else:
        verdict = Verdict(None, "none", f"a model of kind {model.kind} and family {model.family} belongs to no tree")
    model.tree = verdict.tree
    reason: dict[str, Any] = {"by": verdict.by, "said": verdict.said}
    if verdict.score is not None:
        reason["score"] = round(verdict.score, 4)
    model.tree_reason = reason
    session.flush()
    check_declared(session, model)


def _adapter(session: Session, model: Model, parent: Model | None) -> Verdict:
    trees = [_load(session, name) for name in tree_names(session, model.family)]
    outputs = _outputs(session, latest_revision(session, model))
    found = []
    for tree in trees:
        likeness = compare_outputs(outputs, tree.outputs) if outputs else None
        if likeness is not None:
            found.append((likeness.score, _alike(likeness), tree))
    if not found:
        return _only(model, [tree.name for tree in trees], parent, outputs is not None)
    score, alike, tree = max(found, key=lambda one: one[0])
    if alike:
        said = f"it moves the outputs that tree {tree.name} moves: likeness {score:.2f}"
        return Verdict(tree.name, "weights", said, score)
    others = "; ".join(f"likeness {score:.2f} to {tree.name}" for score, _, tree in found)
    friend = _friend(session, model, outputs)
    if friend is not None:
        name = _name(session, model.family, friend)
        friend.tree = name
        friend.tree_reason = {"by": "founder", "said": f"it and {model.name} move other outputs than others: {others}"}
        return Verdict(name, "weights", f"it moves the outputs that {friend.name} moves, others do not: {others}")
    return Verdict(None, "unlike", f"it moves other outputs than all trees of family {model.family}: {others}", score)


def _only(model: Model, names: list[str], parent: Model | None, comparable: bool) -> Verdict:
    """Where nothing can be compared, the only tree of the family is it."""
    if not names:
        return Verdict(model.family, "founder" if comparable else "family", f"the first here of family {model.family}")
    if parent is not None and parent.tree in names:
        return Verdict(parent.tree, "parent", f"a job made it from {parent.name}; its weights cannot be compared")
    if len(names) == 1:
        said = f"the only tree of family {model.family}; its weights cannot be compared"
        return Verdict(names[0], "family", said)
    said = f"its weights cannot be compared, and family {model.family} has the trees {', '.join(names)}"
    return Verdict(None, "none", said)


def _network(session: Session, store: BlobStore, model: Model, parent: Model | None) -> Verdict:
    revision = latest_revision(session, model)
    weights = read_weights(session, store, model, revision)
    best: tuple[float, Model] | None = None
    for candidate in _candidates(session, model, revision):
        score = _correlation(session, store, weights, candidate)
        if score is not None and UNRELATED <= score < RELATED and candidate.tree:
            members = [m for m in checkpoints_of(session, candidate.tree, _ASKED) if m.id != candidate.id]
            score = max([score, *(_correlation(session, store, weights, member) or 0 for member in members)])
        if score is not None and (best is None or score > best[0]):
            best = score, candidate
    if best and best[0] >= RELATED:
        score, relative = best
        if relative.tree is None:  # both are of unknown family: two make a tree
            relative.tree = f"{_UNKNOWN}:{relative.name}"
            relative.tree_reason = {"by": "founder", "said": f"its weights agree with {model.name}"}
        said = f"its weights agree with {relative.name}: correlation {score:.3f}"
        return Verdict(relative.tree, "weights", said, score)
    if parent is not None and parent.tree is not None and not weights.samples:
        return Verdict(parent.tree, "parent", f"a job made it from {parent.name}; its weights cannot be compared")
    if not weights.samples or model.family == _UNKNOWN:
        said = "its weights agree with no other" if weights.samples else "its weights cannot be compared"
        return Verdict(None, "none", f"{said} model of its size" if weights.samples else said)
    return _founder(session, model, revision, best)


def _founder(session: Session, model: Model, revision: Revision, best: tuple[float, Model] | None) -> Verdict:
    """The root of a tree that has adapters and no checkpoint yet, or of a new one."""
    outputs = _outputs(session, revision)
    bare = [tree for tree in (_load(session, n) for n in tree_names(session, model.family)) if tree.root is None]
    for tree in bare:
        likeness = compare_outputs(outputs, tree.outputs) if outputs else None
        if likeness is not None and _alike(likeness):
            said = f"its weights have the outputs that the adapters of tree {tree.name} move: {likeness.score:.2f}"
            return Verdict(tree.name, "weights", said, likeness.score)
        if likeness is None and best is None and len(bare) == 1:
            return Verdict(tree.name, "family", f"the first checkpoint of family {model.family}")
    said = f"the first here of family {model.family}"
    if best is not None:
        said = f"its weights agree with no other base of family {model.family}: correlation {best[0]:.3f} at most"
    return Verdict(_name(session, model.family, model), "founder", said, best[0] if best else None)


def _called(name: str) -> Any:
    """Models that a card may mean by `name`: it gives the name that a base had where the card was written."""
    return col(Model.name).endswith("/" + name.rpartition("/")[2], autoescape=True)


def _means(base: Model) -> Any:
    """Models whose card may mean `base` by the base that it declares."""
    short = base.name.rpartition("/")[2]
    return (col(Model.declared_base) == short) | col(Model.declared_base).endswith("/" + short, autoescape=True)


# ---- what a model is compared with ----------------------------------------------------------


def _correlation(session: Session, store: BlobStore, weights: Weights, other: Model) -> float | None:
    try:
        theirs = read_weights(session, store, other, latest_revision(session, other))
    except (NotFoundError, CorruptFileError):  # `fsck` tells; this model is none the worse for it
        return None
    return weights.correlation(theirs)


def _candidates(session: Session, model: Model, revision: Revision) -> Iterator[Model]:
    """The root of each tree of the family; of unknown families what cards connect and the same sizes."""
    if model.family != _UNKNOWN:
        roots = (find_root(session, name) for name in tree_names(session, model.family))
        yield from (root for root in roots if root is not None)
        return
    near = _means(model) | _called(model.declared_base) if model.declared_base else _means(model)
    relatives = select(Model).where(near, col(Model.kind).in_(NETWORKS), Model.trust == Trust.OK, Model.id != model.id)
    yield from session.exec(relatives.order_by(col(Model.id)).limit(_ASKED))
    query = (
        select(Model)
        .join(Revision, col(Revision.model_id) == col(Model.id))
        .where(
            Model.family == _UNKNOWN, col(Model.kind).in_(NETWORKS), Model.trust == Trust.OK, Model.id != model.id,
            Revision.parameters == revision.parameters,
        )
        .order_by(col(Model.id))
        .limit(_STRANGERS)
    )  # fmt: skip
    seen: set[str | None] = set()
    for other in session.exec(query).unique():
        if other.tree is None or other.tree not in seen:
            seen.add(other.tree)
            yield other


def checkpoints_of(session: Session, tree: str, limit: int | None = None) -> list[Model]:
    """The networks of a tree, the oldest first."""
    query = select(Model).where(Model.tree == tree, col(Model.kind).in_(NETWORKS), Model.trust == Trust.OK)
    return list(session.exec(query.order_by(col(Model.id)).limit(limit)))


def _load(session: Session, name: str) -> _Tree:
    query = (
        select(Sketch)
        .join(Revision, col(Revision.id) == col(Sketch.revision_id))
        .join(Model, col(Model.id) == col(Revision.model_id))
        .where(Model.tree == name, Model.kind == ModelKind.ADAPTER, Model.trust == Trust.OK)
        .order_by(col(Revision.id))
        .limit(_MEMBERS)
    )
    outputs = [Outputs.from_bytes(row.outputs) for row in session.exec(query)]
    root = find_root(session, name)
    own = _outputs(session, latest_revision(session, root)) if root else None
    return _Tree(name, root, (own, *outputs) if own else tuple(outputs))


def _alike(likeness: Likeness) -> bool:
    return likeness.score >= max(ALIKE, SIGMAS * likeness.noise)


def _outputs(session: Session, revision: Revision) -> Outputs | None:
    row = session.get(Sketch, revision.id)
    return Outputs.from_bytes(row.outputs) if row else None


def _friend(session: Session, model: Model, outputs: Outputs | None) -> Model | None:
    """Another adapter without a tree that moves the same outputs."""
    for other in _lonely(session, model):
        theirs = _outputs(session, latest_revision(session, other))
        likeness = compare_outputs(outputs, [theirs]) if outputs and theirs else None
        if likeness is not None and _alike(likeness):
            return other
    return None


def _lonely(session: Session, model: Model) -> list[Model]:
    query = select(Model).where(
        Model.family == model.family, Model.kind == ModelKind.ADAPTER, Model.trust == Trust.OK,
        col(Model.tree).is_(None), Model.id != model.id,
    )  # fmt: skip
    return list(session.exec(query.order_by(col(Model.id))))


def _name(session: Session, family: str, founder: Model) -> str:
    return f"{family}:{founder.name}" if family in tree_names(session, family) else family
