"""What a model looks like in a list: its newest preview, or rings drawn from its weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from markupsafe import Markup
from sqlmodel import col, select

from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.commits import latest_revisions
from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.text import text_space
from modelgrove_hub.search.words import describe
from modelgrove_hub.tables import Embedding, Model, Revision
from modelgrove_hub.verbs.previews import PICTURE, newest_pictures
from modelgrove_hub.web.rings import rings


@dataclass(frozen=True)
class Face:
    """A preview's address, the rings, and the words that its weights say."""

    picture: str | None
    drawing: Markup
    words: tuple[str, ...] = ()
    """What its weights say, the best first."""


def faces(hub: Hub, names: Collection[str]) -> Mapping[str, Face]:
    """The faces of these models by name; models that are not there have none."""
    query = select(Revision.id, Model.name).join(Model, col(Model.id) == col(Revision.model_id))
    with hub.reading() as session:
        rows = session.exec(query.where(col(Model.name).in_(names), col(Revision.id).in_(latest_revisions()))).all()
        revisions = {number: name for number, name in rows if number is not None}
        vectors = session.exec(
            select(Embedding.revision_id, Embedding.side, Embedding.vector)
            .where(col(Embedding.revision_id).in_(revisions), Embedding.text_space == text_space())
            .order_by(col(Embedding.side))  # the weights' comes after the card's, and stays
        ).all()
    known = {number: vector for number, _, vector in vectors}
    words = _words(hub, {number: vector for number, side, vector in vectors if side == "weights"})
    painted = newest_pictures(hub, revisions.keys())
    return {
        name: Face(
            picture_url(painted[number]) if number in painted else None, rings(known.get(number), name),
            words.get(number, ()),
        )
        for number, name in revisions.items()
    }  # fmt: skip


def _words(hub: Hub, vectors: Mapping[int, bytes]) -> dict[int, tuple[str, ...]]:
    import numpy as np

    if not vectors:
        return {}
    rows = np.stack([np.frombuffer(vector, "<f4") for vector in vectors.values()])
    said = describe(load_background(hub.settings.index), rows, hub.settings.index)
    return {number: tuple(row) for number, row in zip(vectors, said, strict=True)}


def picture_url(job: str, name: str = PICTURE) -> str:
    """Where a job's picture is."""
    return f"/jobs/{job}/files/{name}"
