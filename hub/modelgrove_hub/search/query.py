"""Ask the hub: which models do this, and which models are like this one.

A model is found by its weights (an expert's vector) and by its card (the text's vector); both
scores are z-scores over the background prompts. With both sides the order is reciprocal-rank fusion
(Cormack et al., SIGIR 2009), in which a side that a model does not have counts as the one it has:
a model without a card is not punished for it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from sqlmodel import Session, col, select

from modelgrove_hub.errors import UsageError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.models import find, find_revision
from modelgrove_hub.search.background import Background, load_background
from modelgrove_hub.search.experts import latest_revisions, newest_experts, not_embedded
from modelgrove_hub.search.index import open_index
from modelgrove_hub.search.text import SPACE, WIDTH, embed_texts
from modelgrove_hub.tables import Embedding, Model, Revision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Side = Literal["weights", "card"]
By = Literal["weights", "card", "both"]
SIDES: Mapping[By, tuple[Side, ...]] = {"weights": ("weights",), "card": ("card",), "both": ("weights", "card")}
SURE: Mapping[Side, float] = {"weights": 3.0, "card": 3.0}
"""z-scores from which on a hit is sure; for weights only where the expert knows no better."""
_FUSION = 60
_FEWEST_LOOKED_AT = 200
_LONGEST_QUERY = 2000


@dataclass(frozen=True)
class Filters:
    """Only models with these facts; None is anything."""

    kind: str | None = None
    family: str | None = None
    adapter_type: str | None = None
    base: str | None = None
    licence: str | None = None
    trust: str | None = None

    def conditions(self) -> list[Any]:
        """As conditions on `Model`."""
        facts = {
            "kind": self.kind, "family": self.family, "adapter_type": self.adapter_type,
            "declared_base": self.base, "licence": self.licence, "trust": self.trust,
        }  # fmt: skip
        return [getattr(Model, field) == value for field, value in facts.items() if value is not None]


@dataclass(frozen=True)
class Hit:
    """A model found. `weights` and `card` are its scores by each side that was asked, None where it has none."""

    name: str
    score: float
    """The score by the side that found it."""
    found_by: By
    sure: bool
    """Whether that score passes the threshold; below it, texts that fit nothing here score as well."""
    weights: float | None
    card: float | None
    kind: str
    family: str
    adapter_type: str | None
    base: str | None
    licence: str | None
    trust: str
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """Hits, best first, and what the answer does not cover."""

    hits: tuple[Hit, ...]
    nothing: bool
    """No hit is sure."""
    notes: tuple[str, ...]
    """Sentences for people: whether there is nothing of the kind here, and what was not looked at."""
    without_expert: Mapping[str, int]
    """Trees that have no expert, and how many adapters of theirs cannot be found by weights."""
    not_embedded: Mapping[str, int]
    """Trees that have one, and how many of their adapters have no vector yet."""


def search(hub: Hub, text: str, by: By = "both", filters: Filters | None = None, limit: int = 10) -> Answer:
    """The `limit` models that do most nearly what `text` says.

    Raises:
        UsageError: the text is empty.
        StorageError: FAISS is not installed.
    """
    if not text.strip():
        raise UsageError("an empty search: say what the model should do, as in `modelgrove search 'a red car'`")
    background = load_background(hub.settings.index)
    query = background.centre(embed_texts([text[:_LONGEST_QUERY]])[0])
    window = max(_FEWEST_LOOKED_AT, 10 * limit)
    ranked = _ranked(hub, background, query, SIDES[by], filters or Filters(), window)
    with hub.transaction() as session:
        vectors = _vectors(session, SIDES[by], {revision for ids in ranked.values() for revision in ids})
        scores = {side: _z_scores(rows, query, background) for side, rows in vectors.items()}
        order = fuse(ranked, scores)[:limit]
        judge = _Judge(ranked, scores, limit, _thresholds(session))
        hits = tuple(judge.hit(model, revision) for model, revision in _models(session, order))
        missing = not_embedded(session) if by != "card" else {}
    without = {tree: count for tree, count in missing.items() if tree not in judge.thresholds}
    waiting = {tree: count for tree, count in missing.items() if tree in judge.thresholds}
    nothing = not any(hit.sure for hit in hits)
    return Answer(hits, nothing, tuple(_notes(hits, nothing, without, waiting)), without, waiting)


def similar(hub: Hub, reference: str, limit: int = 10) -> Answer:
    """The models whose vectors point most nearly where that of `reference` does; scores are cosines.

    By weights; by cards, with a note, when no expert has placed the model.

    Raises:
        NotFoundError: `reference` names no model.
        StorageError: FAISS is not installed.
    """
    background = load_background(hub.settings.index)
    with hub.transaction() as session:
        model, revision = find(session, reference), find_revision(session, reference)
        own = {side: rows[revision.id] for side, rows in _vectors(session, SIDES["both"], {revision.id}).items() if rows}
    if not own:
        note = f"{model.name} has neither a vector from its weights nor a card: see `modelgrove expert embed`."
        return Answer((), True, (note,), {}, {})
    side: Side = "weights" if "weights" in own else "card"
    note = f"No expert has placed {model.name}: these are the models with similar cards."
    query = _direction(own[side], side, background)
    ranked = _ranked(hub, background, query, (side,), Filters(), max(_FEWEST_LOOKED_AT, 10 * limit))
    with hub.transaction() as session:
        rows = _vectors(session, (side,), set(ranked[side]) - {revision.id})[side]
        scores = {id: float(_direction(vector, side, background) @ query) for id, vector in rows.items()}
        order = sorted(scores, key=lambda id: -scores[id])[:limit]
        judge = _Judge({side: order}, {side: scores}, limit, {})
        hits = tuple(judge.hit(found, its) for found, its in _models(session, order))
    return Answer(hits, not hits, () if side == "weights" else (note,), {}, {})


def fuse(ranked: Mapping[Side, Sequence[int]], scores: Mapping[Side, Mapping[int, float]]) -> list[int]:
    """Reciprocal-rank fusion of the sides' orders: ids, best first.

    An id that has a score on a side but is not among its ranks comes right after them; an id
    without a score on a side counts there as on the side where it has one.
    """
    places = {side: {id: place for place, id in enumerate(ids, 1)} for side, ids in ranked.items()}

    def gain(id: int) -> float:
        shares = [1 / (_FUSION + places[side].get(id, len(places[side]) + 1)) for side in ranked if id in scores[side]]
        return sum(shares) / len(shares)

    known = {id for side in ranked for id in scores[side]}
    return sorted(known, key=lambda id: (-gain(id), id))


# ---- the parts ------------------------------------------------------------------------------


class _Judge:
    """Turns scores into hits: which side found a model, and whether it is sure."""

    def __init__(
        self, ranked: Mapping[Side, Sequence[int]], scores: Mapping[Side, Mapping[int, float]], limit: int,
        thresholds: Mapping[str, float],
    ) -> None:  # fmt: skip
        self.first = {side: set(ids[:limit]) for side, ids in ranked.items()}
        self.scores, self.thresholds = scores, thresholds

    def hit(self, model: Model, revision: int) -> Hit:
        scores = {side: rows[revision] for side, rows in self.scores.items() if revision in rows}
        # How far each side is from its own threshold makes them comparable.
        limits: dict[Side, float] = {**SURE, "weights": self.thresholds.get(model.family, SURE["weights"])}
        margin = {side: score - limits[side] for side, score in scores.items()}
        best = max(margin, key=lambda side: margin[side])
        among = [side for side in scores if revision in self.first[side]]
        return Hit(
            name=model.name, score=scores[best], found_by="both" if len(among) > 1 else best, sure=margin[best] >= 0,
            weights=scores.get("weights"), card=scores.get("card"), kind=model.kind, family=model.family,
            adapter_type=model.adapter_type, base=model.declared_base, licence=model.licence, trust=model.trust,
            tags=tuple(model.tags),
        )  # fmt: skip


def _ranked(
    hub: Hub, background: Background, query: NDArray[np.float32], sides: Sequence[Side], filters: Filters, window: int
) -> dict[Side, list[int]]:
    """For each side the revision ids nearest to `query`, best first."""
    conditions, allowed = filters.conditions(), None
    if conditions:
        with hub.transaction() as session:
            chosen = select(Revision.id).join(Model, col(Model.id) == col(Revision.model_id)).where(*conditions)
            allowed = [id for id in session.exec(chosen) if id is not None]
    indexes = {side: open_index(hub, side, SPACE, background) for side in sides}
    return {side: [id for id, _ in index.search(query, window, allowed)] for side, index in indexes.items()}


def _vectors(
    session: Session, sides: Sequence[Side], revisions: Collection[int | None]
) -> dict[Side, dict[int, NDArray[np.float32]]]:
    """The vectors of those `revisions` that are their models' latest, by side and revision."""
    import numpy as np

    query = select(Embedding).where(
        Embedding.text_space == SPACE, col(Embedding.side).in_(sides),
        col(Embedding.revision_id).in_(revisions), col(Embedding.revision_id).in_(latest_revisions()),
    )  # fmt: skip
    found: dict[Side, dict[int, NDArray[np.float32]]] = {side: {} for side in sides}
    for row in session.exec(query):
        found[cast(Side, row.side)][row.revision_id] = np.frombuffer(row.vector, "<f4", count=WIDTH)
    return found


