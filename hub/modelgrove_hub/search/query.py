"""Ask the hub: which models do this, and which models are like this one.

A model is found by its weights (an expert's vector) and by its card (the text's vector), with
calibrated scores (`background`). With both sides the order is reciprocal-rank fusion (Cormack et
al., SIGIR 2009), in which a side that a model does not have counts as the one it has: a model
without a card is not punished for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sqlmodel import Session, col, select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.commits import latest_revisions
from modelgrove_hub.registry.models import find, find_revision
from modelgrove_hub.search.answers import SIDES, Answer, By, Hit, Side, answer, hit
from modelgrove_hub.search.background import Background, load_background
from modelgrove_hub.search.embedding import not_embedded
from modelgrove_hub.search.experts import known_labels, newest_experts
from modelgrove_hub.search.filters import Filters, allowed_revisions, excluded
from modelgrove_hub.search.groups import fits_none
from modelgrove_hub.search.index import open_index
from modelgrove_hub.search.levels import centred, levelled
from modelgrove_hub.search.seen import ranking_keys
from modelgrove_hub.search.text import embed_texts, text_space
from modelgrove_hub.search.words import describe
from modelgrove_hub.tables import Embedding, Expert, Model, Revision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float32]

SURE: Mapping[Side, float] = {"weights": 3.0, "card": 3.0}
"""Scores from which on a hit is sure; for weights only where the tree's expert knows no better."""
_FUSION = 60
_FEWEST_LOOKED_AT = 200
_LONGEST_QUERY = 2000


@dataclass(frozen=True)
class _Candidate:
    """A model (its id) whose vectors came near: its latest revision, vectors by side, the expert that made one."""

    revision: int
    model: int
    vectors: dict[Side, Vector]
    expert: Expert | None


def search(hub: Hub, text: str, by: By = "both", filters: Filters | None = None, limit: int = 10) -> Answer:
    """The `limit` models that do most nearly what `text` says.

    Raises:
        UsageError: the text is empty, or a filter's value is of no known form.
        StorageError: FAISS is not installed.
    """
    if not text.strip():
        raise UsageError("an empty search: say what the model should do, as in `modelgrove search 'a red car'`")
    background = load_background(hub.settings.index)
    query = background.centre(_embedded(text[:_LONGEST_QUERY], text_space()))
    filters = filters or Filters()
    near = _near(hub, background, query, SIDES[by], filters, max(_FEWEST_LOOKED_AT, 10 * limit))
    if not near and (nobody := _nobody(hub, filters)):
        return nobody
    with hub.reading() as session:
        candidates = {one.revision: one for one in _candidates(session, SIDES[by], near)}
        with_expert = list(newest_experts(session))
        missing = not_embedded(session) if by != "card" else {}
        outside = fits_none(session) if by != "card" else {}
    found = list(candidates.values())
    scores = _scores(background, query, found, SIDES[by])
    experts = {one.expert.id: one.expert for one in found if one.expert is not None}
    labels = {number: known_labels(hub, expert) for number, expert in experts.items()}
    ranked = _ranked(background, query, found, scores, labels)
    best = [candidates[one] for one in fuse(ranked)[:limit]]
    looks = _looks(hub, background, {one.revision: one.vectors["weights"] for one in best if "weights" in one.vectors})
    models = _models(hub, best)
    hits = [_hit(models[one.model], one, scores, ranked, limit, looks.get(one.revision, ())) for one in best]
    return answer(hits, missing, with_expert, outside)


