"""Experts: fitted for the models of a tree, they place these in text space. Which models, when, and with what.

A tree is what shares one base network (`registry.trees`), a group its adapters or its whole networks: an expert is for
one group. Fitting is a job of an embedder plugin; placing models is quick and happens here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from sqlalchemy import case
from sqlmodel import Session, col, delete, func, select

from modelgrove_hub.contracts import Embedder, Kind
from modelgrove_hub.errors import CorruptFileError, ModelgroveError, NotFoundError, PluginError
from modelgrove_hub.hub import Hub
from modelgrove_hub.plugins import get_plugin
from modelgrove_hub.registry.inputs import load_input
from modelgrove_hub.registry.trees import find_root
from modelgrove_hub.search.background import load_background
from modelgrove_hub.search.cards import label_texts, search_text
from modelgrove_hub.search.kept import kept_vectors
from modelgrove_hub.search.seen import LABELS
from modelgrove_hub.search.text import embed_texts, text_space
from modelgrove_hub.search.words import words
from modelgrove_hub.tables import NETWORKS, Embedding, Expert, Job, Model, ModelKind, Revision, Trust

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "expert.safetensors"
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


def newest_experts(session: Session) -> dict[Group, Expert]:
    """The newest expert of every group that has one in the text space in force."""
    query = select(Expert).where(Expert.text_space == text_space()).order_by(col(Expert.id))
    return {Group(one.tree, one.kind): one for one in session.exec(query)}


def training_inputs(session: Session, tree: str, kind: str | None = None) -> list[int]:
    """The latest revisions of a tree's documented models of one kind: what an expert is fitted on.

    Without a kind, that of which more are documented.

    Raises:
        NotFoundError: the hub has no such models; the message lists the trees that it has.
    """
    known = groups(session)
    asked = [group for group in known if group.tree == tree and kind in (None, group.kind)]
    if not asked:
        there = ", ".join(f"{group.title} ({count})" for group, count in known.items())
        raise NotFoundError(
            f"no {kind or 'model'}s of a tree {tree!r}; trees with adapters: {there or 'none: ingest some LoRAs first'}"
        )
    found = [
        [revision.id for model, revision in _latest(session, group) if revision.id and _documented(model, revision)]
        for group in asked
    ]
    return max(found, key=len)


def fits_none(session: Session) -> dict[str, int]:
    """By family, how many adapters fit none of its trees, so that nothing can place them."""
    query = (
        select(Model.family, func.count())
        .where(Model.kind == ModelKind.ADAPTER, Model.trust == Trust.OK, Model.family != "unknown")
        .where(col(Model.tree).is_(None))
        .group_by(Model.family)
    )
    return dict(session.exec(query).all())


def known_labels(hub: Hub, expert: Expert) -> NDArray[np.float32] | None:
    """The labels (l, d) that an expert was fitted on, centred, from its file; None when it has none.

    Nor are there any when the store has lost the file, which `fsck` tells: vectors can be searched without it.

    Raises:
        CorruptFileError: the file is damaged.
    """
    try:
        return _labels_in(_sound_file(hub, expert))
    except NotFoundError:
        return None


def _sound_file(hub: Hub, expert: Expert) -> Path:
    """The expert's file, whose bytes are those that were stored: a flipped bit would be a wrong answer in silence."""
    file = hub.store.path(expert.blob)
    if not _has_hash(file, file.stat().st_mtime_ns, expert.blob):
        raise CorruptFileError(
            f"{file}, the file of expert {expert.encoder} v{expert.version} for tree {expert.tree}, is damaged: "
            f"fit another one, `modelgrove expert fit --tree {expert.tree} --kind {expert.kind}`"
        )
    return file


@lru_cache(maxsize=16)
def _has_hash(file: Path, _changed: int, sha256: str) -> bool:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == sha256


@lru_cache(maxsize=16)
def _labels_in(file: Path) -> NDArray[np.float32] | None:
    import numpy as np

    from modelgrove_hub.store.tensors import tensors_of

    found = next((tensor for tensor in tensors_of(file) if tensor.name == LABELS), None)
    return None if found is None else np.asarray(found.read().float(), np.float32)


