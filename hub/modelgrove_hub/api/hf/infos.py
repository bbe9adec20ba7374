"""A model as the Hugging Face API describes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from modelgrove_hub.api.hf.entries import Entry
from modelgrove_hub.errors import CorruptFileError, DataError, StorageError
from modelgrove_hub.formats.card import front_matter
from modelgrove_hub.hub import Hub
from modelgrove_hub.registry.inputs import place_of
from modelgrove_hub.store.header import read_header
from modelgrove_hub.tables import Blob, Commit, Model, ModelKind, Revision, Trust

CARD = "README.md"
_TASK = "text-to-image"
_LONGEST, _MOST = 200, 100
"""Letters of a tag that a card gives, and how many of them."""


def info_of(model: Model, commit: Commit, revision: Revision, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What lists show of a model whose card has these fields.

    How often it was fetched or liked is not counted here, so it is not said.
    """
    owner = model.name.partition("/")[0]
    library = _said(fields, "library_name") or _library(model, revision)
    task = _said(fields, "pipeline_tag") or _task(model, revision)
    facts = {
        "_id": f"{model.id:024x}", "id": model.name, "modelId": model.name, "author": owner, "sha": commit.id,
        "private": model.private, "gated": False, "disabled": False, "createdAt": moment(model.created_at),
        "lastModified": moment(commit.created_at), "tags": _tags(model, revision, library, task, fields),
        "usedStorage": revision.size,
    }  # fmt: skip
    if library:
        facts["library_name"] = library
    if task:
        facts["pipeline_tag"] = task
    return facts


def detail_of(
    hub: Hub, model: Model, commit: Commit, revision: Revision, entries: Sequence[Entry], *, blobs: bool = False
) -> dict[str, Any]:
    """What is shown of one model: also its files, its card's fields and the safetensors' parameters."""
    card = next((entry for entry in entries if entry.path == CARD), None)
    fields = fields_of(hub, model.name, card.blob) if card is not None else {}
    facts = info_of(model, commit, revision, fields)
    facts["siblings"] = [_sibling(hub, model, entry) if blobs else {"rfilename": entry.path} for entry in entries]
    if card is not None:
        facts["cardData"] = fields
    if counts := _parameters(hub, model, entries):
        facts["safetensors"] = {"parameters": counts, "total": sum(counts.values())}
    facts["config"] = {}
    facts["securityRepoStatus"] = {"scansDone": True, "filesWithIssues": _issues(model, revision, entries)}
    return facts


def fields_of(hub: Hub, model: str, card: Blob) -> dict[str, Any]:
    """The fields of a card; none where its file was changed or taken away, which `fsck` tells."""
    try:
        return dict(_front_matter(place_of(hub, model, CARD, card), card.sha256))
    except (DataError, StorageError, OSError):
        return {}


def only(facts: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Of a model's description what a client asked for by `expand`; all where it asked for nothing."""
    return {name: facts[name] for name in ("_id", "id", "modelId", *wanted) if name in facts} if wanted else facts


def moment(when: datetime) -> str:
    """A time as the API writes it."""
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def _sibling(hub: Hub, model: Model, entry: Entry) -> dict[str, Any]:
    facts = {"rfilename": entry.path, "size": entry.blob.size, "blobId": entry.oid(hub, model.name)}
    if entry.lfs:
        pointer = len(entry.pointer)
        facts["lfs"] = {"sha256": entry.blob.sha256, "size": entry.blob.size, "pointerSize": pointer}
    return facts


def _said(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) and len(value) <= _LONGEST else ""


def _several(fields: Mapping[str, Any], name: str) -> list[str]:
    value = fields.get(name)
    each = value if isinstance(value, list) else [value]
    return [one for one in each[:_MOST] if isinstance(one, str) and one and len(one) <= _LONGEST]


@lru_cache(maxsize=10_000)
def _front_matter(place: Path, _sha256: str) -> Mapping[str, Any]:
    return front_matter(place)


def _tags(model: Model, revision: Revision, library: str, task: str, fields: Mapping[str, Any]) -> list[str]:
    derived = [library, revision.summary.get("format"), task, model.adapter_type]
    if model.family != "unknown":
        derived.append(model.family)
    if model.declared_base:
        derived.append(f"base_model:{model.declared_base}")
        if model.kind == ModelKind.ADAPTER:
            derived.append(f"base_model:adapter:{model.declared_base}")
    if model.licence:
        derived.append(f"license:{model.licence}")
    derived += [f"dataset:{one}" for one in _several(fields, "datasets")]
    return list(dict.fromkeys(filter(None, [*derived, *_several(fields, "language"), *model.tags])))


def _library(model: Model, revision: Revision) -> str:
    if "diffusers" in model.tags or model.kind == ModelKind.ADAPTER or revision.summary.get("parts"):
        return "diffusers"
    return next((tag for tag in model.tags if tag in ("transformers", "sentence-transformers")), "")


def _task(model: Model, revision: Revision) -> str:
    paints = model.kind in (ModelKind.ADAPTER, ModelKind.CHECKPOINT) and model.family != "unknown"
    return _TASK if paints or revision.summary.get("parts") else ""


def _parameters(hub: Hub, model: Model, entries: Sequence[Entry]) -> dict[str, int]:
    """Parameters of the safetensors files by dtype."""
    counts: Counter[str] = Counter()
    for entry in entries:
        if entry.path.endswith(".safetensors"):
            try:
                counts.update(_counted(place_of(hub, model.name, entry.path, entry.blob), entry.blob.sha256))
            except (DataError, StorageError, OSError):  # said when it is fetched; a list of many goes on
                continue
    return dict(counts)


@lru_cache(maxsize=10_000)
def _counted(place: Path, _sha256: str) -> Mapping[str, int]:
    counts: Counter[str] = Counter()
    try:
        for tensor in read_header(place).tensors:
            counts[tensor.dtype] += prod(tensor.shape)
    except CorruptFileError:  # listed all the same, and refused by whoever wants to load it
        return {}
    return counts


def _issues(model: Model, revision: Revision, entries: Sequence[Entry]) -> list[dict[str, str]]:
    if Trust.QUARANTINED not in (model.trust, revision.summary.get("trust")):
        return []
    return [{"path": entry.path, "level": "unsafe"} for entry in entries if entry.lfs]