def similar(hub: Hub, reference: str, filters: Filters | None = None, limit: int = 10) -> Answer:
    """The models whose vectors point most nearly where that of `reference` does; scores are cosines.

    By weights; by cards, with a note, when no expert has placed the model.

    Raises:
        NotFoundError: `reference` names no model.
        UsageError: several models are called so, or a filter's value is of no known form.
        StorageError: FAISS is not installed.
    """
    background = load_background(hub.settings.index)
    with hub.reading() as session:
        model, revision = find(session, reference), find_revision(session, reference)
        rows = {row.side: row.vector for row in session.exec(select(Embedding).where(*_rows_of([revision.id])))}
    if not rows:
        note = f"{model.name} has neither a vector from its weights nor a card: see `modelgrove expert embed`."
        return Answer((), True, (note,), {}, {})
    side: Side = "weights" if "weights" in rows else "card"
    query = _direction(_vector(rows[side]), side, background)
    filters = filters or Filters()
    near = _near(hub, background, query, (side,), filters, max(_FEWEST_LOOKED_AT, 10 * limit))
    if not near and (nobody := _nobody(hub, filters)):
        return nobody
    with hub.reading() as session:
        found = _candidates(session, (side,), {*near, cast(int, revision.id)})
    candidates = [one for one in found if one.model != model.id]
    # The vectors of one expert lean one way, so without their mean its own models would come first.
    placed_by = next((one.expert for one in found if one.revision == revision.id), None)
    query = centred(query, placed_by)
    cosines = {
        one.revision: float(centred(_direction(one.vectors[side], side, background), one.expert) @ query)
        for one in candidates
    }
    candidates.sort(key=lambda one: -cosines[one.revision])
    best = candidates[:limit]
    looks = _looks(hub, background, {one.revision: one.vectors["weights"] for one in best} if side == "weights" else {})
    models = _models(hub, best)
    hits = tuple(
        hit(models[one.model], {side: cosines[one.revision]}, {side: -1.0}, [side], looks.get(one.revision, ()))
        for one in best
    )
    note = f"No expert has placed {model.name}: these are the models with similar cards."
    return Answer(hits, not hits, () if side == "weights" else (note,), {}, {})


def looks_like(hub: Hub, revision_id: int | None) -> tuple[str, ...]:
    """The words that fit a revision's weights best, the best first; none if no expert has placed it."""
    with hub.reading() as session:
        query = select(Embedding.vector).where(*_rows_of([revision_id]), Embedding.side == "weights")
        row = session.exec(query).first()
    return () if row is None else _looks(hub, load_background(hub.settings.index), {0: _vector(row)})[0]


def fuse(ranked: Mapping[Side, Sequence[int]]) -> list[int]:
    """Reciprocal-rank fusion of the sides' orders, best first; what only one side ranks counts there twice."""
    gains: dict[int, list[float]] = {}
    for order in ranked.values():
        for place, one in enumerate(order, 1):
            gains.setdefault(one, []).append(1 / (_FUSION + place))
    return sorted(gains, key=lambda one: (-sum(gains[one]) / len(gains[one]), one))


# ---- the parts ------------------------------------------------------------------------------


def _near(
    hub: Hub, background: Background, query: Vector, sides: Sequence[Side], filters: Filters, window: int
) -> set[int]:
    """Revisions whose vectors are the nearest to `query` on some side."""
    with hub.reading() as session:
        allowed = allowed_revisions(session, filters)
    indexes = [open_index(hub, side, text_space(), background) for side in sides]
    return {revision for index in indexes for revision, _ in index.search(query, window, allowed)}


def _nobody(hub: Hub, filters: Filters) -> Answer | None:
    """The answer when filters leave no model."""
    with hub.reading() as session:
        said = excluded(session, filters)
    return Answer((), True, (said,), {}, {}) if said else None


def _candidates(session: Session, sides: Sequence[Side], revisions: Collection[int]) -> list[_Candidate]:
    """Those `revisions` that are their models' latest, with their vectors on all `sides`."""
    # Whole models and experts, with their cards and calibrations, would be read hundreds of times to show ten.
    columns: Any = (Embedding.revision_id, Embedding.side, Embedding.vector, Embedding.expert_id, Model.id)
    query = (
        select(*columns)
        .join(Revision, col(Revision.id) == col(Embedding.revision_id))
        .join(Model, col(Model.id) == col(Revision.model_id))
        .where(*_rows_of(revisions), col(Embedding.side).in_(sides), col(Revision.id).in_(latest_revisions()))
    )
    rows = session.exec(query).all()
    used = {number for *_, number, _ in rows if number is not None}
    experts = {one.id: one for one in session.exec(select(Expert).where(col(Expert.id).in_(used)))} if used else {}
    found: dict[int, _Candidate] = {}
    for revision, side, vector, expert, model in rows:
        known = found.get(revision)
        vectors = {**(known.vectors if known else {}), cast(Side, side): _vector(vector)}
        placed_by = experts.get(expert) or (known.expert if known else None)
        found[revision] = _Candidate(revision, cast(int, model), vectors, placed_by)
    return list(found.values())