def record_expert(session: Session, job: Job, outputs: Mapping[str, Any]) -> Expert:
    """Make the finished job of an embedder an expert of its target tree, in the transaction that ends the job.

    It is for models of the kind that it was fitted on.

    `outputs` is what the job leaves: its report ("text_space", "layers", "calibration", "metrics") and
    its artefacts by name, already in the blob store.

    Raises:
        PluginError: the plugin left no expert file, or one for another text space.
    """
    blob, report = outputs["artefacts"].get(FILE), outputs["report"]
    if blob is None:
        raise PluginError(f"plugin {job.plugin!r} left no artefact {FILE!r}, which is what an embedder makes")
    space = text_space()
    if report.get("text_space", space) != space:
        raise PluginError(f"plugin {job.plugin!r} made an expert for space {report['text_space']!r}, not {space!r}")
    tree, encoder = job.target or "unknown", job.plugin.partition(".")[2]
    same = select(func.max(Expert.version)).where(Expert.tree == tree, Expert.encoder == encoder)
    fitted_on = select(Model.kind).join(Revision, col(Revision.model_id) == col(Model.id)).limit(1)
    learned = session.exec(fitted_on.where(col(Revision.id).in_(job.inputs))).first()
    expert = Expert(
        tree=tree, kind=ModelKind.CHECKPOINT if learned in NETWORKS else ModelKind.ADAPTER, encoder=encoder,
        version=(session.exec(same).one() or 0) + 1, text_space=space, blob=blob,
        layers=list(report.get("layers", ())), calibration=dict(report.get("calibration", {})),
        metrics=dict(report.get("metrics", {})),
    )  # fmt: skip
    session.add(expert)
    session.flush()
    return expert


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
        .where(*_members(session, group), Embedding.side == WEIGHTS, Embedding.text_space == text_space())
    )
    return session.exec(query).one()


def latest_revisions() -> Any:
    """A subquery of the ids of all models' latest revisions."""
    return select(func.max(Revision.id)).group_by(col(Revision.model_id))


# ---- from weights ---------------------------------------------------------------------------


def _embed_weights(hub: Hub, expert: Expert, done: Embedded, progress: Progress) -> None:
    plugin = get_plugin(f"{Kind.EMBEDDER}.{expert.encoder}", hub.settings)()
    if not isinstance(plugin, Embedder):
        raise PluginError(f"plugin embedder.{expert.encoder} has no method `embed`")
    file = _sound_file(hub, expert)
    with hub.reading() as session:
        by_it = select(Embedding.revision_id).where(Embedding.side == WEIGHTS, Embedding.expert_id == expert.id)
        missing = list(_latest(session, Group(expert.tree, expert.kind), ~col(Revision.id).in_(by_it)))
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
    """Keep with the expert what unrelated prompts get from its models at best: so its scores compare with others'."""
    from modelgrove_hub.search.levels import level_of

    with hub.reading() as session:
        rows = session.exec(select(Embedding.vector).where(Embedding.side == WEIGHTS, Embedding.expert_id == expert.id))
        level = level_of(load_background(hub.settings.index), list(rows))
    with hub.transaction() as session:
        kept = session.get(Expert, expert.id)
        if kept is not None and {**kept.calibration, **level} != kept.calibration:
            kept.calibration = {**kept.calibration, **level}


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
        rows = list(_models(session, ~fresh.exists(), *((Model.tree == tree,) if tree is not None else ())))
    texts = {cast(int, revision.id): search_text(model.card, model.tags) for model, revision in rows}
    _forget(hub, [revision for revision, text in texts.items() if not text])
    telling = [(revision, text) for revision, text in texts.items() if text]
    for start in range(0, len(telling), _BATCH):
        batch = telling[start : start + _BATCH]
        vectors = embed_texts([text for _, text in batch])
        done.cards += _write(hub, CARD, dict(zip([revision for revision, _ in batch], vectors, strict=True)), None)


# ---- rows -----------------------------------------------------------------------------------


def _in_trees() -> tuple[Any, ...]:
    kinds = (ModelKind.ADAPTER, *NETWORKS)
    return col(Model.kind).in_(kinds), col(Model.tree).is_not(None), Model.trust == Trust.OK


def _members(session: Session, group: Group) -> tuple[Any, ...]:
    """Conditions on the models of a group."""
    return (
        col(Model.kind).in_(group.kinds), Model.tree == group.tree, Model.trust == Trust.OK,
        Model.id != _root_id(session, group),
    )  # fmt: skip


def _root_id(session: Session, group: Group) -> int | None:
    """Of the network that all others of the group are compared with: it is no member. Adapters have none."""
    root = find_root(session, group.tree) if group.kind != ModelKind.ADAPTER else None
    return root.id if root is not None else None


def _latest(session: Session, group: Group, *conditions: Any) -> Iterator[tuple[Model, Revision]]:
    """The models of a group and their latest revisions, by id."""
    return _models(session, *_members(session, group), *conditions)


def _models(session: Session, *conditions: Any) -> Iterator[tuple[Model, Revision]]:
    """Models and their latest revisions, by id."""
    query = select(Model, Revision).join(Revision, col(Revision.model_id) == col(Model.id))
    query = query.where(col(Revision.id).in_(latest_revisions()), *conditions).order_by(col(Revision.id))
    yield from session.exec(query)


def _documented(model: Model, revision: Revision) -> bool:
    return bool(label_texts(model.card, model.tags, revision.summary.get("metadata", {})))


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
