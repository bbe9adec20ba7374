"""Experts: fitted for the models of a group (`groups`), they place these in text space.

Fitting is a job of an embedder plugin; placing models is quick (`embedding`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlmodel import Session, col, func, select

from modelgrove_hub.errors import CorruptFileError, NotFoundError, PluginError
from modelgrove_hub.hub import Hub
from modelgrove_hub.search.cards import label_texts
from modelgrove_hub.search.groups import Group, groups, latest
from modelgrove_hub.search.seen import LABELS
from modelgrove_hub.search.text import text_space
from modelgrove_hub.tables import NETWORKS, Expert, Job, Model, ModelKind, Revision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FILE = "expert.safetensors"


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
        [revision.id for model, revision in latest(session, group) if revision.id and _documented(model, revision)]
        for group in asked
    ]
    return max(found, key=len)


def known_labels(hub: Hub, expert: Expert) -> NDArray[np.float32] | None:
    """The labels (l, d) that an expert was fitted on, centred, from its file; None when it has none.

    Nor are there any when the store has lost the file, which `fsck` tells: vectors can be searched without it.

    Raises:
        CorruptFileError: the file is damaged.
    """
    try:
        return _labels_in(sound_file(hub, expert))
    except NotFoundError:
        return None


def sound_file(hub: Hub, expert: Expert) -> Path:
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


def _documented(model: Model, revision: Revision) -> bool:
    return bool(label_texts(model.card, model.tags, revision.summary.get("metadata", {})))
