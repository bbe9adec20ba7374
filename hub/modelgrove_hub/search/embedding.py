"""Vectors of models in text space: from their weights by the newest expert of their group, and from their cards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqlmodel import Session, col, delete, func, select

from modelgrove_hub.contracts import Embedder, Kind
from modelgrove_hub.errors import ModelgroveError, PluginError
from modelgrove_hub.hub import Hub
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.registry.commits import latest_revisions
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.cards import search_text
from modelgrove_hub.search.experts import newest_experts, sound_file
from modelgrove_hub.search.groups import Group, groups, latest, members, with_latest
from modelgrove_hub.search.kept import kept_vectors
from modelgrove_hub.search.levels import level_of
from modelgrove_hub.search.text import embed_texts, text_space
from modelgrove_hub.search.words import words
from modelgrove_hub.tables import Embedding, Expert, Model, ModelKind, Revision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTS, CARD = "weights", "card"
_BATCH = 64
_LENGTH_TOLERANCE = 1e-2

Progress = Callable[[float, str], None]


@dataclass
class Embedded:
    """What `embed_missing` did: vectors made from weights and from cards, and models it could not place, with why."""

    weights: int = 0
    cards: int = 0
    skipped: dict[str, str] = field(default_factory=dict)


def embed_missing(hub: Hub, tree: str | None = None, progress: Progress = lambda _done, _message: None) -> Embedded:
    """Give every model that lacks one a vector: by the newest expert of its group, and from its card.

    Vectors of older experts and of superseded revisions are replaced, those by experts of other trees go; cards that
    changed are read again. Restricted to one tree if given. A model that cannot be placed is skipped with a reason.
    """
    done = Embedded()
    _forget_superseded(hub)
    with hub.reading() as session:
        experts = [expert for group, expert in newest_experts(session).items() if tree in (None, group.tree)]
    for expert in experts:
        _embed_weights(hub, expert, done, progress)
        _calibrate(hub, expert)
    _embed_cards(hub, tree, done)
    if done.weights:
        kept_vectors("words", words(), hub.settings.index)  # so that no later command has to open the encoder for them
    progress(1.0, f"{done.weights} by weights, {done.cards} by card")
    return done


def not_embedded(session: Session) -> dict[Group, int]:
    """How many models of each group have no vector from their weights; groups where all have one are left out.

    Networks count only where there is an expert for them: most hubs have none, and need none.
    """
    counts, experts = groups(session), newest_experts(session)
    asked = [group for group in counts if group.kind == ModelKind.ADAPTER or group in experts]
    missing = {group: counts[group] - _embedded(session, group) for group in asked}
    return {group: count for group, count in missing.items() if count > 0}


def _embedded(session: Session, group: Group) -> int:
    query = (
        select(func.count(func.distinct(Model.id)))
        .join(Revision, col(Revision.model_id) == col(Model.id))
        .join(Embedding, col(Embedding.revision_id) == col(Revision.id))
        .where(*members(session, group), Embedding.side == WEIGHTS, Embedding.text_space == text_space())
    )
    return session.exec(query).one()


# ---- from weights ---------------------------------------------------------------------------


def _embed_weights(hub: Hub, expert: Expert, done: Embedded, progress: Progress) -> None:
    plugin = get_plugin(f"{Kind.EMBEDDER}.{expert.encoder}", hub.settings)()
    if not isinstance(plugin, Embedder):
        raise PluginError(f"plugin embedder.{expert.encoder} has no method `embed`")
    file = sound_file(hub, expert)
    with hub.reading() as session:
        by_it = select(Embedding.revision_id).where(Embedding.side == WEIGHTS, Embedding.expert_id == expert.id)
        missing = list(latest(session, Group(expert.tree, expert.kind), ~col(Revision.id).in_(by_it)))
    for start in range(0, len(missing), _BATCH):
        vectors = {}
        for model, revision in missing[start : start + _BATCH]:
            progress(start / len(missing), f"{expert.tree}: {model.name}")
            try:
                vectors[revision.id] = _place(hub, plugin, file, revision)
            except ModelgroveError as error:
                done.skipped[model.name] = str(error)
            except Exception as error:  # noqa: BLE001  (a stranger's plugin may raise anything)
                done.skipped[model.name] = f"plugin embedder.{expert.encoder}: {type(error).__name__}: {error}"
        done.weights += _write(hub, WEIGHTS, vectors, expert.id)


def _calibrate(hub: Hub, expert: Expert) -> None:
    """Keep with the expert what unrelated prompts get from its models at best: so its scores compare with others'.

    All vectors are read for it, so it is done again only when their number has changed by a tenth.
    """
    own = Embedding.side == WEIGHTS, Embedding.expert_id == expert.id
    with hub.reading() as session:
        count = session.exec(select(func.count()).select_from(Embedding).where(*own)).one()
        before = int(expert.calibration.get("models", 0))
        if 10 * abs(count - before) < max(before, 1):
            return
        level = level_of(load_background(hub.settings.index), list(session.exec(select(Embedding.vector).where(*own))))
    with hub.transaction() as session:
        kept = session.get(Expert, expert.id)
        if kept is not None:
            kept.calibration = {**kept.calibration, **level, "models": count}


def _place(hub: Hub, plugin: Embedder, file: Path, revision: Revision) -> NDArray[np.float32]:
    import numpy as np

    vector = np.asarray(plugin.embed(file, load_input(hub, cast(int, revision.id))), np.float32)
    width = load_background(hub.settings.index).vectors.shape[1]
    if vector.shape != (width,) or not abs(float(np.linalg.norm(vector)) - 1) < _LENGTH_TOLERANCE:
        raise PluginError(f"plugin embedder.{plugin.name} gave {vector.shape} numbers, not {width} of length one")
    return vector


# ---- from cards -----------------------------------------------------------------------------


def _embed_cards(hub: Hub, tree: str | None, done: Embedded) -> None:
    fresh = select(Embedding.revision_id).where(
        Embedding.side == CARD,
        Embedding.text_space == text_space(),
        Embedding.revision_id == Revision.id,
        col(Embedding.created_at) >= col(Model.updated_at),
    )
    with hub.reading() as session:
        rows = list(with_latest(session, ~fresh.exists(), *((Model.tree == tree,) if tree is not None else ())))
    texts = {cast(int, revision.id): search_text(model.card, model.tags) for model, revision in rows}
    _forget(hub, [revision for revision, text in texts.items() if not text])
    telling = [(revision, text) for revision, text in texts.items() if text]
    for start in range(0, len(telling), _BATCH):
        batch = telling[start : start + _BATCH]
        vectors = embed_texts([text for _, text in batch])
        done.cards += _write(hub, CARD, dict(zip([revision for revision, _ in batch], vectors, strict=True)), None)


# ---- rows -----------------------------------------------------------------------------------


def _write(hub: Hub, side: str, vectors: Mapping[int | None, NDArray[np.float32]], expert_id: int | None) -> int:
    """Replace the vectors of these revisions. New rows, not changed ones: the index sees new ids."""
    with hub.transaction() as session:
        there = set(session.exec(select(Revision.id).where(col(Revision.id).in_(vectors))))
        session.exec(delete(Embedding).where(*_of(side, list(there))))
        for revision_id in there:
            vector = vectors[revision_id].astype("<f4").tobytes()
            row = {"revision_id": revision_id, "side": side, "text_space": text_space(), "expert_id": expert_id}
            session.add(Embedding(**row, vector=vector))
    return len(there)


def _of(side: str, revisions: Sequence[int | None]) -> tuple[Any, ...]:
    return Embedding.side == side, Embedding.text_space == text_space(), col(Embedding.revision_id).in_(revisions)


def _forget(hub: Hub, revisions: Sequence[int]) -> None:
    if revisions:
        with hub.transaction() as session:
            session.exec(delete(Embedding).where(*_of(CARD, revisions)))


def _forget_superseded(hub: Hub) -> None:
    with hub.transaction() as session:
        session.exec(delete(Embedding).where(~col(Embedding.revision_id).in_(latest_revisions())))
        elsewhere = (
            select(Embedding.id)
            .join(Expert, col(Expert.id) == col(Embedding.expert_id))
            .join(Revision, col(Revision.id) == col(Embedding.revision_id))
            .join(Model, col(Model.id) == col(Revision.model_id))
            .where((col(Model.tree).is_(None)) | (col(Model.tree) != Expert.tree))
        )
        session.exec(delete(Embedding).where(col(Embedding.id).in_(elsewhere)))
