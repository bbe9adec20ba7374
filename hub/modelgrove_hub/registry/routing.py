"""Look at the weights of models whose trees were decided without them, or decide all trees again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sqlmodel import Session, col, select

from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.formats.outputs import read_outputs
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.commits import latest_revisions
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.trees import check_declared, decide, forget, settle
from modelgrove_hub.tables import NETWORKS, Model, ModelKind, Revision, Sketch, Trust

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Move:
    """A model's tree before and after."""

    before: str | None
    after: str | None


@dataclass
class Routed:
    """What became of the models that were looked at: how many, and whose trees are others now."""

    models: int = 0
    moved: dict[str, Move] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Models whose weights could not be read, and why."""


def route(
    hub: Hub, family: str | None = None, *, again: bool = False, progress: Progress = lambda _done, _message: None
) -> Routed:
    """Decide the trees of models that no weights have decided, networks first; with `again` those of all others too.

    Where a database is older than trees, or a plugin's model was registered without its weights being looked at,
    this is what looks at them. Only one family if given.
    """
    done = Routed()
    with hub.reading() as session:
        chosen = [(model.id, model.name, model.tree) for model in _models(session, family) if again or _unseen(model)]
        bare = _without_sketch(session, family)
    for number, (revision_id, name) in enumerate(bare.items()):
        progress(number / (len(bare) + len(chosen)), name)
        _sketch(hub, revision_id, name, done)
    with hub.transaction() as session:
        # What was decided without weights must not count when weights decide.
        for model in _models(session, family):
            if _unseen(model):
                forget(session, model)
    for number, (model_id, name, _) in enumerate(chosen, len(bare)):
        progress(number / (len(bare) + len(chosen)), name)
        with hub.transaction() as session:
            chosen_one = session.get(Model, model_id)
            if chosen_one is not None and (chosen_one.tree_reason or {}).get("by") != "founder":
                decide(session, hub.store, chosen_one)
            done.models += 1
    families = {family} if family else set()
    with hub.transaction() as session:
        for name in families or set(session.exec(select(Model.family).distinct())):
            settle(session, hub.store, name)
        for model in _models(session, family):
            check_declared(session, model)
    with hub.reading() as session:
        for model_id, name, before in chosen:
            after = session.get(Model, model_id)
            if after is not None and after.tree != before:
                done.moved[name] = Move(before, after.tree)
    return done


def _models(session: Session, family: str | None) -> list[Model]:
    """Networks, then adapters, each by id."""
    query = select(Model).where(col(Model.kind).in_((*NETWORKS, ModelKind.ADAPTER)), Model.trust == Trust.OK)
    if family is not None:
        query = query.where(Model.family == family)
    models = session.exec(query.order_by(col(Model.id))).all()
    return sorted(models, key=lambda model: model.kind == ModelKind.ADAPTER)


def _unseen(model: Model) -> bool:
    return str((model.tree_reason or {}).get("by", "family")) == "family"


def _without_sketch(session: Session, family: str | None) -> Mapping[int, str]:
    """Names of the models of known families by their latest revision, where that has no sketch."""
    query = (
        select(Revision.id, Model.name)
        .join(Model, col(Model.id) == col(Revision.model_id))
        .where(col(Revision.id).in_(latest_revisions()))
        .where(~select(Sketch).where(Sketch.revision_id == Revision.id).exists())
        .where(col(Model.kind).in_((*NETWORKS, ModelKind.ADAPTER)), Model.family != "unknown")
        .where(Model.trust == Trust.OK)
    )
    if family is not None:
        query = query.where(Model.family == family)
    return {int(number): name for number, name in session.exec(query) if number is not None}


def _sketch(hub: Hub, revision_id: int, name: str, done: Routed) -> None:
    try:
        model = load_input(hub, revision_id)
        outputs = read_outputs(model.paths, model.summary.get("kind", ""), model.family, model.summary.get("parts", {}))
    except ModelgroveError as error:
        done.skipped[name] = str(error)
        return
    if outputs is not None:
        with hub.transaction() as session:
            if session.get(Revision, revision_id) is not None:
                session.merge(Sketch(revision_id=revision_id, outputs=outputs.to_bytes()))