def _z_scores(
    rows: Mapping[int, NDArray[np.float32]], query: NDArray[np.float32], background: Background
) -> dict[int, float]:
    import numpy as np

    if not rows:
        return {}
    scores = background.scale(np.stack(list(rows.values()))) @ query
    return dict(zip(rows, scores.tolist(), strict=True))


def _direction(vector: NDArray[np.float32], side: Side, background: Background) -> NDArray[np.float32]:
    """What a vector says beyond what all texts share; vectors from weights are already without it."""
    import numpy as np

    own = vector if side == "weights" else background.centre(vector)
    return own / max(float(np.linalg.norm(own)), 1e-12)


def _thresholds(session: Session) -> dict[str, float]:
    experts = newest_experts(session)
    return {tree: float(expert.calibration.get("threshold", SURE["weights"])) for tree, expert in experts.items()}


def _models(session: Session, revisions: Sequence[int]) -> list[tuple[Model, int]]:
    query = select(Revision.id, Model).join(Model, col(Model.id) == col(Revision.model_id))
    found = {id: model for id, model in session.exec(query.where(col(Revision.id).in_(revisions)))}
    return [(found[id], id) for id in revisions if id in found]


def _notes(
    hits: Sequence[Hit], nothing: bool, without: Mapping[str, int], waiting: Mapping[str, int]
) -> list[str]:
    notes = []
    if nothing and hits:
        notes.append(f"Nothing here seems to do that: the best score, {hits[0].score:.1f}, is one that any text may get.")
    notes += [
        f"{count} adapters of tree {tree} cannot be found by weights: it has no expert (`modelgrove expert fit --tree {tree}`)."
        for tree, count in without.items()
    ]
    notes += [
        f"{count} adapters of tree {tree} have no vector yet (`modelgrove expert embed`)." for tree, count in waiting.items()
    ]
    return notes