def _models(hub: Hub, candidates: Sequence[_Candidate]) -> dict[int | None, Model]:
    """The models of candidates by id."""
    with hub.reading() as session:
        query = select(Model).where(col(Model.id).in_({one.model for one in candidates}))
        return {model.id: model for model in session.exec(query)}


def _scores(
    background: Background, query: Vector, candidates: Sequence[_Candidate], sides: Sequence[Side]
) -> dict[Side, dict[int, float]]:
    """Calibrated scores by side and revision; by weights on one scale for all experts (`levels`)."""
    import numpy as np

    scores: dict[Side, dict[int, float]] = {}
    for side in sides:
        members = [one for one in candidates if side in one.vectors]
        vectors = np.array([one.vectors[side] for one in members], np.float32).reshape(-1, len(query))
        values = background.scores(vectors, query[None])[:, 0].tolist()
        experts = [one.expert if side == "weights" else None for one in members]
        scores[side] = {
            one.revision: levelled(value, expert) for one, value, expert in zip(members, values, experts, strict=True)
        }
    return scores


def _ranked(
    background: Background, query: Vector, candidates: Sequence[_Candidate], scores: Mapping[Side, Mapping[int, float]],
    labels: Mapping[int | None, Vector | None],
) -> dict[Side, list[int]]:  # fmt: skip
    """Revisions by side, best first: by score, and by weights also by what each expert (its id) has `seen`."""
    import numpy as np

    keys = {side: dict(rows) for side, rows in scores.items()}
    for expert, known in labels.items():
        members = [one for one in candidates if "weights" in one.vectors and one.expert and one.expert.id == expert]
        if known is None:
            continue
        vectors = np.array([one.vectors["weights"] for one in members], np.float32)
        order = np.argsort(-ranking_keys(background, vectors, query[None], known)[:, 0], kind="stable")
        # Only the order within a tree changes: among all trees its models keep the places that they have together.
        own = sorted((keys["weights"][one.revision] for one in members), reverse=True)
        keys["weights"] |= {members[place].revision: key for place, key in zip(order, own, strict=True)}
    return {side: sorted(rows, key=lambda one: (-rows[one], one)) for side, rows in keys.items()}


@lru_cache(maxsize=1024)
def _embedded(text: str, _space: str) -> Vector:
    """A text's vector: the encoder takes a third of a search's time, and people search the same again."""
    found: Vector = embed_texts([text])[0]
    return found


def _looks(hub: Hub, background: Background, vectors: Mapping[int, Vector]) -> dict[int, tuple[str, ...]]:
    """The words that fit vectors from weights best."""
    return {one: _described(hub.settings.index, background.digest, vector.tobytes()) for one, vector in vectors.items()}


@lru_cache(maxsize=20_000)
def _described(index: Path, _background: str, vector: bytes) -> tuple[str, ...]:
    (found,) = describe(load_background(index), _vector(vector)[None], index)
    return tuple(found)


def _hit(
    model: Model, one: _Candidate, scores: Mapping[Side, Mapping[int, float]], ranked: Mapping[Side, Sequence[int]],
    limit: int, looks: tuple[str, ...],
) -> Hit:  # fmt: skip
    own = {side: rows[one.revision] for side, rows in scores.items() if one.revision in rows}
    found_by = [side for side in own if one.revision in ranked[side][:limit]]
    return hit(model, own, _thresholds(one.expert), found_by, looks)


def _thresholds(expert: Expert | None) -> Mapping[Side, float]:
    known = expert.calibration.get("threshold") if expert else None
    own = float(known) if isinstance(known, int | float) else SURE["weights"]
    return {**SURE, "weights": levelled(own, expert)}


def _rows_of(revisions: Collection[int | None]) -> tuple[Any, ...]:
    return Embedding.text_space == text_space(), col(Embedding.revision_id).in_(revisions)


def _vector(data: bytes) -> Vector:
    import numpy as np

    return np.frombuffer(data, "<f4")


def _direction(vector: Vector, side: Side, background: Background) -> Vector:
    """What a vector says beyond what all texts share; vectors from weights are already without it."""
    import numpy as np

    own = vector if side == "weights" else background.centre(vector)
    return own / np.float32(max(float(np.linalg.norm(own)), 1e-12))
