"""Places of all models on a map: what does alike lies near.

Vectors of up to 3,000 models are laid out by t-SNE (van der Maaten and Hinton, JMLR 2008) after PCA; every other model
lies at the weighted mean of the landmarks that are the most like it. The same vectors give the same map. It is kept in
a file beside the index: a cache, made again when the rows of vectors have changed, in the background where an older one
can be shown meanwhile.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlmodel import col, select

from modelgrove_hub.errors import ModelgroveError
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.commits import latest_revisions
from modelgrove_hub.search.background import Background, load_background
from modelgrove_hub.search.index import version_of
from modelgrove_hub.search.text import text_space
from modelgrove_hub.search.words import describe
from modelgrove_hub.store.disk import create_temporary, publish, storage_errors
from modelgrove_hub.tables import Embedding, Model, Revision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

log = logging.getLogger(__name__)

SIDE_OF_MAP = 65_535
_FORMAT = 1
_LANDMARKS = 3000
_COMPONENTS = 50
_NEIGHBOURS = 8
_SHARPNESS = 20.0
_PIECE = 4096
_REGIONS = 24
_MEMBERS = 10
"""Models that a region has on average at least, and an expert whose mean is taken off."""
_making = threading.Lock()


@dataclass(frozen=True)
class Region:
    """A part of the map where models do alike, and the word that their weights, or cards, say most."""

    word: str
    x: int
    y: int
    models: int


@dataclass(frozen=True)
class Atlas:
    """Models by column: what stands at one place of every list belongs to one model."""

    side: str
    """What the map was made from: "weights", or "card" where no expert has placed any model."""
    names: list[str]
    x: list[int]
    """From 0 to 65535."""
    y: list[int]
    by_card: list[bool]
    """Whether the place is that of the card, because no expert has placed the model."""
    kind: list[str]
    family: list[str]
    tree: list[str | None]
    regions: list[Region]
    stale: bool
    """Models came or went since the map was made; it is being made again."""


@dataclass(frozen=True)
class _Map:
    """Places by revision, and the rows of vectors they come from."""

    version: str
    side: str
    revisions: NDArray[np.int64]
    places: NDArray[np.int64]
    by_card: NDArray[np.bool_]
    regions: list[Region]


def read_atlas(hub: Hub) -> Atlas:
    """The map of the models that the hub shows; made first if there is none.

    Raises:
        StorageError: the index folder cannot be written.
    """
    background = load_background(hub.settings.index)
    path = hub.settings.index / f"atlas-{text_space()}.npz"
    wanted = _version(hub, background)
    held = _read(path)
    if held is None:
        with _making:
            held = _read(path) or _kept(hub, path, background)
    elif held.version != wanted:
        threading.Thread(target=_renew, args=(hub, path, background), daemon=True).start()
    return _told(hub, held, stale=held.version != wanted)


def lay_out(vectors: Floats) -> Floats:
    """Places (n, 2) of vectors (n, d): t-SNE of landmarks, the others between them; the same for the same vectors."""
    import numpy as np

    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(vectors))[:_LANDMARKS])
    reduced = _principal(vectors, chosen)
    landmarks = reduced[chosen]
    if len(chosen) < 5:
        base = np.pad(landmarks, ((0, 0), (0, max(0, 2 - landmarks.shape[1]))))
        return base[:, :2].astype(np.float32)
    from sklearn.manifold import TSNE

    tsne = TSNE(perplexity=min(30.0, (len(chosen) - 1) / 3), init="pca", random_state=0, max_iter=750)
    laid: NDArray[np.float32] = tsne.fit_transform(landmarks).astype(np.float32)
    if len(chosen) == len(vectors):
        return laid
    places = _between(reduced, landmarks, laid)
    # What has the same landmarks around it would lie on lines between them.
    spread = np.float32(0.004 * np.ptp(laid))
    places += rng.normal(0.0, spread, places.shape).astype(np.float32)
    places[chosen] = laid
    return places


# ---- the map and its file -------------------------------------------------------------------


def _version(hub: Hub, background: Background) -> str:
    with hub.reading() as session:
        sides = [asdict(version_of(session, side, text_space(), background)) for side in ("weights", "card")]
    return json.dumps([_FORMAT, *sides], sort_keys=True)


def _renew(hub: Hub, path: Path, background: Background) -> None:
    """Make the map again, unless another thread is at it; what goes wrong is logged, the old map stays."""
    if not _making.acquire(blocking=False):
        return
    try:
        _kept(hub, path, background)
    except (ModelgroveError, OSError, ValueError):
        log.warning("%s could not be made again", path, exc_info=True)
    finally:
        _making.release()


def _kept(hub: Hub, path: Path, background: Background) -> _Map:
    import numpy as np

    made = _made(hub, background)
    regions = json.dumps([asdict(region) for region in made.regions])
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = create_temporary(path.parent)
        np.savez(
            file, version=made.version, side=made.side, revisions=made.revisions, places=made.places,
            by_card=made.by_card, regions=regions,
        )  # fmt: skip
        publish(file, temporary, path)
    return made


def _read(path: Path) -> _Map | None:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as kept:
            regions = [Region(**region) for region in json.loads(str(kept["regions"]))]
            return _Map(
                str(kept["version"]), str(kept["side"]), kept["revisions"], kept["places"], kept["by_card"], regions
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError) as error:
        log.warning("%s cannot be read (%s): made again", path, error)
        return None


def _told(hub: Hub, held: _Map, *, stale: bool) -> Atlas:
    """The models of the map that are there, as the caller sees the hub."""
    columns: Any = (Revision.id, Model.name, Model.kind, Model.family, Model.tree)
    query = select(*columns).join(Model, col(Model.id) == col(Revision.model_id))
    with hub.reading() as session:
        rows = {row[0]: row[1:] for row in session.exec(query.where(col(Revision.id).in_(latest_revisions())))}
    there = [place for place, revision in enumerate(held.revisions.tolist()) if revision in rows]
    facts = [rows[int(held.revisions[place])] for place in there]
    x, y = held.places[there].T.tolist() if there else ([], [])
    return Atlas(
        side=held.side, names=[fact[0] for fact in facts], x=x, y=y, by_card=held.by_card[there].tolist(),
        kind=[fact[1] for fact in facts], family=[fact[2] for fact in facts], tree=[fact[3] for fact in facts],
        regions=held.regions, stale=stale,
    )  # fmt: skip


# ---- how it is made -------------------------------------------------------------------------


def _made(hub: Hub, background: Background) -> _Map:
    import numpy as np

    version = _version(hub, background)
    weights, cards = _vectors(hub, "weights", background), _vectors(hub, "card", background)
    side = "weights" if len(weights[0]) else "card"
    ids, vectors = weights if side == "weights" else cards
    places = lay_out(vectors) if len(ids) else np.empty((0, 2), np.float32)
    regions = _regions(hub, background, vectors, places)
    by_card = np.full(len(ids), side == "card")
    if side == "weights" and len(cards[0]):
        only, beside = _by_cards(ids, places, *cards)
        ids, places = np.concatenate([ids, only]), np.concatenate([places, beside])
        by_card = np.concatenate([by_card, np.full(len(only), True)])
    scaled, scale = _scaled(places)
    marked = [Region(word=word, x=x, y=y, models=count) for word, (x, y), count in _moved(regions, scale)]
    return _Map(version, side, ids, scaled, by_card, marked)


def _vectors(hub: Hub, side: str, background: Background) -> tuple[NDArray[np.int64], Floats]:
    """Latest revisions that have a vector, and what it says: directions, without what all of its maker's share."""
    import numpy as np

    query = select(Embedding.revision_id, Embedding.expert_id, Embedding.vector).where(
        Embedding.side == side, Embedding.text_space == text_space(), col(Embedding.revision_id).in_(latest_revisions())
    )
    with hub.reading() as session:
        rows = session.exec(query.order_by(col(Embedding.revision_id))).all()
    width = background.vectors.shape[1]
    vectors = np.frombuffer(b"".join(row[2] for row in rows), "<f4").reshape(len(rows), width).astype(np.float32)
    makers = np.array([row[1] or 0 for row in rows], np.int64)
    if side == "card":
        vectors = background.centre(vectors)
    for maker in np.unique(makers):
        own = makers == maker
        if own.sum() >= _MEMBERS:
            vectors[own] -= vectors[own].mean(axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
    return np.array([row[0] for row in rows], np.int64), vectors


def _principal(vectors: Floats, chosen: Any) -> Floats:
    """The coordinates of vectors along the main directions of some of them."""
    import numpy as np

    mean = vectors[chosen].mean(axis=0)
    count = min(_COMPONENTS, len(chosen))
    _, _, directions = np.linalg.svd(vectors[chosen] - mean, full_matrices=False)
    # The sign of a direction is the linear algebra library's whim; the largest entry decides it.
    largest = np.abs(directions).argmax(axis=1)
    directions *= np.sign(directions[np.arange(len(directions)), largest])[:, None]
    found: Floats = (vectors - mean) @ directions[:count].T
    return found


def _between(vectors: Floats, landmarks: Floats, laid: Floats) -> Floats:
    """Places of vectors among landmarks: nearest landmarks' places, the nearer the heavier."""
    import numpy as np

    few = min(_NEIGHBOURS, len(landmarks))
    units = landmarks / np.linalg.norm(landmarks, axis=1, keepdims=True).clip(1e-12)
    places = np.empty((len(vectors), 2), np.float32)
    for start in range(0, len(vectors), _PIECE):
        piece = vectors[start : start + _PIECE]
        likeness = (piece / np.linalg.norm(piece, axis=1, keepdims=True).clip(1e-12)) @ units.T
        nearest = np.argpartition(-likeness, few - 1, axis=1)[:, :few]
        weights = np.exp(_SHARPNESS * (np.take_along_axis(likeness, nearest, axis=1) - 1.0))
        weights /= weights.sum(axis=1, keepdims=True)
        places[start : start + _PIECE] = (weights[..., None] * laid[nearest]).sum(axis=1)
    return places


def _by_cards(ids: Any, places: Floats, card_ids: Any, cards: Floats) -> tuple[Any, Floats]:
    """Models that have a card only, among those whose cards are the most like theirs."""
    import numpy as np

    known = np.isin(card_ids, ids)
    only = card_ids[~known]
    if not known.any() or not len(only):
        return only, np.zeros((len(only), 2), np.float32)
    where = places[np.searchsorted(ids, card_ids[known])]
    some = np.random.default_rng(0).permutation(len(where))[:_LANDMARKS]
    return only, _between(cards[~known], cards[known][some], where[some])


def _regions(hub: Hub, background: Background, vectors: Floats, places: Floats) -> list[tuple[str, Any, int]]:
    """Where many models lie, and the word that fits them best: each word once, the largest regions first."""
    import numpy as np

    count = min(_REGIONS, len(places) // _MEMBERS)
    if not count:
        return []
    from sklearn.cluster import KMeans

    some = np.random.default_rng(1).permutation(len(places))[:_LANDMARKS]
    labels = KMeans(count, random_state=0, n_init=4).fit_predict(places[some])
    members = [some[labels == label] for label in range(count)]
    words = describe(background, np.stack([vectors[own].mean(axis=0) for own in members]), hub.settings.index)
    found: dict[str, tuple[str, Any, int]] = {}
    for own, said in sorted(zip(members, words, strict=True), key=lambda one: -len(one[0])):
        if free := [word for word in said if word not in found]:
            found[free[0]] = (free[0], np.median(places[own], axis=0), round(len(own) * len(places) / len(some)))
    return list(found.values())


def _scaled(places: Floats) -> tuple[Any, Any]:
    """Places as whole numbers on the map, and what brings others there; both axes on one scale."""
    import numpy as np

    if not len(places):
        return np.empty((0, 2), np.int64), lambda point: point
    low, high = places.min(axis=0), places.max(axis=0)
    middle, reach = (low + high) / 2, max(float((high - low).max()) * 0.52, 1e-6)

    def scale(points: Any) -> Any:
        shares = ((points - middle) / reach + 1.0) / 2
        return np.clip(np.rint(shares * SIDE_OF_MAP), 0, SIDE_OF_MAP).astype(np.int64)

    return scale(places), scale


def _moved(regions: list[tuple[str, Any, int]], scale: Any) -> list[tuple[str, Any, int]]:
    return [(word, scale(place).tolist(), count) for word, place, count in regions]
